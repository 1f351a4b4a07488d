"""Rotary fields of a ``config.json``: ``rope_theta`` beside ``rope_scaling``, or version 5's ``rope_parameters``."""

from typing import Any

from zoo.config import RopeConfig, RopeScalingConfig, Scaling
from zoo.hf_fields import Fields

DEFAULT_THETA = 10_000.0
KNOWN = {
    "default": set[str](),
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"},
}
EVERYWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


def read_rope(config: Fields, *, interleaved: bool) -> RopeConfig:
    """Rotary part of a mixer.

    Raises:
        HFError: a kind of scaling, or a field of one, that the zoo does not build.
    """
    name = "rope_scaling" if config.raw.get("rope_scaling") else "rope_parameters"  # the order transformers looks in
    raw = config.raw.get(name) or {}
    if not isinstance(raw, dict):
        raise config.fault(name, "an object")
    fields = Fields(raw, source=f"{config.source}: {name}")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if not isinstance(kind, str) or kind not in KNOWN:
        raise fields.fault("rope_type" if "rope_type" in raw else "type", f"one of {sorted(KNOWN)}")
    for key in sorted(set(raw) - EVERYWHERE - KNOWN[kind]):
        raise fields.fault(key, f"absent from rope_type {kind}")
    for place in (config, fields):
        place.fixed("partial_rotary_factor", 1.0, absent=1.0)
    theta = fields.number("rope_theta", absent=config.number("rope_theta", absent=DEFAULT_THETA))
    scaling = None if kind == "default" else _read_scaling(fields, config, Scaling(kind))
    return RopeConfig(theta=theta, interleaved=interleaved, scaling=scaling)


def write_rope(rope: RopeConfig, *, context: int) -> dict[str, Any]:
    """Fields in the older spelling, which every version of transformers reads.

    YaRN that does not act, because ``context`` is within the original one, is left out: transformers has no such rule
    and would apply it.
    """
    scaling = rope.scaling
    raw: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if scaling is None or (scaling.kind is Scaling.yarn and context <= scaling.original_context):
        return raw
    raw["rope_scaling"] = {
        "rope_type": scaling.kind.value,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context,
    }
    if scaling.kind is Scaling.llama3:
        raw["rope_scaling"] |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        return raw
    raw["rope_scaling"] |= {"beta_slow": scaling.low, "beta_fast": scaling.high}
    if scaling.mscale_all_dim:
        raw["rope_scaling"] |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return raw


def _read_scaling(fields: Fields, config: Fields, kind: Scaling) -> RopeScalingConfig:
    context = config.whole("max_position_embeddings")
    original = fields.whole("original_max_position_embeddings", absent=context)
    original = config.whole("original_max_position_embeddings", absent=original)  # where both are, this one counts
    factor = fields.number("factor")
    if kind is Scaling.llama3:
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        return RopeScalingConfig(kind=kind, factor=factor, original_context=original, low=low, high=high)
    if context <= original:
        raise config.fault(
            "max_position_embeddings", f"above original_max_position_embeddings ({original}), where YaRN acts"
        )
    fields.fixed("truncate", True, absent=True)
    fields.fixed("attention_factor", None, absent=None)
    phases, softmax = _read_mscale(fields)
    return RopeScalingConfig(
        kind=kind,
        factor=factor,
        original_context=original,
        low=fields.number("beta_slow", absent=1.0),
        high=fields.number("beta_fast", absent=32.0),
        mscale=phases,
        mscale_all_dim=softmax,
    )


def _read_mscale(fields: Fields) -> tuple[float, float]:
    """Factors of phases and softmax; without mscale_all_dim transformers takes 1 for the phases, whatever mscale is."""
    phases, softmax = fields.number("mscale", absent=0.0), fields.number("mscale_all_dim", absent=0.0)
    if not softmax:
        return 1.0, 0.0
    if not phases:
        raise fields.fault("mscale", "a number other than 0 beside mscale_all_dim")
    return phases, softmax
