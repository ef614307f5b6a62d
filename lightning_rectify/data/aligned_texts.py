"""Parallel text in files: reading it line by line, refusing what is not aligned, and fetching Multi30k."""

import gzip
import hashlib
import os
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
"""Folder of Multi30k's files (arXiv:1605.00459)."""

MULTI30K_FILES = {"train": "train", "val": "val", "test": "test_2016_flickr"}  # part: name without language

_MULTI30K_SHA256 = {  # of the text, uncompressed
    "train.de": "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
    "train.en": "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
    "val.de": "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
    "val.en": "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
    "test_2016_flickr.de": "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
    "test_2016_flickr.en": "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
}
_TIMEOUT = 60.0  # seconds without an answer


class Aligned(NamedTuple):
    """N sentences and their translations, in the order of their file."""

    sources: list[str]
    targets: list[str]


def read_pairs(name: str | Path, source: str, target: str) -> Aligned:
    """Read parallel text.

    Args:
        name: a tab-separated file of two columns, source and target, if it ends in ".tsv" or ".tsv.gz"; else what the
            names of two files with the same number of lines begin with, ``NAME.source`` and ``NAME.target``, each
            perhaps with ".gz" behind it.
        source: language of the first, as the file is called.
        target: language of the second.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: with file and line, for what :func:`decode_lines` refuses, an empty line, another number of columns
            than two; and for files of different numbers of lines.
    """
    if str(name).endswith((".tsv", ".tsv.gz")):
        path = Path(name)
        pair = _columns(path, read_lines(path))
        places = [path, path]
    else:
        places = [find(f"{name}.{language}") for language in (source, target)]
        pair = Aligned(*(read_lines(path) for path in places))
        if len(pair.sources) != len(pair.targets):
            raise ValueError(
                f"Expected {places[0]} and {places[1]} to have the same number of lines but got {len(pair.sources)} "
                f"and {len(pair.targets)}."
            )
    for path, language, side, lines in zip(places, (source, target), ("source", "target"), pair, strict=True):
        _refuse_empty(path, f"{side} ({language})", lines)
    if not pair.sources:
        raise ValueError(f"Expected {places[0]} to hold at least one line but got none.")
    return pair


def read_lines(path: str | Path) -> list[str]:
    """Lines of a text file in UTF-8, uncompressed first if its name ends in ".gz".

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not what its name says, or as :func:`decode_lines`.
    """
    path = find(path)
    data = path.read_bytes()
    return decode_lines(_unzip(data, str(path)) if path.suffix == ".gz" else data, str(path))


def decode_lines(data: bytes, name: str) -> list[str]:
    r"""Lines of UTF-8 text, without their ends; a byte order mark at the beginning is left out.

    Lines end at line feeds, with a carriage return before it or not, and nowhere else: a Unicode line separator or a
    form feed within a sentence of one file would misalign the other.

    Args:
        data: the text; the last line may have an end or not.
        name: of the file, for messages.

    Raises:
        ValueError: with file, line and byte (both from 1), if it is not UTF-8.

    Example:
        >>> decode_lines("ja\r\nso\u2028la\n".encode(), "x.de")
        ['ja', 'so\u2028la']
    """
    try:
        text = data.decode().removeprefix("\ufeff")  # the byte order mark
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, byte = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise ValueError(
            f"Expected {name} to be text in UTF-8 but got byte 0x{error.object[error.start]:02x}, which does not "
            f"belong there, at {name}:{line}:{byte}."
        ) from None
    lines = text.split("\n")
    if not lines[-1]:
        del lines[-1]
    return [line.removesuffix("\r") for line in lines]


def find(path: str | Path) -> Path:
    """The file itself, or else the one with ".gz" behind its name.

    Raises:
        FileNotFoundError: if there is neither.
    """
    zipped = Path(f"{path}.gz")
    for candidate in (Path(path), zipped):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"Expected a file {Path(path).name} or {zipped.name} but found neither in {str(Path(path).parent)!r}."
    )


def fetch_multi30k(root: str | Path, languages: Sequence[str]) -> None:
    """Download those files of Multi30k that are not in ``root``; each is checked before it is kept.

    Args:
        root: folder, made if need be; the files are kept compressed, as ``train.de.gz`` and the like.
        languages: of "de" and "en".

    Raises:
        ValueError: for another language, and if a file is not the one that is known; it is not kept.
        OSError: if a file cannot be fetched.
    """
    for name in (f"{part}.{language}" for part in MULTI30K_FILES.values() for language in languages):
        if name not in _MULTI30K_SHA256:
            raise ValueError(f"Expected argument `languages` to be of de and en but got {languages!r}.")
        try:
            find(Path(root) / name)
        except FileNotFoundError:
            _fetch(f"{MULTI30K_URL}/{name}.gz", Path(root) / f"{name}.gz", _MULTI30K_SHA256[name])


def _fetch(url: str, path: Path, expected: str) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            data: bytes = answer.read()
    except OSError as error:
        raise OSError(f"Expected to download {url} but got: {error}.") from error
    got = hashlib.sha256(_unzip(data, url)).hexdigest()
    if got != expected:
        raise ValueError(f"Expected {url} to hold text of SHA-256 {expected} but got {got}. It was not kept.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(path)  # whole or not at all


def _unzip(data: bytes, name: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"Expected {name} to be compressed by gzip but got: {error}.") from None


def _columns(path: Path, lines: list[str]) -> Aligned:
    pair = Aligned([], [])
    for number, line in enumerate(lines, start=1):
        columns = line.split("\t")
        if len(columns) != 2:
            raise ValueError(
                f"Expected {path} to have two columns, source and target, with a tab between them but got "
                f"{len(columns)} at {path}:{number}."
            )
        pair.sources.append(columns[0])
        pair.targets.append(columns[1])
    return pair


def _refuse_empty(path: Path, side: str, lines: list[str]) -> None:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ValueError(
                f"Expected each line to hold a sentence but got an empty one on the {side} side at {path}:{number}."
            )
