"""The text of a public score's formula: read by Python's grammar, bounded in size, never run as code."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping

LONGEST = 20_000
"""Characters of a formula."""

LARGEST = 4_000
"""Parts (numbers, names, operators) of a formula."""


def parse(text: str) -> ast.expr:
    """Read a formula; what it may consist of, `formula.compile_formula` checks.

    Raises:
        ValueError: for a text that is no expression, or too large.
    """
    if len(text) > LONGEST:
        raise ValueError(f"the expression has {len(text)} characters, more than {LONGEST}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"not an expression at character {error.offset}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError):
        raise ValueError("not an expression: it holds a null byte or is nested too deeply") from None
    size = sum(1 for _ in ast.walk(tree))
    if size > LARGEST:
        raise ValueError(f"the expression has {size} parts, more than {LARGEST}")
    return tree


def one_line(text: str) -> str:
    """The text with its line breaks and runs of spaces as one space, so that positions are those of one line."""
    return " ".join(text.split())


def wrong(text: str, node: ast.AST, problem: str) -> ValueError:
    """The error of a part of a formula: what is wrong, and where it stands."""
    start = getattr(node, "col_offset", 0)
    shown = ast.get_source_segment(text, node) or ""
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    return ValueError(f"{problem} at character {len(text.encode()[:start].decode()) + 1}: {shown!r}")


def substitute(text: str, replacements: Mapping[str, str]) -> str:
    """A formula with some of its names replaced by expressions.

    >>> substitute("points(hr, [[120, None, 4]]) + age", {"hr": "labs.pulse", "age": "2024 - born"})
    'points(labs.pulse, [[120, None, 4]]) + (2024 - born)'

    Raises:
        ValueError: for a replacement that is no expression.
    """
    text = one_line(text)
    tree = parse(text)
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in functions]
    result = text.encode()
    for node in sorted(names, key=lambda node: -node.col_offset):
        if node.id in replacements:
            new = one_line(replacements[node.id])
            simple = isinstance(parse(new), ast.Name | ast.Attribute | ast.Constant | ast.Call)
            new = new if simple else f"({new})"
            result = result[: node.col_offset] + new.encode() + result[node.end_col_offset :]
    return result.decode()
