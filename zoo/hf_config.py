"""``config.json`` of a Hugging Face folder, read into a ``ModelConfig`` and written from one.

Every field that changes what a model computes is either mapped or must hold the one value that the zoo builds; an
absent one means what transformers 5.23 takes it for. How routers are balanced a folder does not say: it is read as off.
A family without a class there has a layout of our own: our config under the key ``zoo``.
"""

import copy
import dataclasses
import json
from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.config import BlockConfig, InitConfig, ModelConfig, expanded
from zoo.config_ff import DeviceLossConfig, GroupScore, MoEConfig, Score, SwitchLossConfig
from zoo.config_mixer import AttentionConfig, MLAConfig
from zoo.count import parameters
from zoo.hf_families import BY_NAME, BY_TYPE
from zoo.hf_family import Family
from zoo.hf_fields import Fields, HFError
from zoo.hf_layers import FULL, type_of
from zoo.hf_rope import at_rest, read_rope, write_rope
from zoo.hf_table import MAYBE, SLOTS, Part, at, fill, first, read, rebuilt, slot_of

OWN = {"grok2"}
"""Families for which transformers has no class."""
OWN_TYPE = "zoo"
SAME = {"kimi_k2": "deepseek_v3"}
"""Types of model that are another one under a new name."""
WHOLE = {"gemma3": "gemma3_text", "llama4": "llama4_text", "mistral3": "mistral"}
"""Types with a vision tower, and those of their text models."""
NULLABLE = ("sliding_window", "q_lora_rank", "num_key_value_heads")
"""Fields where null is not the same as absent: no window, no low rank, as many heads as queries have."""
UNSET = ("rope_parameters",)
"""Fields where it is, although the class has a value for absence."""
EVERY: dict[str, object] = {"is_causal": True}
"""Fields that transformers looks at in all families, and the one value that the zoo builds."""
MOST_PARTS = 2**16
"""Layers, and experts of a layer: each has a name of its own, and more would fill the memory before files are read."""
MOST_PARAMETERS = 2**59
"""Of which each tensor still has a size in bytes, as torch counts them."""
LIKE: dict[str, object] = {"norm.eps": 1.0, "init.std": 1.0, "tied": True}  # other fields of a model are whole numbers


def parse(raw: dict[str, Any], *, source: str) -> ModelConfig:
    """Read the fields of a ``config.json``.

    Raises:
        HFError: a field is missing, ill-typed or asks for what the zoo does not build; names ``source`` and the field.
    """
    fields = Fields(raw, source=source)
    if raw.get("model_type") == OWN_TYPE:
        return _parse_own(fields)
    family = _family_of(fields)
    fixed = EVERY | family.fixed
    _check_nulls(fields, family.absent | fixed)
    taken = {key: value for key, value in family.absent.items() if raw.get(key) is None}
    nulls = {key: None for key in NULLABLE if key in raw and raw[key] is None}
    fields = Fields(raw | taken | nulls, source=source)
    for key, only in fixed.items():
        fields.fixed(key, only, absent=only)
    try:
        config = _read(fields, family)
    except HFError:
        raise
    except ValueError as error:  # a check of zoo/config.py
        raise HFError(f"{source}: {error}") from error
    total = parameters(config).total
    if total > MOST_PARAMETERS:
        raise HFError(f"{source}: asks for {total} parameters: must be at most {MOST_PARAMETERS}")
    return config


def render(config: ModelConfig) -> dict[str, Any]:
    """Write the fields of a ``config.json``, each explicitly: no checkpoint is what a class defaults to.

    Raises:
        HFError: transformers has no such family, or its class cannot hold some value; names the key.
    """
    if config.family in OWN:
        return {"architectures": ["Decoder"], "model_type": OWN_TYPE, "zoo": dataclasses.asdict(config)}
    if config.family not in BY_NAME:
        allowed = sorted(BY_NAME.keys() | OWN)
        raise HFError(f"model.family={config.family}: must be one of {allowed} for a Hugging Face folder")
    family = BY_NAME[config.family]
    _check_class(config, family)
    raw: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    raw["use_cache"] = any(layer.deltanet is None for layer in config.layers)  # theirs counts tokens by one of those
    raw |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # a class has its own, and pads with one
    for path, key in family.fields.items():
        value = _value(config, path)
        if value is not None or path.endswith(MAYBE):
            raw.setdefault(key, value)
    for rule in family.rules:
        raw |= rule.write(config)
    raw |= family.kinds.write(config) | family.feed_kinds.write(config) | write_rope(config, family)
    raw |= {key: only for key, only in family.fixed.items() if only is not None} | copy.deepcopy(family.extra)
    if family.names.mtp:
        raw["num_nextn_predict_layers"] = config.n_mtp
    back = parse(raw, source="config.json")
    _compare(_function(config), _function(back), key="model", holder=family.architecture)
    check_mtp(config)
    return raw


