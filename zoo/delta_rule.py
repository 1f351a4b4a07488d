"""The gated delta rule, a linear recurrence over a matrix-valued state, in two forms that give the same numbers.

Per value head, with unit keys k, values v, a writing strength β and a decay α = exp(``decay``), token t does

    S ← α S;    S ← S + k (β (v − Sᵀk))ᵀ;    o = Sᵀq

where S, (K, V), is zero before a document's first token. Source: arXiv 2412.06464, equation 10; the form by chunks is
its section 3.3. Value heads in consecutive groups of R share a query and key head (H = G R), as in Qwen3-Next.
Letters: zoo/__init__.py, but G counts query and key heads, H value heads, V a value's width; here also M chunks of C
tokens. All is computed in at least fp32.
"""

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens at most: the chunk of Qwen3-Next and of flash-linear-attention
EPS = 1e-6  # beside a vector's squared length; that of Qwen3-Next and of flash-linear-attention


class Rule(StrEnum):
    """What computes the rule."""

    torch = "torch"  # ``chunked``, anywhere
    fla = "fla"  # flash-linear-attention's kernels (zoo/delta_fla.py)


def recurrent(q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor, decay: Tensor, documents: Tensor | None) -> Tensor:
    """The rule token by token, as its definition reads: what ``chunked`` is measured against. Arguments as there."""
    R = v.shape[2] // k.shape[2]
    narrow, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    q, k = (each.repeat_interleave(R, dim=2) for each in (unit(q, scale=q.shape[-1] ** -0.5), unit(k)))
    v, beta, alpha = v.to(wide), beta.to(wide), decay.to(wide).exp()
    if documents is not None:
        alpha = alpha * F.pad(documents[:, 1:] == documents[:, :-1], (1, 0))[..., None]  # forgets all at a start
    state, outputs = k.new_zeros(*v.shape[:1], *v.shape[2:3], k.shape[-1], v.shape[-1]), []  # (B, H, K, V)
    for q_t, k_t, v_t, beta_t, alpha_t in zip(*(each.unbind(1) for each in (q, k, v, beta, alpha)), strict=True):
        state = state * alpha_t[..., None, None]
        error = v_t - torch.einsum("bhk,bhkv->bhv", k_t, state)
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, beta_t[..., None] * error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
    return torch.stack(outputs, dim=1).to(narrow)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor, decay: Tensor, documents: Tensor | None, chunk: int = CHUNK
) -> Tensor:
    """The rule by chunks of tokens: matrix products within a chunk, one step of the state from chunk to chunk.

    With b the running sum of ``decay`` within a chunk, what its tokens write, U (C, V), solves a triangular system:

        u_i + β_i Σ_{j<i} exp(b_i − b_j) (k_i·k_j) u_j = β_i (v_i − exp(b_i) Sᵀk_i)

    Args:
        q: (B, T, G, K), of any length; normalised here and divided by √K.
        k: (B, T, G, K), of any length; normalised here.
        v: (B, T, H, V), where G divides H.
        beta: (B, T, H), how much of a value replaces what the state holds for its key.
        decay: (B, T, H), at most 0, the logarithm of what the state is multiplied by.
        documents: (B, T), a number that differs between the documents of a row; None: each row is one document.
        chunk: tokens of a chunk, at most.

    Returns:
        (B, T, H, V), of the dtype of v.
    """
    (B, T, G, K), (H, V) = k.shape, v.shape[2:]
    narrow, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    M = -(-T // chunk)
    C = -(-T // M)  # as short as M chunks can be: 65 tokens become 33 and 33, one of them empty

    def cut(x: Tensor, *shape: int) -> Tensor:
        """(B, T, …) to (M, B, *shape, C, rest); what is missing at the end is zeros, which write nothing."""
        padded = F.pad(x.reshape(B, T, -1), (0, 0, 0, M * C - T))
        return padded.view(B, M, C, *shape, -1).movedim((1, 2), (0, -2))

    q, k = cut(unit(q, scale=K**-0.5), G, 1).contiguous(), cut(unit(k), G, 1).contiguous()  # (M, B, G, 1, C, K)
    v, beta = cut(v.to(wide), G, H // G), cut(beta.to(wide), G, H // G)  # (M, B, G, R, C, V), (M, B, G, R, C, 1)
    b = cut(decay.to(wide), G, H // G).squeeze(-1).cumsum(-1)  # (M, B, G, R, C)
    same, reads, keeps = _reach(None if documents is None else cut(documents).squeeze(-1), length=C, device=q.device)

    pair = (b[..., :, None] - b[..., None, :]).masked_fill_(~same, -torch.inf).exp_()  # before exp: no inf · 0
    read = b.exp() if reads is None else b.exp() * reads  # of the state before the chunk, by each token
    keep = (b[..., -1:] - b).exp() if keeps is None else (b[..., -1:] - b).exp() * keeps  # of each write, at its end
    system = (k @ k.mT) * pair * beta  # (M, B, G, R, C, C); of its diagonal and what lies above nothing is read
    sides = torch.cat([v * beta, k * (beta * read[..., None])], dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    write, correction = solved.flatten(1, 3).split([V, K], dim=-1)  # U = write − correction S
    kept = (k * keep[..., None]).flatten(1, 3)
    states, writes = _scan(write, correction, kept, whole=read[..., -1].flatten(1)[..., None, None])

    inside = ((q @ k.mT) * pair).flatten(0, 3) @ writes.flatten(0, 1)  # (M B H, C, V)
    y = torch.baddbmm(inside, (q * read[..., None]).flatten(0, 3), states.flatten(0, 1))
    return y.view(M, B, H, C, V).permute(1, 0, 3, 2, 4).reshape(B, M * C, H, V)[:, :T].to(narrow)


def _scan(write: Tensor, correction: Tensor, kept: Tensor, *, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the state from chunk to chunk.

    Args:
        write: (M, B H, C, V), what a chunk's tokens would write on an empty state.
        correction: (M, B H, C, K), what the state takes from that.
        kept: (M, B H, C, K), keys times what is left of their write at the chunk's end.
        whole: (M, B H, 1, 1), what is left of the state at the chunk's end.

    Returns:
        The states before each chunk, (M, B H, K, V), and what is written in each, (M, B H, C, V).
    """
    writes, corrections, keys, wholes = (each.unbind(0) for each in (write, correction, kept, whole))
    heads, K, V = write.shape[1], kept.shape[-1], write.shape[-1]
    states, written = [write.new_zeros(heads, K, V)], [writes[0]]
    for m in range(1, len(writes)):
        states.append(torch.baddbmm(states[-1] * wholes[m - 1], keys[m - 1].mT, written[-1]))
        written.append(torch.baddbmm(writes[m], corrections[m], states[-1], alpha=-1))
    return torch.stack(states), torch.stack(written)


def _reach(
    documents: Tensor | None, *, length: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Who shares a document: pairs of a chunk, a token with the chunk before, a token with the end of its chunk.

    Documents 0 0 1 | 1 1 2 in chunks of three give for the second chunk

        pairs  1 . .    before 1 1 .    end . . 1
               1 1 .
               . . 1

    Args:
        documents: (M, B, C) or None.
        length: C.
        device: of the pairs.

    Returns:
        Booleans that broadcast over (M, B, G, R, C, C), (M, B, G, R, C) and (M, B, G, R, C); None: all true.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if documents is None:
        return causal, None, None
    last = documents[..., -1:]
    before = torch.cat([last[:1], last[:-1]])  # the first chunk has none before it, and a state of zeros
    documents, before, last = (each[:, :, None, None] for each in (documents, before, last))
    return causal & (documents[..., :, None] == documents[..., None, :]), documents == before, documents == last


def unit(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """Vectors of length ``scale`` along the last dimension, in at least fp32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * ((x * x).sum(dim=-1, keepdim=True) + EPS).rsqrt().mul(scale)
