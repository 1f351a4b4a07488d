"""The transformers class of one of our configs, with our weights: ``from reference import reference_of``."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from zoo.config import ModelConfig
from zoo.hf_config import render
from zoo.hf_names import mtp_prefix, places


def reference_of(
    config: ModelConfig, state: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Transformers' model of ``config``, filled with ``state``, tensors by our names."""
    fields = AutoConfig.for_model(**render(config))
    model = AutoModelForCausalLM.from_config(fields, dtype=dtype, attn_implementation="eager")
    filled = model.load_state_dict(theirs_of(config, state), strict=False)
    assert filled.unexpected_keys == [], f"{filled.unexpected_keys=}"
    assert filled.missing_keys == (["lm_head.weight"] if config.tied else []), f"{filled.missing_keys=}"
    return model


def theirs_of(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names, experts packed as transformers 5 keeps them in memory; no multi-token modules."""
    return _packed(config, {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")})


def ours_of(config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the main model by our names: the inverse of ``theirs_of``."""
    return _unpacked(config, theirs, {name for name in places(config) if not name.startswith("mtp.")})


def mtp_of(main: PreTrainedModel, config: ModelConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """Transformers' multi-token modules beside its main model."""
    packed = _packed(config, {name: tensor for name, tensor in state.items() if name.startswith("mtp.")})
    model = MtpModel(main, config.n_mtp)
    filled = model.load_state_dict({_mtp_name(config, key): tensor for key, tensor in packed.items()}, strict=False)
    assert filled.unexpected_keys == [], f"{filled.unexpected_keys=}"
    assert all(key.startswith(("embed_tokens.", "shared_head.")) for key in filled.missing_keys), f"{filled=}"
    return model


def mtp_ours_of(config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the multi-token modules by our names."""
    ours = {name for name in places(config) if name.startswith("mtp.")}
    keys = {key for name in ours for key in (places(config)[name].packed or places(config)[name].keys[0],)}
    return _unpacked(
        config, {key: theirs[_mtp_name(config, key)] for key in keys if "correction_bias" not in key}, ours
    )


def _packed(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        place = places(config)[name]
        if place.half is None:
            theirs[place.packed or place.keys[0]] = tensor
        elif place.half == 0:
            theirs[str(place.packed)] = torch.cat([tensor, state[name.removesuffix("gate") + "up"]], dim=1)
    return theirs


def _unpacked(config: ModelConfig, theirs: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for name in names:
        place = places(config)[name]
        if not name.endswith("balance_bias"):  # a buffer
            tensor = theirs[place.packed or place.keys[0]]
            ours[name] = tensor if place.half is None else tensor.chunk(2, dim=1)[place.half]
    return ours


def _mtp_name(config: ModelConfig, key: str) -> str:
    """Name inside transformers' MtpModel of a key as checkpoints have it."""
    for depth in range(config.n_mtp):
        rest = key.removeprefix(mtp_prefix(config, depth) + ".")
        if rest != key:
            outer = rest.startswith(("enorm.", "hnorm.", "eh_proj."))
            rest = rest.replace("shared_head.norm.", "post_norm.")
            return f"layers.{depth}.{'' if outer or rest.startswith('post_norm.') else 'mtp_block.'}{rest}"
    raise AssertionError(f"{key=}")
