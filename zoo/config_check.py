"""Checks of values that a user wrote, for the config classes of the zoo."""

import math


def check(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise the one-line ``ValueError`` of a value that a user can correct."""
    if not holds:
        raise ValueError(f"{key}={value}: must be {allowed}")


def check_above_0(part: object, section: str, *keys: str) -> None:
    """``check`` that values of a part's fields are above 0 and finite; a field that is None is an empty slot."""
    for key in keys:
        value = getattr(part, key)
        if value is not None:
            check(value > 0, f"{section}.{key}", value, "above 0")
    check_finite(part, section, *keys)


def check_finite(part: object, section: str, *keys: str) -> None:
    """``check`` that values of a part's fields are neither infinite nor NaN."""
    for key in keys:
        value = getattr(part, key)
        check(value is None or math.isfinite(value), f"{section}.{key}", value, "finite")


def check_weights(part: object, section: str, *keys: str) -> None:
    """``check`` that values of a part's fields are 0 or more and finite; a field that is None is an empty slot."""
    for key in keys:
        value = getattr(part, key)
        check(value is None or 0 <= value < math.inf, f"{section}.{key}", value, "0 or more, and finite")
