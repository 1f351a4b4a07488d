"""Fields of a ``config.json``, and the one error that all reading and writing of Hugging Face folders raises."""

import json
import sys
from pathlib import Path
from typing import Any

MOST = 2**31
"""Above any size of a model: two such, multiplied, still count the elements of a tensor of torch."""


class HFError(ValueError):
    """A Hugging Face folder that cannot be read, or a model that one cannot hold; the message is one line."""


class Fields:
    """Fields taken by name and type; faults name file, field and value. ``null`` is the same as absent."""

    def __init__(self, raw: dict[str, Any], *, source: str) -> None:
        self.raw = raw
        self.source = source

    def whole(self, key: str, *, absent: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``; without ``absent`` the field is required."""
        value = absent if self.raw.get(key) is None else self.raw[key]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < MOST:
            raise self.fault(key, f"a whole number from {least} to {MOST - 1}")
        return value

    def number(self, key: str, *, absent: float | None = None) -> float:
        """A number; without ``absent`` the field is required."""
        value = absent if self.raw.get(key) is None else self.raw[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise self.fault(key, "a number, and finite")
        return float(value)

    def flag(self, key: str, *, absent: bool | None = None) -> bool:
        """True or false; without ``absent`` the field is required."""
        value = absent if self.raw.get(key) is None else self.raw[key]
        if not isinstance(value, bool):
            raise self.fault(key, "true or false")
        return value

    def fixed(self, key: str, only: object, *, absent: object) -> None:
        """Refuse any value but ``only``; ``absent`` is what a missing field means."""
        if (absent if self.raw.get(key) is None else self.raw[key]) != only:
            raise self.fault(key, f"{json.dumps(only)}, which is all that is supported")

    def fault(self, key: str, allowed: str) -> HFError:
        """The error of a field that cannot be used."""
        value = json.dumps(self.raw[key]) if key in self.raw else "absent"
        return HFError(f"{self.source}: {key}={value}: must be {allowed}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        HFError: the file is missing, unreadable or no JSON object.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HFError(f"{path}: no such file: must be in a folder of Hugging Face's layout") from error
    except (OSError, ValueError, RecursionError) as error:
        raise HFError(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise HFError(f"{path}: must hold a JSON object")
    return raw
