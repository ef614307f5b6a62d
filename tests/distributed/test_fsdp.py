"""FSDP2 (Lightning's ``ModelParallelStrategy``) on two gloo processes is one process with the whole batch."""

import pytest
import torch

from lightning_rectify.modules.base import CLASS_PATH
from tests.contract.rows import ROWS
from tests.distributed import jobs
from tests.helpers.training import differences, largest_difference, weights

pytestmark = pytest.mark.ddp
JOBS = "tests.distributed.jobs"
TRANSLATION = next(row for row in ROWS if row.stem == "translation")
VALIDATED = {"limit_val_batches": 1.0}


def test_sharded_weights_are_those_of_one_process(pool, one_player, tmp_path):
    """Also with evaluation in between, and from the checkpoint, which is one file as of one process."""
    path = tmp_path / "whole.ckpt"
    ranks = pool.run(f"{JOBS}.train_sharded", stem=one_player.stem, save_as=str(path), **VALIDATED)
    alone = jobs.train(one_player.stem, ranks=1, **VALIDATED)
    assert [run["world_size"] for run in ranks] == [2, 2]
    assert [run["steps"] for run in (*ranks, alone)] == [3 * one_player.batches] * 3
    assert all(run["sharded"] for run in ranks)
    for first, second in zip(ranks[0]["rows"], ranks[1]["rows"], strict=True):  # of a parameter: all, and held here
        assert first[1] + second[1] == first[0] == second[0]
        assert first[1] == -(-first[0] // 2)
    assert differences(ranks[0]["weights"], ranks[1]["weights"]) == []
    # 1e-5: float32 sums in another order, through 18 steps with a division by sqrt(v).
    assert largest_difference(ranks[0]["weights"], alone["weights"]) < 1e-5
    assert alone["metrics"]
    assert ranks[0]["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)

    saved = torch.load(path, weights_only=True)
    assert saved[CLASS_PATH] == f"{one_player.module.__module__}.{one_player.module.__name__}"
    loaded = one_player.module.load_from_checkpoint(path)
    assert differences(weights(loaded), ranks[0]["weights"]) == []


def check_resume(pool, row, path, one_file):
    middle, run = row.batches + 3, {"stem": row.stem, "noise": True, "one_file": one_file}
    whole = pool.run(f"{JOBS}.train_sharded", **run)
    stopped = pool.run(f"{JOBS}.train_sharded", **run, stop=middle, save_as=str(path))
    resumed = pool.run(f"{JOBS}.train_sharded", **run, stop=3 * row.batches, ckpt_path=str(path), seed=7)
    assert path.is_file() == one_file
    assert stopped[0]["steps"] == middle
    assert largest_difference(stopped[0]["weights"], whole[0]["weights"]) > 1e-3
    assert [differences(a["weights"], b["weights"]) for a, b in zip(whole, resumed, strict=True)] == [[], []]


def test_resume_is_bit_equal(pool, one_player, tmp_path):
    check_resume(pool, one_player, tmp_path / "stopped.ckpt", one_file=True)


def test_resume_from_a_file_a_process_is_bit_equal(pool, tmp_path):
    """One module will do, with two groups and layers of its own: the files are the strategy's."""
    check_resume(pool, TRANSLATION, tmp_path / "stopped.ckpt", one_file=False)


@pytest.mark.parametrize("stem", ["translation", "language_model"])
def test_a_run_goes_on_sharded_that_was_not_and_the_other_way_round(pool, stem, tmp_path):
    """Moments find their parameters: the groups are not in the order of the module's parameters."""
    one, two, middle, end = str(tmp_path / "one.ckpt"), str(tmp_path / "two.ckpt"), 9, 18
    jobs.train(stem, ranks=1, stop=middle, save_as=one)
    ranks = pool.run(f"{JOBS}.train_sharded", stem=stem, stop=end, ckpt_path=one, save_as=two)
    alone = jobs.train(stem, ranks=1, stop=end)
    assert largest_difference(ranks[0]["weights"], alone["weights"]) < 1e-5  # as above
    more = jobs.train(stem, ranks=1, stop=end + 3, ckpt_path=two)
    expected = jobs.train(stem, ranks=1, stop=end + 3)
    assert more["steps"] == end + 3
    assert largest_difference(more["weights"], expected["weights"]) < 1e-5


@pytest.mark.parametrize("stem", ["classifier", "translation"])
def test_monitor_reads_what_one_process_reads_with_one_collective_a_point(pool, stem):
    ranks = pool.run(f"{JOBS}.watch_sharded", stem=stem)
    bare = pool.run(f"{JOBS}.watch_sharded", stem=stem, watched=False)
    alone = jobs.watch(stem)
    assert len(alone["points"]) == alone["steps"] == 8
    assert len(alone["points"][-1]) > 20  # groups and layers
    for got, expected in zip(ranks[0]["points"], alone["points"], strict=True):
        assert got == pytest.approx(expected, rel=1e-6, nan_ok=False)
    assert min(run["collectives"] for run in bare) >= 2 * 8  # weights are gathered, gradients scattered
    assert [a["collectives"] - b["collectives"] for a, b in zip(ranks, bare, strict=True)] == [8, 8]


def test_monitor_counts_once_what_several_processes_hold(pool):
    """As with weights that FSDP2 was told to ignore, replicas of shards, or a tensor parallel user's."""
    for found in pool.run(f"{JOBS}.replicas"):
        assert len(found["plain"][0][0]) == 20
        for mixed, plain in zip(found["mixed"], found["plain"], strict=True):
            assert torch.equal(mixed, plain)  # zeros are added, and twice a number is halved


def test_options_of_the_trainer_work_sharded(pool):
    """Clipping of the whole gradient and accumulation."""
    row = TRANSLATION
    options = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
    ranks = pool.run(f"{JOBS}.train_sharded", stem=row.stem, **options)
    alone = jobs.train(row.stem, ranks=1, **options)
    assert ranks[0]["steps"] == 3 * row.batches // 2
    assert largest_difference(ranks[0]["weights"], alone["weights"]) < 1e-5
    free = jobs.train(row.stem, ranks=1, accumulate_grad_batches=2)
    assert largest_difference(free["weights"], alone["weights"]) > 1e-3


def test_tensor_parallel_mesh_is_refused(pool):
    for message in pool.run(f"{JOBS}.refused", stem="classifier", tensor_parallel_size=2):
        assert message.startswith("Expected argument `tensor_parallel_size` of ModelParallelStrategy to be 1 for Image")
        assert message.endswith("use ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1).")
