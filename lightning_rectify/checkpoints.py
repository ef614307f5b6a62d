"""Checkpoint files that are whole or not there: writing them, reading them, finding the newest."""

import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lightning_rectify._lightning import TorchCheckpointIO

SUFFIX = ".ckpt"
#: Key of a checkpoint whose weights are an average of several: the files they came from.
AVERAGED_FROM = "lightning_rectify_averaged_from"
_FOLDER = 0x10  # an attribute in zip's table of contents
_ZIP, _OLD_PICKLE = b"PK\x03\x04", b"\x80"  # how files of torch.save begin: today's, and those before torch 1.6


class BrokenCheckpointError(ValueError):
    """A checkpoint file that is cut short, changed, or none at all."""


class UntrustedCheckpointError(UnpicklingError):
    """A checkpoint file that holds more than tensors and plain values, and could run code when it is loaded."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written so that a killed run or a full disk leaves the last one as it was.

    A checkpoint is written beside its place, brought to the disk, and then takes its place in one step. Lightning's own
    writes into the system's folder of temporary files first; where that is another file system (a scratch disk, a
    ``/tmp`` in memory), the last step is a copy, which tears the file it replaces if it does not come to its end. And
    where the file may not be written, Lightning's own says nothing and goes on.

    A file that is read is held against its checksums first, so that a damaged one is named, and none is used whose
    numbers have changed (``torch.load`` does not look at them). Types that could run code are refused unless
    ``weights_only`` is False; Lightning's own reader before 2.6 loads them.

    The command line uses it always. In Python, and in YAML for another command line::

        Trainer(plugins=[AtomicCheckpointIO()])

    Addresses that are no local path are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it, whole or not at all.

        Raises:
            OSError: with the file's name and what to do, if it cannot be written.
            TypeError: for ``storage_options``, as Lightning's own.
        """
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        # In memory first: torch's writer does not survive a disk that gets full under it.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        data = buffer.getbuffer()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.replace(path, data)
        except OSError as error:
            raise OSError(
                error.errno,
                f"Expected to write the checkpoint {str(path)!r} of {len(data) / 1e6:.1f} MB but got: "
                f"{error.strerror or error}. Checkpoints written before are unharmed. Free space or give the right to "
                "write there, or choose another folder: `dirpath` of ModelCheckpoint, `save_dir` of the logger, "
                "`default_root_dir` of the Trainer",
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, place: storage,
        weights_only: bool | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Read it, after :func:`require_whole`; arguments are Lightning's (before 2.6 it had no ``weights_only``).

        Raises:
            BrokenCheckpointError: if the file is damaged, or holds no dict.
            FileNotFoundError: if it is not there.
            UntrustedCheckpointError: if it could run code, unless ``weights_only`` is False.
        """
        if not _is_local(path):
            given = {} if weights_only is None else {"weights_only": weights_only}
            return super().load_checkpoint(path, map_location, **given, **options)
        if not Path(path).exists():
            raise FileNotFoundError(f"Checkpoint file not found: {path}")  # as Lightning says it
        require_whole(path)
        with _refusing_code(path):
            saved = torch.load(path, map_location=map_location, weights_only=weights_only is not False)
        require_lightning(saved, path, keys=())  # Fabric's checkpoints have others
        return saved

    def replace(self, path: Path, data: memoryview) -> None:
        """Put the bytes where ``path`` is, in one step.

        The name on the way does not end as checkpoints do and is always the same, so that nobody takes it for one and
        what a killed run leaves is written over.
        """
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # else a loss of power can leave the new name with nothing in it
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def require_whole(path: str | Path) -> None:
    """Refuse a damaged checkpoint file, and a folder; what is not there or not local is not looked at.

    Raises:
        BrokenCheckpointError: with what is wrong, and the newest whole one beside it.
    """
    if _is_local(path) and Path(path).is_dir():
        raise BrokenCheckpointError(
            f"Expected {str(path)!r} to be a checkpoint file but got a folder. Sharded weights are read by the "
            "strategy that wrote them."
        )
    if not _is_local(path) or not Path(path).is_file() or (wrong := what_is_wrong(path)) is None:
        return
    other = newest_checkpoint(Path(path).parent)
    instead = f"Go on from {str(other)!r}, the newest whole one" if other else "There is no whole one"
    raise BrokenCheckpointError(
        f"Expected {str(path)!r} to be a whole checkpoint but got a damaged file: {wrong}. {instead} in its folder."
    )


def read_safely(path: str | Path) -> dict[str, Any]:
    """What a checkpoint file holds; numbers stay on the disk until they are looked at.

    Raises:
        BrokenCheckpointError: if it is damaged, or is no checkpoint of Lightning's.
        UntrustedCheckpointError: if it could run code.
    """
    saved = load_plain(path)
    require_lightning(saved, path)
    checkpoint: dict[str, Any] = saved
    return checkpoint


def load_plain(path: str | Path) -> Any:
    """Tensors and plain values of a whole file of torch's; tensors stay on the disk until they are used.

    Raises:
        BrokenCheckpointError: if it is damaged.
        UntrustedCheckpointError: if it could run code.
    """
    require_whole(path)
    with Path(path).open("rb") as file:
        mapped = file.read(len(_ZIP)) == _ZIP  # those of old torch can not be
    with _refusing_code(path):
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)


@contextmanager
def _refusing_code(path: str | Path) -> Iterator[None]:
    """What torch's safe loader refuses, said in words; torch's own advise to load the file without it."""
    try:
        yield
    except UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"`{name[1]}`" if name else "something else"
        raise UntrustedCheckpointError(
            f"Expected {str(path)!r} to hold tensors and plain values alone but got {what} in it, which loading could "
            "run: it was not loaded. If the file is your own and names a type of yours, allow that type with "
            "torch.serialization.add_safe_globals; do not load a stranger's."
        ) from error


def require_lightning(
    saved: Any, path: str | Path, keys: Iterable[str] = ("state_dict", "pytorch-lightning_version")
) -> None:
    """Refuse what was saved by torch but is no checkpoint of Lightning's.

    Raises:
        BrokenCheckpointError: with what is missing.
    """
    if not isinstance(saved, dict) or (missing := [key for key in keys if key not in saved]):
        got = f"a dict without {', '.join(missing)}" if isinstance(saved, dict) else f"a {type(saved).__name__}"
        raise BrokenCheckpointError(f"Expected {str(path)!r} to be a checkpoint of Lightning's but got {got}.")


def what_is_wrong(path: str | Path) -> str | None:
    """How a checkpoint file is damaged; None if all its parts agree with their checksums.

    Files from before torch 1.6 have none: they count as whole.
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        start = file.read(len(_ZIP))
    if start.startswith(_OLD_PICKLE):
        return None
    if start != _ZIP:
        return "it is empty" if size == 0 else f"its {size:,} bytes do not begin as those of torch.save do"
    try:
        with zipfile.ZipFile(path) as archive:
            folder = next((part.filename for part in archive.infolist() if part.external_attr & _FOLDER), None)
            part = archive.testzip()
    # what zipfile makes of changed headers
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, OSError, struct.error, zlib.error) as error:
        return f"its {size:,} bytes are not the whole of a file of torch.save ({error})"
    if folder is not None:  # torch 2.6 reads nothing then: the tensor is what was in memory
        return f"its part {folder!r} is marked as a folder"
    return None if part is None else f"its part {part!r} does not agree with its checksum"


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The youngest checkpoint that is whole and that training can go on from.

    Args:
        folder: is searched with all below it, so that the folder of several runs (``runs/classifier``) gives the last
            run's.

    Returns:
        None if there is none.

    Example:
        >>> newest_checkpoint("no_such_folder")
    """
    found = [path for path in Path(folder).rglob(f"*{SUFFIX}") if path.is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if what_is_wrong(path) is None and _can_resume(path):
            return path
    return None


def _can_resume(path: Path) -> bool:
    """Whether it holds a run: not weights only, nor averaged ones, nor what the safe default does not load."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        return "optimizer_states" in saved and AVERAGED_FROM not in saved
    except Exception:  # whatever it holds, it is none to go on from
        return False


def _is_local(path: str | Path) -> bool:
    return "://" not in str(path)
