"""Which room may import which, what importing costs, and what the wheel holds (DESIGN.md, "Rooms")."""

import ast
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lightning_rectify

PACKAGE = Path(lightning_rectify.__file__).parent
REPOSITORY = PACKAGE.parent
DOOR = "_lightning"
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}

# room -> rooms it may import, beside itself; a room that is not here fails: give it a line.
ARROWS = {
    "": {"optim", "nn", "attacks", "data", "modules", "callbacks"},  # __init__.py: for type checkers; lazily otherwise
    "__main__": {"cli"},
    DOOR: set(),
    "arguments": set(),
    "seeds": set(),
    "text": {"arguments"},
    "words": {"arguments"},
    "checkpoints": {DOOR},
    "optim": {"arguments"},
    "nn": {"arguments"},
    "attacks": {"nn", "arguments"},
    "data": {"text", "words", "seeds", "arguments", DOOR},
    "modules": {"optim", "nn", "attacks", "text", "words", "checkpoints", "seeds", "arguments", DOOR},
    "callbacks": {"optim", "nn", "attacks", "text", "words", "checkpoints", "seeds", "arguments", DOOR},
    "cli": {"optim", "nn", "attacks", "data", "modules", "callbacks", "checkpoints", DOOR},
}
# rooms that are plain torch
ONLY = {
    "arguments": set(),
    "seeds": {"numpy"},
    "optim": {"torch", "numpy"},
    "nn": {"torch", "numpy"},
    "attacks": {"torch", "numpy"},
    "text": {"torch", "sentencepiece"},
    "words": {"torch"},
}


