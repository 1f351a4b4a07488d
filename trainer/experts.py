"""How busy the experts of each layer are: numbers of an update, and a picture of a whole run, ``plots/experts.png``."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.record import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float64]
Narrow = npt.NDArray[np.float32]

COLUMNS = 512  # of the picture at least, once there are so many records; twice as many are kept
ROWS = 2000  # of pixels at most, for all experts of all layers together
REACH = 3  # doublings to either side of the mean that colours tell apart
TEXT = "#333333"


def measures(loads: Tensor) -> dict[str, Tensor]:
    """What describes the loads of one update, of each layer: (layers, E) tokens to (layers,) each.

    ``expert_load_max`` is the fullest expert over the mean, 1 at best; ``expert_entropy`` the entropy of the shares of
    tokens over log E, 1 at best and 0 where one expert has all; ``dead_experts`` how many had no token at all.

    Example: loads 2 2 0 0 are 2, 0.5 (log 2 over log 4) and 2.
    """
    shares = loads / loads.sum(dim=1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=1)
    return {
        "expert_load_max": shares.amax(dim=1) * loads.shape[1],
        "expert_entropy": entropy / math.log(loads.shape[1]) if loads.shape[1] > 1 else torch.ones_like(entropy),
        "dead_experts": (loads == 0).sum(dim=1),
    }


def summary(loads: Tensor) -> dict[str, Tensor]:
    """``measures`` of the worst layer; dead experts of all."""
    of = measures(loads)
    return {
        "expert_load_max": of["expert_load_max"].amax(),
        "expert_entropy": of["expert_entropy"].amin(),
        "dead_experts": of["dead_experts"].sum(),
    }


def by_layer(loads: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """``measures`` of each layer, such as ``expert_load_max/blocks.3``."""
    return {
        f"{key}/{layer}": value
        for key, values in measures(loads).items()
        for layer, value in zip(layers, values, strict=True)
    }


class HeatMap:
    """Loads so far, drawn on request: updates from left to right, experts from top to bottom, layer by layer."""

    def __init__(self, path: Path, *, title: str) -> None:
        """Draw to ``path``."""
        self.path = path
        self._title = title
        self._records: list[tuple[float, Narrow]] = []  # update, (layers, E) loads as multiples of the mean
        self._layers: list[str] = []

    def add(self, step: int, loads: Mapping[str, Sequence[float]]) -> None:
        """Take the loads of one update, by layer; neighbours are averaged where there are more than can be shown."""
        of = np.array([*loads.values()], dtype=np.float64)
        self._layers = [*loads]
        self._records.append((step, (of / of.mean(axis=1, keepdims=True)).astype(np.float32)))
        if len(self._records) >= 2 * COLUMNS:
            pairs = zip(self._records[::2], self._records[1::2], strict=True)
            self._records = [((a + b) / 2, (x + y) / np.float32(2)) for (a, x), (b, y) in pairs]

    def draw(self) -> bool:
        """Write the picture, whole or not at all; whether there was anything to draw."""
        if not self._records:
            return False
        # Here, not above: the import takes half a second, and only rank 0 draws. Figure without pyplot draws by Agg.
        from matplotlib.figure import Figure

        steps = np.array([step for step, _ in self._records])
        picture, height = image(np.stack([loads for _, loads in self._records], axis=2), rows=ROWS)
        figure = Figure(figsize=(9, max(4.4, 1.3 + len(picture) / 160)), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        self._draw_loads(axes, picture[:, evenly(steps)], steps)
        self._dress(axes, height=height)
        with whole(self.path) as partial:
            figure.savefig(partial, format="png")
        return True

    def _draw_loads(self, axes: "Axes", picture: Array, steps: Array) -> None:
        from matplotlib import colormaps

        half = (steps[-1] - steps[0]) / (2 * max(1, len(steps) - 1)) or 0.5
        colours = colormaps["RdBu_r"].with_extremes(under="black")
        drawn = axes.imshow(
            picture, cmap=colours, vmin=-REACH, vmax=REACH, aspect="auto", interpolation="nearest",
            extent=(steps[0] - half, steps[-1] + half, len(picture), 0),
        )  # fmt: skip
        figure = axes.get_figure()
        assert figure is not None
        bar = figure.colorbar(drawn, ax=axes, extend="min", pad=0.015, aspect=30, shrink=min(1.0, 900 / len(picture)))
        ticks = range(-REACH, REACH + 1)
        bar.set_ticks([*ticks], labels=[f"{2**n}" if n >= 0 else f"1/{2**-n}" for n in ticks])
        bar.set_label("tokens over the layer's mean (black: hardly any)", fontsize=9, color=TEXT)

    def _dress(self, axes: "Axes", *, height: int) -> None:
        """Title, names, and a line between any two layers."""
        from matplotlib.ticker import MaxNLocator

        n = len(self._layers)
        for place in range(1, n):
            axes.axhline(place * height, color="#555555", lw=0.6)
        shown = range(0, n, -(-n // 40))
        axes.set_yticks([(place + 0.5) * height for place in shown], labels=[self._layers[place] for place in shown])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        experts = self._records[0][1].shape[1]
        title = f"{self._title}: load of {experts} experts a layer"
        if height < experts:
            title += f" (of each {-(-experts // height)}, the one furthest from the mean)"
        axes.set_title(title, loc="left", fontsize=12, color=TEXT)
        axes.set_xlabel("update", fontsize=12, color=TEXT)
        axes.tick_params(labelsize=10, colors=TEXT)


def image(loads: Array | Narrow, *, rows: int) -> tuple[Array, int]:
    """Doublings above the mean, as rows of pixels, and how many rows a layer has.

    Where experts are more than rows, each row shows the one of its experts that is furthest from the mean.

    Example: one layer with loads 1 2 0 1 in two rows gives 1 and −4, which stands for none.

    Args:
        loads: (layers, E, n), multiples of the mean.
        rows: at most.

    Returns:
        (layers · height, n), and the height.
    """
    layers, experts, n = loads.shape
    with np.errstate(divide="ignore"):
        doublings = np.log2(loads).clip(min=-REACH - 1)  # what is not finite would be left blank
    height = max(1, min(experts, rows // layers))
    first = np.arange(height + 1) * experts // height
    shown = np.empty((layers, height, n))
    for row in range(height):
        some = doublings[:, first[row] : first[row + 1]]
        far = np.abs(some).argmax(axis=1, keepdims=True)
        shown[:, row] = np.take_along_axis(some, far, axis=1)[:, 0]
    return shown.reshape(-1, n), height


def evenly(steps: Array) -> npt.NDArray[np.int64]:
    """Which record each column shows, of columns that are evenly spread over the updates: the one nearest to it.

    Example: records of updates 10 20 30 70 fill seven columns as 0 1 2 2 3 3 3.
    """
    if len(steps) == 1:
        return np.zeros(1, dtype=np.int64)
    gap = np.diff(steps).min()
    wanted = np.linspace(steps[0], steps[-1], min(2 * COLUMNS, round((steps[-1] - steps[0]) / gap) + 1))
    middles = (steps[1:] + steps[:-1]) / 2
    return np.searchsorted(middles, wanted, side="right").astype(np.int64)
