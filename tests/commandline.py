"""Commands typed in tests, and little hospitals to type them for."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from gapweave.shared.cli import _run
from gapweave.sites.demo import write_demo

LABEL = "deteriorated"
DECLARED = 45
"""Public number of patients of every little hospital: one plan for all, and no count is released."""

QUICK = ("--rounds", "2", "--set", "training.local_steps=2")
OPEN = ("--set", "privacy.enabled=false")


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of a command that failed as it should: one line, and nothing else."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        assert not self.out
        return lines[0]


def gapweave(*arguments: object) -> Outcome:
    """Run a command in this process, as a person at the terminal would."""
    return _call(arguments, debug=False)


def done(*arguments: object) -> Outcome:
    """Run a command that must succeed; an internal error shows its traceback here."""
    outcome = _call(arguments, debug=True)
    assert outcome.code == 0, outcome.err
    return outcome


def run(*arguments: object, code: int = 0) -> Outcome:
    """Run a command that must end with a code."""
    outcome = _call(arguments, debug=False)
    assert outcome.code == code, outcome
    return outcome


def _call(arguments: tuple[object, ...], *, debug: bool) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = _run([str(word) for word in arguments], debug)
    return Outcome(code, out.getvalue(), err.getvalue())


def process(*arguments: object) -> subprocess.Popen[str]:
    """Start a command in a process of its own, to be killed or interrupted.

    It is not measured: an interrupt that hits coverage's tracer while that holds its lock makes the process wait
    for itself for ever.
    """
    program = [sys.executable, "-c", "from gapweave.shared.cli import main; main()"]
    words = [*program, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def hospitals(folder: Path, **options: Any) -> Path:
    """Three little hospitals (alder, birch, cedar) with a public number of patients.

    Args:
        folder: new or empty.
        options: of `write_demo`.

    Returns:
        The study file.
    """
    study = write_demo(folder, **{"hospitals": 3, "patients": 60, **options})
    for file in (folder / "sites").glob("*.yaml"):
        edit(file, patients={"declared": DECLARED})
    return study


def edit(file: Path, **changes: Any) -> Path:
    """Change keys of a YAML file; mappings are merged, None removes a key."""
    content = _merged(yaml.safe_load(file.read_text(encoding="utf-8")), changes)
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def _merged(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(old)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result


def site_file(study: Path, name: str) -> Path:
    """A hospital's site file."""
    return study.parent / "sites" / f"{name}.yaml"


def records(study: Path, name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Change a hospital's records."""
    file = study.parent / "data" / name / "records.csv"
    change(pl.read_csv(file)).write_csv(file)


def summary_of(run: Path) -> dict[str, Any]:
    """summary.json of a run."""
    content: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return content


def rounds_of(run: Path) -> list[dict[str, Any]]:
    """rounds.jsonl of a run."""
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
