"""What a page of Markdown shows and names: code, links, configurations, a table of keys."""

import re
from pathlib import Path

_FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CONFIG = re.compile(r"--config[ =](?:configs/)?([\w/]+)(?:\.yaml)?")
_KEY = re.compile(r"^\| (`[^|]+`) \|", re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[str]:
    """The ```python blocks of a page, in its order."""
    return _FENCE.findall(text_of(page))


def broken_links(page: Path) -> list[str]:
    """Targets of links and figures that are neither an address nor a file beside the page, nor a heading in one."""
    broken = []
    for link in _LINK.findall(text_of(page)):
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = page if not path else page.parent / path
        if not target.exists() or (heading and heading not in _anchors(target)):
            broken.append(link)
    return broken


def _anchors(page: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_configs(page: Path) -> list[str]:
    """Names behind ``--config``, but paths of runs and what stands in capitals for any name."""
    return [name for name in _CONFIG.findall(text_of(page)) if not name.startswith("runs/") and not name.isupper()]


def key_table(page: Path) -> list[str]:
    """Keys in the first column of the table under the heading "What it logs"; none without such a heading."""
    _, heading, rest = text_of(page).partition("## What it logs\n")
    rows = _KEY.findall(rest.partition("\n## ")[0]) if heading else []
    return [key for row in rows for key in re.findall(r"`([^`]+)`", row)]
