"""RectifiedModule on its own: hyperparameters, groups, schedules, compile, random state, the check of the loss."""

from functools import partial
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rectify import RectifiedAdam, RectifiedModule
from lightning_rectify._lightning import NAME
from lightning_rectify.modules.base import NonFiniteLossError
from tests.helpers.training import differences, trainer, weights

STATE = "lightning_rectify_random_state"


class Line(RectifiedModule):
    """A user's module; its loss can be made anything."""

    def __init__(self, width=3, dropout=0.0, loss=None, **kwargs):
        super().__init__(**kwargs)
        self.body, self.head = nn.Linear(2, width), nn.Linear(width, 1)
        self.dropout, self.loss = nn.Dropout(dropout), loss

    def forward(self, x):
        return self.head(self.dropout(torch.tanh(self.body(x))))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self(x) - y).square().mean()
        self.log("train/loss", loss, batch_size=len(x))
        return loss if self.loss is None else loss * self.loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(1.0), batch_size=len(batch[0]))


def data(batches=4):
    x = torch.randn(8 * batches, 2, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


def fit(module, ckpt_path=None, **options):
    training = trainer(**{"max_epochs": 1, "limit_val_batches": 0, **options})
    training.fit(module, data(), data(1), ckpt_path=ckpt_path)
    return training


# -- hyperparameters ---------------------------------------------------------------------------------------------------


class Options(RectifiedModule):
    def __init__(self, plain=None, deep=None, table=None, network=None, *, rate=0.1, **kwargs):
        super().__init__(**kwargs)
        self.layer = nn.Linear(1, 1)


class Middle(Options):
    """Takes arguments of its own, fixes one of its parent's and passes the others on."""

    def __init__(self, own="x", hook=print, **kwargs):
        super().__init__(table={"fixed": 1}, **kwargs)


class Leaf(Middle):
    def __init__(self, last, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()


class ByName(Options):
    """Names what it saves, an object among it."""

    def __init__(self, good=1, bad=None, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters("good", "bad")
        self.save_hyperparameters("bad")


class Without(Options):
    def __init__(self, secret="s", **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters(ignore="secret")


NOTHING = {"plain": None, "deep": None, "table": None, "network": None, "rate": 0.1}


def test_plain_values_are_saved_and_objects_are_not():
    deep = {"a": [1, 2.5, {"b": ("c", None, True)}]}
    given = {"plain": 3, "deep": deep, "rate": 0.5}
    assert dict(Options(**given).hparams) == {**NOTHING, **given}
    assert dict(Options(compile=True, **given).hparams) == {**NOTHING, **given, "compile": True}


@pytest.mark.parametrize(
    "value",
    [
        print,
        nn.Linear(1, 1),
        partial(RectifiedAdam, lr=1.0),
        torch.ones(1),
        torch.float32,
        {"a": [1, {"b": print}]},
        [1, (2, nn.Identity)],
        {1: "a key that YAML and the safe loader read otherwise"},
        {1, 2},
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_object_at_any_depth_keeps_its_argument_out(value):
    module = Options(deep=value, plain=1)
    assert "deep" not in module.hparams
    assert module.hparams["plain"] == 1


def test_whole_chains_of_subclasses_are_collected():
    objects = {"network": nn.Identity(), "optimizer": torch.optim.SGD, "lr_scheduler": lambda optimizer: None}
    module = Leaf("end", own="y", plain=7, **objects)
    saved = dict(module.hparams)
    assert saved["last"] == "end"
    assert (saved["own"], saved["plain"]) == ("y", 7)
    assert saved.keys().isdisjoint({"hook", "network", "optimizer", "lr_scheduler"})
    assert "table" not in saved  # Middle fixes it: on load it would come twice
    assert "rate" not in saved  # at the default of a parent, so it cannot be told from one that Middle fixes


def test_what_a_subclass_makes_of_its_own_argument_is_not_saved_beside_it():
    class Sized(Options):
        def __init__(self, size=2, **kwargs):
            super().__init__(deep={"size": size}, rate=0.5, network=None, **kwargs)  # the last as it is by default

    class Fixed(Sized):
        def __init__(self, **kwargs):
            super().__init__(plain=1, **kwargs)

    module = Fixed(size=5)
    assert module.hparams["size"] == 5
    assert module.hparams.keys().isdisjoint({"deep", "rate", "plain", "network"})
    loaded = Fixed(**module.hparams)
    assert dict(loaded.hparams) == dict(module.hparams)

    class Again(Fixed):
        def __init__(self, rate="fast", **kwargs):  # a word of its own, that Sized fixes for Options
            super().__init__(**kwargs)

    assert Again(rate="slow").hparams["rate"] == "slow"


def test_names_that_a_subclass_gives_are_filtered_too():
    module = ByName(good=2, bad=nn.Identity())
    assert module.hparams["good"] == 2
    assert "bad" not in module.hparams
    assert ByName(bad=4).hparams["bad"] == 4


def test_ignore_still_ignores():
    """What is ignored by a second call is no longer added by it; the base's own call came first and had it."""
    assert "rate" in Without(rate=0.3).hparams


@pytest.mark.parametrize("make", [Options, partial(Leaf, "end"), partial(ByName, bad=nn.Identity())])
def test_saved_hyperparameters_load_safely(make, tmp_path):
    class_ = make.func if isinstance(make, partial) else make
    path = tmp_path / "a.ckpt"
    training = trainer(max_steps=0)
    module = make(optimizer=lambda params: RectifiedAdam(params), network=nn.Identity(), plain="kept")
    module.training_step = lambda batch, batch_idx: None
    training.fit(module, data())
    training.save_checkpoint(path)
    loaded = class_.load_from_checkpoint(path)  # weights_only is the default
    assert loaded.hparams["plain"] == "kept"
    assert differences(weights(loaded), weights(module)) == []


# -- optimizer, groups, schedule ---------------------------------------------------------------------------------------


def test_one_named_group_of_what_can_be_trained():
    module = Line()
    module.body.bias.requires_grad_(False)
    (group,) = module.configure_optimizers().param_groups
    assert group["name"] == "model"
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()} - {id(module.body.bias)}


def test_groups_can_be_split_with_rates_of_their_own():
    class Split(Line):
        def parameter_groups(self):
            return [
                {"name": "body", "params": self.body.parameters(), "lr": 1e-4},
                {"name": "head", "params": self.head.parameters()},
            ]

    optimizer = Split(optimizer=partial(RectifiedAdam, lr=0.5)).configure_optimizers()
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("body", 1e-4), ("head", 0.5)]


def test_wrong_interval():
    with pytest.raises(ValueError, match="`lr_scheduler_interval` to be 'step' or 'epoch' but got 'batch'"):
        RectifiedModule(lr_scheduler_interval="batch")


LightningPlateau = import_module(f"{NAME}.cli").ReduceLROnPlateau


@pytest.mark.parametrize(
    ("make", "monitor"),
    [
        (partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5), "val/loss"),
        (partial(LightningPlateau, monitor="train/never", patience=0, factor=0.5), "train/never"),
    ],
)
def test_plateau_reads_the_metric_of_its_monitor(make, monitor):
    class Never(Line):
        def training_step(self, batch, batch_idx):
            self.log("train/never", 1.0, batch_size=8)
            return super().training_step(batch, batch_idx)

    module = Never(optimizer=partial(RectifiedAdam, lr=0.1), lr_scheduler=make)
    assert module.configure_optimizers()["lr_scheduler"]["monitor"] == monitor
    training = fit(module, max_epochs=3, limit_val_batches=1)
    # Both metrics stand still: the rate halves after each epoch but the first.
    assert training.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 4)


# -- compile -----------------------------------------------------------------------------------------------------------


def test_children_with_parameters_are_compiled_once_and_keep_their_keys(monkeypatch):
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: calls.append(self))
    module = Line(compile=True)
    keys = list(module.state_dict())
    assert calls == []  # not before the strategy has placed the module
    fit(module)
    fit(module)
    assert calls == [module.body, module.head]  # the dropout has nothing to compile
    assert list(module.state_dict()) == keys
    fit(Line())
    assert len(calls) == 2


def test_networks_says_what_is_compiled(monkeypatch):
    class Head(Line):
        def networks(self):
            return [self.head]

    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: calls.append(self))
    module = Head(compile=True)
    fit(module)
    assert calls == [module.head]


