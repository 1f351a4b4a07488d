"""Values of configs by dotted path, and their counterparts in a ``config.json`` by the type of what stands there."""

from dataclasses import fields, is_dataclass
from typing import Any

from zoo.config import ModelConfig
from zoo.config_ff import MLPConfig, MoEConfig
from zoo.config_mixer import AttentionConfig, DeltaNetConfig, MLAConfig
from zoo.hf_fields import Fields

Part = AttentionConfig | MLAConfig | DeltaNetConfig | MLPConfig | MoEConfig
SLOTS: dict[type, str] = {
    AttentionConfig: "attention",
    MLAConfig: "mla",
    DeltaNetConfig: "deltanet",
    MLPConfig: "mlp",
    MoEConfig: "moe",
}
MAYBE = "?"
"""End of a path whose field may be null, which leaves the slot empty."""


def slot_of(part: Part) -> str:
    """Name of the slot of a layer that a part stands in."""
    return SLOTS[type(part)]


def fill(part: Part, table: dict[str, str], source: Fields) -> None:
    """Set the fields of ``source`` in a part.

    Args:
        part: says what a family has: empty slots stay empty, and a value's type is its field's.
        table: path from a layer, such as ``attention.qk_norm.eps``, to field.
        source: to read from.

    Raises:
        HFError: a field is missing or ill-typed.
    """
    for path, key in table.items():
        slot, _, rest = path.removesuffix(MAYBE).partition(".")
        if slot == slot_of(part) and at(part, rest) is not None:
            empty = path.endswith(MAYBE) and source.raw.get(key) is None
            put(part, rest, None if empty else read(source, key, like=at(part, rest)))


def read(source: Fields, key: str, *, like: object) -> Any:
    """A field of the same type as ``like``."""
    if isinstance(like, bool):
        return source.flag(key)
    return source.whole(key) if isinstance(like, int) else source.number(key)


def first(config: ModelConfig, path: str) -> Any:
    """Value at a path in the first layer that has one there; None where no layer has."""
    slot, _, rest = path.removesuffix(MAYBE).partition(".")
    for layer in config.layers:
        part = at(layer, slot)
        value = at(part, rest) if part is not None else None
        if value is not None:
            return value
    return None


def at(root: object, path: str) -> Any:
    """Value at a dotted path; None where a slot on the way is empty."""
    for name in path.split("."):
        if root is None:
            return None
        root = getattr(root, name)
    return root


def put(root: object, path: str, value: object) -> None:
    """Set the value at a dotted path."""
    *way, name = path.split(".")
    setattr(at(root, ".".join(way)) if way else root, name, value)


def rebuilt(part: Any) -> Any:
    """The same config made anew, so that its own checks see the values it has now."""
    if not is_dataclass(part):
        return part
    kind: Any = type(part)
    return kind(**{field.name: rebuilt(getattr(part, field.name)) for field in fields(part)})
