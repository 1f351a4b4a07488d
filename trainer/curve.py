"""The picture of a run's losses, ``plots/loss.png``."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainer.config import CurveAxis
from trainer.record import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float64]

POINTS = 1500  # drawn of the raw curve; more than the picture has columns would only thicken it
WINDOW = 1 / 40  # of the run, over which the smooth curve averages
TRAIN, VALIDATION, ENTROPY, TEXT = "#2a6f97", "#d1495b", "#7a7a7a", "#333333"


class Curve:
    """Losses so far, drawn on request. Drawing takes a few tenths of a second: do it where an evaluation is anyway."""

    def __init__(self, path: Path, *, title: str, axis: CurveAxis, entropy: float | None) -> None:
        """Draw to ``path``; ``entropy`` is the corpus's unigram entropy in nats a token, where it is known."""
        self.path = path
        self._title = title
        self._axis = axis
        self._entropy = entropy
        self._train: list[tuple[float, float]] = []
        self._validation: list[tuple[float, float]] = []

    def add(self, row: dict[str, float]) -> None:
        """Take the losses of one line of ``metrics.jsonl``."""
        self._train.append((row["step"], row["loss"]))
        if "val_loss" in row:
            self._validation.append((row["step"], row["val_loss"]))

    def draw(self) -> None:
        """Write the picture, whole or not at all; nothing before the first update."""
        if not self._train:
            return
        # Here, not above: the import takes half a second, and only rank 0 draws. Figure without pyplot draws by Agg.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.8), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        self._draw_train(axes)
        if self._validation:
            steps, losses = np.array(self._validation).T
            label = f"validation {losses[-1]:.3f}"
            axes.plot(steps, losses, color=VALIDATION, lw=0.8, ls=":", marker="o", ms=5, label=label)
        if self._entropy is not None:
            label = f"unigram entropy {self._entropy:.3f}"
            axes.axhline(self._entropy, color=ENTROPY, lw=1.2, ls=(0, (5, 3)), label=label)
        self._dress(axes)
        with whole(self.path) as partial:
            figure.savefig(partial, format="png")

    def _draw_train(self, axes: "Axes") -> None:
        """The training loss, raw in the background and smooth in front."""
        steps, losses = np.array(self._train, dtype=np.float64).T
        smoothed = smooth(losses, window=max(1, round(len(losses) * WINDOW)))
        shown = thin(len(steps), points=POINTS, axis=self._axis)
        axes.plot(steps[shown], losses[shown], color=TRAIN, lw=0.8, alpha=0.35)
        axes.plot(steps[shown], smoothed[shown], color=TRAIN, lw=2, label=f"train {smoothed[-1]:.3f}")

    def _dress(self, axes: "Axes") -> None:
        axes.set_xscale(self._axis.value)
        axes.xaxis.set_major_formatter("{x:,.0f}")  # 1,000 on both axes, not ten to the third
        axes.set_title(self._title, loc="left", fontsize=13, color=TEXT)
        axes.set_xlabel("update", fontsize=12, color=TEXT)
        axes.set_ylabel("loss, nats a token", fontsize=12, color=TEXT)
        axes.tick_params(labelsize=11, colors=TEXT)
        axes.grid(True, color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
        axes.legend(loc="upper right", fontsize=11, frameon=False, labelcolor=TEXT)


def smooth(values: Array, *, window: int) -> Array:
    """Mean over ``window`` neighbours on both sides together, fewer towards the ends; what is not finite is left out.

    Example: 1 2 3 4 5 with a window of 3 gives 1.5 2 3 4 4.5.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centre = np.arange(len(values))
    first = np.maximum(centre - window // 2, 0)
    last = np.minimum(centre + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):  # nothing finite in reach: nan, which leaves a gap
        means: Array = (sums[last] - sums[first]) / (counts[last] - counts[first])
    return means


def thin(n: int, *, points: int, axis: CurveAxis) -> npt.NDArray[np.int64]:
    """At most ``points`` of ``n`` places, evenly spread along the axis, with the first and the last.

    Example: 3 of 101 are 0 50 100 on a linear axis and 0 9 100 on a logarithmic one.
    """
    if n <= points:
        return np.arange(n)
    spread = np.linspace(0, n - 1, points) if axis is CurveAxis.linear else np.geomspace(1, n, points) - 1
    return np.unique(np.round(spread).astype(np.int64))
