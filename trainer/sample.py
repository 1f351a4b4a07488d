"""Text sampled while a model trains, one file an evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from parallel.mesh import Mesh
from trainer.config import TrainConfig
from trainer.record import whole
from zoo.generate import Model, generate


class Tokenizer(Protocol):
    """Text to tokens and back."""

    eos: int

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens."""


@dataclass
class Sampler:
    """Continues a prompt greedily, the same under every plan.

    Attributes:
        tokenizer: of the data.
        folder: of the files.
        mesh: ranks that sample together; rank 0 writes.
        prompt: text to begin with.
        n_tokens: how many to add.
    """

    tokenizer: Tokenizer
    folder: Path
    mesh: Mesh
    prompt: str
    n_tokens: int

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, *, train: TrainConfig, folder: Path, mesh: Mesh) -> Self | None:
        """The sampler that a run asks for; None where tokens stand for no text or none are wanted."""
        if tokenizer is None or train.sample_tokens == 0:
            return None
        return cls(tokenizer, folder, mesh, train.sample_prompt, train.sample_tokens)

    def write(self, model: Model, *, step: int) -> None:
        """Sample and write ``step-00000100.txt`` (parameters over dp_shard)."""
        prompt = [self.tokenizer.eos, *self.tokenizer.encode(self.prompt)]  # as a document begins in training
        added = generate(model, prompt=prompt, n_tokens=self.n_tokens, device=self.mesh.device)
        if self.mesh.rank == 0:
            text = self.tokenizer.decode([*prompt, *added])
            with whole(self.folder / f"step-{step:08d}.txt") as partial:
                partial.write_text(text, encoding="utf-8")
