"""Figures of robustness: a report's curves, and images with what an attack adds to them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:
    from lightning_rectify.callbacks.robustness.result import RobustReport

_GOOD, _BAD, _PLAIN = "tab:green", "tab:red", "tab:blue"


def draw_report(report: "RobustReport") -> Figure:
    """Accuracy over epsilon, over steps (with the loss), and under each attack; failed checks in the title.

    Args:
        report: any.
    """
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    by_epsilon, by_steps, by_attack = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
    _curve(by_epsilon, report, [0.0, *report.epsilons], [report.clean_accuracy, *report.epsilons_accuracy])
    by_epsilon.axvline(report.epsilon, color="0.6", lw=1, ls=":")
    by_epsilon.plot([report.epsilon], [100 * report.robust_accuracy], "v", color=_BAD, label="worst case")
    by_epsilon.legend(fontsize=8)
    by_epsilon.set(xlabel=f"epsilon ({report.norm})", ylabel="accuracy, %", title=f"PGD-{report.steps[-1]}")
    _curve(by_steps, report, list(report.steps), list(report.steps_accuracy))
    by_steps.set(xscale="log", xlabel="steps of PGD", title="more steps")
    by_steps.set_xticks([int(steps) for steps in report.steps], [str(steps) for steps in report.steps])
    by_steps.minorticks_off()
    loss = by_steps.twinx()
    loss.plot(report.steps, report.steps_loss, color="0.5", marker=".", lw=1, ls="--")
    loss.set_ylabel("mean loss (dashed)", color="0.4")
    _bars(by_attack, report)
    failed = ", ".join(check.name for check in report.failed)
    verdict = f"checks that failed: {failed}" if failed else "all checks passed"
    figure.suptitle(
        f"{report.images:,} images at epsilon {report.epsilon:.4g}: clean {100 * report.clean_accuracy:.1f} %, worst "
        f"case {100 * report.robust_accuracy:.1f} %; {verdict}",
        color=_BAD if failed else "black",
    )
    return figure


def _curve(ax: Axes, report: "RobustReport", x: Sequence[float], accuracy: Sequence[float]) -> None:
    percent = [100 * value for value in accuracy]
    errors = [100 * report.standard_error(value) for value in accuracy]
    ax.errorbar(x, percent, errors, marker="o", ms=4, capsize=3, color=_PLAIN)
    ax.set_ylim(-2, 102)
    ax.grid(alpha=0.3)


def _bars(ax: Axes, report: "RobustReport") -> None:
    names = ["clean", *(row.name for row in report.attacks)]
    worst = [report.clean_accuracy, *(row.worst for row in report.attacks)]
    places = np.arange(len(names))
    ax.barh(places, [100 * value for value in worst], color=_PLAIN, alpha=0.55, label="worst so far")
    alone = [(place, row.alone) for place, row in enumerate(report.attacks, start=1) if row.alone is not None]
    ax.plot([100 * value for _, value in alone], [place for place, _ in alone], "k|", ms=11, label="alone")
    ax.set_yticks(places, names, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlim=(0, 102), xlabel="accuracy, %", title="attack by attack")
    ax.legend(fontsize=8, loc="lower right")
    ax.grid(alpha=0.3, axis="x")


def draw_examples(
    images: Tensor,
    attacked: Tensor,
    labels: Tensor,
    before: Tensor,
    after: Tensor,
    epsilon: float,
    bounds: tuple[float, float],
    classes: Sequence[str] | None = None,
) -> Figure:
    """Images, what the attack adds to them (magnified so that epsilon spans the range), and the sum.

    Args:
        images: shape (N, C, H, W) with C 1 or 3, on the CPU.
        attacked: the same shape.
        labels: right classes, int64 (N,).
        before: predictions without the attack, int64 (N,).
        after: predictions with it, int64 (N,).
        epsilon: size of the largest possible change of a pixel.
        bounds: smallest and largest pixel.
        classes: names of the classes; None for their numbers.
    """
    low, high = bounds
    count = len(images)
    figure = Figure(figsize=(1.35 * count + 0.9, 4.6), layout="constrained")
    axes = figure.subplots(3, count, squeeze=False)
    rows = [(images - low) / (high - low), 0.5 + (attacked - images) / (2 * epsilon), (attacked - low) / (high - low)]

    def name(label: Tensor) -> str:
        return classes[int(label)] if classes is not None else str(int(label))

    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures.clamp(0, 1).permute(0, 2, 3, 1).numpy()):
            ax = axes[row][column]
            ax.imshow(picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
    for column in range(count):
        for row, predicted in ((0, before[column]), (2, after[column])):
            right = int(predicted) == int(labels[column])
            axes[row][column].set_title(name(predicted), fontsize=8, color=_GOOD if right else _BAD)
    axes[0][0].set_ylabel("image", fontsize=8)
    axes[1][0].set_ylabel(f"change, × {(high - low) / (2 * epsilon):.3g}", fontsize=8)
    axes[2][0].set_ylabel("attacked", fontsize=8)
    return figure
