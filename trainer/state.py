"""How far a run is."""

from dataclasses import dataclass


@dataclass
class State:
    """Progress, stored with every checkpoint.

    Attributes:
        step: updates done.
        tokens: input tokens seen.
    """

    step: int = 0
    tokens: int = 0

    def advance(self, *, tokens: int) -> None:
        """Count one update over ``tokens`` input tokens."""
        self.step += 1
        self.tokens += tokens
