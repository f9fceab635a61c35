"""The command line's help, and how quickly it comes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from commandline import done, gapweave, process
from typer.core import TyperGroup
from typer.main import get_command

from gapweave.shared import __version__
from gapweave.shared.cli import COMMANDS, root


def commands() -> list[str]:
    """Every command a person can type, sub-commands included."""
    found = []
    group = get_command(root)
    assert isinstance(group, TyperGroup)
    for name in COMMANDS:
        command = group.get_command(None, name)
        found += [f"{name} {sub}" for sub in getattr(command, "commands", {})] or [name]
    return found


def test_help_is_quick_and_says_how_to_start() -> None:
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        child = process("--help")
        out, _ = child.communicate(timeout=60)
        seconds.append(time.monotonic() - start)
        assert child.returncode == 0
    assert min(seconds) < 1
    for text in ("gapweave simulate", "study file", "run directory", "Exit codes", "130 interrupted"):
        assert text in " ".join(out.split())
    for name in COMMANDS:
        assert f"  {name} " in out


def test_who_asks_for_a_status_or_a_budget_does_not_wait_for_torch() -> None:
    modules = (
        "client.service",
        "client.state",
        "shared.privacy.loss",
        "shared.privacy.precision",
        "shared.report.ledger_report",
    )
    code = (
        f"import sys, {', '.join('gapweave.' + name for name in modules)}\n"
        "print([name for name in ('torch', 'polars', 'scipy.signal', 'scipy.stats') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_command_of_the_product_is_there() -> None:
    assert {
        "simulate", "compare", "resume", "report", "predict", "study init", "study check", "site init", "site check",
        "site report", "privacy report", "privacy verify", "data list", "data fetch",
    } <= set(commands())  # fmt: skip


@pytest.mark.parametrize("command", commands())
def test_every_help_has_an_example(command: str) -> None:
    out = done(*command.split(), "--help").out
    assert f"Example: gapweave {command}" in " ".join(out.split())


def test_the_aliases_are_listed() -> None:
    out = done("simulate", "--help").out
    for alias in ("method", "fusion", "imputer", "scheme", "sharing", "missing_rate", "attack", "epsilon", "label"):
        assert alias in out


@pytest.mark.parametrize("words", [[], ["study"], ["site"]])
def test_without_a_command_the_help_is_shown(words: list[str]) -> None:
    outcome = gapweave(*words)
    assert outcome.code == 2
    assert outcome.err.startswith("Usage: gapweave")
    assert "Commands:" in outcome.err


def test_version() -> None:
    assert done("--version").out == f"gapweave {__version__}\n"
