"""Every test of this folder that takes ``row`` runs for each module; the two processes start once."""

import pytest

from tests.contract.rows import ROWS
from tests.helpers.pool import Pool


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", ROWS, ids=[row.stem for row in ROWS], scope="session")


@pytest.fixture(scope="session")
def pool():
    pool = Pool()
    yield pool
    pool.close()
