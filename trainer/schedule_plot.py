"""The picture of schedules: a panel for the learning rate, and one for each other thing that one of them changes."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from trainer.record import whole
from trainer.schedule import Moment, Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 1600  # drawn of a curve, besides where something begins or ends
TEXT = "#333333"
COLOURS = ("#2a6f97", "#d1495b", "#3a7d44", "#8d5a97", "#c98a1b", "#555b6e", "#1aa6a6", "#a63c06")
STYLES: tuple[Literal["-", "--", ":"], ...] = (
    "-",
    "--",
    ":",
)  # tell apart curves of one colour, and those that lie on each other

Panel = tuple[str, Callable[[Schedule, Moment], float]]
RATE: Panel = ("learning rate / peak", lambda schedule, now: now.lr)
OTHERS: dict[str, Panel] = {
    "batch": ("tokens of an update, in millions", lambda schedule, now: now.rows * schedule.timeline.seq_len / 1e6),
    "mtp_weight": ("MTP weight, factor", lambda schedule, now: now.mtp_weight),
    "balance_rate": ("balance rate, factor", lambda schedule, now: now.balance_rate),
    "theta": (
        "rotary theta, from its change on",
        lambda schedule, now: schedule.config.theta[now.theta - 1].theta if now.theta else np.nan,
    ),
}


def draw(schedules: Mapping[str, Schedule], *, path: Path) -> None:
    """Write the picture, whole or not at all.

    Runs of one length share an axis of updates; of several, each is drawn over its own length in percent.
    """
    from matplotlib.figure import Figure  # here: the import takes half a second

    changed = [key for key in OTHERS if any(vars(schedule.config)[key] for schedule in schedules.values())]
    heights = [3.0, *(1.4 for _ in changed)]
    figure = Figure(figsize=(9, 1.2 + sum(heights)), dpi=150, layout="constrained")
    rows = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    panels: list[Axes] = list(rows[:, 0])
    share = len({schedule.timeline.steps for schedule in schedules.values()}) > 1
    for axes, key in zip(panels, ["", *changed], strict=True):
        label, value = OTHERS[key] if key else RATE
        for i, (name, schedule) in enumerate(schedules.items()):
            if key and not vars(schedule.config)[key]:
                continue
            steps = places(schedule)
            across = (steps + 1) * (100 / schedule.timeline.steps) if share else steps + 1
            values = [value(schedule, schedule.at(int(step))) for step in steps]
            (line,) = axes.plot(across, values, lw=1.8, label=name, drawstyle="steps-pre" if key else "default")
            line.set_color(COLOURS[i % len(COLOURS)])
            line.set_linestyle(STYLES[i // len(COLOURS) % len(STYLES)])
        axes.set_title(label, loc="left", fontsize=10, color=TEXT)
        _dress(axes)
    panels[0].legend(fontsize=9, frameon=False, labelcolor=TEXT, loc="center left", bbox_to_anchor=(1.0, 0.5))
    panels[-1].set_xlabel("percent of the updates" if share else "update", fontsize=10, color=TEXT)
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    with whole(path) as partial:
        figure.savefig(partial, format="png")


def places(schedule: Schedule) -> npt.NDArray[np.int64]:
    """Updates to draw: evenly spread, and both sides of every corner that an even spread might step over."""
    steps = schedule.timeline.steps
    ramp = itertools.accumulate(updates for updates, _ in schedule.timeline.ramp)
    corners = [0, schedule.config.warmup, steps - 1, *ramp]
    near = [corner + side for corner in corners for side in (-1, 0, 1)]
    spread = np.round(np.linspace(0, steps - 1, min(POINTS, steps))).astype(np.int64)
    return np.unique(np.clip(np.concatenate([spread, np.array(near, dtype=np.int64)]), 0, steps - 1))


def _dress(axes: "Axes") -> None:
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.tick_params(labelsize=9, colors=TEXT)
    axes.grid(True, color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
