"""The form that all groups of commands share."""

from __future__ import annotations

import typer


def command_group(text: str, example: str) -> typer.Typer:
    """A Typer group in plain text.

    Typer's own tracebacks are off: they show local variables, which may be patients' values.

    Args:
        text: its line of help.
        example: of one of its commands.
    """
    return typer.Typer(
        help=f"{text}\n\nExample: {example}",
        no_args_is_help=True,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
