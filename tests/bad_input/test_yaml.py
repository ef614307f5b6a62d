"""YAML of the shipped configurations with one key that is wrong: the command line says which, and what it wanted."""

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rectify.cli import RectifyCLI, shipped_configs
from tests.bad_input.subjects import Subject
from tests.bad_input.table_callbacks import CALLBACKS
from tests.bad_input.table_data import DATA
from tests.bad_input.table_modules import MODULES
from tests.bad_input.values import NAN, kinds_of

EMBEDDED = (
    "classifier", "l2l", "language_model", "manifold", "spectral_gan", "spot", "spot_adaptation", "translation",
)  # fmt: skip
SUBJECTS = {subject.name: subject for subject in (*MODULES, *DATA, *CALLBACKS)}
DRAWN = 25  # cases of a configuration
LEAST = 100  # of all configurations together

#: What YAML can say, by kind (tests/bad_input/values.py).
PLAIN: dict[str, Any] = {
    "none": None, "bool": True, "float": 1.5, "nan": NAN, "str": "nonsense", "list": ["a", 1], "dict": {"a": 1}
}  # fmt: skip
TRAINER = {"max_epochs": 1.5, "accelerator": ["cpu"], "devices": {}, "precision": "17-true", "nonsense": 1}

#: What a configuration has set that is refused first where a key is wrong.
SETTLED: dict[tuple[str, str], dict[str, Any]] = {("manifold", "test_size"): {"val_size": 2}}


def is_plain(value: Any) -> bool:
    """Whether YAML gives the value back as it is."""
    return value is None or type(value) in (bool, int, float, str)


def cases(name: str) -> list[tuple[str, str, Any, Subject | None]]:
    """Section, key and value of what is wrong with a configuration."""
    whole = yaml.safe_load(shipped_configs()[name].read_text())
    found: list[tuple[str, str, Any, Subject | None]] = [("trainer", *item, None) for item in TRAINER.items()]
    sections = {key: SUBJECTS[whole[key]["class_path"].rpartition(".")[2]] for key in ("model", "data")}
    for section, subject in {**sections, "adaptive_rate": SUBJECTS["AdaptiveRateMonitor"]}.items():
        hints = get_type_hints((subject.of or subject.make).__init__)  # type: ignore[misc]
        for argument in subject.tried():
            if not all(map(is_plain, subject.beside.get(argument, {}).values())):
                continue
            hint = hints.get(argument, Any)
            # An object stands in YAML as a dict or as the name of its class, a path as a string.
            kinds = kinds_of(hint) | ({"dict", "str"} if kinds_of(hint) & {"callable", "module", "path"} else set())
            if kinds_of(hint) < kinds_of(Any):
                found += [(section, argument, value, subject) for kind, value in PLAIN.items() if kind not in kinds]
            found += [(section, argument, value, subject) for value in subject.wrong(argument)[0] if is_plain(value)]
    return found


def said(name: str, section: str, argument: str, value: Any, subject: Subject | None, capsys: Any) -> str | None:
    """What the command line says of it; None if it builds what it is told to."""
    beside = dict(subject.beside.get(argument, {})) if subject else {}
    if subject and all(map(is_plain, subject.base.values())):
        beside = {**subject.base, **beside}  # what is out of range may hang on it
    change = SETTLED.get((name, argument), {}) | beside | {argument: value}
    overlay = Path("wrong.yaml")
    overlay.write_text(yaml.safe_dump({section: {"init_args": change} if section in ("model", "data") else change}))
    capsys.readouterr()
    try:
        RectifyCLI(args=["--config", name, "--config", str(overlay), "--trainer.logger=false"], run=False)
    except SystemExit:
        return capsys.readouterr().err.rpartition("error: ")[2]
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_wrong_key_of_a_configuration_is_named(name: str, record_property, capsys):
    tried: dict[str, str | None] = {}

    @settings(
        max_examples=DRAWN, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(cases(name)))
    def refused(case):
        section, argument, value, subject = case
        words = said(name, section, argument, value, subject, capsys)
        tried[f"{section}.{argument} = {value!r}"] = words
        assert words is not None, f"{section}.{argument} = {value!r} is accepted silently"
        names = "|".join((argument, *(subject.named.get(argument, ()) if subject else ())))
        assert re.search(rf"\b({names})\b", words), f"{section}.{argument} = {value!r}: {words}"
        assert re.search("[Ee]xpected|not accepted|not match|invalid", words), f"{argument} = {value!r}: {words}"

    refused()
    assert len(tried) >= LEAST // len(EMBEDDED)
    record_property("bad_input_cases", len(tried))


def test_a_configuration_as_it_is_shipped_is_taken():
    """Else a command line that refuses everything would pass."""
    for name in EMBEDDED:
        RectifyCLI(args=["--config", name, "--trainer.logger=false"], run=False)


@pytest.mark.parametrize(("name", "size"), [("manifold", 3), ("classifier", 100), ("spot", 3), ("spot_adaptation", 3)])
def test_a_count_in_place_of_a_share_stays_a_count(name, size):
    """jsonargparse makes a float of it where the configuration has one."""
    Path("count.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"val_size": size}}}))
    built = RectifyCLI(args=["--config", name, "--config", "count.yaml", "--trainer.logger=false"], run=False)
    assert built.datamodule.val_size == size
    assert type(built.datamodule.val_size) is int
