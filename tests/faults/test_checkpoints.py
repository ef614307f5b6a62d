"""Checkpoint files: whole or not there; a damaged one is named and never chosen."""

import os
import random
import signal

import pytest
import torch

from lightning_rectify import ImageClassifier
from lightning_rectify._lightning import NAME, ModelCheckpoint, TorchCheckpointIO
from lightning_rectify.callbacks.average import average_checkpoints
from lightning_rectify.checkpoints import (
    AtomicCheckpointIO,
    BrokenCheckpointError,
    newest_checkpoint,
    require_whole,
    what_is_wrong,
)
from lightning_rectify.cli import RectifyCLI
from tests.faults.conftest import cut, flip, largest_file
from tests.helpers.training import differences, trainer

SAVED = {"count": 1, "numbers": torch.arange(50_000.0), "optimizer_states": []}
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints of a short run, one an epoch: their folder is read, and copied by those who write."""
    from tests.contract.rows import ROWS

    row = next(row for row in ROWS if row.stem == "classifier")
    folder = tmp_path_factory.mktemp("run")
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    plugins = [AtomicCheckpointIO()]
    fit = trainer(max_epochs=2, callbacks=[keep], enable_checkpointing=True, plugins=plugins, limit_val_batches=0)
    fit.fit(row.make_module(), row.make_data())
    return row, folder


@pytest.fixture
def files(run, tmp_path):
    """The two checkpoints of the run, older first, to do with as one likes."""
    copies = []
    for number, name in enumerate(("epoch=0.ckpt", "epoch=1.ckpt")):
        copy = tmp_path / "files" / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((run[1] / name).read_bytes())
        os.utime(copy, ns=(0, 10**18 + number * 10**9))
        copies.append(copy)
    return copies


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_takes_its_place_whole_and_leaves_nothing_beside_it(tmp_path):
    writer, path = AtomicCheckpointIO(), tmp_path / "new" / "last.ckpt"
    for count in (1, 2):
        writer.save_checkpoint({**SAVED, "count": count}, path)
        assert writer.load_checkpoint(path)["count"] == count
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    with pytest.raises(TypeError, match="storage_options"):
        writer.save_checkpoint(SAVED, path, storage_options={})


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    writer, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint(SAVED, path)
    with largest_file(100_000), pytest.raises(OSError, match=r"'.*last\.ckpt' of 0\.2 MB.*File too large.*unharmed"):
        writer.save_checkpoint({**SAVED, "count": 2}, path)
    assert differences(writer.load_checkpoint(path), SAVED) == []
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_lightnings_own_writer_tears_what_it_replaces(small_disk, monkeypatch, tmp_path):
    """Why the package has one: its temporary file lies on another file system, so the last step is a copy."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = small_disk(350) / "last.ckpt"  # room for one checkpoint of 200 kB, and a part of a second
    AtomicCheckpointIO().save_checkpoint(SAVED, path)
    larger = {**SAVED, "numbers": torch.arange(100_000.0)}
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint(larger, path)
    assert what_is_wrong(path) is None
    with pytest.raises(OSError, match="No space left"):
        TorchCheckpointIO().save_checkpoint(larger, path)
    assert "not the whole of a file" in what_is_wrong(path)


