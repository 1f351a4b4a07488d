"""The progress of a run on the console: one live line on a terminal, a plain line now and then elsewhere."""

import time
from collections import deque

from rich.console import Console
from rich.live import Live
from rich.text import Text

REFRESH = 0.1  # seconds between redrawings of the live line
RECENT = 100  # updates that the time left is told from


class Progress:
    """Shows an update at a time; ``say`` prints a line of its own above."""

    def __init__(self, *, total: int, every: float, console: Console) -> None:
        """Show updates up to ``total``; where ``console`` is no terminal, a line each ``every`` seconds."""
        self._total = total
        self._every = every
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._ends: deque[float] = deque(maxlen=RECENT + 1)  # wall clock at the end of the latest updates
        self._shown = 0.0
        self._validation: float | None = None

    def update(self, row: dict[str, float]) -> None:
        """Show the update that ``row``, a line of ``metrics.jsonl``, tells of."""
        now = time.monotonic()
        self._ends.append(now)
        evaluated = "val_loss" in row
        self._validation = row["val_loss"] if evaluated else self._validation
        matters = evaluated or row["step"] >= self._total
        due = len(self._ends) == 1 or now - self._shown >= (REFRESH if self._live else self._every)
        if not (matters or due):
            return
        self._shown = now
        line = describe(row, total=self._total, validation=self._validation, left=self._left(int(row["step"])))
        if self._live:
            self._live.start()  # does nothing from the second time on
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """Print ``line`` above the progress."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last line standing and give the terminal back."""
        if self._live:
            self._live.stop()

    def _left(self, step: int) -> float | None:
        """Seconds to the last update, from what the latest took with their evaluations; None before the second."""
        if len(self._ends) < 2:
            return None
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * max(self._total - step, 0)


def describe(row: dict[str, float], *, total: int, validation: float | None, left: float | None) -> str:
    """One update for people.

    Example: ``step 120/600  loss 4.312  val 4.455  5,120 tokens/s  fullest expert 1.31x  left 02:05``.
    """
    width = len(str(total))
    parts = [f"step {int(row['step']):>{width}}/{total}", f"loss {row['loss']:.3f}"]
    if validation is not None:
        parts.append(f"val {validation:.3f}")
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "expert_load_max" in row:
        parts.append(f"fullest expert {row['expert_load_max']:.2f}x")
    if left is not None:
        parts.append(f"left {clock(left)}")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as mm:ss, or h:mm:ss from an hour on.

    Example: 125.2 is 02:05, 3661 is 1:01:01.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
