"""The transformers class of one of our configs, with our weights: ``from reference import reference_of``."""

from collections.abc import Mapping

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_layers import MtpModel

from zoo.config import ModelConfig
from zoo.hf_config import render
from zoo.hf_images import PREFIX as IMAGES
from zoo.hf_layout import Layout
from zoo.hf_places import mtp_prefix, places


def reference_of(
    config: ModelConfig, state: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Transformers' model of ``config``, filled with ``state``, tensors by our names."""
    raw = render(config)
    fields = AutoConfig.for_model(**raw)
    kind = getattr(transformers, raw["architectures"][0])
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}  # their grouped_mm wants whole 16 bytes
    model = kind._from_config(fields, dtype=dtype, **plain)
    filled = model.load_state_dict(theirs_of(config, state), strict=False)
    assert filled.unexpected_keys == [], f"{filled.unexpected_keys=}"
    missing = [key for key in filled.missing_keys if not key.startswith(IMAGES)]
    assert missing == (["lm_head.weight"] if config.tied else []), f"{missing=}"
    return model.eval()


def theirs_of(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names and in their layouts, as transformers 5 keeps them in memory; no multi-token modules."""
    return _theirs(config, {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")})


def ours_of(config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by our names, of what is there by theirs: the inverse of ``theirs_of``, for gradients too."""
    held = _held(config)
    return _ours({name: layout for name, layout in held.items() if layout.key in theirs}, theirs)


def mtp_theirs_of(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the multi-token modules by the names that checkpoints have, in the layouts of memory."""
    return _theirs(config, {name: tensor for name, tensor in state.items() if name.startswith("mtp.")})


def mtp_of(main: PreTrainedModel, config: ModelConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """Transformers' multi-token modules beside its main model."""
    held = mtp_theirs_of(config, state)
    model = MtpModel(main, config.n_mtp)
    filled = model.load_state_dict({_mtp_name(config, key): tensor for key, tensor in held.items()}, strict=False)
    assert filled.unexpected_keys == [], f"{filled.unexpected_keys=}"
    assert all(key.startswith(("embed_tokens.", "shared_head.")) for key in filled.missing_keys), f"{filled=}"
    return model


def mtp_ours_of(config: ModelConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the multi-token modules by our names."""
    held = {name: layout for name, layout in _held(config).items() if name.startswith("mtp.")}
    return _ours(held, {layout.key: theirs[_mtp_name(config, layout.key)] for layout in held.values()})


def _held(config: ModelConfig) -> dict[str, Layout]:
    """What transformers has in memory of each of our parameters; of buffers nothing."""
    spelt = places(config)
    return {name: spellings[-1][0] for name, spellings in spelt.items() if not name.endswith("balance_bias")}


def _theirs(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layouts = {layout.key: layout for name, spelt in places(config).items() if name in state for layout in spelt[-1]}
    return {key: layout.assemble(state.__getitem__) for key, layout in layouts.items()}


def _ours(held: Mapping[str, Layout], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: layout.extract(theirs[layout.key], name) for name, layout in held.items()}


def _mtp_name(config: ModelConfig, key: str) -> str:
    """Name inside transformers' MtpModel of a key as checkpoints have it."""
    for depth in range(config.n_mtp):
        rest = key.removeprefix(mtp_prefix(config, depth))
        if rest != key:
            outer = rest.startswith(("enorm.", "hnorm.", "eh_proj."))
            rest = rest.replace("shared_head.norm.", "post_norm.")
            return f"layers.{depth}.{'' if outer or rest.startswith('post_norm.') else 'mtp_block.'}{rest}"
    raise AssertionError(f"{key=}")
