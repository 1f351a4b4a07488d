"""Shows on stderr how far a preparation is."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

PLAIN_EVERY = 5.0  # seconds between lines where stderr is a file
LIVE_EVERY = 0.2


class ProgressLine:
    """One line that renews itself on a terminal, or a line now and then elsewhere."""

    def __init__(self, title: str) -> None:
        """Args: ``title`` opens the line."""
        self._title = title
        self._documents = 0
        self._tokens = 0
        self._begun = self._shown = time.monotonic()
        console = Console(stderr=True)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "ProgressLine":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._show()
        if self._live is not None:
            self._live.stop()

    def say(self, message: str) -> None:
        """Announce a stage."""
        if self._live is not None:
            self._live.update(Text(f"{self._title}: {message}"), refresh=True)
        else:
            print(f"{self._title}: {message}", file=sys.stderr, flush=True)

    def add(self, *, tokens: int) -> None:
        """Count a document."""
        self._documents += 1
        self._tokens += tokens
        if time.monotonic() - self._shown >= (PLAIN_EVERY if self._live is None else LIVE_EVERY):
            self._show()

    def restart(self) -> None:
        """Measure speed from here."""
        self._begun = self._shown = time.monotonic()

    def _show(self) -> None:
        self._shown = time.monotonic()
        if self._tokens:
            speed = self._tokens / max(self._shown - self._begun, 1e-9)
            self.say(f"{self._documents:,} documents, {self._tokens:,} tokens, {speed:,.0f} tokens/s")
