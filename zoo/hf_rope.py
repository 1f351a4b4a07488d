"""Rotary fields of a ``config.json``: ``rope_theta`` beside ``rope_scaling``, or version 5's ``rope_parameters``."""

import dataclasses
from typing import Any

from zoo.config import BlockConfig, ModelConfig
from zoo.config_mixer import RopeConfig, RopeScalingConfig, Scaling
from zoo.hf_family import Family
from zoo.hf_fields import Fields
from zoo.hf_layers import FULL, SLIDING, type_of

KNOWN = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"},
}
EVERYWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}

NEVER_NULL = {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "truncate"}
"""Where null is not the same as absent: transformers takes it for false, or fails."""


def read_rope(config: Fields, *, like: RopeConfig, kind: str, family: Family, latent: bool) -> RopeConfig:
    """Rotary part of a mixer.

    Args:
        config: all fields.
        like: has what the family fixes.
        kind: of the layers that have this mixer.
        family: of the model.
        latent: whether the mixer is MLA, the only one whose softmax transformers scales under YaRN.

    Raises:
        HFError: a kind of scaling, or a field of one, that the zoo does not build.
    """
    local = family.local_rope and kind == SLIDING
    fields = _local(config, kind=kind) if family.local_rope else _flat(config)
    scaled = fields.raw.get("rope_type", fields.raw.get("type", "default"))
    if not isinstance(scaled, str) or scaled not in KNOWN:
        raise fields.fault("rope_type" if "rope_type" in fields.raw else "type", f"one of {sorted(KNOWN)}")
    for key in sorted(set(fields.raw) - EVERYWHERE - KNOWN[scaled]):
        raise fields.fault(key, f"absent from rope_type {scaled}")
    for key in sorted(NEVER_NULL & fields.raw.keys()):
        if fields.raw[key] is None:
            raise fields.fault(key, "absent or have a value")
    fraction = config.number("partial_rotary_factor", absent=1.0)
    fraction = fields.number("partial_rotary_factor", absent=fraction)
    if like.fraction == 1 and fraction != 1:
        holder = fields if "partial_rotary_factor" in fields.raw else config
        raise holder.fault("partial_rotary_factor", "1.0, which is all that is supported")
    theta = fields.number("rope_theta", absent=config.number("rope_local_base_freq" if local else "rope_theta"))
    scaling = None if scaled == "default" else _read_scaling(fields, config, Scaling(scaled), latent=latent)
    return dataclasses.replace(like, theta=theta, fraction=fraction, scaling=scaling)


