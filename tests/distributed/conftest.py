"""Tests that take ``one_player`` run for each module with one optimizer, ``game`` for each with several."""

from tests.contract.rows import ROWS
from tests.distributed.support import is_game


def pytest_generate_tests(metafunc):
    for name, rows in {
        "row": ROWS,
        "one_player": [row for row in ROWS if not is_game(row)],
        "game": [row for row in ROWS if is_game(row)],
    }.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, rows, ids=[row.stem for row in rows], scope="session")
