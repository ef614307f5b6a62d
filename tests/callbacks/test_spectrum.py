import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import nn
from torch.nn.utils import parametrizations

from lightning_rectify._lightning import (
    LightningModule,
    MisconfigurationException,
    ModelCheckpoint,
    TensorBoardLogger,
)
from lightning_rectify.callbacks import AdaptiveRateMonitor, SpectrumMonitor
from lightning_rectify.callbacks._logs import CsvFile
from lightning_rectify.callbacks.spectrum.dashboard import Records, draw
from lightning_rectify.callbacks.spectrum.readings import read_layers
from lightning_rectify.nn.spectral import controlled_layers, spectral_control
from tests.helpers.pool import Pool
from tests.helpers.training import CSVLogger, differences, snapshot, trainer

COMMON = {"max", "min", "mean", "stable_rank", "condition_number"}


class Everything(LightningModule):
    """A user's module with a layer of each kind: plain, spectral_norm'ed, controlled; convolutions and linear ones."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.critic = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            parametrizations.spectral_norm(nn.Conv2d(6, 4, 4, stride=2, padding=1)),
            nn.BatchNorm2d(4),
            nn.Dropout(0.1),
            nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
            nn.Flatten(),
            parametrizations.spectral_norm(nn.Linear(3 * 64, 5)),
            nn.Linear(5, 1),
        )
        self.controlled = spectral_control(
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ConvTranspose2d(4, 2, 3), nn.Flatten(), nn.Linear(200, 3))
        )

    def training_step(self, batch, batch_idx):
        return self.critic(batch).pow(2).mean() + (self.controlled(batch) - 1).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Game(Everything):
    """Two players, manual optimization: global_step advances by two a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.critic, self.controlled)]


def data(batches=5):
    images = torch.randn(4 * batches, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(images, batch_size=4)


def fit(module, monitor, batches=5, logger=None, ckpt_path=None, callbacks=(), **options):
    logger = TensorBoardLogger("logs", version=0, default_hp_metric=False) if logger is None else logger
    callbacks = [*([monitor] if monitor else []), *callbacks]
    torch.manual_seed(7)  # dropout draws from it
    run = trainer(logger=logger, callbacks=callbacks, **({"max_epochs": 1} | options))
    run.fit(module, data(batches), ckpt_path=ckpt_path)
    return run


def scalars(run):
    events = EventAccumulator(run.loggers[0].log_dir, size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}, events


def stored(run):
    """The CSV as {step: {layer: values}}, read without the package."""
    table = {}
    with open(Path(run.loggers[0].log_dir, "spectrum.csv"), newline="") as file:
        for row in csv.DictReader(file):
            values = table.setdefault(int(row["step"]), {}).setdefault(row["layer"], [])
            assert int(row["index"]) == len(values)
            values.append(float(row["value"]))
    return table


def oracle(layer):
    """Singular values by numpy, of the weight that evaluation would use, one row an output channel."""
    weight = layer.eval().weight.detach().double()
    weight = weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight
    return np.linalg.svd(weight.flatten(1).numpy(), compute_uv=False)


def layers_of(module):
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, kinds)}


def test_numbers_are_those_of_numpy():
    module = Everything()
    run = fit(module, SpectrumMonitor(every_n_steps=2), logger=[TensorBoardLogger("tb"), CSVLogger("csv")])
    logged, _ = scalars(run)
    last = stored(run)[5]
    assert list(last) == list(layers_of(module))
    for name, layer in layers_of(module).items():
        s = oracle(layer)
        # 1e-6 of the largest: the Gram matrix in float64 keeps 1e-8.
        np.testing.assert_allclose(last[name], s, rtol=0, atol=1e-6 * s[0])
        expected = {
            "max": s[0],
            "min": s[-1],
            "mean": s.mean(),
            "stable_rank": (s**2).sum() / s[0] ** 2,
            "condition_number": s[0] / s[-1],
        }
        for quantity, value in expected.items():
            key = f"spectrum/{name}/{quantity}"
            assert logged[key][5] == pytest.approx(value, rel=1e-5), key  # event files are float32
            assert run.callback_metrics[key].item() == pytest.approx(value, rel=1e-5)
    with open(Path(run.loggers[1].log_dir, "metrics.csv"), newline="") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert sorted(rows) == [0, 2, 4, 5]
    assert float(rows[5]["spectrum/critic.7/max"]) == pytest.approx(oracle(module.critic[7])[0], rel=1e-6)


