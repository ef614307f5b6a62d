"""What no strategy serves fails before anything is trained, and says what to do; the support table says the same."""

import importlib
from importlib import import_module
from pathlib import Path

import pytest

from lightning_rectify._lightning import NAME
from tests.contract.rows import ROWS
from tests.distributed.support import COLUMNS, cell, is_game, table
from tests.helpers.training import trainer

strategies = import_module(f"{NAME}.strategies")
README = Path(__file__).parents[2] / "README.md"


def stand_in(name):
    """A strategy of that name: the real ones want a GPU, or a package, that tests have not."""
    return type(name, (strategies.SingleDeviceStrategy,), {})("cpu")


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_one_player_modules_refuse_flat_pieces(one_player, name):
    words = (
        f"`strategy` for {one_player.module.__name__} to be 'auto', 'ddp' or ModelParallelStrategy.*got {name}: .*flat"
    )
    with pytest.raises(ValueError, match=words):
        trainer(strategy=stand_in(name), max_steps=1).fit(one_player.make_module(), one_player.make_data())


@pytest.mark.parametrize("name", ["ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy"])
def test_games_refuse_what_shards(game, name):
    module = game.make_module()
    module.trainer = trainer(strategy=stand_in(name))
    words = f"`strategy` for {type(module).__name__}, a game of . players, to be 'auto' or 'ddp' but got {name}: it"
    with pytest.raises(ValueError, match=words):
        module.setup("fit")


def test_a_subclass_may_try_what_is_refused():
    row = ROWS[0]

    class Daring(row.module):
        def check_strategy(self):
            pass

    fit = trainer(strategy=stand_in("DeepSpeedStrategy"), max_steps=2, limit_val_batches=0)
    fit.fit(row.make_module(cls=Daring), row.make_data())
    assert fit.global_step == 2


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.title)
def test_cells_of_the_support_table_have_tests(column):
    every = {cell(row, column) for row in ROWS}
    assert ("yes" in every) == (column.test is not None)
    assert any(text != "yes" for text in every) == (column.refusal is not None)
    for name in filter(None, (column.test, column.refusal)):
        file, _, function = name.partition("::")
        module = importlib.import_module("tests." + file.removesuffix(".py").replace("/", "."))
        assert callable(getattr(module, function))


def test_readme_has_the_support_table():
    """As ``python -m tests.distributed.support`` prints it."""
    assert table() in README.read_text(encoding="utf-8")
    assert {is_game(row) for row in ROWS} == {True, False}
