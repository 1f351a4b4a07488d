"""The one way in which the trainer's config classes refuse what a user wrote."""


def check(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise the one-line ``ValueError`` of a value that a user can correct."""
    if not holds:
        raise ValueError(f"{key}={value}: must be {allowed}")
