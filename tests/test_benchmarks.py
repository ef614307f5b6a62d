"""The benchmarks run in their quick mode and write what report.py reads; the timer and the report do what they say."""

import json
import math
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = [
    *("optimizer_step", "monitor_cost", "lr_sensitivity", "variance_simulation", "spectral_cost", "probe_cost"),
    *("lightning_cost", "house"),
    pytest.param("scaling_efficiency", marks=pytest.mark.slow),  # four processes start
]


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


def test_adaptation_study_runs_goes_on_and_is_rendered(results: Path, report: ModuleType) -> None:
    path = results / "spot_adaptation.json"
    methods = ["source alone", "exact plan of features", "two-stage", "joint, Wasserstein"]
    arguments = ("papers/spot_adaptation", "--quick", "--methods", *methods, "--out", str(path))
    first = call(*arguments)
    assert first.returncode == 0, first.stderr
    assert "4 of 4 runs to do" in first.stdout
    result = json.loads(path.read_text())
    assert str(results) not in path.read_text()
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == [row["method"] for row in result["table"]] == methods
    # A share of 359 test images; accuracies are float32.
    assert all(row["accuracy"] * 359 == pytest.approx(round(row["accuracy"] * 359), abs=1e-3) for row in rows.values())
    exact = rows.pop("exact plan of features")
    assert exact["solver"] in ("POT EMDTransport", "scipy assignment")
    assert exact["accuracy_best_of_test"] is None
    assert all(row["accuracy_best_of_test"] >= row["accuracy"] - 1e-6 for row in rows.values())
    text = report.render("spot_adaptation.paper", results)
    assert f"| two-stage | {100 * rows['two-stage']['accuracy']:.1f}, 1 |" in text

    next(path.parent.glob("spot_adaptation_runs/*source_alone_s0*")).unlink()
    again = call(*arguments)
    assert "1 of 4 runs to do" in again.stdout
    fields = ("method", "seed", "accuracy", "accuracy_best_of_test", "unsupervised_score")
    repeated, once = (
        [[row[name] for name in fields] for row in rows]
        for rows in (json.loads(path.read_text())["rows"], result["rows"])
    )
    assert repeated == once


@pytest.mark.parametrize("script", ["spot_scaling", "papers/spot_adaptation_limits"])
def test_transport_studies_run_go_on_and_are_rendered(script: str, results: Path, report: ModuleType) -> None:
    name = script.rpartition("/")[2]
    path = results / f"{name}.json"
    for _ in range(2):  # the second call reads what the first has left
        done = call(script, "--quick", "--out", str(path))
        assert done.returncode == 0, done.stderr
        text = report.render(name, results)
        assert text.count("|") >= 8
    assert str(results) not in path.read_text()
    rows = json.loads(path.read_text())["rows"]
    assert all(math.isfinite(row.get("cost", row.get("accuracy"))) for row in rows)