def _family_of(fields: Fields) -> Family:
    """The row of a ``config.json``."""
    kind = fields.raw.get("model_type")
    if isinstance(kind, str) and kind in WHOLE:
        raise fields.fault("model_type", f'"{WHOLE[kind]}", the text model alone: images are not supported')
    family = BY_TYPE.get(SAME.get(kind, kind)) if isinstance(kind, str) else None
    if family is None:
        raise fields.fault("model_type", f"one of {sorted(BY_TYPE.keys() | SAME.keys())}")
    if fields.raw.get("architectures") not in (None, [family.architecture]):
        raise fields.fault("architectures", f'["{family.architecture}"]')
    return family


def _check_nulls(fields: Fields, absent: dict[str, object]) -> None:
    """Refuse null for a field whose absence means a value: transformers takes it for false or none, or refuses it."""
    for key, value in absent.items():
        null = key in fields.raw and fields.raw[key] is None
        if null and value and key not in (*NULLABLE, *UNSET):
            raise fields.fault(key, f"absent, which means {json.dumps(value)}, or have a value")


def _read(fields: Fields, family: Family) -> ModelConfig:
    values = {path: read(fields, key, like=LIKE.get(path, 1)) for path, key in family.fields.items() if not _slot(path)}
    n_layers = values["n_layers"]
    if n_layers > MOST_PARTS:
        raise fields.fault(family.fields["n_layers"], f"at most {MOST_PARTS}")
    mixers = family.kinds.read(fields, n_layers)
    feeds = family.feed_kinds.read(fields, n_layers)
    parts = {kind: _part(fields, family, family.mixers[kind], kind=kind) for kind in dict.fromkeys(mixers)}
    parts |= {kind: _part(fields, family, family.feeds[kind], kind=kind) for kind in dict.fromkeys(feeds)}
    kinds = [f"{mixer.removesuffix('_attention')}_{feed}" for mixer, feed in zip(mixers, feeds, strict=True)]
    blocks: dict[str, Any] = {}
    for kind, *names in zip(kinds, mixers, feeds, strict=True):
        both: dict[str, Any] = {slot_of(parts[name]): copy.deepcopy(parts[name]) for name in names}
        blocks.setdefault(kind, BlockConfig(**both, **family.block))
    prefix, cycle = _pattern(kinds)
    return ModelConfig(
        family=family.name,
        blocks=blocks,
        prefix=prefix,
        cycle=cycle,
        norm=dataclasses.replace(family.norm, eps=values["norm.eps"]),
        init=InitConfig(std=values["init.std"]),
        n_mtp=_read_mtp(fields, family),
        **{path: value for path, value in values.items() if "." not in path},
        **family.model,
    )


def _read_mtp(fields: Fields, family: Family) -> int:
    """How many multi-token modules are declared; transformers and vLLM take one for granted."""
    if not family.names.mtp:
        return 0
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        _check_nulls(fields, {key: 1})
    n_mtp = fields.whole("num_nextn_predict_layers", absent=fields.whole("num_mtp_layers", absent=1, least=0), least=0)
    if n_mtp > 1 and "{}" not in family.names.mtp_at:
        raise fields.fault("num_nextn_predict_layers", "0 or 1: there is one place for a multi-token module")
    return n_mtp


def _part(fields: Fields, family: Family, like: Part, *, kind: str) -> Part:
    """One part of the layers of a kind."""
    part = copy.deepcopy(like)
    fill(part, family.fields, fields)
    for rule in family.rules:
        rule.read(fields, part)
    if isinstance(part, AttentionConfig | MLAConfig) and part.rope is not None:
        latent = isinstance(part, MLAConfig)
        part.rope = read_rope(fields, like=part.rope, kind=kind, family=family, latent=latent)
    if isinstance(part, MoEConfig) and part.n_experts > MOST_PARTS:
        key = family.fields.get("moe.n_experts", "num_experts")
        raise fields.fault(key, f"at most {MOST_PARTS}")
    return rebuilt(part)


