"""Pictures of curves over updates, for the studies of ``docs/numerics.md``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#2a6f97", "#d1495b", "#3a7d44", "#8d5a97", "#c98a1b", "#555b6e", "#1aa6a6", "#a63c06")
TEXT = "#333333"


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        label: of the vertical axis.
        curves: by name, one of each seed as (x, y); seeds are drawn thin, their mean thick.
        line: a level to mark, with its name.
        limits: of the vertical axis.
    """

    title: str
    label: str
    curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]
    line: tuple[float, str] | None = None
    limits: tuple[float, float] | None = None


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the picture of panels side by side."""
    figure = Figure(figsize=(5.6 * len(panels), 4.4), dpi=130, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(axes, panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _panel(axes: Axes, panel: Panel) -> None:
    for colour, (name, seeds) in zip(COLOURS, panel.curves.items(), strict=False):
        for x, y in seeds:
            axes.plot(x, y, color=colour, lw=0.7, alpha=0.45)
        x, _ = seeds[0]
        axes.plot(x, np.mean([y for _, y in seeds], axis=0), color=colour, lw=2.2, label=name)
    if panel.line is not None:
        level, name = panel.line
        axes.axhline(level, color="#7a7a7a", lw=1.2, ls=(0, (5, 3)), label=name)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    axes.set_title(panel.title, loc="left", fontsize=12, color=TEXT)
    axes.set_xlabel("update", color=TEXT)
    axes.set_ylabel(panel.label, color=TEXT)
    axes.tick_params(colors=TEXT)
    axes.grid(True, color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor=TEXT)
