"""Which strategy serves which module: the table of README, and the tests behind its cells.

python -m tests.distributed.support    # prints the table
"""

from dataclasses import dataclass

from tests.contract.rows import ROWS, Row


@dataclass(frozen=True)
class Column:
    """A way to train.

    Attributes:
        title: its heading.
        test: where it is tried, "file::test"; the test takes every row that ``games`` and ``one_player`` allow.
        games: whether games are served; if not, why.
        one_player: the same for modules with one optimizer.
        refusal: the test that shows what becomes of the modules that are not served.
    """

    title: str
    test: str | None
    games: bool | str = True
    one_player: bool | str = True
    refusal: str | None = None


COLUMNS = (
    Column("one process", "contract/test_configs.py::test_config_of_embedded_data_trains"),
    Column("`ddp`", "contract/test_two_processes.py::test_two_processes_with_half_batches_are_one_with_whole_batches"),
    Column("`ddp`, two nodes", "distributed/test_two_nodes.py::test_two_nodes_are_one_process"),
    Column(
        "FSDP2",
        "distributed/test_fsdp.py::test_sharded_weights_are_those_of_one_process",
        games="refused: players read each other's weights",
        refusal="distributed/test_strategies.py::test_games_refuse_what_shards",
    ),
    Column(
        "FSDP 1, DeepSpeed",
        None,
        games="refused: one optimizer, or flat weights",
        one_player="refused: flat weights; use FSDP2",
        refusal="distributed/test_strategies.py::test_one_player_modules_refuse_flat_pieces",
    ),
)


def is_game(row: Row) -> bool:
    """Whether a module has several optimizers."""
    return row.quiet is not None


def cell(row: Row, column: Column) -> str:
    """ "yes", or the reason why not."""
    served = column.games if is_game(row) else column.one_player
    return "yes" if served is True else str(served)


def table() -> str:
    """The support table, Markdown."""
    rows = [row for row in ROWS if row.has_config]
    lines = [["module", *(column.title for column in COLUMNS)], ["---"] * (len(COLUMNS) + 1)]
    lines += [[f"`{row.module.__name__}`", *(cell(row, column) for column in COLUMNS)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
