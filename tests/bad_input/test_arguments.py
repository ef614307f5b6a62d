"""Every argument of every public constructor: what is wrong is refused in words, what is right is taken."""

import pytest
from hypothesis import HealthCheck, given, settings

import lightning_rectify
from lightning_rectify import attacks, callbacks, data, modules, nn, optim
from tests.bad_input.subjects import Subject
from tests.bad_input.table_callbacks import CALLBACKS
from tests.bad_input.table_data import DATA
from tests.bad_input.table_modules import MODULES
from tests.bad_input.table_parts import MANIFOLDS, NETWORKS, TEXTS
from tests.bad_input.table_plain import ATTACKS, NN, OPTIM, THEORY

SUBJECTS = [*MODULES, *DATA, *CALLBACKS, *OPTIM, *THEORY, *NN, *ATTACKS, *NETWORKS, *MANIFOLDS, *TEXTS]
EACH = [pytest.param(subject, name, id=f"{subject.name}-{name}") for subject in SUBJECTS for name in subject.tried()]
DRAWN = 12  # values of an argument that hypothesis draws, beside those that the table names
LEAST = 500  # cases that this folder promises

#: Public names that take no argument a user could get wrong, and why.
NO_ARGUMENTS = {
    "AttackRow": "a result",
    "Check": "a result",
    "Control": "a base class without arguments",
    "Evidence": "a result",
    "Limits": "limits for `robust_report`, numbers of any size",
    "Loss": "a type",
    "Model": "a type",
    "RequeueBetweenSteps": "no arguments",
    "RobustReport": "a result",
    "SpectralFactors": "made by spectral_control",
    "SpectralNormalization": "no arguments",
    "WarmupProbeResult": "a result",
    "__version__": "a string",
    "attacking": "a context",
    "autoattack": "needs a package that is not here",
    "average_checkpoints": "files: tests/callbacks/test_average.py",
    "bake": "one module",
    "condition_number": "one tensor",
    "controlled_layers": "one module",
    "masking_checks": "a result",
    "orthogonality_error": "one layer",
    "project": "one module",
    "rebuilt_once": "one module",
    "spectral_penalty": "one module",
    "spectrum": "one layer",
    "stable_rank": "one tensor",
}


@pytest.mark.parametrize(("subject", "argument"), EACH)
def test_wrong_values_are_refused_in_words(subject: Subject, argument: str, record_property):
    edges, strategy = subject.wrong(argument)
    tried: dict[str, str | None] = {}

    def refused(value):
        shown = repr(value)
        if shown not in tried:
            tried[shown] = subject.complaint(argument, value)
        assert tried[shown] is None, f"{argument} = {shown}: {tried[shown]}"

    for value in edges:
        refused(value)
    if strategy is not None:
        options = settings(
            max_examples=DRAWN, derandomize=True, deadline=None, database=None,
            suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        )  # fmt: skip
        options(given(strategy)(refused))()
    assert len(tried) >= subject.least(argument), f"only {len(tried)} cases: {list(tried)}"
    record_property("bad_input_cases", len(tried))  # tests/conftest.py prints the sum


def test_cases_are_as_many_as_promised():
    """Each test above tries at least ``least`` different values, and says so when it does not."""
    assert sum(subject.least(argument) for subject, argument in (param.values for param in EACH)) >= LEAST


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_right_values_are_taken(subject: Subject):
    """Else a constructor that refuses everything would pass."""
    for argument in subject.tried():
        for value in subject.values[argument].right:
            subject.call(argument, value)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_argument_has_a_line(subject: Subject):
    assert sorted(subject.arguments()) == sorted({*subject.values, *subject.left})


def test_every_public_name_has_a_table():
    names = {
        name for room in (lightning_rectify, attacks, callbacks, data, modules, nn, optim) for name in room.__all__
    }
    assert sorted(names - {subject.name for subject in SUBJECTS}) == sorted(NO_ARGUMENTS.keys() & names)