def test_controlled_layers_have_quantities_of_their_own():
    module = Everything()
    logged, _ = scalars(fit(module, SpectrumMonitor()))
    for name in layers_of(module):
        found = {tag.rpartition("/")[2] for tag in logged if tag.startswith(f"spectrum/{name}/")}
        assert found == COMMON | ({"orthogonality_error", "deviation"} if name.startswith("controlled") else set())
    for name, layer in controlled_layers(module).items():
        u, e, v = (p.detach().double().numpy() for p in layer.parametrizations.weight.parameters())
        error = sum(np.linalg.norm(f.T @ f - np.eye(f.shape[1])) ** 2 for f in (u, v))
        deviation = np.abs(oracle(layer) - np.sort(np.abs(e))[::-1]).max()
        # The error is a sum of squares of float32 numbers of size 1: 1e-7 absolute, more than that after five steps.
        assert logged[f"spectrum/{name}/orthogonality_error"][5] == pytest.approx(error, rel=1e-3)
        assert logged[f"spectrum/{name}/deviation"][5] == pytest.approx(deviation, rel=1e-4, abs=1e-6)
        assert deviation > 1e-4  # five steps without the penalty take the factors away from orthonormal


def test_baseline_orthogonal_has_its_error():
    net = spectral_control(nn.Sequential(nn.Linear(6, 3)), "orthogonal")
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    reading = read_layers({"0": net[0]}, None)["0"]
    # (4 - 1)^2 for each of three rows; orthonormal to 1e-6 in float32.
    assert reading.quantities["orthogonality_error"] == pytest.approx(27.0, rel=1e-5)
    assert "deviation" not in reading.quantities


def test_convolution_norm_is_the_norm_of_the_operator():
    """Oracle: the matrix of the circular convolution, column by column."""
    module = Everything()
    logged, _ = scalars(fit(module, SpectrumMonitor(image_size=5)))
    for name, size in {"critic.0": 5, "critic.1": 6, "controlled.0": 5}.items():  # 6: the next multiple of the stride
        layer = layers_of(module)[name].eval()
        basis = torch.eye(layer.in_channels * size**2, dtype=torch.float64).view(-1, layer.in_channels, size, size)
        kernel = layer.kernel_size[0]
        wrapped = torch.nn.functional.pad(basis, (0, kernel - 1, 0, kernel - 1), mode="circular")
        images = torch.nn.functional.conv2d(wrapped, layer.weight.detach().double(), stride=layer.stride)
        norm = np.linalg.norm(images.flatten(1).numpy(), 2)
        assert logged[f"spectrum/{name}/convolution_norm"][5] == pytest.approx(norm, rel=1e-5)  # float32 events
    assert "spectrum/critic.4/convolution_norm" in logged  # transposed
    assert "spectrum/critic.7/convolution_norm" not in logged  # linear


def test_steps_in_automatic_and_manual_optimization():
    assert list(stored(fit(Everything(), SpectrumMonitor(every_n_steps=3), batches=7))) == [0, 3, 6, 7]
    # Two steps a batch: the first batch end at or after each multiple of 3.
    assert list(stored(fit(Game(), SpectrumMonitor(every_n_steps=3), batches=5))) == [0, 4, 6, 10]
    run = fit(Everything(), SpectrumMonitor(every_n_steps=1), batches=6, accumulate_grad_batches=2)
    assert list(stored(run)) == [0, 1, 2, 3]


def test_a_part_is_watched_under_names_of_its_own():
    run = fit(Everything(), SpectrumMonitor(module="critic"))
    assert list(stored(run)[0]) == ["0", "1", "4", "6", "7"]
    run = fit(Everything(), SpectrumMonitor(module="critic.7"))
    assert list(stored(run)[0]) == ["critic.7"]


@pytest.mark.parametrize("make", [Everything, Game])
def test_training_is_bit_equal_with_and_without(make):
    """Weights, moments, buffers (spectral_norm's vectors among them) and random state (dropout draws from it)."""
    with_monitor, without = make(), make()
    monitor = SpectrumMonitor(every_n_steps=1, image_size=4)
    a = snapshot(fit(with_monitor, monitor))
    state = torch.get_rng_state()
    b = snapshot(fit(without, None))
    assert "critic.1.parametrizations.weight.0._u" in a["state_dict"]
    assert differences(a, b) == []
    assert torch.equal(torch.get_rng_state(), state)


