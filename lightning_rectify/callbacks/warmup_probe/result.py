"""What a probe found: arrays, a table, a figure, files."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_rectify.callbacks._logs import CsvFile
from lightning_rectify.callbacks.warmup_probe.advice import LayerProbe, PlayerProbe

_SHOWN_STEPS = (3, 5, 10, 20, 50, 100, 200, 500, 1000)
_MOST_LAYERS = 12  # in the table and the figure; all are in the CSV
_NAME = 48  # characters of a layer's name
_CURVES = (
    "player", "layer", "step", "relative_variance", "theory", "log_variance", "theory_log", "unseen_share",
)  # fmt: skip
_LAYERS = (
    "player", "layer", "coordinates", "sampled", "factor", "worst_factor", "needs_more", "steps", "warmup",
    "rectified_excess", "zero_share", "dead_share",
)  # fmt: skip


@dataclass(eq=False)
class WarmupProbeResult:
    """What :func:`probe_warmup` returns.

    Attributes:
        players: what was measured, by the player's name; one named "model" for a module with one loss.
        streams: number of streams S.
        gradients: number of gradients taken.
        seconds: that the probe took.
        notes: what a reader should know, such as a loader without an order of its own.
    """

    players: dict[str, PlayerProbe]
    streams: int
    gradients: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> float:
        """Steps until the variance is near its floor (over all coordinates, of the player that takes longest)."""
        return max(player.whole.steps for player in self.players.values())

    @property
    def warmup(self) -> float:
        """Length in steps of the linear warmup with the same protection (of the player that needs the longest)."""
        return max(player.whole.warmup for player in self.players.values())

    @property
    def layers(self) -> list[LayerProbe]:
        """The layers of all players."""
        return [layer for player in self.players.values() for layer in player.layers]

    @property
    def worse(self) -> list[LayerProbe]:
        """Layers that need more than the theory says, the worst of each player first."""
        return [layer for player in self.players.values() for layer in player.worse]

    def table(self) -> str:
        """The result in words and numbers, for a terminal."""
        lines: list[str] = []
        for player in self.players.values():
            lines += ["", *_player_lines(player, self.streams)] if lines else _player_lines(player, self.streams)
        notes = [*self.notes, *(note for player in self.players.values() for note in player.notes)]
        return "\n".join([*lines, *(f"Note: {note}." for note in notes)])

    def plot(self) -> Figure:
        """The figure: a row a player; measured over theory, of the rate, of its logarithm, and layer by layer."""
        figure = Figure(figsize=(17, 4.6 * len(self.players)), layout="constrained")
        for row, player in zip(
            figure.subplots(len(self.players), 3, squeeze=False), self.players.values(), strict=True
        ):
            _plot_variance(row[0], player)
            _plot_log_variance(row[1], player)
            _plot_layers(row[2], player)
        return figure

    def save(self, folder: str | Path) -> Path:
        """Write ``warmup_probe.csv`` (curves), ``warmup_probe_layers.csv``, ``warmup_probe.txt`` and ``.png``.

        Files of an earlier probe are overwritten.

        Args:
            folder: made if it is not there.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, fields, rows in (
            ("warmup_probe.csv", _CURVES, self._curve_rows()),
            ("warmup_probe_layers.csv", _LAYERS, self._layer_rows()),
        ):
            (folder / name).unlink(missing_ok=True)
            CsvFile(folder / name, fields).append(rows)
        (folder / "warmup_probe.txt").write_text(self.table() + "\n", encoding="utf-8")
        self.plot().savefig(folder / "warmup_probe.png", dpi=110)
        return folder

    def _curve_rows(self) -> Iterator[Sequence[Any]]:
        for player in self.players.values():
            for layer in (player.whole, *player.layers):
                for i, step in enumerate(player.step):
                    numbers = (
                        layer.relative_variance[i], player.theory[i], layer.log_variance[i], player.theory_log[i],
                        layer.unseen_share[i],
                    )  # fmt: skip
                    yield [player.name, layer.name, int(step), *(f"{number:.9g}" for number in numbers)]

    def _layer_rows(self) -> Iterator[Sequence[Any]]:
        for player in self.players.values():
            for layer in (player.whole, *player.layers):
                numbers = [getattr(layer, name) for name in _LAYERS[4:]]
                kept = [n if isinstance(n, bool) else f"{n:.9g}" for n in numbers]
                yield [player.name, layer.name, layer.coordinates, layer.sampled, *kept]


# -- the table ---------------------------------------------------------------------------------------------------------


def _player_lines(player: PlayerProbe, streams: int) -> list[str]:
    last = int(player.step[-1])
    shown = [step for step in (*_SHOWN_STEPS, last) if step <= last]
    shown = sorted(set(shown))
    at = [step - 1 for step in shown]
    whole, times = player.whole, f"{player.tolerance:g} times its floor ({player.tolerance * player.floor:.2g})"
    lines = [
        f"Warmup probe of {player.name!r} at frozen weights: {streams} streams of {last} steps, beta2 = "
        f"{player.beta2:g}, {whole.sampled:,} of {whole.coordinates:,} coordinates",
        "  Var[psi]/E[psi]^2, median over coordinates",
        _row("step", [f"{step}" for step in shown]),
        _row("measured", [_short(whole.relative_variance[i]) for i in at]),
        _row("theory", [_short(player.theory[i]) for i in at]),
        f"  Steps until it is within {times}: {_steps(whole.steps)} (theory: {_steps(player.theory_steps)}).",
        f"  Steps of a linear warmup with the same protection: {_steps(whole.warmup)} (theory: "
        f"{_steps(player.theory_warmup)}).",
        f"  {_rectified(player)}",
        f"  Gradients exactly zero: {whole.zero_share:.1%}; coordinates that never had one: {whole.dead_share:.1%}.",
        "",
        f"  {'layer':<{_NAME}}{'coordinates':>12}{'factor':>9}{'worst 10%':>11}{'zero':>8}{'never':>8}{'steps':>9}"
        f"{'warmup':>9}",
    ]
    by_factor = sorted(player.layers, key=lambda layer: -np.nan_to_num(layer.factor, nan=-1.0))
    lines += [_layer_line(layer) for layer in by_factor[:_MOST_LAYERS]]
    if len(by_factor) > _MOST_LAYERS:
        lines.append(f"  ... and {len(by_factor) - _MOST_LAYERS} layers with smaller factors")
    lines.append("")
    lines += [f"  {_need(layer, player)}" for layer in player.worse[:_MOST_LAYERS]]
    if not player.worse:
        lines.append("  No layer needs more than the theory says.")
    return lines


