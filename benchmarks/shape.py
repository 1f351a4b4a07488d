"""The small model that every implementation trains, and the matrix products in one step of it."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Experts:
    """Routed experts in place of every feed-forward: sigmoid scores, the chosen normalised to one; no shared expert."""

    n_experts: int
    top_k: int
    d_expert: int


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder: RMSNorm, rotary positions, grouped queries, SwiGLU, embedding and head apart."""

    n_layers: int = 8
    d_model: int = 512
    n_heads: int = 8
    n_kv_heads: int = 2
    d_ff: int = 1408
    vocab_size: int = 32000
    experts: Experts | None = None
    rows: int = 8
    seq_len: int = 512
    theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def n_tokens(self) -> int:
        """Tokens of one step."""
        return self.rows * self.seq_len

    @property
    def n_parameters(self) -> int:
        """Parameters, biases that no gradient moves left out; an implementation with another number is refused."""
        attention = 2 * self.d_model * self.head_dim * (self.n_heads + self.n_kv_heads)
        forward = 3 * self.d_model * self.d_ff
        if self.experts:
            e = self.experts
            forward = e.n_experts * (3 * e.d_expert + 1) * self.d_model
        return self.n_layers * (attention + forward + 2 * self.d_model) + (2 * self.vocab_size + 1) * self.d_model

    @property
    def linears(self) -> list[tuple[int, int, int]]:
        """Products of one forward as (rows, in, out), every layer's; experts as if all had equally many rows.

        Those of attention's scores and values are left out: no implementation does them as plain matrix products.
        """
        n, d = self.n_tokens, self.d_model
        wide, narrow = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        layer = [(n, d, wide), (n, d, narrow), (n, d, narrow), (n, wide, d)]
        if self.experts:
            e = self.experts
            share = n * e.top_k // e.n_experts
            expert = [(share, d, e.d_expert), (share, d, e.d_expert), (share, e.d_expert, d)]
            layer += [(n, d, e.n_experts), *expert * e.n_experts]
        else:
            layer += [(n, d, self.d_ff), (n, d, self.d_ff), (n, self.d_ff, d)]
        return [*layer * self.n_layers, (n, d, self.vocab_size)]


DENSE = Shape()
SHAPES = {"dense": DENSE, "experts": replace(DENSE, experts=Experts(n_experts=32, top_k=4, d_expert=352))}
