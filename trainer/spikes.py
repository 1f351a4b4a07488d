"""Which layers made a spike: gradient norms of all parts against what they usually are, told and kept in a file."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.guard import Excess, Verdict
from trainer.metrics import cut
from trainer.record import writing
from trainer.state import History

FILE = "spikes.jsonl"
LAYERS, PARAMETERS = 3, 5  # that a report names
FAINT = 1e-6  # of the whole gradient's usual norm: what is usually less grows from there
SAID = {"loss": "loss", "grad_norm": "gradient norm"}


class Spikes:
    """Keeps running means of gradient norms; writes a line of ``spikes.jsonl`` for each update that stands out."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        window: int,
        history: History,
        folder: Path,
        writes: bool,
        rows: Callable[[int], range],
        step: int,
    ) -> None:
        """Go on after ``step`` updates; lines past them go.

        Args:
            names: of all parameters of the model.
            window: of the running means, in updates.
            history: of the run; its means are kept up to date.
            folder: of the run.
            writes: whether this process writes.
            rows: gives the rows of a global batch, by its number.
            step: updates done.
        """
        self.window, self.history, self.rows = window, history, rows
        self.path, self.writes = folder / FILE, writes
        self.parameters = list(names)
        self.layers = list(dict.fromkeys(layer(name) for name in names))
        self._parts = [[i for i, name in enumerate(names) if layer(name) == each] for each in self.layers]
        if writes:
            cut(self.path, after=step)

    def note(self, verdict: Verdict, *, step: int, loss: float, squares: Sequence[float]) -> str | None:
        """Remember an update, or report it where it stands out.

        Args:
            verdict: on it.
            step: its number, from 1.
            loss: of it.
            squares: of the gradient norm of each parameter.

        Returns:
            The report in one line for people; None where there is nothing to tell.
        """
        norms = [math.sqrt(each) for each in squares]
        if not verdict.notable:
            self._remember(norms)
            return None
        report = self._report(verdict, step=step, loss=loss, norms=norms)
        if self.writes:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(report) + "\n")
        return _told(report)

    def _remember(self, norms: Sequence[float]) -> None:
        """Means of all updates up to ``window``; from there on the latest counts for one in ``window``."""
        history = self.history
        history.seen += 1
        usual = history.usual or [0.0] * len(norms)
        part = 1 / min(history.seen, self.window)
        history.usual = [old + (new - old) * part for old, new in zip(usual, norms, strict=True)]

    def _report(self, verdict: Verdict, *, step: int, loss: float, norms: Sequence[float]) -> dict[str, Any]:
        rows, usual = self.rows(step - 1), self.history.usual or [0.0] * len(norms)
        least = FAINT * math.hypot(*usual)
        lines = [_line(*each, least=least) for each in zip(self.parameters, norms, usual, strict=True)]
        return {
            "step": step,
            "loss": loss,
            "grad_norm": math.hypot(*norms),
            "skipped": verdict.skips,
            "outliers": {key: _numbers(each) for key, each in verdict.outliers.items()},
            "layers": self._layers(lines, least=least)[:LAYERS],
            "parameters": _most(lines)[:PARAMETERS],
            "not_finite": [line["name"] for line in lines if not math.isfinite(line["grad_norm"])],
            "batch": step - 1,
            "rows": [rows.start, rows.stop],
        }

    def _layers(self, parameters: Sequence[dict[str, Any]], *, least: float) -> list[dict[str, Any]]:
        """Lines of layers in the order of what has grown most in each.

        Not in that of their own growth: what goes wrong in a layer shows most beside it, and from there in all layers
        that the gradient flows back through. Queries multiplied by 30 in the second of three layers of a Llama: it grew
        1.7 times, the first one 2.3 times; but most of all the second's keys.
        """
        found = []
        for name, part in zip(self.layers, self._parts, strict=True):
            inside = [parameters[i] for i in part]
            norms, usual = ([line[key] for line in inside] for key in ("grad_norm", "usual"))
            most = _most(inside)[:1]
            if most:
                line = _line(name, math.hypot(*norms), math.hypot(*usual), least=least)
                found.append(line | {"most": most[0]["name"], "most_growth": most[0]["growth"]})
        return sorted(found, key=lambda line: -line["most_growth"])


def layer(name: str) -> str:
    """The layer of a parameter, or the part of the model that stands beside layers.

    Example: blocks.3.mlp.up.weight is of blocks.3, mtp.0.proj.weight of mtp.0, head.weight of head.
    """
    top, number, *_ = name.split(".")
    return f"{top}.{number}" if number.isdigit() else top


def _line(name: str, norm: float, usual: float, *, least: float) -> dict[str, Any]:
    floor = max(usual, least)
    return {"name": name, "grad_norm": norm, "usual": usual, "growth": norm / floor if floor else 0.0}


def _most(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that have grown, most first; one whose norm is no number has not grown."""
    return sorted((line for line in lines if line["growth"] > 1), key=lambda line: -line["growth"])


def _numbers(each: Excess) -> dict[str, float]:
    return {**asdict(each), "ratio": each.value / each.mean if each.mean else math.inf}


def _told(report: dict[str, Any]) -> str:
    """A report in one line.

    Example: ``step 90 was skipped: gradient norm 31.2 is 14 times the usual 2.2; most grown: blocks.1.mlp.up.weight
    (90x), blocks.0.mixer.wo.weight (3.1x); batch 89``, one of each layer.
    """
    parts = [
        f"{SAID[key]} {each['value']:.4g} is {each['ratio']:.3g} times the usual {each['mean']:.4g}"
        for key, each in report["outliers"].items()
    ]
    lost = report["not_finite"]
    if lost:
        parts.append(f"gradients that are no number: {lost[0]}" + (f" and {len(lost) - 1} more" if lost[1:] else ""))
    elif not parts:
        parts.append("the loss is no number")
    if report["layers"]:
        most = ", ".join(f"{line['most']} ({line['most_growth']:.3g}x)" for line in report["layers"])
        parts.append(f"most grown: {most}")
    verb = "was skipped" if report["skipped"] else "stands out"
    return f"step {report['step']} {verb}: {'; '.join(parts)}; batch {report['batch']}"
