"""Every test of this folder that takes ``row`` runs for each module, ``yaml_row`` for those that have a YAML."""

from tests.contract.rows import ROWS


def pytest_generate_tests(metafunc):
    for name, rows in {"row": ROWS, "yaml_row": [row for row in ROWS if row.has_config]}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, rows, ids=[row.stem for row in rows], scope="session")