def test_a_crossover_is_where_ours_stays_the_cheaper_one(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import spot_scaling as study

    def line(size: int, side: str, seconds: float | None) -> dict[str, object]:
        return {"problem": "p", "size": size, "side": side, "reached": seconds is not None, "cpu_seconds": seconds}

    table = [line(size, "ours", seconds) for size, seconds in ((10, 5.0), (100, 5.0), (1000, 5.0))]
    table += [line(size, "slower", seconds) for size, seconds in ((10, 9.0), (100, 1.0), (1000, 6.0))]
    table += [line(size, "lost", seconds) for size, seconds in ((10, 1.0), (100, None), (1000, None))]
    table += [line(size, "faster", seconds) for size, seconds in ((10, 9.0), (100, 9.0), (1000, 5.0))]
    found = {row["rival"]: row["from_size"] for row in study.crossovers(table)}
    assert found == {"slower": 1000, "lost": 100, "faster": None}
    far = [{**row, "reached": row["side"] != "ours" and row["reached"]} for row in table]  # ours is within it nowhere
    assert all(row["from_size"] is None for row in study.crossovers(far))


#: Bars of the manifold study: mode, then the least and largest slope over the cells and over the local weights.
SLOPES = {
    ("circle", "p1"): (-2.3, -1.7, -2.3, -1.7), ("circle", "telescope_p1"): (-2.3, -1.7, -2.3, -1.7),
    **{("circle", mode): (-3.6, -2.6, -3.2, -2.3) for mode in ("paper", "paper, r = 0.8", "lean", "telescope")},
    ("sphere", "p1"): (-2.3, -1.7, -1.2, -0.8), ("sphere", "telescope_p1"): (-2.3, -1.7, -1.2, -0.8),
    ("sphere", "telescope"): (-3.6, -2.6, -2.0, -1.3), ("moment curve", "telescope_p1"): (-2.3, -1.7, -2.3, -1.7),
}  # fmt: skip


@pytest.mark.parametrize(("manifold", "mode"), SLOPES, ids=lambda part: part)
def test_published_slopes_are_those_of_the_theory(manifold: str, mode: str) -> None:
    """In every R^D: -2 by cells for degree 1, -3 for degree 2, divided by the dimension for the local weights."""
    result = json.loads((BENCHMARKS / "results" / "manifold_scaling.json").read_text())
    (line,) = (line for line in result["table"] if (line["manifold"], line["label"]) == (manifold, mode))
    low, high, low_local, high_local = SLOPES[manifold, mode]
    assert len(line["dims"]) == 4
    for found in line["dims"].values():
        assert low <= found["slope_size"] <= high
        assert low_local <= found["slope_local"] <= high_local


def test_published_errors_do_not_depend_on_the_space() -> None:
    """With distances computed alike (bar: 1.05); the torus and R^1000 are among the rows."""
    result = json.loads((BENCHMARKS / "results" / "manifold_scaling.json").read_text())
    same = [line for line in result["table"] if line["kind"] == "same"]
    assert [line["manifold"] for line in same] == ["circle", "sphere"]
    assert all("1000" in line["dims"] and line["spread"] <= 1 + 1e-9 for line in same)
    assert any(row["manifold"] == "torus" and row["ambient_dim"] == 1000 for row in result["rows"])


def test_every_method_of_the_adaptation_study_can_be_built(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "papers"))
    import spot_adaptation as study

    built = {
        name: study.make_module(study.Cell("usps to mnist", "paper", name, 0), study.Study()) for name in study.METHODS
    }
    # A module that never leaves the source, and one whose plan is one round and of no use.
    assert built["source alone"].source_steps > study.Study().rounds
    assert built["own sure answers, no plan"].plan_steps == 1 > built["own sure answers, no plan"].carried_weight
    assert built["two-stage"].source_steps + built["two-stage"].plan_steps == 3 * study.Study().rounds // 4
    assert {module.method for module in built.values()} == {"two_stage", "joint"}


def test_point_cloud_study_runs_and_goes_on(results: Path, report: ModuleType) -> None:
    path = results / "manifold_points.json"
    first = call("papers/manifold_points", "--quick", "--out", str(path))
    assert first.returncode == 0, first.stderr
    assert "7 of 7 runs to do" in first.stdout
    result = json.loads(path.read_text())
    assert result["command"] == "python benchmarks/papers/manifold_points.py --quick"
    measured = {row["method"]: row for row in result["rows"] if row["status"] == "measured"}
    assert len(measured) == 6
    assert measured["charts"]["rmse"] < measured["k-nn"]["rmse"]
    assert measured["charts"]["dim"] == 2
    assert all(row["fit_seconds"] > 0 and row["predict_ms_per_1000"] > 0 for row in measured.values())
    refused = [row["status"] for row in result["rows"] if row["size"] == 50_000]
    assert refused == ["not run: a matrix of 20 GB"]
    assert str(results) not in path.read_text()

    from report_manifold import TABLES

    errors, costs = (report.table(*TABLES[name](result)) for name in ("manifold_points", "manifold_points.cost"))
    assert f"{measured['charts']['rmse']:.4f} (1)" in errors
    assert "| 50,000, kernel ridge | not run: a matrix of 20 GB |" in costs

    next(path.parent.glob("manifold_points_runs/charts_200*")).unlink()
    again = call("papers/manifold_points", "--quick", "--out", str(path))
    assert "1 of 7 runs to do" in again.stdout
    assert len(json.loads(path.read_text())["rows"]) == 7