def write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Fields in the older spelling, which every version of transformers reads, unless only the newer has a place.

    YaRN that does not act, because the context is within the original one, is left out: transformers has no such rule
    and would apply it.
    """
    raw: dict[str, Any] = {}
    if family.local_rope and any(_scaled_window(layer, config.context) for layer in config.layers):
        return {"rope_parameters": _nested(config)}
    for layer in config.layers:
        mixer = layer.attention or layer.mla
        if mixer is None or mixer.rope is None:
            continue
        if family.local_rope and layer.attention is not None and layer.attention.window:
            raw.setdefault("rope_local_base_freq", mixer.rope.theta)
        elif "rope_theta" not in raw:
            raw |= _written(mixer.rope, context=config.context)
            if mixer.rope.fraction != 1 or "partial_rotary_factor" in family.absent:
                raw["partial_rotary_factor"] = mixer.rope.fraction
    if raw and raw.get("rope_scaling") is None and "rope_parameters" in family.absent:  # else it would be scaled
        raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    return raw


def at_rest(rope: RopeConfig, *, context: int) -> bool:
    """Whether there is no scaling, or one that does not act."""
    scaling = rope.scaling
    if scaling is None:
        return True
    return scaling.kind is Scaling.yarn and scaling.original_context is not None and context <= scaling.original_context


def _written(rope: RopeConfig, *, context: int) -> dict[str, Any]:
    scaling = rope.scaling
    raw: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if scaling is None or at_rest(rope, context=context):
        return raw
    raw["rope_scaling"] = {"rope_type": scaling.kind.value, "factor": scaling.factor}
    if scaling.kind is Scaling.linear:
        return raw
    raw["rope_scaling"]["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind is Scaling.llama3:
        raw["rope_scaling"] |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        return raw
    raw["rope_scaling"] |= {"beta_slow": scaling.low, "beta_fast": scaling.high}
    if scaling.mscale_all_dim:
        raw["rope_scaling"] |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    if not scaling.truncate:
        raw["rope_scaling"]["truncate"] = False
    return raw


def _scaled_window(layer: BlockConfig, context: int) -> bool:
    """Whether a layer has a window and scaled positions: the older spelling scales the full layers only."""
    attention = layer.attention
    if attention is None or not attention.window or attention.rope is None:
        return False
    return not at_rest(attention.rope, context=context)


def _nested(config: ModelConfig) -> dict[str, Any]:
    """One object for each type of layer, of the first layer that is of it."""
    nested: dict[str, Any] = {}
    for layer in config.layers:
        if layer.attention is not None and layer.attention.rope is not None:
            flat = _written(layer.attention.rope, context=config.context)
            scaling = flat["rope_scaling"] or {"rope_type": "default"}
            nested.setdefault(type_of(layer), scaling | {"rope_theta": flat["rope_theta"]})
    return nested


def _flat(config: Fields) -> Fields:
    """The one object of rotary fields, of either spelling."""
    name = "rope_scaling" if config.raw.get("rope_scaling") else "rope_parameters"  # the order transformers looks in
    return _object(config, name)


def _local(config: Fields, *, kind: str) -> Fields:
    """The object of one type of layer; an older ``rope_scaling`` is of the full ones, as Gemma3TextConfig reads it."""
    nested = _object(config, "rope_parameters")
    for key in sorted(set(nested.raw) - {FULL, SLIDING}):
        raise nested.fault(key, f"absent: there is one object for {FULL} and one for {SLIDING}")
    fields = _object(nested, kind)
    older = _object(config, "rope_scaling")
    if kind == FULL and older.raw:
        return Fields(fields.raw | older.raw, source=older.source)
    return fields


def _object(fields: Fields, key: str) -> Fields:
    raw = fields.raw.get(key) or {}
    if not isinstance(raw, dict):
        raise fields.fault(key, "an object")
    return Fields(raw, source=f"{fields.source}: {key}")


def _read_scaling(fields: Fields, config: Fields, kind: Scaling, *, latent: bool) -> RopeScalingConfig:
    factor = fields.number("factor")
    if kind is Scaling.linear:
        return RopeScalingConfig(kind=kind, factor=factor)
    context = config.whole("max_position_embeddings")
    original = fields.whole("original_max_position_embeddings", absent=context)
    original = config.whole("original_max_position_embeddings", absent=original)  # where both are, this one counts
    if kind is Scaling.llama3:
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        return RopeScalingConfig(kind=kind, factor=factor, original_context=original, low=low, high=high)
    if context <= original:
        raise config.fault(
            "max_position_embeddings", f"above original_max_position_embeddings ({original}), where YaRN acts"
        )
    fields.fixed("attention_factor", None, absent=None)
    if not latent and fields.number("mscale_all_dim", absent=0.0):
        raise fields.fault("mscale_all_dim", "0 or absent but in MLA: transformers scales no other softmax")
    phases, softmax = _read_mscale(fields)
    return RopeScalingConfig(
        kind=kind,
        factor=factor,
        original_context=original,
        low=fields.number("beta_slow", absent=1.0),
        high=fields.number("beta_fast", absent=32.0),
        mscale=phases,
        mscale_all_dim=softmax,
        truncate=fields.flag("truncate", absent=True),
    )


def _read_mscale(fields: Fields) -> tuple[float, float]:
    """Factors of phases and softmax; without mscale_all_dim transformers takes 1 for the phases, whatever mscale is."""
    phases, softmax = fields.number("mscale", absent=0.0), fields.number("mscale_all_dim", absent=0.0)
    if not softmax:
        return 1.0, 0.0
    if not phases:
        raise fields.fault("mscale", "a number other than 0 beside mscale_all_dim")
    return phases, softmax