def _row(name: str, cells: Sequence[str]) -> str:
    return f"  {name:<9}" + "".join(f"{cell:>9}" for cell in cells)


def _layer_line(layer: LayerProbe) -> str:
    name = layer.name if len(layer.name) < _NAME else "..." + layer.name[4 - _NAME :]
    return (
        f"  {name:<{_NAME}}{layer.coordinates:>12,}{_short(layer.factor):>9}{_short(layer.worst_factor):>11}"
        f"{layer.zero_share:>8.1%}{layer.dead_share:>8.1%}{_steps(layer.steps):>9}{_steps(layer.warmup):>9}"
    )


def _rectified(player: PlayerProbe) -> str:
    if math.isnan(player.rectified_warmup):
        return f"RectifiedAdam never rectifies with beta2 = {player.beta2:g}: it takes plain momentum steps."
    text = f"RectifiedAdam by itself holds back what a linear warmup of {_steps(player.rectified_warmup)} steps does"
    excess = player.whole.rectified_excess
    if math.isnan(excess) or math.isinf(excess):
        return f"{text}."
    return f"{text}, and keeps the variance within {excess:.2g} times the floor."


def _need(layer: LayerProbe, player: PlayerProbe) -> str:
    unseen = layer.unseen_share[-1]
    cause = f" ({unseen:.0%} had no gradient in {len(player.step)} steps)" if unseen >= 0.005 else ""
    text = (
        f"{layer.name} needs more: {layer.factor:.3g} times as many steps as in theory to the same variance{cause}. "
        f"With beta2 = {player.beta2:g} "
    )
    if math.isfinite(layer.steps):
        return text + f"that is {_steps(layer.steps)} steps to {player.tolerance:g} times the floor."
    longer = 1.0 - (1.0 - player.beta2) / layer.factor
    return text + (
        f"it never comes within {player.tolerance:g} times the floor; beta2 = {longer:.7g} with a linear warmup of "
        f"{_steps(player.theory_warmup * layer.factor)} steps would bring it there, or a learning rate smaller by "
        f"{math.sqrt(layer.factor):.2g} makes up for it."
    )


def _short(value: float) -> str:
    return "-" if math.isnan(value) else "inf" if math.isinf(value) else f"{value:.3g}"


def _steps(value: float) -> str:
    return "-" if math.isnan(value) else "never" if math.isinf(value) else f"{value:,.0f}"


# -- the figure --------------------------------------------------------------------------------------------------------


def _plot_variance(ax: Any, player: PlayerProbe) -> None:
    for layer in player.layers:
        ax.plot(player.step, _finite(layer.relative_variance), color="C0", alpha=0.25, lw=0.7)
    ax.plot(player.step, _finite(player.whole.relative_variance), "C0", lw=2, label="measured, whole (thin: layers)")
    ax.plot(player.step, _finite(player.theory), "k--", label="theory at $\\rho_t$")
    level = player.tolerance * player.floor
    ax.axhline(level, color="C3", lw=0.8, label=f"{player.tolerance:g} times the floor")
    ax.set(
        title=f"{player.name}: relative variance of the adaptive rate",
        xscale="log", yscale="log", xlabel="step",
    )  # fmt: skip
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)


def _plot_log_variance(ax: Any, player: PlayerProbe) -> None:
    for layer in player.layers:
        ax.plot(player.step, _finite(layer.log_variance), color="C0", alpha=0.25, lw=0.7)
    ax.plot(player.step, _finite(player.whole.log_variance), "C0", lw=2, label="measured, whole (thin: layers)")
    ax.plot(player.step, player.theory_log, "k--", label="theory at $\\rho_t$")
    ax.set(title=f"{player.name}: variance of its logarithm", xscale="log", yscale="log", xlabel="step")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)


def _plot_layers(ax: Any, player: PlayerProbe) -> None:
    known = [layer for layer in player.layers if not math.isnan(layer.factor)]
    worst = sorted(known, key=lambda layer: -layer.factor)[: 2 * _MOST_LAYERS][::-1]
    places = np.arange(len(worst))
    colors = ["C3" if layer.needs_more else "C0" for layer in worst]
    ax.barh(places, [layer.factor for layer in worst], color=colors)
    ax.plot([layer.worst_factor for layer in worst], places, "k|", label="its worst 10 % of coordinates")
    ax.axvline(1.0, color="k", ls="--", lw=0.8, label="theory")
    ax.set_yticks(places, [f"{layer.name} ({layer.zero_share:.0%} zero)" for layer in worst], fontsize=7)
    ax.set(title=f"{player.name}: steps to the same variance, over theory", xscale="log")
    ax.legend(fontsize=8)


def _finite(curve: np.ndarray) -> np.ndarray:
    """Infinite values, and zeros, have no place on a logarithmic axis."""
    return np.where(np.isfinite(curve) & (curve > 0.0), curve, np.nan)