def test_manifold_scaling_runs_goes_on_and_draws(
    results: Path, monkeypatch: pytest.MonkeyPatch, report: ModuleType
) -> None:
    path = results / "manifold_scaling.json"
    first = call("papers/manifold_scaling", "--quick", "--out", str(path))
    assert first.returncode == 0, first.stderr
    assert "14 of 14 runs to do" in first.stdout
    result = json.loads(path.read_text())
    assert result["command"] == "python benchmarks/papers/manifold_scaling.py --quick"
    assert len(result["rows"]) == 14
    table = {row["label"]: row for row in result["table"] if row["manifold"] == "circle"}
    assert table["10 levels in the distances"]["spread"] <= 1.05  # D = 3 and 10: bar A3
    # linear interpolation is of order 2; three coarse grids
    assert -2.3 <= table["telescope_p1"]["dims"]["3"]["slope_size"] <= -1.7
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert str(results) not in path.read_text()

    from report_manifold import TABLES

    for name in ("manifold_scaling", "manifold_scaling.dimension"):
        assert report.table(*TABLES[name](result)).count("|") > 20

    next(path.parent.glob("manifold_scaling_runs/k_nn*")).unlink()
    again = call("papers/manifold_scaling", "--quick", "--out", str(path))
    assert "1 of 14 runs to do" in again.stdout
    assert [row["label"] for row in json.loads(path.read_text())["rows"]] == [row["label"] for row in result["rows"]]

    monkeypatch.syspath_prepend(str(BENCHMARKS / "papers"))
    import manifold_scaling

    # on the line of logarithms from (100, 1e-1) to (10000, 1e-3), 1e-2 is halfway
    assert manifold_scaling.needed([100, 10_000], [1e-1, 1e-3], 1e-2) == pytest.approx(1000)
    assert manifold_scaling.needed([100, 10_000], [1e-1, 2e-2], 1e-2) is None
    assert manifold_scaling.slope([1, 2, 4, 8], [5e-2, 1.6e-2, 4e-3, 1e-3]) == pytest.approx(-2)
    assert manifold_scaling.slope([1, 2, 4], [5e-2, 1e-2, 1e-3]) is None


def test_manifold_detector_runs(results: Path, report: ModuleType) -> None:
    path = results / "manifold_detector.json"
    done = call("papers/manifold_detector", "--quick", "--out", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    lines = {(row["detector"].split(",")[0], row["charts"]): row for row in result["table"]}
    assert lines["1-NN", None]["auroc"] > 0.9  # pieces of photographs are no digits
    assert lines["gate", 128]["auroc"] > 0.99
    assert lines["gate", 128]["held_digits"] > 0.9  # 99 of 100 training images are within the inner radius
    assert lines["gate", 128]["held_others"] < 0.1 < lines["PCA", None]["let_in_at_95"]
    assert lines["gate", 128]["stored"] == 128 * 64
    from report_manifold import TABLES

    assert "gate, 128 charts" in report.table(*TABLES["manifold_detector"](result))
    assert str(results) not in path.read_text()


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
    command = timing.command(["benchmarks/x.py", "--peer", "/p/bin/python", "--weights=/w.ckpt", "--rounds", "3"])
    assert command == "python benchmarks/x.py --peer PEER_PYTHON --weights CHECKPOINT --rounds 3"


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
