"""Every test of this folder that takes ``row`` runs for each module, ``yaml_row`` for those that have a YAML.

The two processes start once.
"""

import pytest

from tests.contract.rows import ROWS
from tests.helpers.pool import POOL


def pytest_generate_tests(metafunc):
    for name, rows in {"row": ROWS, "yaml_row": [row for row in ROWS if row.has_config]}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, rows, ids=[row.stem for row in rows], scope="session")


@pytest.fixture(scope="session")
def pool():
    yield POOL
    POOL.close()
