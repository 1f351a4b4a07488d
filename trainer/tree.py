"""Nested states as flat ones: ``{"optimizer": {"lr": 0.1}}`` is ``{"optimizer.lr": 0.1}``."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def flatten(node: Any, *, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts, lists and tuples by dotted name; list entries are named by their place from 0."""
    flat: dict[str, Any] = {}
    for name, leaf in _leaves(node, prefix):
        assert name not in flat, f"two leaves of the state share the {name=}"
        assert isinstance(leaf, Tensor | bool | int | float | str | None), f"{name=} {type(leaf)=}"
        flat[name] = leaf
    return flat


def fill(node: Any, *, values: dict[str, Any], prefix: str = "") -> Any:
    """Replace every leaf that is no tensor by its value, in place in dicts and lists.

    Returns:
        The node itself, except that a leaf is its value and a tuple a new tuple.
    """
    if isinstance(node, dict):
        node.update({key: fill(child, values=values, prefix=_join(prefix, key)) for key, child in node.items()})
        return node
    if isinstance(node, list | tuple):
        filled = [fill(child, values=values, prefix=_join(prefix, i)) for i, child in enumerate(node)]
        if isinstance(node, tuple):
            return tuple(filled)
        node[:] = filled
        return node
    return node if isinstance(node, Tensor) else values[prefix]


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        children = list(node.items())
    elif isinstance(node, list | tuple):
        children = list(enumerate(node))
    else:
        yield prefix, node
        return
    for key, child in children:
        yield from _leaves(child, _join(prefix, key))


def _join(prefix: str, key: object) -> str:
    return f"{prefix}.{key}" if prefix else str(key)
