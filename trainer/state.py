"""How far a run is, and what it remembers of its latest updates."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """What outliers are told from; every rank has the same.

    Attributes:
        losses: of the latest updates, the oldest first, but those that were no number.
        norms: of their gradients.
        lost: updates in a row, up to the latest, whose loss or gradient norm was no number.
        usual: running means of the gradient norms of parameters (``trainer/spikes.py``).
        seen: updates that these are of.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    lost: int = 0
    usual: list[float] = field(default_factory=list)
    seen: int = 0


@dataclass
class State:
    """Progress, stored with every checkpoint.

    Attributes:
        step: updates done, skipped ones too.
        tokens: input tokens seen.
        skipped: updates that changed nothing.
        history: of them.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    history: History = field(default_factory=History)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "State":
        """The state of which a checkpoint has the fields; older ones have fewer."""
        return cls(**values | {"history": History(**values.get("history", {}))})

    def advance(self, *, tokens: int, skipped: bool = False) -> None:
        """Count one update over ``tokens`` input tokens."""
        self.step += 1
        self.tokens += tokens
        self.skipped += skipped
