"""Fixtures that every room shares: nothing leaks from one test into the next."""

import os

import pytest
import torch

from tests.helpers.pool import POOL

CASES = "bad_input_cases"  # a property of single tests


@pytest.fixture(autouse=True)
def _restore_process_state(tmp_path, monkeypatch):
    """Run in a folder of its own, and leave environment, default dtype, determinism and process group as found."""
    monkeypatch.chdir(tmp_path)
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Networks of tests are small: threads cost more than they bring, a hundred times more where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pool():
    """Two processes joined by gloo, which start with the first job."""
    yield POOL
    POOL.close()


def pytest_terminal_summary(terminalreporter):
    """How many wrong values the tests of tests/bad_input have tried."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    cases = [value for report in reports for name, value in getattr(report, "user_properties", ()) if name == CASES]
    if cases:
        terminalreporter.write_line(f"bad input: {sum(cases)} wrong values tried")
