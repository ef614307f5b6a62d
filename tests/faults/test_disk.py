"""A disk that is full, a folder that cannot be written: the command line says which and what to do."""

import re

import pytest

from lightning_rectify.checkpoints import newest_checkpoint
from lightning_rectify.cli import RectifyCLI

QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def fit(row, save_dir, *arguments):
    quick = (*row.quick_cli, *QUIET, "--test_after_fit=false", "--adaptive_rate.figure=false")
    folder = f"--trainer.logger.init_args.save_dir={save_dir}"
    return RectifyCLI(["fit", f"--config={row.config}", *quick, "--trainer.max_epochs=3", folder, *arguments]).trainer


def test_a_disk_that_fills_up_leaves_a_checkpoint_to_go_on_from(classifier, small_disk, tmp_path):
    disk = small_disk(160)  # the first epoch's checkpoint is 90 kB: the second does not fit beside it
    with pytest.raises(OSError, match=r"write the checkpoint '.*last_epoch\.ckpt'.*No space left.*Free space"):
        fit(classifier, disk)
    last = newest_checkpoint(disk)
    assert last.name == "last_epoch.ckpt"
    resumed = fit(classifier, tmp_path / "elsewhere", f"--ckpt_path={last}")
    assert resumed.global_step == 3 * classifier.batches


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer
@pytest.mark.parametrize("room", [4, 12, 20])  # kB: for neither file, for the configuration, for some of the points
def test_a_disk_without_room_for_logs_is_named(room, classifier, small_disk):
    disk = small_disk(room)
    with pytest.raises(OSError, match="No space left") as caught:
        fit(classifier, disk, "--trainer.callbacks=null", "--trainer.enable_checkpointing=false")
    assert re.search(
        rf"write the run into '{disk}.*Free space.*--trainer\.logger\.init_args\.save_dir", str(caught.value)
    )


def test_a_read_only_log_folder_is_named(classifier, small_disk):
    folder = small_disk(100, ",ro")
    with pytest.raises(OSError, match=rf"write the run into '{folder}/.*Read-only file system.*name another folder"):
        fit(classifier, folder)


def test_a_file_in_the_place_of_the_log_folder_is_named(classifier, tmp_path):
    place = tmp_path / "runs"
    place.write_text("")
    with pytest.raises(OSError, match=rf"write the run into '{place}/.*Not a directory.*name another folder"):
        fit(classifier, place)


def test_an_error_of_reading_is_not_called_one_of_writing(classifier, tmp_path):
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found"):
        fit(classifier, tmp_path, f"--ckpt_path={tmp_path / 'none.ckpt'}")
