"""Which kind of mixer and of feed-forward each layer has: how the fields of a ``config.json`` say it.

A pattern reads one name a layer, a key of ``Family.mixers`` or ``Family.feeds``, and writes the fields that say so.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from zoo.config import BlockConfig, ModelConfig
from zoo.hf_fields import Fields

FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
NOPE = "nope"  # full attention without rotary positions
DENSE, MOE = "dense", "moe"


class Pattern(Protocol):
    """One name a layer, read from fields and written to them."""

    def read(self, fields: Fields, n_layers: int) -> list[str]:
        """Names of the layers' kinds, in order."""
        ...

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Fields that say which kind each layer is of."""
        ...


@dataclass(frozen=True)
class Alike:
    """All layers are of one kind."""

    kind: str

    def read(self, fields: Fields, n_layers: int) -> list[str]:
        """The one kind, also where ``layer_types`` says so at length."""
        if self.kind == FULL:
            given = types(fields, n_layers)
            if given is not None and set(given) != {FULL}:
                raise fields.fault("layer_types", f"{FULL} in every layer")
        return [self.kind] * n_layers

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Nothing: it goes without saying."""
        return {}


@dataclass(frozen=True)
class Windowed:
    """All layers have the window ``sliding_window``, or none has."""

    untyped: bool = False  # transformers takes a config with layer_types, be it null, for one of another class

    def read(self, fields: Fields, n_layers: int) -> list[str]:
        """Null is no window."""
        if self.untyped and "layer_types" in fields.raw:
            raise fields.fault("layer_types", "absent: with it transformers builds another family, Ministral")
        Alike(FULL).read(fields, n_layers)
        return [FULL if fields.raw.get("sliding_window") is None else SLIDING] * n_layers

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Null where the first layer has no window; a window itself is in the family's table."""
        return {"sliding_window": None} if type_of(config.layers[0]) == FULL else {}


@dataclass(frozen=True)
class Types:
    """``layer_types`` names each; where it is absent, every ``interval``-th layer is full, the others ``other``."""

    other: str
    interval: int
    field: str | None = None  # that gives another interval

    def read(self, fields: Fields, n_layers: int) -> list[str]:
        """Names as given, or by the interval."""
        interval = self.interval if self.field is None else _interval(fields, self.field, absent=self.interval)
        given = types(fields, n_layers)
        if given is None:
            return [FULL if (i + 1) % interval == 0 else self.other for i in range(n_layers)]
        if set(given) - {FULL, self.other}:
            raise fields.fault("layer_types", f"{FULL} or {self.other} for each layer")
        return given

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """One name a layer."""
        return {"layer_types": [type_of(layer) for layer in config.layers]}


@dataclass(frozen=True)
class NoRope:
    """``no_rope_layers`` is 1 where a layer has rotary positions, despite its name; by default all but each fourth.

    ``rotating`` is the kind of those that have; the others are full attention.
    """

    rotating: str

    def read(self, fields: Fields, n_layers: int) -> list[str]:
        """The kind follows from the positions; ``layer_types``, if given, must agree."""
        marks = fields.raw.get("no_rope_layers")
        if marks is None or marks == []:  # as Llama 4's released files have it
            interval = _interval(fields, "no_rope_layer_interval", absent=4)
            marks = [int((i + 1) % interval != 0) for i in range(n_layers)]
        if not isinstance(marks, list) or len(marks) != n_layers or any(mark not in (0, 1) for mark in marks):
            raise fields.fault("no_rope_layers", f"0 or 1 for each of {n_layers} layers")
        given = types(fields, n_layers)
        if given is not None and given != [self.rotating if mark else FULL for mark in marks]:
            raise fields.fault("layer_types", f"{self.rotating} where no_rope_layers is 1, {FULL} where it is 0")
        return [self.rotating if mark else NOPE for mark in marks]

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Marks and names, one a layer."""
        marks = [int(layer.attention is not None and layer.attention.rope is not None) for layer in config.layers]
        return {"no_rope_layers": marks, "layer_types": [self.rotating if mark else FULL for mark in marks]}


@dataclass(frozen=True)
class FirstDense:
    """The first ``first_k_dense_replace`` layers are dense, the others have experts."""

    def read(self, fields: Fields, n_layers: int) -> list[str]:
        """Dense ones first."""
        dense = min(fields.whole("first_k_dense_replace", least=0), n_layers)
        return [DENSE] * dense + [MOE] * (n_layers - dense)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """How many are dense."""
        return {"first_k_dense_replace": sum(layer.moe is None for layer in config.layers)}


@dataclass(frozen=True)
class Listed:
    """``moe_layers`` lists the layers with experts; by default every ``interleave_moe_layer_step``-th has them."""

    def read(self, fields: Fields, n_layers: int) -> list[str]:
        """As listed, or by the step."""
        step = _interval(fields, "interleave_moe_layer_step", absent=1)
        listed = fields.raw.get("moe_layers")
        if listed is None:
            listed = list(range(step - 1, n_layers, step))
        if not isinstance(listed, list) or any(type(i) is not int or not 0 <= i < n_layers for i in listed):
            raise fields.fault("moe_layers", f"a list of layers from 0 to {n_layers - 1}")
        return [MOE if i in listed else DENSE for i in range(n_layers)]

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Which layers have experts."""
        return {"moe_layers": [i for i, layer in enumerate(config.layers) if layer.moe is not None]}


def types(fields: Fields, n_layers: int) -> list[str] | None:
    """``layer_types``, one name for each layer, if it is there."""
    given = fields.raw.get("layer_types")
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != n_layers or not all(isinstance(name, str) for name in given):
        raise fields.fault("layer_types", f"one name for each of {n_layers} layers")
    return given


def _interval(fields: Fields, key: str, *, absent: int) -> int:
    """Every how many layers something comes; null is no such number."""
    return fields.whole(key) if key in fields.raw else absent


def type_of(layer: BlockConfig) -> str:
    """A layer's mixer as ``layer_types`` names it."""
    if layer.attention is None:
        return FULL if layer.mla is not None else LINEAR
    return SLIDING if layer.attention.window else CHUNKED if layer.attention.chunk else FULL
