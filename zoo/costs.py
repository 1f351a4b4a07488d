"""The costs of an architecture that a card lists, part by part, over ``zoo/count.py``."""

from dataclasses import dataclass

from zoo.config import ModelConfig
from zoo.config_ff import Activation, MLPConfig, MoEConfig
from zoo.count import cache_of_row, flops_per_token, kv_bytes_per_token, parameters

SEQ_LEN = 4096  # tokens of the row for which arithmetic is given
BF16 = 2  # bytes


@dataclass(frozen=True)
class Costs:
    """Numbers of a card.

    Attributes:
        parameters: of the main model.
        active: of those, what one token meets.
        active_without_embed: ``active`` less an embedding that only looks up.
        mtp: parameters of the multi-token modules.
        parts: ``parameters`` taken apart.
        cache: bytes of keys and values for each token in bf16, windows and chunks disregarded.
        growing: of ``cache``, what is in layers that see all.
        kept: most bytes that the other layers keep, however long the row.
        whole: bytes that a row as long as the context keeps.
        flops: operations of training for one token of a row of ``SEQ_LEN``.
    """

    parameters: int
    active: int
    active_without_embed: int
    mtp: int
    parts: list[tuple[str, int]]
    cache: int
    growing: int
    kept: int
    whole: int
    flops: int


def costs(config: ModelConfig) -> Costs:
    """All of them."""
    counted = parameters(config)
    far = 10**9  # tokens, beyond every window
    growing = cache_of_row(config, tokens=far + 1) - cache_of_row(config, tokens=far)
    return Costs(
        parameters=counted.total,
        active=counted.active,
        active_without_embed=counted.active_without_embed,
        mtp=counted.mtp,
        parts=_parts(config),
        cache=kv_bytes_per_token(config, value_bytes=BF16),
        growing=growing * BF16,
        kept=(cache_of_row(config, tokens=far) - far * growing) * BF16,
        whole=cache_of_row(config, tokens=config.context) * BF16,
        flops=flops_per_token(config, seq_len=SEQ_LEN).total,
    )


def _parts(config: ModelConfig) -> list[tuple[str, int]]:
    """Parameters by what they are in, parts without any left out."""
    counted, d, layers = parameters(config), config.d_model, config.layers
    moes = [layer.moe for layer in layers if layer.moe is not None]
    parts = {
        "embedding": counted.embed,
        "learned positions": config.context * d if config.learned_positions else 0,
        "dense feed-forward": sum(_mlp(layer.mlp, d=d) for layer in layers if layer.mlp is not None),
        "routed experts": sum(_experts(moe, d=d) for moe in moes),
        "shared experts": sum((3 * moe.d_shared + moe.shared_gate) * d for moe in moes),
        "routers": sum(moe.n_experts * (d + moe.router.bias) for moe in moes),
        "head": counted.head,
    }
    parts["mixers and norms"] = counted.total - sum(parts.values())
    order = ["embedding", "learned positions", "mixers and norms", *list(parts)[2:-1]]
    return [(part, parts[part]) for part in order if parts[part]]


def _mlp(mlp: MLPConfig, *, d: int) -> int:
    matrices = 2 if mlp.activation is Activation.gelu else 3
    return matrices * d * mlp.d_ff + ((matrices - 1) * mlp.d_ff + d if mlp.bias else 0)


def _experts(moe: MoEConfig, *, d: int) -> int:
    return moe.n_experts * (3 * d * moe.d_expert + (2 * moe.d_expert + d if moe.bias else 0))