class Modes(SpectrumMonitor):
    """What modes the layers are in around a reading."""

    def on_train_batch_end(self, run, module, *args):
        before = {name: part.training for name, part in module.named_modules()}
        super().on_train_batch_end(run, module, *args)
        assert {name: part.training for name, part in module.named_modules()} == before
        assert not module.critic[1].training
        assert module.critic[6].training


def test_each_submodule_keeps_its_mode():
    class Frozen(Everything):
        def on_train_batch_start(self, batch, batch_idx):
            self.critic[1].eval()

    fit(Frozen(), Modes(every_n_steps=1))


def test_reading_has_no_side_effect_in_either_mode():
    for mode in (True, False):
        module = Everything().train(mode)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        state = torch.get_rng_state()
        read_layers(layers_of(module), 4)
        assert differences(before, dict(module.state_dict())) == []
        assert all(part.training is mode for part in module.modules())
        assert torch.equal(torch.get_rng_state(), state)


def test_shared_weights_and_shared_layers():
    """A parametrized weight that two layers hold is read for both; a layer in two places is one."""
    first, second = (parametrizations.spectral_norm(nn.Linear(4, 4)) for _ in range(2))
    second.parametrizations.weight.original = first.parametrizations.weight.original
    tied, third = nn.Linear(4, 4), nn.Linear(4, 4)
    third.weight = tied.weight
    net = nn.ModuleDict({"a": first, "b": second, "c": tied, "d": third, "e": tied})
    module = Everything()
    module.critic = net
    module.training_step = lambda batch, batch_idx: (
        sum(layer(batch[:, 0, 0, :4]) for layer in net.values()).pow(2).mean()
    )
    table = stored(fit(module, SpectrumMonitor(module="critic")))[5]
    assert list(table) == ["a", "b", "c", "d"]
    for name in table:
        np.testing.assert_allclose(table[name], oracle(net[name]), rtol=0, atol=1e-6)
    assert table["c"] == table["d"]


def test_weights_of_older_hooks_are_those_after_the_step():
    """torch.nn.utils.spectral_norm and prune keep the weight of the last forward; the attribute is left alone."""
    layer = nn.utils.spectral_norm(nn.Linear(5, 4))
    pruned = nn.utils.prune.l1_unstructured(nn.Linear(5, 4), "weight", 7)
    for kind in (layer, pruned):
        kind(torch.ones(1, 5))
        stale, buffers = kind.weight, {name: value.clone() for name, value in kind.named_buffers()}
        with torch.no_grad():
            kind.weight_orig.add_(torch.eye(4, 5))
        values = read_layers({"x": kind}, None)["x"].values
        assert kind.weight is stale
        assert differences(buffers, dict(kind.named_buffers())) == []
        kind.eval()(torch.ones(1, 5))
        expected = np.linalg.svd(kind.weight.detach().double().numpy(), compute_uv=False)
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6)
        assert np.abs(expected - np.linalg.svd(stale.detach().numpy(), compute_uv=False)).max() > 1e-2


def test_lazy_layers_are_read_once_they_have_weights():
    class Lazy(Everything):
        def __init__(self):
            super().__init__()
            self.critic = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    table = stored(fit(Lazy(), SpectrumMonitor(module="critic", every_n_steps=2)))
    assert {step: list(layers) for step, layers in table.items()} == {2: ["1"], 4: ["1"], 5: ["1"]}


def test_weights_that_are_not_finite_do_not_stop_training():
    class Broken(Everything):
        def on_train_batch_start(self, batch, batch_idx):
            with torch.no_grad():
                self.critic[7].weight.fill_(math.nan)

    run = fit(Broken(), SpectrumMonitor(every_n_steps=2, image_size=4))
    logged, _ = scalars(run)
    assert all(math.isnan(logged[f"spectrum/critic.7/{name}"][5]) for name in COMMON)
    assert math.isfinite(logged["spectrum/critic.7/max"][0])
    assert Path(run.loggers[0].log_dir, "spectrum.png").exists()


# -- what is left behind -----------------------------------------------------------------------------------------------


