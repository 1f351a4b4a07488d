"""What an architecture costs, from its config alone: parameters, arithmetic and cache. No torch, no module built."""

from dataclasses import dataclass

from zoo.config import AttentionConfig, BlockConfig, MLAConfig, ModelConfig, MoEConfig


@dataclass(frozen=True)
class Parameters:
    """Trained numbers of a model. Multi-token modules are apart, as publishers count them; router biases are buffers.

    Attributes:
        total: the main model, embedding and head included; a tied matrix once.
        active: of ``total``, what one token meets: all but the routed experts it is not sent to.
        embed: the embedding.
        head: the output matrix, 0 if it is the embedding's.
        mtp: all multi-token modules, which share the main model's embedding and head.
        mtp_active: of ``mtp``, what one token meets.
    """

    total: int
    active: int
    embed: int
    head: int
    mtp: int
    mtp_active: int

    @property
    def active_without_embed(self) -> int:
        """``active`` less an embedding that only looks up; a tied one stays, the head multiplies by it.

        DeepSeek-V3's published 36.7B is this number (36.63B); with the embedding it is 37.55B.
        """
        return self.active - (self.embed if self.head else 0)

    @property
    def body(self) -> int:
        """``total`` less embedding and head."""
        return self.total - self.embed - self.head

    @property
    def active_body(self) -> int:
        """``active`` less embedding and head."""
        return self.active - self.embed - self.head


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of training, a token, forward and backward; a multiply-add is two.

    Attributes:
        matmul: 6 for each weight that multiplies the token: 2 forward, 4 backward.
        attention: scores and weighted sums, over the keys that a causal mask lets through.
        mtp: the same two of the multi-token modules, the head's product at every depth included.
    """

    matmul: int
    attention: int
    mtp: int

    @property
    def total(self) -> int:
        """All of a training step's."""
        return self.matmul + self.attention + self.mtp


def parameters(config: ModelConfig) -> Parameters:
    """Count parameters; equal to the sum over ``Decoder(config).parameters()``."""
    d = config.d_model
    embed = d * config.vocab_size
    head = 0 if config.tied else embed
    layers = config.layers
    mtp = 0
    mtp_active = 0
    if config.n_mtp:
        last = layers[-1]
        around = 3 * d + 2 * d * d  # three norms and the projection of embedding and state
        mtp = config.n_mtp * (around + _block(last, d=d))
        mtp_active = config.n_mtp * (around + _block(last, d=d) - _idle(last, d=d))
    total = embed + head + d + sum(_block(layer, d=d) for layer in layers)
    active = total - sum(_idle(layer, d=d) for layer in layers)
    return Parameters(total, active, embed, head, mtp, mtp_active)


def flops_per_token(config: ModelConfig, *, seq_len: int) -> Flops:
    """Operations that training needs for one token of a row.

    6 times the weights in matrix products (arXiv 2001.08361, section 2.1), plus attention as in PaLM (arXiv 2204.02311,
    appendix B), except that only the keys a causal mask lets through are counted: (seq_len + 1) / 2 of them on average,
    where PaLM counts seq_len. Norms, rotations and the softmax are left out, and so is what recomputation adds.

    Args:
        config: the architecture.
        seq_len: tokens of a row that is one document; packed documents need less.
    """
    d, layers = config.d_model, config.layers
    head = d * config.vocab_size  # a tied head multiplies too
    main = head + sum(_products(layer, d=d) for layer in layers)
    attention = sum(_attention_flops(layer, seq_len=seq_len) for layer in layers)
    mtp = 0
    if config.n_mtp:
        weights = head + 2 * d * d + _products(layers[-1], d=d)
        mtp = config.n_mtp * (6 * weights + _attention_flops(layers[-1], seq_len=seq_len))
    return Flops(6 * main, attention, mtp)


def cache_per_token(config: ModelConfig) -> int:
    """Numbers that generation keeps for each token; ``kv_bytes_per_token`` in bytes. Multi-token modules keep none."""
    return sum(_cached(layer) for layer in config.layers)


def kv_bytes_per_token(config: ModelConfig, *, value_bytes: int) -> int:
    """Bytes of key-value cache a token, with ``value_bytes`` bytes a number (bf16: 2)."""
    return cache_per_token(config) * value_bytes


def _block(layer: BlockConfig, *, d: int) -> int:
    """Parameters of one layer of model width ``d``, its two norms included."""
    return 2 * d + _norms(layer) + _products(layer, d=d) + _idle(layer, d=d)


def _norms(layer: BlockConfig) -> int:
    """Norm weights inside the mixer."""
    if layer.mla is not None:
        return (layer.mla.q_rank or 0) + layer.mla.kv_rank
    assert layer.attention is not None, f"{layer=}"
    return 2 * layer.attention.head_dim if layer.attention.qk_norm else 0


def _products(layer: BlockConfig, *, d: int) -> int:
    """Weights of the matrix products that one token goes through in one layer."""
    weights = 0
    if layer.attention is not None:
        weights += _attention(layer.attention, d=d)
    if layer.mla is not None:
        weights += _mla(layer.mla, d=d)
    if layer.mlp is not None:
        weights += 3 * d * layer.mlp.d_ff
    if layer.moe is not None:
        weights += d * layer.moe.n_experts + 3 * d * layer.moe.d_shared + layer.moe.top_k * _expert(layer.moe, d=d)
    return weights


def _attention(a: AttentionConfig, *, d: int) -> int:
    return 2 * d * (a.n_heads + a.n_kv_heads) * a.head_dim


def _mla(m: MLAConfig, *, d: int) -> int:
    query = m.n_heads * (m.nope_dim + m.rope_dim)
    queries = d * query if m.q_rank is None else (d + query) * m.q_rank
    keys_and_values = d * (m.kv_rank + m.rope_dim) + m.kv_rank * m.n_heads * (m.nope_dim + m.v_dim)
    return queries + keys_and_values + m.n_heads * m.v_dim * d


def _expert(moe: MoEConfig, *, d: int) -> int:
    return 3 * d * moe.d_expert


def _idle(layer: BlockConfig, *, d: int) -> int:
    """Weights of the routed experts that a token is not sent to."""
    return 0 if layer.moe is None else (layer.moe.n_experts - layer.moe.top_k) * _expert(layer.moe, d=d)


def _attention_flops(layer: BlockConfig, *, seq_len: int) -> int:
    """Scores (query width) and weighted sums (value width): 2 a key forward, twice that backward, causal mean of keys.

    Example: five tokens see 1 2 3 4 5 keys, 3 on average.
    """
    if layer.mla is not None:
        width = layer.mla.n_heads * (layer.mla.nope_dim + layer.mla.rope_dim + layer.mla.v_dim)
    else:
        assert layer.attention is not None, f"{layer=}"
        width = 2 * layer.attention.n_heads * layer.attention.head_dim
    return 3 * (seq_len + 1) * width  # 6 · width · (seq_len + 1) / 2


def _cached(layer: BlockConfig) -> int:
    if layer.mla is not None:
        return layer.mla.kv_rank + layer.mla.rope_dim  # the latent, and the rotated key that all heads share
    assert layer.attention is not None, f"{layer=}"
    return 2 * layer.attention.n_kv_heads * layer.attention.head_dim
