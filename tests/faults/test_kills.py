"""The benchmarks of faults run in their quick mode: killed training is as undisturbed, and what they find is seen."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_benchmarks import BENCHMARKS, call

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="they fork")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.usefixtures("benchmarks")
def test_killed_training_is_as_undisturbed(tmp_path):
    import report

    path = tmp_path / "faults.json"
    done = call("faults", "--quick", "--out", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    assert row["kills"] == 3
    assert row["runs_compared"] >= 1
    assert (row["broken_files"], row["checkpoints_lost"], row["states_that_differ"]) == (0, 0, [])
    assert row["states_compared"] > 50
    torn = {writer["writer"]: writer["files_torn"] for writer in result["writers"] if writer["status"] == "measured"}
    assert torn["package"] == 0
    assert str(tmp_path) not in path.read_text()
    assert "| classifier | 3 |" in report.render("faults", tmp_path)


@pytest.mark.usefixtures("benchmarks")
def test_its_comparison_sees_one_bit():
    import torch
    from faults import differences, flat

    a = {"weights": {"w": torch.ones(3)}, "steps": [1, 2.0]}
    b = {"weights": {"w": torch.ones(3)}, "steps": [1, 2.0]}
    assert differences(dict(flat(a)), dict(flat(b))) == []
    b["weights"]["w"][1] = 1 + 2**-23
    b["steps"][1] = 2
    b["more"] = None
    assert sorted(differences(dict(flat(a)), dict(flat(b)))) == ["/more", "/steps/1", "/weights/w"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_monitor_is_measured(tmp_path):
    path = tmp_path / "monitor_memory.json"
    done = call("monitor_memory", "--quick", "--out", str(path), "--steps", "100")
    assert done.returncode == 0, done.stderr
    alone, watched = json.loads(path.read_text())["rows"]
    assert (alone["monitor"], watched["monitor"]) == (None, "PlanHistory")
    assert 50 < alone["first_mb"] < 5000  # torch alone is some hundred


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_monitor_grows(tmp_path):
    path = tmp_path / "monitor_memory.json"
    command = [sys.executable, str(BENCHMARKS / "monitor_memory.py"), "--out", str(path), "--steps", "1500"]
    subprocess.run(command, check=True)
    rows = json.loads(path.read_text())["rows"]
    alone = {row["module"]: row["slope_kb_per_1000_steps"] for row in rows if row["monitor"] is None}
    grown = {row["monitor"]: row["slope_kb_per_1000_steps"] - alone[row["module"]] for row in rows if row["monitor"]}
    # 3 MB: what the allocator takes and gives back in 1,000 steps of any of these fits without a monitor
    assert {name: kilobytes for name, kilobytes in grown.items() if kilobytes > 3000} == {}
