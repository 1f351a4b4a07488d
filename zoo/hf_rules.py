"""Fields of a ``config.json`` that are no plain counterpart of one value: each rule reads them into a part of a layer.

A rule leaves parts alone that it does not concern, and writes what it reads.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from zoo.config import ModelConfig
from zoo.config_ff import MLPConfig, MoEConfig
from zoo.config_mixer import AttentionConfig, MLAConfig
from zoo.hf_fields import Fields, HFError
from zoo.hf_table import Part, at, first, put, slot_of


class Rule(Protocol):
    """Reads into a part, and writes the fields of a model."""

    def read(self, fields: Fields, part: Part) -> None:
        """Set what the fields say of ``part``."""
        ...

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The fields."""
        ...


@dataclass(frozen=True)
class Heads:
    """Numbers of heads and their width, which is d_model / n_heads unless a field ``dim`` says otherwise."""

    n: str = "num_attention_heads"
    kv: str | None = "num_key_value_heads"  # None: as many as queries
    dim: str | None = "head_dim"
    width: str = "hidden_size"
    divides: bool = False  # the class refuses a width that n_heads does not divide

    def read(self, fields: Fields, part: Part) -> None:
        """Of attention."""
        if isinstance(part, AttentionConfig):
            n_heads = fields.whole(self.n)
            part.n_heads = n_heads
            part.n_kv_heads = n_heads if self.kv is None else fields.whole(self.kv, absent=n_heads)
            each = fields.whole(self.width) // n_heads
            part.head_dim = each if self.dim is None else fields.whole(self.dim, absent=each)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Those of the first attention layer; nothing where no layer has attention."""
        if self.divides:
            _check_divides(config, first(config, "attention.n_heads"))
        paths = {self.n: "attention.n_heads", self.kv: "attention.n_kv_heads", self.dim: "attention.head_dim"}
        found = {key: first(config, path) for key, path in paths.items() if key is not None}
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class LatentHeads:
    """MLA has one number of heads, which two fields repeat."""

    dim: str | None = None  # a field that would overrule how many dimensions rotate
    divides: bool = False  # the class refuses a width that n_heads does not divide

    def read(self, fields: Fields, part: Part) -> None:
        """Of MLA."""
        if isinstance(part, MLAConfig):
            part.n_heads = fields.whole("num_attention_heads")
            if fields.whole("num_key_value_heads", absent=part.n_heads) != part.n_heads:
                raise fields.fault("num_key_value_heads", f"num_attention_heads ({part.n_heads})")
            if self.dim in fields.raw and fields.raw[self.dim] != part.rope_dim:
                raise fields.fault(self.dim, f"absent or qk_rope_head_dim ({part.rope_dim})")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Both."""
        n_heads = first(config, "mla.n_heads")
        if self.divides:
            _check_divides(config, n_heads)
        return {"num_attention_heads": n_heads, "num_key_value_heads": n_heads}


@dataclass(frozen=True)
class Experts:
    """Number of experts, a field that transformers saves under another name than it was published under."""

    field: str = "num_experts"
    saved: str = "num_local_experts"

    def read(self, fields: Fields, part: Part) -> None:
        """Of experts."""
        if isinstance(part, MoEConfig):
            there = self.field if fields.raw.get(self.saved) is None else self.saved
            part.n_experts = fields.whole(there)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """As published."""
        return {self.field: first(config, "moe.n_experts")}


@dataclass(frozen=True)
class SharedExperts:
    """``n_shared_experts`` of an expert's width stand side by side as one."""

    def read(self, fields: Fields, part: Part) -> None:
        """Of experts."""
        if isinstance(part, MoEConfig):
            part.d_shared = part.d_expert * fields.whole("n_shared_experts")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """How many."""
        d_shared, d_expert = first(config, "moe.d_shared"), first(config, "moe.d_expert")
        return {} if d_expert is None else {"n_shared_experts": d_shared // d_expert}


@dataclass(frozen=True)
class Greedy:
    """DeepSeek-V2's ``topk_method``: only ``group_limited_greedy`` looks at groups."""

    def read(self, fields: Fields, part: Part) -> None:
        """Of routers."""
        method = fields.raw.get("topk_method")
        if method not in ("greedy", "group_limited_greedy"):
            raise fields.fault("topk_method", '"greedy" or "group_limited_greedy"')
        if isinstance(part, MoEConfig) and method == "group_limited_greedy":
            part.router.n_groups = fields.whole("n_group")
            part.router.top_groups = fields.whole("topk_group")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Groups also where there is but one."""
        n_groups, top_groups = first(config, "moe.router.n_groups"), first(config, "moe.router.top_groups")
        if n_groups is None:
            return {"topk_method": "greedy"}
        method = "greedy" if n_groups == 1 else "group_limited_greedy"
        return {"topk_method": method, "n_group": n_groups, "topk_group": top_groups}


@dataclass(frozen=True)
class Inner:
    """GPT-2's ``n_inner``: null is four times the width."""

    def read(self, fields: Fields, part: Part) -> None:
        """Of feed-forward layers."""
        if isinstance(part, MLPConfig):
            part.d_ff = fields.whole("n_inner", absent=4 * fields.whole("n_embd"))

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The number itself."""
        return {"n_inner": first(config, "mlp.d_ff")}


@dataclass(frozen=True)
class QueryScalar:
    """What scores are divided by the root of; Gemma's class takes whole numbers only."""

    def read(self, fields: Fields, part: Part) -> None:
        """Of attention."""
        if isinstance(part, AttentionConfig):
            part.scale_dim = fields.number("query_pre_attn_scalar")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The number, or the width of a head, which it is unless set."""
        scale_dim = first(config, "attention.scale_dim") or first(config, "attention.head_dim")
        if scale_dim != int(scale_dim):
            raise HFError(f"attention.scale_dim={scale_dim}: must be a whole number for Gemma3ForCausalLM")
        return {"query_pre_attn_scalar": int(scale_dim)}


@dataclass(frozen=True)
class Slot:
    """A field that is false where a slot is empty."""

    path: str
    field: str

    def read(self, fields: Fields, part: Part) -> None:
        """Empty the slot if the field is false."""
        slot, _, rest = self.path.partition(".")
        if slot == slot_of(part) and at(part, rest) is not None and not fields.flag(self.field):
            put(part, rest, None)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Whether any layer fills it."""
        return {self.field: first(config, self.path) is not None}


def _check_divides(config: ModelConfig, n_heads: int) -> None:
    if config.d_model % n_heads:
        raise HFError(f"model.d_model={config.d_model}: must be a multiple of n_heads ({n_heads}) for transformers")
