"""The L2L studies run in their quick mode, go on where they stopped, and are rendered; their attackers do as named."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from lightning_rectify.attacks.gradient import pgd
from lightning_rectify.modules.l2l.learned import learned_attack

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _found_and_loud(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts can be imported; they silence the Trainer, which must not outlive a test."""
    for folder in (BENCHMARKS, BENCHMARKS / "papers"):
        monkeypatch.syspath_prepend(str(folder))
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def report() -> ModuleType:
    import report

    return report


def quick(module: ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict:
    """What a script writes when it is called with ``--quick``; in this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", [str(module.__file__), "--quick", "--out", str(path), *more])
    module.main()
    text = path.read_text()
    assert str(path.parent) not in text
    return json.loads(text)


# -- the studies -------------------------------------------------------------------------------------------------------


def test_comparison_at_equal_epochs_and_equal_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    import l2l_compare

    path = tmp_path / "l2l_compare.json"
    result = quick(l2l_compare, path, monkeypatch)
    seconds = result["settings"]["seconds_an_epoch"]["digits"]
    fits = {
        method: max(1, round(seconds["PGD-10"] / seconds[method])) for method in ("FGSM-RS", "2-step L2L", "PGD-10")
    }
    runs = 3 + sum(epochs > 1 for epochs in fits.values())  # a method that fits no more epochs than PGD-10 runs once
    assert f"{runs} of {runs} runs done now" in capsys.readouterr().out
    assert result["command"] == "python benchmarks/papers/l2l_compare.py --quick"
    assert [(line["budget"], line["method"]) for line in result["table"]] == [
        (budget, method) for budget in ("epochs", "time") for method in ("FGSM-RS", "2-step L2L", "PGD-10")
    ]
    for row in result["rows"]:
        assert row["epochs"] == (1 if row["budget"] == "epochs" else fits[row["method"]])
    both = [line["worst"] for line in result["table"] if line["method"] == "PGD-10"]
    assert both[0] == both[1]  # one run, in both budgets
    text = report.render("l2l_compare", tmp_path)
    assert "| digits, equal time: FGSM-RS |" in text

    next(tmp_path.glob("l2l_compare_runs/digits_fgsm-rs_time*.json")).unlink()
    assert len(quick(l2l_compare, path, monkeypatch, "--finished")["rows"]) == runs - 1
    assert f"0 of {runs - 1} runs done now" in capsys.readouterr().out
    assert len(quick(l2l_compare, path, monkeypatch)["rows"]) == runs
    assert f"1 of {runs} runs done now" in capsys.readouterr().out


def test_numbers_are_for_all_data_sets_or_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    import l2l_compare

    def studies(*options: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["l2l_compare.py", *options])
        return l2l_compare.studies_of(l2l_compare.parse())

    found = studies("--images", "60000", "10000", "--epochs", "5")
    assert {name: (study.train_images, study.epochs) for name, study in found.items()} == {
        "fashion_mnist": (60_000, 5),
        "cifar10": (10_000, 5),
    }
    assert [study.train_images for study in studies().values()] == [60_000, 50_000]
    with pytest.raises(SystemExit, match="--epochs: expected one number, or one for each data set, but got"):
        studies("--epochs", "1", "2", "3")


def test_search_keeps_to_half_the_time_and_looks_at_test_images_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    import l2l_search

    path = tmp_path / "l2l_search.json"
    result = quick(l2l_search, path, monkeypatch)
    assert result["command"] == "python benchmarks/papers/l2l_search.py --quick"
    first = {row["name"] for row in result["rows"] if row["epsilon"] == 0.2}
    assert first == {"PGD-10", "2-step L2L", "sign 1", "sign .5, memory", "linear, 2-step"}
    tested = {row["name"] for row in result["test_rows"]} - {"PGD-10", "2-step L2L"}
    times = {(line["epsilon"], line["name"]): line["ratio_to_pgd"] for line in result["table"]}
    # chosen by the mean over both epsilons
    assert all((times[0.1, name] + times[0.2, name]) / 2 <= 0.5 for name in tested)
    assert len(tested) <= 2  # the best of each kind
    assert all(line["found"] <= (line["ratio_to_pgd"] <= 0.5) for line in result["verdict"])
    assert "| 0.2, sign 1 |" in report.render("l2l_search", tmp_path)
    assert "| 0.1, PGD-10 |" in report.render("l2l_search.test", tmp_path)

    capsys.readouterr()
    quick(l2l_search, path, monkeypatch)
    again = capsys.readouterr().out
    assert "seed" not in again  # nothing is run twice
    assert "behind PGD-10" in again


def test_cost_is_rendered_with_its_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: ModuleType) -> None:
    import l2l_cost

    result = quick(l2l_cost, tmp_path / "l2l_cost.json", monkeypatch)
    assert result["settings"]["targets"] == {"gradient L2L, joint": 0.35, "2-step L2L, joint": 0.5}
    text = report.render("l2l_cost", tmp_path)
    assert re.search(r"\| PGD-10 \| \d+ ms \| \d+ s \| 1\.000 \(1\.000 to 1\.000\) \| 1\.000 \|  \|", text)
    assert len(re.findall(r"0\.(?:35|5): (?:met|\*\*missed\*\*)", text)) == 2


def test_study_of_the_paper_is_rendered_as_far_as_it_has_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: ModuleType
) -> None:
    import l2l

    study = l2l.Study("digits", 256, 32, 1, 64, steps=(1, 20), restarts=(1,), apgd_steps=3, queries=5)  # --quick's
    work = tmp_path / "l2l_runs"
    l2l.prepare(study, None, work)
    for method in ("standard", l2l.PGD):
        l2l.make_source((method, 0.1), study, work)
    rows = [l2l.run(l2l.Cell(method, 0.1, 0), study, work) for method in ("standard", l2l.PGD, "2-step L2L")]
    assert quick(l2l, tmp_path / "l2l.json", monkeypatch, "--finished")["rows"] == json.loads(json.dumps(rows))
    text = report.render("l2l", tmp_path)
    lines = re.findall(r"\| 0\.1, (.*?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text)
    assert [line[0] for line in lines] == ["standard", "PGD-10", "2-step L2L"]
    for row, line in zip(rows, lines, strict=True):
        assert line[1:] == tuple(f"{100 * row[key]:.1f}" for key in ("clean", "pgd_20", "worst"))
    assert re.search(
        r"\| 2-step L2L: within \.05 of PGD-10 \| (yes|\*\*no\*\*) \|", report.render("l2l.bars", tmp_path)
    )


def test_as_good_in_half_the_time_asks_for_both() -> None:
    from l2l_search import best, verdict

    def line(name: str, worst: float) -> dict:
        return {"epsilon": 0.1, "name": name, "worst": worst, "worst_standard_error": 0.01}

    test = [line("PGD-10", 0.7), line("close", 0.691), line("far", 0.689), line("slow", 0.72)]
    times = {"PGD-10": 1.0, "close": 0.5, "far": 0.3, "slow": 0.51}
    timed = [{"epsilon": 0.1, "name": name, "ratio_to_pgd": ratio} for name, ratio in times.items()]
    found = {entry["name"]: entry["found"] for entry in verdict(test, timed)}
    assert found == {"close": True, "far": False, "slow": False}

    rows = [{**entry, **ratio, "learned": True} for entry, ratio in zip(test, timed, strict=True)]
    assert best(rows, learned=True, count=3) == ["close", "far"]
    assert best(rows, learned=False, count=3) == []


# -- what they train with ----------------------------------------------------------------------------------------------


def test_images_are_cropped_out_of_a_frame_and_mirrored() -> None:
    from image_batches import Batches
    from l2l_compare import cropped

    images, pad = torch.rand(64, 3, 6, 6, generator=torch.Generator().manual_seed(0)), 2
    batches = Batches(images, torch.arange(64), 64, seed=1, augment=partial(cropped, pad=pad))
    augmented, numbers = next(iter(batches))
    assert augmented.shape == images.shape
    framed = nn.functional.pad(images, [pad] * 4)
    seen = set()
    for image, number in zip(augmented, numbers, strict=True):
        crops = {
            (top, left, flip): framed[number, :, top : top + 6, left : left + 6].flip([2] if flip else [])
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for flip in (False, True)
        }
        found = [where for where, crop in crops.items() if torch.equal(crop, image)]
        assert len(found) == 1
        seen.add(found[0])
    # 64 draws of 50: about 36 different ones, and fewer than 20 never
    assert len(seen) > 20
    assert {flip for *_, flip in seen} == {False, True}


def defense(name: str, images: int = 6) -> nn.Module:
    """A candidate on images of 8 pixels, as in the study."""
    import l2l
    from l2l_candidates import build

    torch.manual_seed(0)
    return build(name, l2l.Study(), epsilon=0.2, images=images, image_size=8, steps=1)


def batch(images: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(images, 1, 8, 8, generator=generator)
    return pixels, torch.randint(10, (images,), generator=generator), torch.arange(images)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_every_candidate_attacks_inside_the_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    from l2l_candidates import CANDIDATES, SearchDefense

    seen = {}
    plain = SearchDefense._defend

    def watched(self, images, adversarial, labels):  # the real one runs; this only looks
        seen["moved"] = (adversarial - images).abs().max().item()
        return plain(self, images, adversarial, labels)

    monkeypatch.setattr(SearchDefense, "_defend", watched)
    for name in CANDIDATES:
        module = defense(name)
        module.train()
        loss = (module.joint_loss if module.learned else module.classifier_loss)(batch())
        loss.backward()
        assert torch.isfinite(loss), name
        assert 0.02 < seen["moved"] <= 0.2, name  # a tenth of epsilon at least: no candidate does nothing
        for player in module.players:
            grads = [p.grad for p in getattr(module, player).parameters()]
            assert any(grad is not None and bool(grad.any()) for grad in grads), (name, player)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_signs_are_those_of_pgd() -> None:
    """Ten of a quarter of epsilon from a uniform start: the package's PGD."""
    module = defense("PGD-10")
    images, labels, numbers = batch()
    module.candidate = replace(module.candidate, memory="start")  # a look at what it made
    module.past = torch.zeros_like(images)
    start = torch.Generator().manual_seed(3)
    offset = (2 * torch.rand(images.shape, generator=start) - 1) * 0.2
    module.past[numbers] = (images + offset).clamp(0, 1) - images
    # First, as a training pass changes the running statistics.
    expected = pgd(module.classifier, images, labels, 0.2, steps=10, generator=torch.Generator().manual_seed(3))
    module.classifier_loss((images, labels, numbers))
    # x + (x' - x) rounds, and where a gradient is nearly 0 its sign may turn: a few pixels
    assert ((images + module.past - expected).abs() < 1e-5).float().mean() > 0.98


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_memory_goes_on_where_the_last_epoch_ended() -> None:
    """Of a linear classifier with two classes the gradient's sign never changes: half of epsilon, then all of it."""
    module = defense("sign .5, memory")
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    linear = nn.Linear(64, 2, bias=False)
    linear.weight.data = weight
    module.classifier = nn.Sequential(nn.Flatten(), linear)
    images, numbers = torch.full((6, 1, 8, 8), 0.5), torch.arange(6)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    away = torch.stack([(weight[1 - label] - weight[label]).sign().view(1, 8, 8) for label in labels])
    for share in (0.5, 1.0, 1.0):
        module.classifier_loss((images, labels, numbers))
        assert torch.allclose(module.past, share * 0.2 * away, atol=1e-6)  # rounding of 0.5 + 0.1


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_learned_attack_from_an_empty_memory_is_the_packages() -> None:
    module = defense("2-step, width 8, memory")
    images, labels, numbers = batch()
    module.attacker.eval()
    made = module._learn((images, labels, numbers)).images
    expected = learned_attack(module.attacker, module.classifier, images, labels, 0.2, steps=2).images
    assert torch.equal(made, expected)
    assert torch.allclose(images + module.past, made.detach(), atol=1e-6)  # rounding of a difference of pixels


def test_a_plan_changes_the_steps_over_the_epochs() -> None:
    from l2l_candidates import CANDIDATES

    plan = CANDIDATES["1-step, then 3-step, width 8"]
    assert [plan.steps(epoch / 10) for epoch in range(10)] == [1] * 5 + [3] * 5
    assert CANDIDATES["PGD-4"].steps(0.9) == (0.625,) * 4
