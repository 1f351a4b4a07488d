"""Where each tensor of a model stands in a Hugging Face folder: the tables of ``hf_names.py`` applied to a config."""

import dataclasses
from collections.abc import Mapping

import torch

from zoo.config import BlockConfig, ModelConfig
from zoo.decoder import Decoder
from zoo.hf_families import BY_NAME
from zoo.hf_layout import Layout, fused, stacked
from zoo.hf_names import WIDE_MLA, Names, Table
from zoo.hf_table import at

Spelling = tuple[Layout, ...]
"""Stored tensors that hold one of ours: one, or one an expert of a bank."""


def places(config: ModelConfig) -> dict[str, list[Spelling]]:
    """Every way in which files hold each tensor of ``Decoder(config).state_dict()``.

    The first is what we write, the last what transformers 5 has in memory. A family without names has its own layout:
    our names.
    """
    shapes = shapes_of(config)
    if config.family not in BY_NAME:
        return {name: [(Layout(name, shape, {name: shape}),)] for name, shape in shapes.items()}
    names = BY_NAME[config.family].names
    found: dict[str, list[Spelling]] = {}
    for ours, theirs, table, layer in _scopes(config, names):
        inside = {name.removeprefix(ours): shape for name, shape in shapes.items() if name.startswith(ours)}
        for rest in inside if ours else [name for name in shapes if name not in found]:
            found[ours + rest] = _spellings(rest, inside, table, ours=ours, theirs=theirs, layer=layer)
    if names.respelt is not None:
        found = {name: _respelt(spellings, *names.respelt) for name, spellings in found.items()}
    return {name: found[name] for name in shapes}


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model, by our names."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}


def copies(config: ModelConfig) -> dict[str, str]:
    """Keys under which a folder may repeat a tensor → our name of it.

    DeepSeek's and GLM's released weights repeat embedding and head in the multi-token module; some tied checkpoints
    hold a head.
    """
    if config.family not in BY_NAME:
        return {}
    head = "embed.weight" if config.tied else "head.weight"
    found = {"lm_head.weight": "embed.weight"} if config.tied else {}
    if BY_NAME[config.family].names.mtp_block:
        return found
    for depth in range(config.n_mtp):
        theirs = mtp_prefix(config, depth)
        found |= {f"{theirs}embed_tokens.weight": "embed.weight", f"{theirs}shared_head.head.weight": head}
    return found


def mtp_prefix(config: ModelConfig, depth: int) -> str:
    """Begin of the keys of a multi-token module: a layer after the last, or apart from them (Qwen3-Next)."""
    return BY_NAME[config.family].names.mtp_at.format(config.n_layers + depth)


def mtp_passed_over(config: ModelConfig) -> bool:
    """Whether transformers passes over the keys of the multi-token modules; of others it would warn."""
    known = BY_NAME[config.family].names.mtp_known if config.family in BY_NAME else None
    return known is None or all(config.n_layers + depth in known for depth in range(config.n_mtp))


def _scopes(config: ModelConfig, names: Names) -> list[tuple[str, str, Table, BlockConfig]]:
    """Our prefix, theirs, the names between and the layer they are of; last what has no prefix."""
    found = []
    for i, layer in enumerate(config.layers):
        found.append((f"blocks.{i}.", names.layer.format(i), _table(names, layer), layer))
    last = config.layers[-1]
    for depth in range(config.n_mtp):
        theirs = mtp_prefix(config, depth)
        found.append((f"mtp.{depth}.block.", theirs + names.mtp_block, _table(names, last), last))
        outside = {f"mtp.{depth}.{ours}": theirs + name for ours, name in names.mtp.items()}
        names = dataclasses.replace(names, top={**names.top, **outside})
    return [*found, ("", "", Table(names.top), last)]


def _table(names: Names, layer: BlockConfig) -> Table:
    table = Table(names.block)
    for slot, more in names.slots.items():
        if getattr(layer, slot) is not None:
            table = table | more
    return table | WIDE_MLA if layer.mla is not None and layer.mla.q_rank is None else table


def _spellings(
    rest: str, inside: Mapping[str, tuple[int, ...]], table: Table, *, ours: str, theirs: str, layer: BlockConfig
) -> list[Spelling]:
    name, shape = ours + rest, inside[rest]
    found: list[Spelling] = []
    if rest in table.each:
        keys = [theirs + table.each[rest].format(e) for e in range(shape[0])]
        found.append(tuple(stacked(keys, name, shape)))
    for one in table.fused:
        if rest in one.parts:
            parts = {ours + part: inside[part] for part in one.parts}
            groups = 1 if one.groups is None else at(layer, one.groups)
            how = {"transposed": one.transposed, "unit": one.unit}
            found.append((fused(theirs + one.key, parts, dim=one.dim, groups=groups, **how),))
    if not found:
        stem, _, leaf = rest.rpartition(".")
        key = table.plain[rest] if rest in table.plain else f"{table.plain[stem]}.{leaf}"
        found.append((Layout(theirs + key, shape, {name: shape}),))
    return found


def _respelt(spellings: list[Spelling], before: str, after: str) -> list[Spelling]:
    """The same with a part of the keys changed, after the spellings that have it."""
    changed = [
        tuple(dataclasses.replace(layout, key=layout.key.replace(before, after)) for layout in spelling)
        for spelling in spellings
        if before in spelling[0].key
    ]
    first = [spelling for spelling in spellings if before in spelling[0].key]
    return [*first, *changed, *(spelling for spelling in spellings if before not in spelling[0].key)]
