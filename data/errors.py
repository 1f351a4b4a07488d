"""The one error of this room."""


class DataError(ValueError):
    """A fault of data that a user can mend; the message is one line and names the file or key."""
