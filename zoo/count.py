"""What an architecture costs, from its config alone: parameters, arithmetic and cache. No torch, no module built."""

from dataclasses import dataclass

from zoo.config import BlockConfig, ModelConfig
from zoo.config_ff import Activation, MLPConfig, MoEConfig
from zoo.config_mixer import AttentionConfig, DeltaNetConfig, MLAConfig, NormConfig, NormKind, QKNormConfig, Scope


@dataclass(frozen=True)
class Parameters:
    """Trained numbers of a model. Multi-token modules are apart, as publishers mostly count; balancing biases are none.

    Attributes:
        total: the main model, embedding and head included; a tied matrix once.
        active: of ``total``, what one token meets: all but the routed experts it is not sent to.
        embed: the embedding of tokens.
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
        matmul: 6 for each weight that multiplies the token, those of convolutions included: 2 forward, 4 backward.
        attention: scores and weighted sums, over the keys that a mask lets through; DeltaNet's work on its state.
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
    positions = d * config.context if config.learned_positions else 0
    layers = config.layers
    mtp = 0
    mtp_active = 0
    if config.n_mtp:
        last = layers[-1]
        around = 3 * _norm(d, config.norm) + 2 * d * d  # three norms and the projection of embedding and state
        mtp = config.n_mtp * (around + _block(last, model=config))
        mtp_active = mtp - config.n_mtp * _idle(last, d=d)
    blocks = sum(_block(layer, model=config) for layer in layers)
    total = embed + positions + head + _norm(d, config.norm) + blocks
    active = total - sum(_idle(layer, d=d) for layer in layers)
    return Parameters(total, active, embed, head, mtp, mtp_active)


def flops_per_token(config: ModelConfig, *, seq_len: int) -> Flops:
    """Operations that training needs for one token of a row, rounded down.

    6 times the weights in matrix products (arXiv 2001.08361, section 2.1), plus attention as in PaLM (arXiv 2204.02311,
    appendix B), except that only the keys a mask lets through are counted: under a causal one (seq_len + 1) / 2 of them
    on average, where PaLM counts seq_len. Norms, rotations and the softmax are left out, and so is what recomputation
    adds.

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


def forward_flops(layer: BlockConfig, *, d_model: int, seq_len: int) -> int:
    """Operations of the forward of one layer for one token of a row: a third of what training needs, rounded down."""
    return 2 * _products(layer, d=d_model) + _attention_flops(layer, seq_len=seq_len) // 3


def cache_per_token(config: ModelConfig) -> int:
    """Numbers that generation keeps for each token, windows and chunks disregarded; multi-token modules keep none."""
    return sum(_cached(layer) for layer in config.layers)


def kv_bytes_per_token(config: ModelConfig, *, value_bytes: int) -> int:
    """Bytes of ``cache_per_token``, with ``value_bytes`` bytes a number (bf16: 2)."""
    return cache_per_token(config) * value_bytes


def cache_of_row(config: ModelConfig, *, tokens: int) -> int:
    """Numbers that generation keeps of a row of ``tokens`` tokens.

    A window or chunk bounds what its layer keeps; DeltaNet keeps a state of fixed size: for each value head values by
    keys, and of its convolutions the inputs that the next token reaches.
    """
    kept = 0
    for layer in config.layers:
        if layer.deltanet is not None:
            n = layer.deltanet
            kept += n.n_v_heads * n.v_dim * n.k_dim + (n.conv - 1) * _channels(n)
        else:
            bound = (layer.attention.window or layer.attention.chunk) if layer.attention is not None else None
            kept += _cached(layer) * (tokens if bound is None else min(tokens, bound))
    return kept


def _block(layer: BlockConfig, *, model: ModelConfig) -> int:
    """Parameters of one layer."""
    d = model.d_model
    norms = 2 * (layer.pre_norm + layer.post_norm) * _norm(d, model.norm)
    return norms + _beside(layer, d=d) + _products(layer, d=d) + _idle(layer, d=d)


def _norm(dim: int, norm: NormConfig) -> int:
    """Weights, and biases, of a norm."""
    return {NormKind.rms: 1, NormKind.layer: 2, NormKind.bare: 0}[norm.kind] * dim


def _beside(layer: BlockConfig, *, d: int) -> int:
    """What mixer and feed-forward have beside matrices: norms, biases, sinks, decays; only of experts a token meets."""
    count = 0
    if layer.attention is not None:
        count += _attention_beside(layer.attention, d=d)
    if layer.mla is not None:
        count += _norm(layer.mla.q_rank or 0, layer.mla.norm) + _norm(layer.mla.kv_rank, layer.mla.norm)
    if layer.deltanet is not None:
        n = layer.deltanet
        count += 2 * n.n_v_heads + _norm(n.v_dim, n.norm)  # a decay and a step a head
    if layer.mlp is not None and layer.mlp.bias:
        count += (_matrices(layer.mlp) - 1) * layer.mlp.d_ff + d
    if layer.moe is not None:
        count += layer.moe.n_experts if layer.moe.router.bias else 0
        count += layer.moe.top_k * _expert_biases(layer.moe, d=d)
    return count


