"""A worker that dies, SIGTERM, a SLURM job that is requeued, and a run that goes on in the middle of an epoch."""

import os
import signal
from functools import partial

import pytest
import torch

from lightning_rectify._lightning import Callback, ModelCheckpoint
from lightning_rectify.callbacks import RequeueBetweenSteps
from lightning_rectify.checkpoints import AtomicCheckpointIO, newest_checkpoint
from lightning_rectify.cli import RectifyCLI
from tests.faults.conftest import BY_STEM
from tests.helpers.training import differences, snapshot, trainer

EPOCHS = 2


def run(row, keep=None, ckpt_path=None, callbacks=(), data=None, module_args=None, **options):
    """Two epochs of six steps, with a checkpoint each fourth step if there is a folder to keep it in."""
    if keep is not None:
        every = ModelCheckpoint(keep, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        options |= {"enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
        callbacks = [*callbacks, every]
    fit = trainer(**{"max_epochs": EPOCHS, "limit_val_batches": 0, "callbacks": list(callbacks), **options})
    fit.fit(row.make_module(noise=True, **(module_args or {})), data or row.make_data(), ckpt_path=ckpt_path)
    return fit


def goes_on_as_if_nothing_had_happened(row, folder, **options):
    last = newest_checkpoint(folder)
    assert last.name == "step=4.ckpt"
    return differences(snapshot(run(row, **options)), snapshot(run(row, ckpt_path=last, **options))) == []


# -- workers, SIGTERM --------------------------------------------------------------------------------------------------


def killed_at_the_seventh_batch(samples, collate, main=None):
    """What collates in a worker; the worker gets SIGKILL, as from a machine that is out of memory."""
    killed_at_the_seventh_batch.count += 1
    if killed_at_the_seventh_batch.count == 7 and os.getpid() != main:
        os.kill(os.getpid(), signal.SIGKILL)
    return collate(samples)


killed_at_the_seventh_batch.count = 0  # of a process


def test_a_worker_that_dies_is_reported_and_the_last_checkpoint_is_good(classifier, tmp_path):
    class DyingWorkers(classifier.data):
        def train_dataloader(self):
            loader = super().train_dataloader()
            loader.collate_fn = partial(killed_at_the_seventh_batch, collate=loader.collate_fn, main=os.getpid())
            return loader

    killed_at_the_seventh_batch.count = 0
    data = classifier.make_data(num_workers=1)
    dying = DyingWorkers(**{"batch_size": classifier.batch_size, **classifier.data_args, "num_workers": 1})
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*(killed by signal: Killed|exited unexpectedly)"):
        run(classifier, tmp_path, data=dying)
    assert goes_on_as_if_nothing_had_happened(classifier, tmp_path, data=data)


class SignalAt(Callback):
    """Sends this process a signal in the middle of the n-th step of the first optimizer: before it, or behind it."""

    def __init__(self, signum, step, place="pre"):
        self.signum, self.step, self.place, self.count = signum, step, place, 0

    def on_train_start(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        register = {"pre": optimizer.register_step_pre_hook, "post": optimizer.register_step_post_hook}[self.place]
        register(self._send)

    def _send(self, *args):
        self.count += 1
        if self.count == self.step:
            os.kill(os.getpid(), self.signum)


def test_sigterm_ends_training_behind_the_step_and_the_last_checkpoint_is_good(classifier, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        run(classifier, tmp_path, callbacks=[SignalAt(signal.SIGTERM, 6)])
    assert signal.getsignal(signal.SIGTERM) is before
    assert goes_on_as_if_nothing_had_happened(classifier, tmp_path)


# -- SLURM -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The environment of a job, and a ``scontrol`` that writes down what it is asked for."""
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\necho $@ >> {tmp_path / 'asked'}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    job = {"JOB_ID": "77", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1"}
    for name, value in {**job, "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return tmp_path / "asked"


@pytest.mark.parametrize("stem", ["classifier", "toy_game"])
@pytest.mark.parametrize("place", ["pre", "post"])
def test_a_requeued_job_goes_on_as_if_nothing_had_happened(stem, place, slurm, tmp_path):
    row = BY_STEM[stem]
    expected = snapshot(run(row))
    waits = RequeueBetweenSteps()
    run(row, callbacks=[SignalAt(signal.SIGUSR1, 4, place), waits], default_root_dir=tmp_path)
    assert slurm.read_text() == "requeue 77\n"
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert 0 < saved["global_step"] < 6
    again = run(row, callbacks=[RequeueBetweenSteps()], default_root_dir=tmp_path)  # Lightning finds it by itself
    assert differences(expected, snapshot(again)) == []


def test_without_it_the_job_goes_on_from_half_a_round(slurm, tmp_path):
    """The test above sees what it is there to see."""
    row = BY_STEM["toy_game"]
    expected = snapshot(run(row))
    run(row, callbacks=[SignalAt(signal.SIGUSR1, 4)], default_root_dir=tmp_path)
    assert differences(expected, snapshot(run(row, default_root_dir=tmp_path))) != []


def test_requeue_waits_for_the_batches_that_make_a_step(slurm, tmp_path, classifier):
    class SignalAtBatch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (0, 3):  # the first of the second step's three batches
                os.kill(os.getpid(), signal.SIGUSR1)

    options = {"accumulate_grad_batches": 3, "default_root_dir": tmp_path}
    expected = snapshot(run(classifier, **options))
    run(classifier, callbacks=[SignalAtBatch(), RequeueBetweenSteps()], **options)
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 2
    again = run(classifier, callbacks=[RequeueBetweenSteps()], **options)
    assert differences(expected, snapshot(again)) == []


def test_a_handler_of_the_users_is_left_alone(slurm, classifier):
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        run(classifier, callbacks=[SignalAt(signal.SIGUSR1, 2), RequeueBetweenSteps()], max_steps=3)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert heard == [1]


def test_the_command_line_requeues_between_steps(classifier):
    parsed = RectifyCLI([f"--config={classifier.config}", "--trainer.accelerator=cpu"], run=False)
    assert sum(isinstance(callback, RequeueBetweenSteps) for callback in parsed.trainer.callbacks) == 1


# -- where a run goes on -----------------------------------------------------------------------------------------------


def test_a_run_resumed_at_an_epochs_last_batch_can_be_resumed_again(classifier, tmp_path):
    """Lightning does not count the epoch that such a run begins: its next checkpoint would repeat batches."""
    every = ModelCheckpoint(tmp_path / "first", filename="{step}", every_n_train_steps=6, save_top_k=-1)
    keep = {"callbacks": [every], "enable_checkpointing": True, "max_epochs": 3}
    expected = snapshot(run(classifier, **keep))
    run(classifier, tmp_path / "second", ckpt_path=tmp_path / "first" / "step=6.ckpt", max_epochs=3)
    for step in (8, 12, 16):
        again = run(classifier, ckpt_path=tmp_path / "second" / f"step={step}.ckpt", max_epochs=3)
        assert differences(expected, snapshot(again)) == []


def one_cycle(optimizer, module):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, int(module.trainer.estimated_stepping_batches))


def test_a_schedule_that_asks_for_the_number_of_steps_does_not_lose_the_place_in_the_data(classifier, tmp_path):
    """Lightning makes the loaders when asked for it, and then forgets where the checkpoint had left them."""

    class OneCycle(classifier.module):
        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters())
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": one_cycle(optimizer, self), "interval": "step"},
            }

    def fit(ckpt_path=None, callbacks=None):
        made = trainer(
            max_epochs=EPOCHS, limit_val_batches=0, callbacks=callbacks, enable_checkpointing=bool(callbacks)
        )
        made.fit(classifier.make_module(OneCycle), classifier.make_data(), ckpt_path=ckpt_path)
        return snapshot(made)

    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    expected = fit(callbacks=[every])
    for step in (4, 8, 12):  # in the middle of an epoch, twice, and at the end of one
        assert differences(expected, fit(tmp_path / f"step={step}.ckpt")) == []


def test_a_games_schedule_of_epochs_does_not_lose_one_at_the_last_batch(tmp_path):
    """Of a checkpoint of an epoch's last batch: Lightning does not come to the epoch's end again."""
    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    arguments = {"lr_scheduler": halve, "lr_scheduler_interval": "epoch"}
    row, last = BY_STEM["toy_game"], tmp_path / "step=6.ckpt"
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    keep = {"callbacks": [every], "enable_checkpointing": True}
    expected = run(row, module_args=arguments, **keep)
    assert [optimizer.param_groups[0]["lr"] for optimizer in expected.optimizers] == [0.25e-3] * 2
    resumed = run(row, module_args=arguments, ckpt_path=last)
    assert differences(snapshot(expected), snapshot(resumed)) == []


@pytest.mark.parametrize("stem", ["toy_game", "language_model"])
def test_a_finished_run_that_is_resumed_stays_as_it_was(stem, tmp_path):
    row = BY_STEM[stem]
    done = run(row)
    done.save_checkpoint(tmp_path / "done.ckpt")
    assert differences(snapshot(done), snapshot(run(row, ckpt_path=tmp_path / "done.ckpt"))) == []
