"""A small module and its data, a disk that is full, and a look at errors."""

import resource
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.contract.rows import ROWS

BY_STEM = {row.stem: row for row in ROWS}


@pytest.fixture
def classifier():
    return BY_STEM["classifier"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own: ``small_disk(kilobytes)`` gives its folder; ``options`` as ``mount`` takes them."""
    mounted = []

    def make(kilobytes, options=""):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k{options}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no mount: {error}")
        if done.returncode:
            pytest.skip(f"may not mount: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def largest_file(size):
    """No file may grow beyond so many bytes, as on a disk that is full: writing on raises OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def flip(path: Path, at: int) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def cut(path: Path, size: int) -> None:
    """Keep the first bytes only."""
    path.write_bytes(path.read_bytes()[:size])
