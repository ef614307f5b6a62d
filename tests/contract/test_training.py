"""Clauses 1, 5 and 6: it learns, it counts batches, and the Trainer's options do what they say."""

from functools import partial
from operator import attrgetter

import pytest
import torch
from torch import nn

from lightning_rectify._lightning import Callback, ModelCheckpoint
from lightning_rectify.optim import RectifiedAdam
from tests.helpers.training import largest_difference, trainer, weights


class Steps(Callback):
    """Keeps what every real optimizer step saw: its learning rate and the norm of its gradients."""

    def __init__(self):
        self.lr, self.norm, self.batches = [], [], 0

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._keep)  # before it, the closure has not run yet

    def on_train_batch_end(self, *args):
        self.batches += 1

    def _keep(self, optimizer, *args):
        self.lr.append(optimizer.param_groups[0]["lr"])
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norm.append(nn.utils.get_total_norm(gradients).item())


def run(row, module=None, data_args=None, module_args=None, **options):
    module = module or row.make_module(**row.optimizers(partial(RectifiedAdam, lr=0.01)), **(module_args or {}))
    steps = Steps()
    options = {"max_epochs": 1, "limit_val_batches": 0, **options}
    options["callbacks"] = [steps, *options.get("callbacks", [])]
    fit = trainer(**options)
    fit.fit(module, row.make_data(**(data_args or {})))
    return fit, steps


# -- 1: it learns ------------------------------------------------------------------------------------------------------


def test_training_beats_the_untrained_module_by_the_rows_margin(row):
    module = row.make_module(**row.optimizers(partial(RectifiedAdam, lr=0.02)), **row.learn_module_args)
    data = row.make_data(**row.learn_args)
    fit = trainer(max_epochs=row.epochs)
    before = fit.validate(module, data, verbose=False)[0][row.metric]
    fit.fit(module, data)
    after = fit.callback_metrics[row.metric].item()
    assert (after - before) * (1 if row.higher else -1) > row.margin


# -- 5: steps are batches ----------------------------------------------------------------------------------------------


def test_global_step_counts_batches(row):
    fit, steps = run(row, max_epochs=2)
    assert fit.global_step == steps.batches == 2 * row.batches


def test_max_steps_is_a_number_of_batches(row):
    fit, steps = run(row, max_steps=10, max_epochs=-1)
    assert fit.global_step == steps.batches == 10


def test_checkpoints_every_n_steps(row, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    run(row, max_steps=10, max_epochs=-1, callbacks=[keep], enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=3.ckpt", "step=6.ckpt", "step=9.ckpt"]


def test_accumulation_makes_one_step_of_two_batches(row):
    fit, steps = run(row, max_epochs=2, **row.accumulation(2))
    assert steps.batches == 2 * row.batches
    assert fit.global_step == row.batches
    assert len(steps.lr) == row.batches * row.steps_a_batch


# -- 6: the Trainer's options ------------------------------------------------------------------------------------------


def test_accumulation_equals_a_bigger_batch(row):
    half = {"data_args": {"batch_size": row.batch_size // 2}}
    whole, _ = run(row, precision="64-true", max_epochs=2)
    halves, _ = run(row, **half, precision="64-true", max_epochs=2, **row.accumulation(2))
    # 1e-9: float64 sums in another order; dividing by sqrt(v) of tiny gradients costs digits.
    assert largest_difference(weights(whole.model), weights(halves.model)) < 1e-9
    without, _ = run(row, **half, precision="64-true", max_epochs=2)
    assert largest_difference(weights(whole.model), weights(without.model)) > 1e-3


def test_clipping_bounds_the_gradient_that_the_step_sees(row):
    _, free = run(row)
    bound = min(free.norm) / 2
    _, clipped = run(row, **row.clipping(bound))
    # 1e-4: float32 sums, and torch adds 1e-6 to the norm it divides by.
    assert clipped.norm == pytest.approx([bound] * row.batches * row.steps_a_batch, rel=1e-4)


@pytest.mark.parametrize(("interval", "expected"), [("step", [0.01, 0.005, 0.0025, 0.00125]), ("epoch", [0.01, 0.005])])
def test_schedule_steps_when_it_says(row, interval, expected):
    module = row.make_module(
        **row.optimizers(partial(RectifiedAdam, lr=0.01)),
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        lr_scheduler_interval=interval,
    )
    _, steps = run(row, module, max_epochs=2, limit_train_batches=2)
    used = steps.lr[:: row.steps_a_batch]
    assert used == pytest.approx(expected if interval == "step" else [expected[0]] * 2 + [expected[1]] * 2)


def test_bf16_mixed_computes_in_bf16_and_keeps_float32_weights(row):
    module = row.make_module(**row.optimizers(partial(RectifiedAdam, lr=0.01)))
    seen = set()
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for layer in layers:
        layer.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    module.configure_model()  # makes a game's averages, which are weights too
    before = weights(module)
    fit, _ = run(row, module, precision="bf16-mixed")
    assert seen == row.dtypes_under_bf16
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert largest_difference(before, weights(module)) > 1e-3
    exact, _ = run(row)
    # bf16 has 8 bits; losses of the sixth batch apart by a few of their units, were it another loss by more.
    for key, value in exact.callback_metrics.items():
        if "loss" in key:
            assert fit.callback_metrics[key].item() == pytest.approx(value.item(), rel=0.05)


def compiled(row, monkeypatch, backend):
    """The networks that compile=True compiles, and the trainer."""
    found, compile_ = [], nn.Module.compile

    def keep(self, *args, **kwargs):
        found.append(self)
        compile_(self, *args, **{"backend": backend, **kwargs})

    monkeypatch.setattr(nn.Module, "compile", keep)
    torch._dynamo.reset()
    module = row.make_module(**row.optimizers(partial(RectifiedAdam, lr=0.01)), compile=True)
    fit, _ = run(row, module)
    torch._dynamo.reset()
    return found, fit


def check_compiled(row, monkeypatch, tmp_path, backend):
    plain, _ = run(row)
    found, fit = compiled(row, monkeypatch, backend)
    assert {attrgetter(name)(fit.model) for name in row.networks} == set(found)
    assert fit.model.state_dict().keys() == plain.model.state_dict().keys()
    # 1e-4: the compiler may reorder float32 sums, and six steps divide by sqrt(v).
    assert largest_difference(weights(fit.model), weights(plain.model)) < 1e-4
    fit.save_checkpoint(tmp_path / "compiled.ckpt")
    loaded = row.module.load_from_checkpoint(tmp_path / "compiled.ckpt", compile=False)
    assert largest_difference(weights(fit.model), weights(loaded)) == 0
    assert not any(module._compiled_call_impl for module in loaded.modules())


def test_compiled_networks_train_and_their_checkpoints_are_plain(row, monkeypatch, tmp_path):
    """With the backend that traces and does not generate code: the default one takes half a minute (slow, below)."""
    check_compiled(row, monkeypatch, tmp_path, "aot_eager")


@pytest.mark.slow
def test_compiled_by_the_default_backend(row, monkeypatch, tmp_path):
    check_compiled(row, monkeypatch, tmp_path, "inductor")
