"""What the trainer needs of data, whoever gives it."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class Batch(Protocol):
    """Rows of one forward; all (B, T) or (B, n_mtp, T) int64, targets negative where nothing is to be predicted."""

    @property
    def tokens(self) -> Tensor:
        """(B, T)."""

    @property
    def targets(self) -> Tensor:
        """(B, T), the token after each."""

    @property
    def positions(self) -> Tensor:
        """(B, T), counted from the start of each document."""

    @property
    def documents(self) -> Tensor:
        """(B, T), the number of the document within the row."""

    @property
    def mtp_tokens(self) -> Tensor:
        """(B, n_mtp, T), the tokens 1, 2, … places ahead."""

    @property
    def mtp_targets(self) -> Tensor:
        """(B, n_mtp, T), the tokens 2, 3, … places ahead."""

    def to(self, device: torch.device) -> Self:
        """The same on another device."""


class Stream(Protocol):
    """Micro-batches of this rank, in the order of global batches."""

    def __iter__(self) -> Iterator[Any]:
        """Itself."""

    def __next__(self) -> Any:
        """The next micro-batch, a ``Batch``."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class Streams(Protocol):
    """What a run reads."""

    @property
    def train(self) -> Stream:
        """Without end."""

    @property
    def validation(self) -> Sequence[Any]:
        """Micro-batches of one evaluation."""