def _pattern(kinds: list[str]) -> tuple[list[str], list[str]]:
    """The shortest prefix and cycle that list the layers.

    Example: a b c b c is prefix [a], cycle [b, c].
    """
    n = len(kinds)
    for length in range(1, n + 1):
        for start in range(length):
            cycle = length - start
            if all(kinds[i] == kinds[i + cycle] for i in range(start, n - cycle)):
                return kinds[:start], kinds[start:length]
    raise AssertionError(f"{kinds=}")


def _parse_own(fields: Fields) -> ModelConfig:
    """The layout of families that transformers has no class for."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), fields.raw.get("zoo")))
    except (OmegaConfBaseException, ValueError) as error:
        raise HFError(f"{fields.source}: zoo: {str(error).splitlines()[0]}") from error
    assert isinstance(config, ModelConfig), f"{type(config)=}"
    if config.family not in OWN:
        raise HFError(f"{fields.source}: zoo: family={config.family}: must be one of {sorted(OWN)}")
    return config


def _slot(path: str) -> str | None:
    """The slot of a layer that a path begins with; None: it is of the model itself."""
    slot = path.partition(".")[0]
    return slot if slot in SLOTS.values() else None


def _value(config: ModelConfig, path: str) -> Any:
    return first(config, path) if _slot(path) else at(config, path)


def _check_class(config: ModelConfig, family: Family) -> None:
    """Refuse what could not even be asked for."""
    mixers = {slot_of(part) for part in family.mixers.values()}
    feeds = {slot_of(part) for part in family.feeds.values()}
    for kind, layer in config.blocks.items():
        slots = {slot for slot in SLOTS.values() if at(layer, slot) is not None}
        if kind in config.kinds and not (len(slots) == 2 and slots & mixers and slots & feeds):
            allowed = f"one of {sorted(mixers)} and one of {sorted(feeds)}"
            raise HFError(f"model.blocks.{kind}: must have {allowed} in family {family.name}")


def check_mtp(config: ModelConfig) -> None:
    """Refuse multi-token modules that a folder cannot hold: they are layers of full attention with experts.

    Raises:
        HFError: the last layer, whose kind ours take, is another.
    """
    last = config.layers[-1]
    fits = config.family in OWN or (type_of(last) == FULL and last.moe is not None)
    if config.n_mtp and not fits:
        raise HFError(f"model.n_mtp={config.n_mtp}: must be 0 unless the last layer is full attention with experts")


def _function(config: ModelConfig) -> dict[str, Any]:
    """What of a config decides logits, as plain data: layers in order, without names, training or scaling at rest."""
    config = copy.deepcopy(config)
    for block in config.blocks.values():
        mixer = block.attention or block.mla
        if mixer is not None and mixer.rope is not None and at_rest(mixer.rope, context=config.context):
            mixer.rope.scaling = None
        if block.attention is not None:
            block.attention.scale_dim = block.attention.scale_dim or float(block.attention.head_dim)
        if block.moe is not None:
            router = block.moe.router
            router.balance_rate = None if router.balance_rate is None else 0.0
            router.balance_loss = router.z_loss = 0.0
            router.switch_loss, router.device_loss = SwitchLossConfig(), DeviceLossConfig()
            if router.n_groups == 1:
                router.group_score = GroupScore.best
            if router.score is Score.softmax_chosen:  # the same function
                router.score, router.normalize = Score.softmax, True
    plain = expanded(config)
    del plain["init"]
    return plain


def _compare(ours: Any, theirs: Any, *, key: str, holder: str) -> None:
    """Refuse what did not survive being written and read: the folder could not hold it."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in ours:
            _compare(ours[name], theirs[name], key=f"{key}.{name}", holder=holder)
    elif isinstance(ours, list) and isinstance(theirs, list):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            _compare(one, other, key=f"{key}.{place}", holder=holder)
    elif ours != theirs:
        raise HFError(f"{key}={_shown(ours)}: must be {_shown(theirs)}, all that {holder} can hold")


def _shown(value: Any) -> Any:
    """As a user writes it: a choice by its name."""
    if isinstance(value, dict):
        return {key: _shown(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shown(each) for each in value]
    return value.value if isinstance(value, Enum) else value
