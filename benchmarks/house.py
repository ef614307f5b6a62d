"""The package as a house: how long it takes to import, how many public names it has, how many lines each room.

Each import runs in a new process, ``--rounds`` of them, names by turns; its time is the CPU time between an empty
interpreter and one that has the name, so that what other processes do to the clock does not count.

    python benchmarks/house.py
"""

import ast
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timing import ROOT, output_path, parser, write_result

import lightning_rectify

NAME = "house"
PACKAGE = ROOT / "lightning_rectify"
COMFORTABLE = {"lines_of_a_file": 300, "lines_of_a_function": 40}  # CONTRIBUTING's measure
IMPORT = """
import sys, time
begin = time.process_time()
exec(sys.argv[1])
print(time.process_time() - begin, len(sys.modules), int("torch" in sys.modules), int(any(
    name in sys.modules for name in ("lightning.pytorch", "pytorch_lightning"))))
"""


def import_rows(names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """CPU seconds of each import, its modules, and whether it brings torch and Lightning."""
    statements = {"torch": "import torch", "lightning": "from lightning_rectify import _lightning"}
    statements |= {"lightning_rectify": "import lightning_rectify"}
    statements |= {name: f"from lightning_rectify import {name}" for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in statements}
    found: dict[str, list[int]] = {}
    for _ in range(rounds):
        for name, statement in statements.items():
            done = subprocess.run(
                [sys.executable, "-c", IMPORT, statement], capture_output=True, text=True, check=True, cwd=ROOT
            )
            taken, *rest = done.stdout.split()
            seconds[name].append(float(taken))
            found[name] = [int(value) for value in rest]
    return [
        {
            "import": name,
            "cpu_seconds": round(statistics.median(seconds[name]), 4),
            "modules": found[name][0],
            "torch": bool(found[name][1]),
            "lightning": bool(found[name][2]),
        }
        for name in statements
    ]


def rooms() -> list[dict[str, Any]]:
    """Files and lines of each room: a folder of the package, of ``modules`` each module's, or what lies at the top."""
    files: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts[:-1]
        files.setdefault("/".join(parts[:2]) or "(top)", []).append(path)
    return [room(name, paths) for name, paths in files.items()]


def room(name: str, paths: Sequence[Path]) -> dict[str, Any]:
    """Lines of a room and what is longer in it than is comfortable."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    functions = [length for path in paths for length in function_lengths(path)]
    return {
        "room": name,
        "files": len(paths),
        "lines": sum(lines.values()),
        "functions": len(functions),
        "longest_function": max(functions, default=0),
        "long_functions": sum(length > COMFORTABLE["lines_of_a_function"] for length in functions),
        "long_files": {
            path.relative_to(PACKAGE).as_posix(): count
            for path, count in lines.items()
            if count > COMFORTABLE["lines_of_a_file"]
        },
    }


def function_lengths(path: Path) -> list[int]:
    """Lines of each function's body: without signature and docstring, which say what the body need not."""
    lengths = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lengths.append((node.end_lineno or 0) - body[0].lineno + 1 if body else 0)
    return lengths


def describe(imports: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], names: int) -> str:
    """What the console shows."""
    lines = [f"{row['import']:<22} {row['cpu_seconds']:6.2f} s  {row['modules']:5} modules" for row in imports]
    lines += [f"{row['room']:<26} {row['files']:3} files {row['lines']:6} lines" for row in found]
    long_files = {name: count for row in found for name, count in row["long_files"].items()}
    lines += [f"{name} {count}" for name, count in sorted(long_files.items(), key=lambda item: -item[1])]
    total, functions = (sum(row[key] for row in found) for key in ("lines", "long_functions"))
    return "\n".join(
        [*lines, f"{names} public names, {total} lines, {len(long_files)} long files, {functions} long functions"]
    )


def main() -> None:
    arguments = parser(__doc__, NAME)
    arguments.add_argument("--rounds", type=int, help="processes a name (default 5; quick: 1)")
    args = arguments.parse_args()
    rounds = args.rounds or (1 if args.quick else 5)
    public = [name for name in lightning_rectify.__all__ if name != "__version__"]
    imports = import_rows(public[:1] if args.quick else public, rounds)
    found = rooms()
    print(describe(imports, found, len(public)))
    settings = {"rounds": rounds, "public_names": len(public), **COMFORTABLE}
    write_result(output_path(NAME, args.out, args.quick), NAME, settings, found, imports=imports)


if __name__ == "__main__":
    main()
