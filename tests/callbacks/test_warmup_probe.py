"""The probe against theory, a plain numpy simulation and closed forms; and that it leaves everything as it was."""

import copy
import csv
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_rectify._lightning import LightningModule, TensorBoardLogger
from lightning_rectify.callbacks.warmup_probe import WarmupProbe, probe_warmup
from lightning_rectify.callbacks.warmup_probe.advice import linear_warmup, steps_until
from lightning_rectify.callbacks.warmup_probe.stream_variance import weighted_quantile
from lightning_rectify.callbacks.warmup_probe.streams import Streams
from lightning_rectify.data.images import ImageData
from lightning_rectify.optim.rectified_adam import RectifiedAdam
from lightning_rectify.optim.variance import relative_variance, sma_length
from tests.helpers.games import loader as game_loader
from tests.helpers.games import make_game
from tests.helpers.pool import Pool
from tests.helpers.training import differences, snapshot, trainer
from tests.reference import radam

CPU = {"accelerator": "cpu"}


def probe(module, data, **options):
    return probe_warmup(module, data, trainer_options=CPU, **options)


class Base(LightningModule):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Digits(Base):
    """With all that a probe could disturb: dropout, running means, a metric's counts, noise of its own."""

    def __init__(self, careful=True):
        super().__init__()
        torch.manual_seed(0)
        extra = [nn.BatchNorm1d(128), nn.Dropout(0.2)] if careful else []
        self.net = nn.Sequential(
            nn.Linear(64, 128), *extra, nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.generator = torch.Generator().manual_seed(5)
        self.seen, self.losses = 0, []

    def loss(self, batch):
        logits = self.net(batch[0])
        self.accuracy.update(logits.detach(), batch[1])
        self.seen += 1
        loss = F.cross_entropy(logits, batch[1])
        self.losses.append(loss.detach() + torch.rand((), generator=self.generator) + random.random())
        return loss


def digits():
    data = load_digits()
    return TensorDataset(torch.tensor(data.data / 16.0 - 0.3).float(), torch.tensor(data.target))


class Noise(Base):
    """The loss is w . g, so the gradient is what a batch of one holds: Gaussian noise, or rarely any."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, 1, bias=False)
        self.other = nn.Linear(3, 1, bias=False)

    def loss(self, batch):
        return F.linear(batch[0], self.linear.weight).sum()


class Draws(IterableDataset):
    """Standard normal rows without end, of which each number is there with probability ``share``."""

    def __init__(self, size, share=1.0):
        self.size, self.share, self.rng = size, share, np.random.default_rng(0)

    def __iter__(self):
        while True:
            there = self.rng.random(self.size) < self.share
            yield (torch.from_numpy(np.where(there, self.rng.standard_normal(self.size), 0.0)).float(),)


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_result():
    loader = DataLoader(digits(), batch_size=32, shuffle=True)
    return probe(Digits(careful=False), loader, steps=200, sample_size=384)


def test_digits_follow_theory(digits_result):
    player = digits_result.players["model"]
    ratio = player.whole.relative_variance[4:] / [relative_variance(radam.rho(t, 0.999)) for t in range(5, 201)]
    # The aim that the feature was given. Gradients are not Gaussian, and an epoch of 57 batches is soon over.
    assert 1 / 1.5 < ratio.min() < ratio.max() < 1.5
    assert player.beta2 == 0.999
    assert player.step.tolist() == list(range(1, 201))
    assert digits_result.gradients == 16 * 200
    assert [layer.name for layer in digits_result.layers] == ["net.0", "net.2", "net.4"]
    assert [layer.coordinates for layer in digits_result.layers] == [64 * 128 + 128, 128 * 128 + 128, 1290]
    assert all(0.0 <= layer.dead_share <= layer.zero_share < 0.5 for layer in digits_result.layers)


def test_gaussian_gradients_are_those_of_a_plain_simulation():
    size, steps = 800, 60
    result = probe(Noise(size), DataLoader(Draws(size), batch_size=1), steps=steps, loss=lambda m, b: m.loss(b))
    whole = result.layers[0]
    # Not the probe's median over 16 streams: the variance itself, from many streams, by numpy in float64.
    rng = np.random.default_rng(0)
    v, measured, logarithm = np.zeros(40_000), [], []
    for t in range(1, steps + 1):
        v = 0.999 * v + 0.001 * rng.standard_normal(len(v)) ** 2
        rate = np.sqrt((1 - 0.999**t) / v)
        measured.append(rate.var() / rate.mean() ** 2)
        logarithm.append(np.log(rate).var())
    # 15 % is the aim; the two medians' sampling errors are 2 % and 0.7 %, the simulation's 5 % at step 5. From 5 on:
    # before, the simulation itself does not settle (its fourth moment is infinite).
    np.testing.assert_allclose(whole.relative_variance[4:], measured[4:], rtol=0.15)
    np.testing.assert_allclose(whole.log_variance, logarithm, rtol=0.15)
    assert np.isinf(whole.relative_variance[:2]).all()  # rho is at most 2 there
    assert whole.factor == pytest.approx(1.0, abs=0.1)
    assert whole.zero_share == whole.dead_share == 0.0
    assert not result.worse
    assert result.layers[1].dead_share == 1.0  # `other` is in no loss: counted, and left out of the whole
    assert math.isnan(result.layers[1].factor)
    assert "other" in result.table()


def test_rare_gradients_have_the_factor_of_their_kurtosis():
    size, share = 800, 0.2
    result = probe(Noise(size), DataLoader(Draws(size, share), batch_size=1), steps=80, beta2=0.9999)
    layer = result.layers[0]
    # E[g^4] / E[g^2]^2 = 3 / q, less 1, over 2. The median over coordinates of a skewed estimate with 16 streams, each
    # of 8 to 16 gradients, is corrected as if they were Gaussian: that leaves it low by up to a fifth.
    assert layer.factor == pytest.approx(1.5 / share - 0.5, rel=0.25)
    assert layer.zero_share == pytest.approx(1 - share, abs=0.005)
    # No gradient in t steps has probability 0.8^t; standard error about 0.003.
    np.testing.assert_allclose(layer.unseen_share[:20], (1 - share) ** np.arange(1, 21), atol=0.015)
    assert np.isinf(layer.relative_variance[:5]).all()
    assert layer.needs_more
    assert [each.name for each in result.worse] == ["linear"]


def test_zipf_tokens_name_the_embedding():
    class Text(Base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(5000, 16), nn.Linear(16, 4)

        def loss(self, batch):
            return F.cross_entropy(self.head(self.embedding(batch[0]).mean(1)), batch[1])

    rng = np.random.default_rng(0)
    probability = 1 / np.arange(1, 5001)
    tokens = rng.choice(5000, (20_000, 16), p=probability / probability.sum())
    data = TensorDataset(torch.from_numpy(tokens), torch.from_numpy(rng.integers(0, 4, len(tokens))))
    result = probe(Text(), DataLoader(data, batch_size=32, shuffle=True), steps=60)
    assert [layer.name for layer in result.worse] == ["embedding"]
    embedding, head = result.layers
    assert embedding.factor > 5 * head.factor
    assert 0.7 < head.factor < 1.5
    # A token of the median rank, 2500 of 5000, is in a share q of batches (512 tokens each). There its gradient has a
    # kurtosis between 1 (always one size) and 3 (Gaussian): (1 / q - 1) / 2 to (3 / q - 1) / 2, and a fifth for the
    # median's error with streams that have met it once or twice.
    q = 1 - (1 - probability[2500] / probability.sum()) ** 512
    assert 0.8 * (1 / q - 1) / 2 < embedding.factor < 1.2 * (3 / q - 1) / 2
    assert f"embedding needs more: {embedding.factor:.3g} times" in result.table()


def test_steps_and_warmup_of_the_theory():
    steps = np.arange(1.0, 201.0)
    theory = np.array([relative_variance(r) if (r := sma_length(t, 0.999)) > 2 else math.inf for t in steps])
    level = 2 * relative_variance(1999.0)
    found = steps_until(theory, 1.0, 0.999, level)
    assert relative_variance(radam.rho(found, 0.999)) <= level < relative_variance(radam.rho(found - 1, 0.999))
    assert steps_until(theory, 4.0, 0.999, level) == math.inf  # a floor four times the theory's
    assert steps_until(theory, 1.0, 0.999, theory[49]) == 50  # inside what was measured
    # Sum of 1 - sqrt(V(inf) / V(t)), one step at a time.
    every = [relative_variance(radam.rho(t, 0.999)) if t > 2 else math.inf for t in range(1, 30_000)]
    held = sum(1 - math.sqrt(relative_variance(1999.0) / v) for v in every)
    assert linear_warmup(theory, 1.0, 0.999) == pytest.approx(2 * held + 1, rel=1e-3)  # trapezoids of 4000 steps


def test_weighted_quantile_is_that_of_repeated_values():
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal(50), rng.integers(1, 6, 50)
    values[7] = np.inf
    repeated = np.sort(np.repeat(values, weights))
    values, weights = np.append(values, np.nan), np.append(weights, 1000)
    for level in (0.1, 0.5, 0.9):
        expected = np.quantile(repeated, level, method="inverted_cdf")
        assert weighted_quantile(torch.tensor(values), torch.tensor(weights, dtype=torch.float64), level) == expected


# -- nothing is touched ------------------------------------------------------------------------------------------------


def random_states():
    return {"torch": torch.get_rng_state(), "numpy": list(np.random.get_state()[1]), "python": random.getstate()}


def everything(module):
    return {
        "weights": dict(module.state_dict()),
        "gradients": [p.grad for p in module.parameters() if p.grad is not None],
        "metric": {name: getattr(module.accuracy, name) for name in module.accuracy._defaults},
        "updates": module.accuracy._update_count,
        "generator": module.generator.get_state(),
        "seen": module.seen,
        "losses": list(module.losses),
        "modes": [part.training for part in module.modules()],
    }


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(4)], ids=["global", "own"])
def test_function_leaves_everything_as_it_was(generator):
    module = Digits()
    loader = DataLoader(digits(), batch_size=32, shuffle=True, generator=generator)
    module.net[3].eval()
    next(module.parameters()).grad = torch.ones(128, 64)
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters)
    module.loss(next(iter(loader))).backward()
    optimizer.step()
    before = copy.deepcopy([everything(module), random_states(), optimizer.state_dict()])
    order = copy.deepcopy(generator.get_state()) if generator else None
    probe(module, loader, steps=4, streams=3)
    after = [everything(module), random_states(), optimizer.state_dict()]
    assert differences(before, after) == []
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert module._trainer is None
    if generator is not None:
        assert torch.equal(generator.get_state(), order)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_the_same_with_a_probe_before_it(workers):
    def run(*callbacks):
        random.seed(2), np.random.seed(2), torch.manual_seed(2)
        module, seen = Digits(), []
        forward = module.net.forward
        module.net.forward = lambda x: (
            seen.append(x.sum().item()) if module.trainer.sanity_checking else None,
            forward(x),
        )[1]
        fit = trainer(max_steps=3, callbacks=list(callbacks))
        fit.fit(module, DataLoader(digits(), batch_size=32, shuffle=True, num_workers=workers))
        return [snapshot(fit), everything(module), random_states(), fit.callback_metrics]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fork with threads around
        callback = WarmupProbe(streams=2, steps=3)
        assert differences(run(), run(callback)) == []
    assert callback.result.gradients == 6
    assert callback.result.players["model"].whole.relative_variance[2] > 0


def test_next_batch_of_a_resumable_loader_is_the_same():
    def first(probed):
        data = ImageData(batch_size=16)
        data.setup("fit")
        loader = data.train_dataloader()
        if probed:
            probe(Images(), loader, streams=2, steps=3)
        batch = next(iter(loader))
        return [batch, loader.state_dict()]

    assert differences(first(False), first(True)) == []


class Images(Base):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_datamodule_gets_its_trainer_back():
    data, module = ImageData(batch_size=16), Images()
    assert probe(module, data, streams=2, steps=2).gradients == 4
    assert data.trainer is None
    assert module._trainer is None


# -- streams -----------------------------------------------------------------------------------------------------------


def dealt(streams, count):
    """Batches by stream."""
    batches = [batch.tolist() for batch in streams]
    return [batches[s::count] for s in range(count)]


def test_streams_have_orders_of_their_own():
    loader = DataLoader(range(24), batch_size=4, shuffle=True)
    streams = Streams(loader, 3, 18, seed=1)
    found = dealt(streams, 3)
    assert not streams.notes
    assert found == dealt(Streams(loader, 3, 18, seed=1), 3)
    assert found != dealt(Streams(loader, 3, 18, seed=2), 3)
    assert len({str(stream) for stream in found}) == 3
    for stream in found:  # somewhere in it begins an epoch: 24 numbers, each once
        flat = [[x for batch in stream[i : i + 6] for x in batch] for i in range(6)]
        assert any(sorted(epoch) == list(range(24)) for epoch in flat)


def test_a_loader_in_order_is_dealt_out():
    streams = Streams(DataLoader(range(12), batch_size=2), 2, 6)
    found = dealt(streams, 2)
    assert found[0][:3] == [[0, 1], [4, 5], [8, 9]]
    assert found[1][:3] == [[2, 3], [6, 7], [10, 11]]
    assert found[0][3:] == [[2, 3], [6, 7], [10, 11]]  # one further on
    assert any("no order of its own" in note for note in streams.notes)
    assert any("share batches" in note for note in streams.notes)


def test_lists_and_dicts_of_loaders():
    a, b = DataLoader(range(4), shuffle=True), DataLoader(range(10, 13), shuffle=True)
    pairs = list(Streams([a, b], 2, 3))
    assert len(pairs) == 6
    assert all(x.item() < 4 and y.item() >= 10 for x, y in pairs)
    assert set(next(iter(Streams({"x": a, "y": b}, 2, 3)))) == {"x", "y"}


def test_an_iterator_is_refused():
    with pytest.raises(ValueError, match="one that can be copied"):
        list(Streams((i for i in range(3)), 2, 2))
    with pytest.raises(ValueError, match="to have batches"):
        list(Streams([], 2, 2))


# -- players -----------------------------------------------------------------------------------------------------------


def test_games_are_probed_player_by_player():
    game = make_game(optimizer=lambda groups: RectifiedAdam(groups, betas=(0.5, 0.9)))
    result = probe(game, game_loader(), streams=4, steps=10)
    assert list(result.players) == ["critic", "generator"]
    assert {layer.name for layer in result.players["critic"].layers} == {"critic.0", "critic.2"}
    assert {layer.name for layer in result.players["generator"].layers} == {"generator.0", "generator.2"}
    assert all(player.beta2 == 0.9 for player in result.players.values())
    assert result.steps == max(player.whole.steps for player in result.players.values())
    joint = probe(make_game(joint=True), game_loader(), streams=2, steps=2)
    assert list(joint.players) == ["joint"]
    assert len(joint.layers) == 4
    assert any("no second moment" in note for note in joint.players["joint"].notes)  # it is SGD


def test_other_manual_modules_need_a_loss():
    module = Images()
    module.automatic_optimization = False
    loader = DataLoader(TensorDataset(torch.randn(32, 1, 8, 8), torch.zeros(32, dtype=torch.long)), 4, shuffle=True)
    with pytest.raises(ValueError, match="argument `loss` to be a function"):
        probe(module, loader)
    given = {"net": lambda m, batch: m.loss(batch), "all": lambda m, batch: m.loss(batch)}
    assert list(probe(module, loader, loss=given, streams=2, steps=2).players) == ["net", "all"]


def test_accumulated_batches_make_one_gradient():
    """The mean of k independent gradients keeps its relative mean, and loses noise: factors of a signal fall."""
    rows = torch.randn(4000, 50, generator=torch.Generator().manual_seed(0)) + 1.0
    loader = DataLoader(TensorDataset(rows), batch_size=1, shuffle=True)
    one, four = (probe(Noise(50), loader, steps=20, accumulate=k) for k in (1, 4))
    assert four.gradients == 4 * one.gradients
    # Kurtosis about zero of N(1, s^2): (1 + 6 s^2 + 3 s^4) / (1 + s^2)^2, s^2 = 1 and 1 / 4; median of 50 coordinates.
    assert one.layers[0].factor == pytest.approx((10 / 4 - 1) / 2, rel=0.2)
    assert four.layers[0].factor == pytest.approx((2.6875 / 1.5625 - 1) / 2, rel=0.2)


# -- what is left ------------------------------------------------------------------------------------------------------


def test_callback_writes_table_figure_and_csv():
    callback = WarmupProbe(streams=4, steps=12)
    logger = TensorBoardLogger("logs", version=0)
    fit = trainer(logger=logger, max_steps=2, callbacks=[callback])
    fit.fit(Digits(), DataLoader(digits(), batch_size=64, shuffle=True))
    folder = Path(logger.log_dir)
    with open(folder / "warmup_probe.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["layer"] == "whole"]
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    found = [float(row["relative_variance"]) for row in rows]
    np.testing.assert_allclose(found, callback.result.players["model"].whole.relative_variance, rtol=1e-8)  # 9 digits
    assert float(rows[9]["theory"]) == pytest.approx(relative_variance(radam.rho(10, 0.999)), rel=1e-8)
    with open(folder / "warmup_probe_layers.csv", newline="") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == ["whole", "net.0", "net.1", "net.4", "net.6"]
    assert (folder / "warmup_probe.png").stat().st_size > 10_000
    assert (folder / "warmup_probe.txt").read_text() == callback.result.table() + "\n"
    events = EventAccumulator(str(folder)).Reload()
    assert events.Tags()["images"] == ["warmup_probe/figure"]
    (loss,) = events.Scalars("train/loss_epoch")  # the mean over the two steps of training, not over the probe's
    assert loss.step == 1
    assert loss.value == pytest.approx(fit.callback_metrics["train/loss_epoch"].item(), rel=1e-6)  # float32


def test_stop_ends_fit_before_a_step():
    module = Digits()
    before = copy.deepcopy(dict(module.state_dict()))
    fit = trainer(max_steps=5, callbacks=[callback := WarmupProbe(streams=2, steps=4, stop=True)])
    fit.fit(module, DataLoader(digits(), batch_size=64))  # without an error
    assert fit.state.finished
    assert fit.global_step == 0
    assert callback.result.gradients == 8
    assert differences(before, dict(module.state_dict())) == []


def test_dry_and_resumed_runs():
    callback = WarmupProbe()
    trainer(fast_dev_run=True, callbacks=[callback]).fit(Digits(), DataLoader(digits(), batch_size=64))
    assert callback.result.gradients == 4
    assert list(Path().iterdir()) == []
    module, loader = Digits(), DataLoader(digits(), batch_size=64)
    first = trainer(max_steps=1)
    first.fit(module, loader)
    first.save_checkpoint("first.ckpt")
    callback = WarmupProbe()
    trainer(max_steps=2, callbacks=[callback]).fit(module, loader, ckpt_path="first.ckpt")
    assert callback.result is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": 1}, "`streams` to be at least 2 but got 1"),
        ({"steps": 0}, "`steps` to be at least 1 but got 0"),
        ({"sample_size": 0}, "`sample_size` to be at least 1 but got 0"),
        ({"beta2": 1.0}, "`beta2` to be in .0, 1., or None, but got 1.0"),
        ({"tolerance": 1.0}, "`tolerance` to be a finite number above 1 but got 1.0"),
        ({"seed": -1}, "`seed` to be at least 0 but got -1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        WarmupProbe(**options)


def test_gradients_that_are_not_finite_are_refused():
    loader = DataLoader(TensorDataset(torch.full((8, 5), torch.nan)), batch_size=1, shuffle=True)
    with pytest.raises(ValueError, match="gradient of player 'model' to be finite"):
        probe(Noise(5), loader, streams=2, steps=2)


# -- two processes -----------------------------------------------------------------------------------------------------


def probe_on_rank():
    """What this rank finds, and its weights, after a step with its half of the data."""
    callback = WarmupProbe(streams=2, steps=4, sample_size=64)
    torch.manual_seed(0)
    module = Images()
    data = TensorDataset(torch.randn(64, 1, 8, 8), torch.arange(64) % 10)
    fit = trainer(devices=2, strategy="ddp", max_steps=1, limit_val_batches=0, callbacks=[callback])
    fit.fit(module, DataLoader(data, batch_size=4, shuffle=True))
    curves = torch.from_numpy(callback.result.players["model"].whole.relative_variance)
    return {"curves": curves, "weight": module.net[1].weight.detach().clone()}


@pytest.mark.ddp
def test_ranks_average_their_gradients_and_agree(request):
    pool = Pool()
    request.addfinalizer(pool.close)
    first, second = pool.run(f"{__name__}.probe_on_rank")
    assert torch.equal(first["curves"], second["curves"])
    assert torch.isfinite(first["curves"][2:]).all()
    assert torch.equal(first["weight"], second["weight"])
