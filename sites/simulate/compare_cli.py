"""placeholder."""


def compare() -> None:
    """."""