def test_a_process_that_ends_in_the_middle_of_a_write_leaves_the_last_checkpoint(tmp_path):
    """The kernel ends it inside write(), half of the file written, as SIGKILL would."""
    writer, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint(SAVED, path)
    if (pid := os.fork()) == 0:
        try:
            with largest_file(100_000):
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # its default ends the process
                writer.save_checkpoint({**SAVED, "count": 2}, path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGXFSZ
    assert (tmp_path / ".last.ckpt.partial").stat().st_size == 100_000
    assert differences(writer.load_checkpoint(path), SAVED) == []
    assert newest_checkpoint(tmp_path) == path
    writer.save_checkpoint({**SAVED, "count": 3}, path)  # what was left behind is written over
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert writer.load_checkpoint(path)["count"] == 3


@pytest.mark.parametrize("blocked", ["folder", "read-only"])
def test_a_folder_that_cannot_be_written_is_an_error(blocked, tmp_path, small_disk):
    """Lightning's own says nothing where it may not write."""
    if blocked == "folder":
        (tmp_path / "runs").write_text("a file")
        folder = tmp_path / "runs"
    else:
        folder = small_disk(100, ",ro")
    with pytest.raises(OSError, match=r"Expected to write the checkpoint '.*last\.ckpt'.*choose another folder"):
        AtomicCheckpointIO().save_checkpoint(SAVED, folder / "last.ckpt")


# -- reading -----------------------------------------------------------------------------------------------------------

DAMAGE = {
    "empty": (lambda path: cut(path, 0), "it is empty"),
    "first bytes": (lambda path: cut(path, 3), "3 bytes do not begin"),
    "first half": (lambda path: cut(path, path.stat().st_size // 2), "not the whole of a file"),
    "last byte cut": (lambda path: cut(path, path.stat().st_size - 1), "not the whole of a file"),
    "one byte changed": (lambda path: flip(path, path.stat().st_size // 2), "checksum|not the whole"),
    "text": (lambda path: path.write_text("<html>404</html>"), "do not begin"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_with_a_whole_one_to_go_on_from(damage, run, files):
    row, _ = run
    older, newer = files
    make, words = DAMAGE[damage]
    make(newer)
    message = rf"(?s)Expected '.*epoch=1\.ckpt' to be a whole checkpoint.*({words}).*Go on from '.*epoch=0\.ckpt'"
    with pytest.raises(BrokenCheckpointError, match=message):
        ImageClassifier.load_from_checkpoint(newer)
    resumed = trainer(max_epochs=3, plugins=[AtomicCheckpointIO()], limit_val_batches=0)
    with pytest.raises(BrokenCheckpointError, match=message):
        resumed.fit(row.make_module(), row.make_data(), ckpt_path=newer)
    assert newest_checkpoint(older.parent) == older
    older.unlink()
    with pytest.raises(BrokenCheckpointError, match="There is no whole one in its folder"):
        average_checkpoints([newer], newer.parent / "average.ckpt")


@pytest.mark.parametrize("command", ["fit", "test"])
def test_the_command_line_names_a_damaged_file(command, run, files):
    row, _ = run
    flip(files[1], files[1].stat().st_size // 2)
    with pytest.raises(BrokenCheckpointError, match=r"'.*epoch=1\.ckpt' to be a whole.*Go on from '.*epoch=0\.ckpt'"):
        RectifyCLI([command, f"--config={row.config}", *row.quick_cli, *QUIET, f"--ckpt_path={files[1]}"])


def test_no_changed_byte_changes_what_is_loaded(tmp_path):
    """Anywhere in the file, also in its tables: it is refused, or (in what nobody reads) as it was."""
    path, dice, refused = tmp_path / "last.ckpt", random.Random(0), 0
    saved = {"numbers": torch.arange(300.0), "words": ["a", "b"], "step": 7}
    torch.save(saved, path)
    whole = path.read_bytes()
    for _ in range(300):
        flip(path, dice.randrange(len(whole)))
        try:
            require_whole(path)
            assert differences(torch.load(path, weights_only=True), saved) == []
        except BrokenCheckpointError:
            refused += 1
        except (RuntimeError, UnicodeDecodeError):  # torch's, of a part of zip's tables that Python does not read
            pass
        path.write_bytes(whole)
    assert refused > 200


def test_a_part_that_is_marked_as_a_folder_is_refused(tmp_path):
    """torch 2.6 then gives a tensor of whatever was in memory, without a word."""
    path = tmp_path / "last.ckpt"
    torch.save({"numbers": torch.arange(300.0)}, path)
    table = path.read_bytes().index(b"PK\x01\x02")
    part = path.read_bytes().index(b"last/data/0", table)  # 46 bytes into its entry, whose attributes are at 38
    flip(path, part - 8)
    with pytest.raises(BrokenCheckpointError, match="its part 'last/data/0' is marked as a folder"):
        require_whole(path)


def test_files_of_old_torch_are_not_refused(tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save(SAVED, path, _use_new_zipfile_serialization=False)
    assert AtomicCheckpointIO().load_checkpoint(path)["count"] == 1


def test_what_is_not_there_is_not_called_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


# -- choosing ----------------------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_is_whole_and_of_a_run(files):
    older, newer = files
    folder = older.parent
    deep = folder / "version_1" / "checkpoints" / "last.ckpt"
    deep.parent.mkdir(parents=True)
    deep.write_bytes(newer.read_bytes())  # now: the youngest
    assert newest_checkpoint(folder) == deep
    deep.unlink()
    weights_only = torch.load(newer, weights_only=True)
    del weights_only["optimizer_states"]
    torch.save(weights_only, folder / "weights.ckpt")
    average_checkpoints(files, folder / "average.ckpt")
    (folder / "torn.ckpt").write_bytes(newer.read_bytes()[:-100])
    (folder / ".last.ckpt.partial").write_bytes(newer.read_bytes())
    assert newest_checkpoint(folder) == newer
    assert newest_checkpoint(folder / "nothing") is None


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_writes_whole_files_unless_told_otherwise(classifier):
    parsed = RectifyCLI([f"--config={classifier.config}", *QUIET], run=False)
    assert type(parsed.trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    other = f"--trainer.plugins={NAME}.plugins.io.AsyncCheckpointIO"
    parsed = RectifyCLI([f"--config={classifier.config}", *QUIET, other], run=False)
    assert type(parsed.trainer.strategy.checkpoint_io).__name__ == "AsyncCheckpointIO"
    named = "--trainer.plugins=lightning_rectify.checkpoints.AtomicCheckpointIO"
    parsed = RectifyCLI([f"--config={classifier.config}", *QUIET, named], run=False)
    assert type(parsed.trainer.strategy.checkpoint_io) is AtomicCheckpointIO
