"""Names and layouts of our tensors in a Hugging Face folder, for one family or many: tables made of shared pieces.

A ``Table`` names what stands in one layer, by our names without ``blocks.<i>``. ``plain`` is what is stored as it is;
``each`` are banks of experts that are stored one key an expert (``{}``); ``fused`` is what several of ours make up, or
one in another layout. Where a bank is in both, files hold either: the first is what we write, the second what
transformers 5 has in memory.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from zoo.hf_images import PREFIX as IMAGES

GATE, UP, DOWN = "moe.experts.gate", "moe.experts.up", "moe.experts.down"


@dataclass(frozen=True)
class Fused:
    """A stored tensor in a layout of its own; see ``hf_layout.Layout``."""

    key: str
    parts: tuple[str, ...]
    dim: int = 0
    groups: str | None = None  # path in the layer to how often parts take turns; None: once
    transposed: bool = False
    unit: bool = False


@dataclass(frozen=True)
class Table:
    """Names of a part of a layer."""

    plain: Mapping[str, str] = field(default_factory=dict)
    each: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[Fused, ...] = ()

    def __or__(self, other: "Table") -> "Table":
        return Table({**self.plain, **other.plain}, {**self.each, **other.each}, self.fused + other.fused)


@dataclass(frozen=True)
class Names:
    """Names of a family.

    Attributes:
        block: of what every layer has.
        slots: of what stands in a slot of a layer.
        top: of what stands outside the layers.
        layer: prefix of a layer.
        respelt: part of keys as published, and what transformers has in memory and other files have instead.
        prefix: that files of the bare model lack.
        ignored: keys that files may hold and nobody needs.
        mtp: of a multi-token module, as stored beside its layer.
        mtp_at: its prefix: of the number of layers before it, or nothing.
        mtp_block: what stands between that prefix and the module's layer.
        mtp_known: numbers of layers that transformers passes over; None: of any.
    """

    block: Mapping[str, str]
    slots: Mapping[str, Table]
    top: Mapping[str, str]
    layer: str = "model.layers.{}."
    respelt: tuple[str, str] | None = None
    prefix: str = ""
    ignored: re.Pattern[str] = re.compile(r".*rotary_emb\.inv_freq")
    mtp: Mapping[str, str] = field(default_factory=dict)
    mtp_at: str = "model.layers.{}."
    mtp_block: str = ""
    mtp_known: tuple[int, ...] | None = None


TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
PRE = {"mixer_norm": "input_layernorm", "ff_norm": "post_attention_layernorm"}
POST = {"mixer_post_norm": "post_attention_layernorm", "ff_post_norm": "post_feedforward_layernorm"}
BOTH = {
    "mixer_norm": "input_layernorm",
    "mixer_post_norm": "post_attention_layernorm",
    "ff_norm": "pre_feedforward_layernorm",
    "ff_post_norm": "post_feedforward_layernorm",
}


def _under(prefix: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{prefix}.{ours}": f"{theirs}.{name}" for ours, name in names.items()}


def _mlp(ours: str, theirs: str) -> dict[str, str]:
    return _under(ours, theirs, {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})


PROJECTIONS = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
NORMED = {"q_norm": "q_norm", "k_norm": "k_norm", "sinks": "sinks"}
ATTENTION = Table(_under("mixer", "self_attn", PROJECTIONS | NORMED))
MLA = Table(
    _under(
        "mixer",
        "self_attn",
        {
            "wq_down": "q_a_proj",
            "q_norm": "q_a_layernorm",
            "wq": "q_b_proj",
            "wkv_down": "kv_a_proj_with_mqa",
            "kv_norm": "kv_a_layernorm",
            "wkv": "kv_b_proj",
            "wo": "o_proj",
        },
    )
)
WIDE_MLA = MLA | Table({"mixer.wq": "self_attn.q_proj"})  # without q_rank
MLP = Table(_mlp("mlp", "mlp"))
ROUTER = {"moe.router": "mlp.gate", "moe.router.balance_bias": "mlp.gate.e_score_correction_bias"}
EACH = {
    GATE: "mlp.experts.{}.gate_proj.weight",
    UP: "mlp.experts.{}.up_proj.weight",
    DOWN: "mlp.experts.{}.down_proj.weight",
}
PACKED = (Fused("mlp.experts.gate_up_proj", (GATE, UP), dim=1), Fused("mlp.experts.down_proj", (DOWN,), dim=1))
QWEN_MOE = Table(ROUTER, EACH, PACKED)
DEEPSEEK_MOE = QWEN_MOE | Table(_mlp("moe.shared", "mlp.shared_experts"))
NEXT_MOE = QWEN_MOE | Table(_mlp("moe.shared", "mlp.shared_expert") | {"moe.shared_gate": "mlp.shared_expert_gate"})
MIXTRAL_MOE = Table(
    {"moe.router": "block_sparse_moe.gate"},
    {
        GATE: "block_sparse_moe.experts.{}.w1.weight",
        UP: "block_sparse_moe.experts.{}.w3.weight",
        DOWN: "block_sparse_moe.experts.{}.w2.weight",
    },
    PACKED,
)
LLAMA4_MOE = Table(
    {"moe.router": "feed_forward.router"} | _mlp("moe.shared", "feed_forward.shared_expert"),
    fused=(
        Fused("feed_forward.experts.gate_up_proj", (GATE, UP), dim=1, transposed=True),
        Fused("feed_forward.experts.down_proj", (DOWN,), dim=1, transposed=True),
    ),
)
GPT_OSS_MOE = Table(
    {"moe.router": "mlp.router", "moe.experts.down_bias": "mlp.experts.down_proj_bias"},
    fused=(  # columns of gate and up take turns
        Fused("mlp.experts.gate_up_proj", (GATE, UP), 1, "moe.d_expert", transposed=True),
        Fused("mlp.experts.down_proj", (DOWN,), dim=1, transposed=True),
        Fused(
            "mlp.experts.gate_up_proj_bias",
            ("moe.experts.gate_bias", "moe.experts.up_bias"),
            1,
            "moe.d_expert",
        ),
    ),
)
GPT2_ATTENTION = Table(
    {"mixer.wo.bias": "attn.c_proj.bias"},
    fused=(
        Fused("attn.c_attn.weight", ("mixer.wq.weight", "mixer.wk.weight", "mixer.wv.weight"), transposed=True),
        Fused("attn.c_attn.bias", ("mixer.wq.bias", "mixer.wk.bias", "mixer.wv.bias")),
        Fused("attn.c_proj.weight", ("mixer.wo.weight",), transposed=True),
    ),
)
GPT2_MLP = Table(
    {"mlp.up.bias": "mlp.c_fc.bias", "mlp.down.bias": "mlp.c_proj.bias"},
    fused=(
        Fused("mlp.c_fc.weight", ("mlp.up.weight",), transposed=True),
        Fused("mlp.c_proj.weight", ("mlp.down.weight",), transposed=True),
    ),
)
NEXT_ATTENTION = Table(
    _under("mixer", "self_attn", {"wk": "k_proj", "wv": "v_proj", "wo": "o_proj"} | NORMED),
    fused=(
        Fused(
            "self_attn.q_proj.weight",
            ("mixer.wq.weight", "mixer.wg.weight"),
            groups="attention.n_heads",
        ),
    ),
)
DELTANET = Table(
    _under("mixer", "linear_attn", {"log_decay": "A_log", "dt_bias": "dt_bias", "norm": "norm", "wo": "out_proj"}),
    fused=(
        Fused(
            "linear_attn.in_proj_qkvz.weight",
            ("mixer.wq.weight", "mixer.wk.weight", "mixer.wv.weight", "mixer.wg.weight"),
            groups="deltanet.n_k_heads",
        ),
        Fused(
            "linear_attn.in_proj_ba.weight",
            ("mixer.wb.weight", "mixer.wa.weight"),
            groups="deltanet.n_k_heads",
        ),
        Fused(
            "linear_attn.conv1d.weight",
            ("mixer.conv_q.weight", "mixer.conv_k.weight", "mixer.conv_v.weight"),
            unit=True,
        ),
    ),
)
MTP = {"embed_norm": "enorm", "hidden_norm": "hnorm", "proj": "eh_proj", "norm": "shared_head.norm"}
NEXT_MTP = {
    "embed_norm": "pre_fc_norm_embedding",
    "hidden_norm": "pre_fc_norm_hidden",
    "proj": "fc",
    "norm": "norm",
}

LLAMA = Names(PRE, {"attention": ATTENTION, "mla": MLA, "mlp": MLP, "moe": DEEPSEEK_MOE}, TOP)
DEEPSEEK_V3 = dataclasses.replace(LLAMA, mtp=MTP, mtp_known=(61,))
GLM = dataclasses.replace(LLAMA, mtp=MTP, mtp_known=(46, 92))
OLMO2 = dataclasses.replace(LLAMA, block=POST)
GEMMA3 = dataclasses.replace(LLAMA, block=BOTH)
CHAMELEON = dataclasses.replace(LLAMA, ignored=re.compile(re.escape(IMAGES) + ".*"))
MIXTRAL = Names(PRE, {"attention": ATTENTION, "moe": MIXTRAL_MOE}, TOP, respelt=("block_sparse_moe.", "mlp."))
LLAMA4 = Names(PRE, {"attention": ATTENTION, "mlp": Table(_mlp("mlp", "feed_forward")), "moe": LLAMA4_MOE}, TOP)
GPT_OSS = Names(PRE, {"attention": ATTENTION, "moe": GPT_OSS_MOE}, TOP)
QWEN3_NEXT = Names(
    PRE,
    {"attention": NEXT_ATTENTION, "deltanet": DELTANET, "moe": NEXT_MOE},
    TOP,
    mtp=NEXT_MTP,
    mtp_at="mtp.",
    mtp_block="layers.0.",
)
GPT2 = Names(
    {"mixer_norm": "ln_1", "ff_norm": "ln_2"},
    {"attention": GPT2_ATTENTION, "mlp": GPT2_MLP},
    {"embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"},
    layer="transformer.h.{}.",
    prefix="transformer.",
    ignored=re.compile(r".*\.attn\.(masked_)?bias"),  # causal masks
)