def test_figure_shows_what_was_recorded(tmp_path):
    run = fit(Everything(), SpectrumMonitor(every_n_steps=2), batches=9)
    table = stored(run)
    assert list(table) == [0, 2, 4, 6, 8, 9]
    records = Records()
    for step, spectra in table.items():
        records.add(step, {layer: np.array(values) for layer, values in spectra.items()})
    figure = draw(records.chosen())
    assert [ax.get_title() for ax in figure.axes] == ["step 0", "step 4", "step 9"]
    for ax, step in zip(figure.axes, (0, 4, 9), strict=True):
        lines = {line.get_label(): line for line in ax.get_lines()}
        assert list(lines) == list(table[step])
        for layer, line in lines.items():
            values = table[step][layer]
            assert line.get_ydata().tolist() == values
            assert line.get_xdata().tolist() == [i / len(values) for i in range(len(values))]
    figure.savefig(tmp_path / "again.png", dpi=110)
    assert (imread(tmp_path / "again.png") == imread(Path(run.loggers[0].log_dir, "spectrum.png"))).all()
    image = scalars(run)[1].Images("spectrum/decay")
    assert [event.step for event in image] == [9]
    assert image[0].width > 500


def test_records_of_a_long_run_keep_first_middle_and_last():
    records, most = Records(), 0
    for step in range(0, 1001):
        records.add(step, {"layer": np.array([float(step)])})
        most = max(most, len(records._spread))
        assert records.last_step == step
    first, middle, last = records.chosen()
    assert (first, last) == (0, 1000)
    assert abs(middle - 500) <= 1000 / 16  # sixteen steps at least eight of which are spread evenly
    assert most <= 17
    assert records.chosen()[middle]["layer"].tolist() == [middle]


def test_files_on_demand():
    run = fit(Everything(), SpectrumMonitor(figure=False, values=False))
    assert {path.name for path in Path(run.loggers[0].log_dir).iterdir() if "spectrum" in path.name} == set()
    assert "spectrum/critic.0/max" in scalars(run)[0]
    run = fit(Everything(), SpectrumMonitor(values=False), logger=CSVLogger("csv"))
    assert Path(run.loggers[0].log_dir, "spectrum.png").exists()
    assert not Path(run.loggers[0].log_dir, "spectrum.csv").exists()


def shown(run):
    """The layout that TensorBoard shows, the last of the run: {category: {chart: patterns}}."""
    event = scalars(run)[1].Tensors("custom_scalars__config__")[-1]
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}


@pytest.mark.filterwarnings("ignore::lightning_rectify.callbacks.adaptive_rate.AdaptiveRateWarning")
def test_layout_shows_what_is_logged_beside_the_other_monitor():
    for order in (1, -1):
        monitors = [SpectrumMonitor(image_size=4), AdaptiveRateMonitor()][::order]
        run = fit(Everything(), None, callbacks=monitors, logger=TensorBoardLogger("both", default_hp_metric=False))
        page, (tags, _) = shown(run), scalars(run)
        assert set(page) == {"Spectra", "Adaptive rate of model"}
        patterns = [pattern for charts in page.values() for chart in charts.values() for pattern in chart]
        assert all(sum(re.search(pattern, tag) is not None for tag in tags) == 1 for pattern in patterns)
        drawn = {tag for tag in tags if any(re.search(pattern, tag) for pattern in patterns)}
        assert {tag for tag in tags if tag.startswith("spectrum/")} <= drawn
    fresh = fit(Everything(), SpectrumMonitor(), logger=TensorBoardLogger("other"))
    assert set(shown(fresh)) == {"Spectra"}  # one run's page knows nothing of another's


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_model_checkpoint_sees_the_values():
    keep = ModelCheckpoint("best", monitor="spectrum/critic.7/max", mode="max", every_n_train_steps=1, save_top_k=1)
    run = fit(Everything(), SpectrumMonitor(every_n_steps=1), callbacks=[keep], enable_checkpointing=True)
    logged = scalars(run)[0]["spectrum/critic.7/max"]
    assert keep.best_model_score.item() == pytest.approx(max(logged[step] for step in range(1, 6)), rel=1e-6)


def test_resumed_run_drops_what_came_after_its_checkpoint():
    module = Everything()
    whole = stored(fit(module, SpectrumMonitor(every_n_steps=2), batches=6, max_epochs=2))
    assert list(whole) == [0, 2, 4, 6, 8, 10, 12]
    logger = TensorBoardLogger("part", version=0, default_hp_metric=False)
    first = fit(Everything(), SpectrumMonitor(every_n_steps=2), batches=6, logger=logger)
    first.save_checkpoint("6.ckpt")
    path = Path(logger.log_dir, "spectrum.csv")
    with path.open("a") as file:  # more steps than the checkpoint knows, the last half written
        file.write("8,critic.0,0,99.0\n8,crit")
    again = fit(Everything(1), SpectrumMonitor(every_n_steps=2), batches=6, logger=logger, ckpt_path="6.ckpt",
                max_epochs=2)  # fmt: skip
    resumed = stored(again)
    assert list(resumed) == list(whole)
    # Dropout draws other numbers after a restart, so only what was there before the checkpoint is equal.
    assert all(resumed[step] == whole[step] for step in (0, 2, 4, 6))
    assert all(max(values) < 50 for spectra in resumed.values() for values in spectra.values())
    # The figure of a resumed run begins where the first one did.
    assert imread(Path(logger.log_dir, "spectrum.png")).shape[1] > 1500  # three panels