def imports_of(source, module):
    """Absolute names of all modules that a source imports, wherever in the file; ``module`` is its own name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            # `from package import room` names a room as well
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == "lightning_rectify" else [base]


def complaints(path, source):
    """What is wrong with the imports of one file; ``path`` is relative to the package."""
    parts = Path(path).with_suffix("").parts
    room = "" if parts == ("__init__",) else parts[0]
    if room not in ARROWS:
        return [f"{path}: room {room!r} has no line in ARROWS"]
    found = []
    for name in imports_of(source, ".".join(["lightning_rectify", *parts])):
        top, *rest = name.split(".")
        if top in LIGHTNING and room != DOOR:
            found.append(f"{path} imports {name}: only {DOOR}.py may")
        elif top == "lightning_rectify" and rest:
            theirs = rest[0]
            if theirs in lightning_rectify._PUBLIC:
                found.append(f"{path} imports a public name: name its module, or the arrow cannot be seen")
            elif theirs not in ARROWS[room] | {room}:
                found.append(f"{path} imports {name}: {room} may not")
            elif room == theirs == "modules":
                found += _across_folders(path, parts, rest, name)
        elif room in ONLY and top not in ONLY[room] | set(sys.stdlib_module_names) | {"lightning_rectify"}:
            found.append(f"{path} imports {name}: {room} is {', '.join(sorted(ONLY[room]))} and the standard library")
    return found


def _across_folders(path, parts, rest, name):
    """A folder of modules/ imports itself and the files beside it (base.py, minimax.py), and those no folder."""
    if parts == ("modules", "__init__") or len(rest) < 2:
        return []
    shared = (PACKAGE / "modules" / f"{rest[1]}.py").exists()
    own = len(parts) > 2 and parts[1] == rest[1]
    return [] if shared or own else [f"{path} imports {name}: another module's folder"]


FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_arrows(path):
    assert complaints(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source", "bad"),
    [
        ("optim/x.py", "import torch, math\nimport numpy as np\nfrom lightning_rectify.optim.variance import a", False),
        ("optim/x.py", "def f():\n    import lightning", True),
        ("optim/x.py", "import scipy", True),
        ("nn/x.py", "from lightning_rectify._lightning import Callback", True),
        ("nn/x.py", "from lightning_rectify import optim", True),
        ("attacks/x.py", "from lightning_rectify.nn.modes import evaluating\nimport importlib, torch", False),
        ("attacks/x.py", "import pyautoattack", True),
        ("attacks/x.py", "from lightning_rectify.modules.base import RectifiedModule", True),
        ("modules/l2l/x.py", "from lightning_rectify.attacks.gradient import pgd", False),
        ("data/x.py", "from lightning_rectify.attacks.gradient import pgd", True),
        ("data/x.py", "from ..optim import moments", True),
        ("data/x.py", "from . import images\nfrom lightning_rectify._lightning import Trainer", False),
        ("callbacks/deep/x.py", "from lightning_rectify.modules.base import RectifiedModule", True),
        ("callbacks/x.py", "if TYPE_CHECKING:\n    from pytorch_lightning import Trainer", True),
        ("modules/gan/x.py", "from lightning_rectify.modules.base import a\nfrom .networks import b", False),
        ("modules/gan/x.py", "from lightning_rectify.modules.classifier.module import ImageClassifier", True),
        ("modules/base.py", "from lightning_rectify.modules.classifier import ImageClassifier", True),
        ("modules/gan/x.py", "from lightning_rectify import ImageClassifier", True),
        ("modules/gan/x.py", "from lightning_rectify.data import ImageData", True),
        ("cli.py", "from lightning_rectify.modules import ImageClassifier", False),
        ("extra/x.py", "", True),
    ],
)
def test_a_wrong_arrow_is_seen(path, source, bad):
    assert bool(complaints(path, source)) is bad


def test_modules_leave_backward_to_lightning():
    """loss.backward() lets ranks drift apart silently (PITFALLS 24)."""
    sources = {path: path.read_text(encoding="utf-8") for path in (PACKAGE / "modules").rglob("*.py")}
    assert sources
    assert [path for path, text in sources.items() if re.search(r"(?<!manual)\.backward\(", text)] == []


# -- what imports cost and bring ---------------------------------------------------------------------------------------


def python(code, check=True, cwd=None, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=check, cwd=cwd,
        env={**{k: v for k, v in os.environ.items() if k != "RECTIFY_LIGHTNING"}, **env},
    )  # fmt: skip


def test_public_names_import():
    assert sorted(lightning_rectify.__all__) == sorted([*lightning_rectify._PUBLIC, "__version__"])
    for name in lightning_rectify.__all__:
        assert getattr(lightning_rectify, name) is not None
        assert name in dir(lightning_rectify)
    with pytest.raises(AttributeError, match="no attribute 'RectifiedAdm'"):
        _ = lightning_rectify.RectifiedAdm


def test_optim_works_without_lightning():
    rooms = [room for room in ("optim", "nn", "attacks") if (PACKAGE / room).is_dir()]
    modules = [
        ".".join(["lightning_rectify", *path.with_suffix("").parts]).removesuffix(".__init__")
        for path in FILES
        if path.parts[0] in rooms
    ]
    code = "import importlib, sys\n"
    code += f"for name in {sorted(LIGHTNING)}:\n    sys.modules[name] = None\n"  # importing it now raises
    code += f"for name in {modules}:\n    importlib.import_module(name)\n"
    code += "import torch\nfrom lightning_rectify import RectifiedAdam\n"
    code += "w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)\n"
    code += "RectifiedAdam([w]).step(); print(w[0].item())"
    assert float(python(code).stdout) < 1


def test_import_costs_nothing():
    heavy = python("import lightning_rectify, sys; print('torch' in sys.modules, 'numpy' in sys.modules)").stdout
    assert heavy.split() == ["False", "False"]
    seconds = {"lightning_rectify": [], "pytorch_lightning": []}
    for _ in range(3):  # in turns, so that a busy moment hits both
        for name, times in seconds.items():
            start = time.perf_counter()
            python(f"import {name}")
            times.append(time.perf_counter() - start)
    ours, theirs = (statistics.median(times) for times in seconds.values())
    assert ours <= 1.15 * theirs


# -- the door ----------------------------------------------------------------------------------------------------------

SAY = """
from lightning_rectify import _lightning as door
print(door.NAME, door.Trainer.__module__, door.TensorBoardLogger.__module__)
"""


@pytest.mark.parametrize(
    ("first", "asked", "expected"),
    [
        ("pytorch_lightning", "", "pytorch_lightning"),
        ("lightning.pytorch", "pytorch_lightning", "lightning.pytorch"),  # what the user imported wins
        ("", "pytorch_lightning", "pytorch_lightning"),
        ("", "", "lightning.pytorch"),
    ],
)
def test_door_takes_the_name_the_user_has(first, asked, expected):
    if "lightning.pytorch" in (first, asked, expected):
        pytest.importorskip("lightning")
    said = python(f"import {first or 'sys'}\n{SAY}", **({"RECTIFY_LIGHTNING": asked} if asked else {})).stdout.split()
    assert said[0] == expected
    assert all(module.startswith(f"{expected}.") for module in said[1:])


def test_door_refuses_an_unknown_name():
    done = python(SAY, check=False, RECTIFY_LIGHTNING="lightning_pytorch")
    assert done.returncode == 1
    assert re.search(
        "ValueError: Expected RECTIFY_LIGHTNING to be one of lightning.pytorch, pytorch_lightning but got "
        "'lightning_pytorch'",
        done.stderr,
    )
