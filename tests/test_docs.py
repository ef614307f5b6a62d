"""Every page of docs/ runs as printed, logs the keys that its table has, and points at what exists."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_rectify._lightning import NAME
from lightning_rectify.cli import shipped_configs
from tests.helpers.markdown import blocks, broken_links, key_table, named_configs

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WITH_KEYS = [page for page in PAGES if key_table(page)]


def logged_tags(folder):
    """Names of all scalars below the folder."""
    tags = set()
    for path in folder.rglob("events.out.tfevents.*"):
        tags |= set(EventAccumulator(str(path)).Reload().Tags()["scalars"])
    return tags


def pattern(key):
    """``val/kid_EXTRACTOR_nCOUNT``: what is written in capitals stands for anything."""
    return re.compile("[^/]+".join(map(re.escape, re.split("[A-Z]+", key))) + "$")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_page_runs_as_printed_and_logs_the_keys_of_its_table(page, tmp_path):
    onnx = all(importlib.util.find_spec(name) for name in ("onnxscript", "onnxruntime"))  # an extra
    code = "\n\n".join(block for block in blocks(page) if onnx or "onnx" not in block)
    torch.manual_seed(0)
    exec(compile(code.replace("lightning.pytorch", NAME), page.name, "exec"), {"__name__": "page"})
    if page not in WITH_KEYS:
        return
    tags = logged_tags(tmp_path) - {"epoch", "hp_metric"}
    keys = key_table(page)
    missing = [key for key in keys if not any(pattern(key).match(tag) for tag in tags)]
    assert missing == [], f"in the table, not logged; logged are {sorted(tags)}"
    # Keys of the test are those of validation; a key that the example logs itself stands in its code.
    known = [pattern(key) for key in keys] + [pattern(key.replace("val/", "test/")) for key in keys]
    unknown = [tag for tag in tags if not any(k.match(tag) for k in known) and f'"{tag}"' not in code]
    assert unknown == [], "logged, not in the table"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_figures_and_configs_of_page_exist(page):
    assert broken_links(page) == []
    assert [name for name in named_configs(page) if name not in shipped_configs()] == []


def test_index_names_every_page():
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name != "README.md" and f"({page.name})" not in text] == []
    shipped = [name for name in shipped_configs() if "/" not in name]
    everything = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in shipped if f"`{name}`" not in everything] == []
