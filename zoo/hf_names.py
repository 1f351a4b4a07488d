"""Where each tensor of ours stands in a Hugging Face folder: one table of names and layouts for all families."""

from dataclasses import dataclass

from zoo.config import BlockConfig, ModelConfig

IGNORED = "rotary_emb.inv_freq"
"""End of a key that old checkpoints store and nobody needs."""

NORMS = {"mixer_norm": "input_layernorm", "ff_norm": "post_attention_layernorm"}
ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
QK_NORM = {"q_norm": "q_norm", "k_norm": "k_norm"}
MLA = {"wkv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "wkv": "kv_b_proj", "wo": "o_proj"}
WIDE_QUERY = {"wq": "q_proj"}  # of MLA without q_rank
LOW_RANK_QUERY = {"wq_down": "q_a_proj", "q_norm": "q_a_layernorm", "wq": "q_b_proj"}
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MTP = {"embed_norm": "enorm", "hidden_norm": "hnorm", "proj": "eh_proj", "norm": "shared_head.norm"}
PACKED = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", None)}


@dataclass(frozen=True)
class Place:
    """Where one tensor is stored.

    Attributes:
        keys: one key; for a bank of experts one for each, in order, whose tensors stack.
        stacked: whether it is such a bank.
        packed: key under which transformers 5 keeps a whole bank.
        half: which half of the packed rows is meant, 0 or 1; None: all.
    """

    keys: tuple[str, ...]
    stacked: bool = False
    packed: str | None = None
    half: int | None = None


def places(config: ModelConfig) -> dict[str, Place]:
    """Place of every tensor in ``Decoder(config).state_dict()``."""
    found = {"embed.weight": Place(("model.embed_tokens.weight",)), "norm.weight": Place(("model.norm.weight",))}
    if not config.tied:
        found["head.weight"] = Place(("lm_head.weight",))
    for i, layer in enumerate(config.layers):
        found |= _block(layer, ours=f"blocks.{i}", theirs=f"model.layers.{i}")
    for depth in range(config.n_mtp):
        theirs = mtp_prefix(config, depth)
        found |= _weights(MTP, ours=f"mtp.{depth}", theirs=theirs)
        found |= _block(config.layers[-1], ours=f"mtp.{depth}.block", theirs=theirs)
    return found


def copies(config: ModelConfig) -> dict[str, str]:
    """Keys under which a folder may repeat a tensor → our name of it.

    DeepSeek's released weights repeat embedding and head in the multi-token module; some tied checkpoints hold a head.
    """
    head = "embed.weight" if config.tied else "head.weight"
    found = {"lm_head.weight": "embed.weight"} if config.tied else {}
    for depth in range(config.n_mtp):
        theirs = mtp_prefix(config, depth)
        found |= {f"{theirs}.embed_tokens.weight": "embed.weight", f"{theirs}.shared_head.head.weight": head}
    return found


def mtp_prefix(config: ModelConfig, depth: int) -> str:
    """Keys of a multi-token module: it is stored as a layer after the last."""
    return f"model.layers.{config.n_layers + depth}"


def _block(layer: BlockConfig, *, ours: str, theirs: str) -> dict[str, Place]:
    found = _weights(NORMS, ours=ours, theirs=theirs)
    mixer = {"ours": f"{ours}.mixer", "theirs": f"{theirs}.self_attn"}
    if layer.attention is not None:
        found |= _weights(ATTENTION | (QK_NORM if layer.attention.qk_norm else {}), **mixer)
    if layer.mla is not None:
        found |= _weights(MLA | (WIDE_QUERY if layer.mla.q_rank is None else LOW_RANK_QUERY), **mixer)
    if layer.mlp is not None:
        found |= _weights(MLP, ours=f"{ours}.mlp", theirs=f"{theirs}.mlp")
    if layer.moe is not None:
        found[f"{ours}.moe.router.weight"] = Place((f"{theirs}.mlp.gate.weight",))
        found[f"{ours}.moe.router.balance_bias"] = Place((f"{theirs}.mlp.gate.e_score_correction_bias",))
        found |= _weights(MLP, ours=f"{ours}.moe.shared", theirs=f"{theirs}.mlp.shared_experts")
        for name, key in MLP.items():
            one_each = tuple(f"{theirs}.mlp.experts.{e}.{key}.weight" for e in range(layer.moe.n_experts))
            packed, half = PACKED[name]
            bank = Place(one_each, stacked=True, packed=f"{theirs}.mlp.experts.{packed}", half=half)
            found[f"{ours}.moe.experts.{name}"] = bank
    return found


def _weights(table: dict[str, str], *, ours: str, theirs: str) -> dict[str, Place]:
    return {f"{ours}.{name}.weight": Place((f"{theirs}.{key}.weight",)) for name, key in table.items()}