def _attention_beside(a: AttentionConfig, *, d: int) -> int:
    count = (a.n_heads + 2 * a.n_kv_heads) * a.head_dim if a.bias else 0
    count += d if a.out_bias else 0
    count += a.n_heads if a.sinks else 0
    for n_heads in (a.n_heads, a.n_kv_heads):
        count += _heads_norm(a.qk_norm, n_heads=n_heads, head_dim=a.head_dim) if a.qk_norm else 0
    return count


def _heads_norm(norm: QKNormConfig, *, n_heads: int, head_dim: int) -> int:
    return _norm(head_dim if norm.scope is Scope.head else n_heads * head_dim, norm)


def _products(layer: BlockConfig, *, d: int) -> int:
    """Weights of the products that one token goes through in one layer."""
    weights = 0
    if layer.attention is not None:
        weights += _attention(layer.attention, d=d)
    if layer.mla is not None:
        weights += _mla(layer.mla, d=d)
    if layer.deltanet is not None:
        weights += _deltanet(layer.deltanet, d=d)
    if layer.mlp is not None:
        weights += _matrices(layer.mlp) * d * layer.mlp.d_ff
    if layer.moe is not None:
        shared = 3 * d * layer.moe.d_shared + (d if layer.moe.shared_gate else 0)
        weights += d * layer.moe.n_experts + shared + layer.moe.top_k * _expert(layer.moe, d=d)
    return weights


def _attention(a: AttentionConfig, *, d: int) -> int:
    wide = 3 if a.gate else 2  # queries, output, and a gate as wide
    return d * (wide * a.n_heads + 2 * a.n_kv_heads) * a.head_dim


def _mla(m: MLAConfig, *, d: int) -> int:
    query = m.n_heads * (m.nope_dim + m.rope_dim)
    queries = d * query if m.q_rank is None else (d + query) * m.q_rank
    keys_and_values = d * (m.kv_rank + m.rope_dim) + m.kv_rank * m.n_heads * (m.nope_dim + m.v_dim)
    return queries + keys_and_values + m.n_heads * m.v_dim * d


def _deltanet(n: DeltaNetConfig, *, d: int) -> int:
    """Queries, keys and values, their convolutions, output and its gate, a decay and a strength for each value head."""
    values = n.n_v_heads * n.v_dim
    return d * (_channels(n) + 2 * values + 2 * n.n_v_heads) + n.conv * _channels(n)


def _channels(n: DeltaNetConfig) -> int:
    """Width of queries, keys and values together, which is what the convolutions work on."""
    return 2 * n.n_k_heads * n.k_dim + n.n_v_heads * n.v_dim


def _matrices(mlp: MLPConfig) -> int:
    return 2 if mlp.activation is Activation.gelu else 3


def _expert(moe: MoEConfig, *, d: int) -> int:
    return 3 * d * moe.d_expert


def _expert_biases(moe: MoEConfig, *, d: int) -> int:
    return 2 * moe.d_expert + d if moe.bias else 0


def _idle(layer: BlockConfig, *, d: int) -> int:
    """What belongs to the routed experts that a token is not sent to."""
    if layer.moe is None:
        return 0
    return (layer.moe.n_experts - layer.moe.top_k) * (_expert(layer.moe, d=d) + _expert_biases(layer.moe, d=d))


def _attention_flops(layer: BlockConfig, *, seq_len: int) -> int:
    """Scores (query width) and weighted sums (value width): 2 a key forward, twice that backward, mean number of keys.

    DeltaNet, as a recurrence: for each value head, three products with its state (what it holds for the key, what is
    written, what the query reads). Computing by chunks, as kernels do, takes more.
    """
    if layer.deltanet is not None:
        return 6 * 3 * layer.deltanet.n_v_heads * layer.deltanet.k_dim * layer.deltanet.v_dim
    window = chunk = None
    if layer.mla is not None:
        width = layer.mla.n_heads * (layer.mla.nope_dim + layer.mla.rope_dim + layer.mla.v_dim)
    else:
        assert layer.attention is not None, f"{layer=}"
        width = 2 * layer.attention.n_heads * layer.attention.head_dim
        window, chunk = layer.attention.window, layer.attention.chunk
    return 6 * width * _pairs(seq_len, window=window, chunk=chunk) // seq_len


def _pairs(seq_len: int, *, window: int | None, chunk: int | None) -> int:
    """Pairs of a query and a key that it sees.

    Example: five tokens see 1 2 3 4 5 keys, 15 pairs; with a window of 3, 1 2 3 3 3; in chunks of 3, 1 2 3 1 2.
    """
    if chunk is not None:
        whole, rest = divmod(seq_len, chunk)
        return whole * _pairs(chunk, window=None, chunk=None) + _pairs(rest, window=None, chunk=None)
    near = seq_len if window is None else min(window, seq_len)
    return near * (near + 1) // 2 + (seq_len - near) * near


def _cached(layer: BlockConfig) -> int:
    if layer.deltanet is not None:
        return 0
    if layer.mla is not None:
        return layer.mla.kv_rank + layer.mla.rope_dim  # the latent, and the rotated key that all heads share
    assert layer.attention is not None, f"{layer=}"
    return 2 * layer.attention.n_kv_heads * layer.attention.head_dim