def test_a_new_run_in_an_old_folder_starts_its_table_anew():
    fit(Everything(), SpectrumMonitor())
    second = Everything(seed=3)
    initial = {name: oracle(layer) for name, layer in layers_of(second).items()}
    table = stored(fit(second.train(), SpectrumMonitor()))
    assert list(table) == [0, 5]
    np.testing.assert_allclose(table[0]["critic.0"], initial["critic.0"], rtol=0, atol=1e-6)


def test_a_failed_run_leaves_its_values_and_figure():
    class Failing(Everything):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("the disk is on fire")
            return super().training_step(batch, batch_idx)

    logger = TensorBoardLogger("logs", version=0)
    with pytest.raises(RuntimeError, match="on fire"):
        fit(Failing(), SpectrumMonitor(every_n_steps=1), logger=logger)
    assert sorted({row[0] for row in CsvFile(Path(logger.log_dir, "spectrum.csv"), "abcd").rows()}) == list("0123")
    assert Path(logger.log_dir, "spectrum.png").exists()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_needs_a_logger_except_in_a_dry_run(tmp_path):
    with pytest.raises(MisconfigurationException, match="SpectrumMonitor to have a logger but got logger=False"):
        fit(Everything(), SpectrumMonitor(), logger=False)
    for logger in (None, False):
        fit(Everything(), SpectrumMonitor(), logger=logger, fast_dev_run=2)
    assert not list(tmp_path.rglob("spectrum*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` to be at least 1 but got 0"),
        ({"image_size": 0}, "`image_size` to be at least 1"),
        ({"module": ""}, "`module` to be a dotted name"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        SpectrumMonitor(**options)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("critik", r"name a part of Everything but got 'critik'.*\['critic', 'controlled'\]"),
        ("critic.99", "but got 'critic.99'"),
        ("critic.2", "'critic.2' has none"),
    ],
)
def test_a_part_that_cannot_be_watched(path, words):
    with pytest.raises(ValueError, match=words):
        fit(Everything(), SpectrumMonitor(module=path))


def shard(stop):
    """On two ranks: weights as FSDP 2 has them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from lightning_rectify.callbacks._sharded import refuse_sharded

    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    refuse_sharded(net, "SpectrumMonitor")  # whole: nothing happens
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    try:
        refuse_sharded(net, "SpectrumMonitor")
    except ValueError as error:
        return str(error)
    return ""


def watch_two():
    """On two ranks: DDP with a checkpoint by a value of the monitor."""
    keep = ModelCheckpoint("best", monitor="spectrum/critic.7/max", mode="max", every_n_train_steps=1)
    logger = TensorBoardLogger("ddp", version=0)
    module = Everything()
    run = fit(module, SpectrumMonitor(every_n_steps=1), callbacks=[keep], enable_checkpointing=True, devices=2,
              strategy="ddp", logger=logger, batches=6)  # fmt: skip
    values = {key: value.item() for key, value in run.callback_metrics.items() if key.startswith("spectrum/")}
    return {"best": keep.best_model_score.item(), "values": values, "steps": run.global_step}


@pytest.mark.ddp
def test_two_processes():
    pool = Pool()
    try:
        ranks = pool.run(f"{__name__}.watch_two")
        refusals = pool.run(f"{__name__}.shard", stop=True)
    finally:
        pool.close()
    assert [rank["steps"] for rank in ranks] == [3, 3]
    assert ranks[0] == ranks[1]
    rows = list(CsvFile(Path("ddp/lightning_logs/version_0/spectrum.csv"), "abcd").rows())
    assert len(rows) == len({tuple(row[:3]) for row in rows})  # each value once: one process wrote
    largest = [float(row[3]) for row in rows if row[1:3] == ["critic.7", "0"]]
    assert len(largest) == 4
    assert ranks[0]["best"] == pytest.approx(max(largest[1:]), rel=1e-6)
    for said in refusals:
        assert "Expected the weights that SpectrumMonitor looks at to be whole" in said
        assert "DTensor" in said