# -- random state ------------------------------------------------------------------------------------------------------


def test_random_state_is_saved_and_restored(tmp_path):
    training = fit(Line(dropout=0.5))
    training.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.get_rng_state()
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(saved[STATE]["cpu"], state.unsqueeze(0))  # a row for each rank

    class Look(Line):
        def on_train_start(self):
            super().on_train_start()
            self.state = torch.get_rng_state()

    torch.manual_seed(5)
    module = Look(dropout=0.5)
    fit(module, tmp_path / "a.ckpt", max_epochs=2)
    assert torch.equal(module.state, state)


def test_a_checkpoint_without_random_state_resumes(tmp_path):
    """One that plain Lightning wrote, or an older version of this package."""
    training = fit(Line())
    training.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del saved[STATE]
    torch.save(saved, tmp_path / "a.ckpt")
    assert fit(Line(), tmp_path / "a.ckpt", max_epochs=2).global_step == 8


class Ranked(Line):
    """As rank R of some."""

    rank = 0

    @property
    def global_rank(self):
        return self.rank


def states_after_start(rank, saved=None, seed=0):
    module = Ranked()
    module.rank = rank
    module.on_load_checkpoint({} if saved is None else {STATE: {"cpu": saved}})
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    module.on_train_start()
    return before, torch.get_rng_state()


def test_ranks_draw_streams_of_their_own():
    before, first = states_after_start(0)
    assert torch.equal(before, first)  # rank 0 goes on as one process would
    streams = [states_after_start(rank, seed=seed)[1] for seed in (0, 1, 2) for rank in (0, 1, 2)]
    assert len({bytes(stream.tolist()) for stream in streams}) == 9  # also no seed's rank 1 is another seed's rank 0
    assert torch.equal(states_after_start(2)[1], streams[2])  # a function of seed and rank


def test_each_rank_gets_its_row_back_and_new_ranks_their_own_stream():
    rows = torch.stack([states_after_start(0, seed=seed)[0] for seed in (10, 11)])
    for rank in (0, 1):
        assert torch.equal(states_after_start(rank, rows)[1], rows[rank])
    assert torch.equal(states_after_start(2, rows)[1], states_after_start(2)[1])  # not there before


# -- the check of the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_loss_that_is_not_finite_raises_before_the_step(value):
    module = Line(loss=value)
    before = weights(module)
    with pytest.raises(NonFiniteLossError, match=r"player 'model' is (nan|-?inf) at step 0 \(epoch 0\)"):
        fit(module)
    assert differences(before, weights(module)) == []
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_user_can_switch_the_check_off():
    class Careless(Line):
        def on_before_backward(self, loss):
            pass

    assert fit(Careless(loss=float("nan"))).global_step == 4
