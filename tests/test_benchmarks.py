"""The benchmarks run in their quick mode and write what report.py reads; the timer and the report do what they say."""

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = ["optimizer_step", "monitor_cost", "lr_sensitivity", "variance_simulation", "spectral_cost", "probe_cost"]


def call(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=240)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import timing

    return timing


@pytest.fixture
def report(timing: ModuleType) -> ModuleType:
    import report

    return report


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick_mode_writes_a_result_that_report_renders(script: str, results: Path, report: ModuleType) -> None:
    path = results / f"{script}.json"
    done = call(script, "--quick", "--out", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["name"] == script
    assert result["command"] == f"python benchmarks/{script}.py --quick"
    assert result["rows"]
    assert result["environment"]["torch"]
    text = path.read_text()
    assert str(results) not in text
    assert str(ROOT) not in text
    for name in (name for name in report.RENDERERS if name.split(".")[0] == script):
        assert report.render(name, results).count("|") > 10


def test_narrow_discriminator_study_runs_goes_on_and_is_rendered(results: Path, report: ModuleType) -> None:
    path = results / "spectral_gan.json"
    first = call("papers/spectral_gan", "--quick", "--out", str(path))
    assert first.returncode == 0, first.stderr
    assert "4 of 4 runs to do" in first.stdout
    result = json.loads(path.read_text())
    assert result["command"] == "python benchmarks/papers/spectral_gan.py --quick"
    assert [(row["control"], row["seed"]) for row in result["rows"]] == [
        (control, seed) for control in ("plain", "8 d_optimal") for seed in (1, 2)
    ]
    plain, _ = result["table"]
    first_kid, second_kid = (row["kid"] for row in result["rows"][:2])
    assert plain["kid"] == pytest.approx((first_kid * second_kid) ** 0.5, rel=1e-12)
    # Two values: Student's t of one degree of freedom, 12.706, times half their distance, on logarithms.
    ratio = max(first_kid / second_kid, second_kid / first_kid) ** (12.706 / 2)
    assert plain["kid_high"] == pytest.approx(plain["kid"] * ratio, rel=1e-9)
    assert plain["kid_low"] == pytest.approx(plain["kid"] / ratio, rel=1e-9)
    largest = {max(values) for values in result["rows"][2]["spectra"].values()}
    assert largest
    assert all(value == pytest.approx(1, abs=0.02) for value in largest)  # normalized, but for U and V
    assert report.spectral_gan("digits", "kid", 1000)(result).count("|") > 6
    assert path.with_suffix(".png").exists()

    again = call("papers/spectral_gan", "--quick", "--out", str(path))
    assert "0 of 4 runs to do" in again.stdout


def test_interrupted_study_goes_on_and_refuses_other_settings(results: Path, monkeypatch, timing: ModuleType) -> None:
    import lr_sensitivity

    path = results / "study.json"
    settings = {"epochs": 1}
    row = {"optimizer": "SGD", "lr": 0.1, "seed": 1, "accuracy": 0.1, "diverged": True}
    lr_sensitivity.save(path, settings, [row])
    assert lr_sensitivity.finished_rows(path, settings) == [row]
    assert json.loads(path.read_text())["table"][0]["diverged"] == 1
    with pytest.raises(SystemExit, match="other settings"):
        lr_sensitivity.finished_rows(path, {"epochs": 2})


def test_learning_rate_warms_up_and_drops_twice(timing: ModuleType) -> None:
    from lr_sensitivity import factor

    assert [factor(step, total=186, warmup=4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [factor(step, total=186, warmup=0) for step in (0, 80, 81, 121, 122)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01], rel=1e-12
    )


def test_a_ratio_is_taken_round_by_round(timing: ModuleType) -> None:
    """A machine that gets ten times slower on the way changes no ratio, though it changes both medians."""
    now = 0.0
    rounds = count()

    def work(seconds: float):
        def call() -> None:
            nonlocal now
            now += seconds * (1.0 if next(rounds) < 8 else 10.0)

        return call

    timings = timing.interleave({"a": work(2.0), "b": work(1.0)}, rounds=5, warmup=1, clock=lambda: now)
    assert timings.samples["b"] == [1.0, 1.0, 1.0, 10.0, 10.0]
    assert timings.ratio("a", "b").median == 2.0
    assert timings.fastest(["a", "b"]) == "b"
    assert timings.milliseconds("a") == {"median_ms": 2000.0, "min_ms": 2000.0, "max_ms": 20000.0}


def test_command_hides_paths(timing: ModuleType) -> None:
    command = timing.command(["/home/me/benchmarks/x.py", "--data", "/d", "--out=/o", "--lr", "0.1", "--out", "/o"])
    assert command == 'python benchmarks/x.py --data "$LIGHTNING_RECTIFY_DATA" --lr 0.1'


def test_report_writes_checks_and_complains(
    tmp_path: Path, timing: ModuleType, report: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    arguments = ("--documents", str(readme), "--results", str(results))
    readme.write_text("before\n<!-- table:optimizer_step -->\nold\n<!-- /table:optimizer_step -->\nafter\n")
    assert report.main(arguments) == 1
    assert "optimizer_step.json is missing" in capsys.readouterr().err

    row = {"model": "m", "optimizer": "o", "status": "measured", "median_ms": 1.5, "ratio_to_fused_adam": 1.25}
    timing.write_result(results / "optimizer_step.json", "optimizer_step", {"rounds": 3}, [row])
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert "| o | 1.50 ms (1.25×) |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert call("report", *arguments, "--check").returncode == 0  # as a script

    with pytest.raises(report.ReportError, match="no such table"):
        report.rewrite("<!-- table:nothing -->\n<!-- /table:nothing -->", results)
    with pytest.raises(report.ReportError, match="table:optimizer_step"):
        report.rewrite("<!-- table:optimizer_step -->\n", results)
