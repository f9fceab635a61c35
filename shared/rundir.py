"""RUN: the folder that holds everything about one run. Its files are a contract with tests, tools and people."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gapweave.shared.config.study import Study, load_study
from gapweave.shared.errors import UsageError
from gapweave.shared.files import intact, naming, write_atomically


class RunDirectory:
    """Paths and files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint"
        self.model = path / "model"
        self.sites = path / "sites"
        self.report = path / "report.html"
        self.failure = path / "failure.json"

    @staticmethod
    def require_new(path: Path) -> None:
        """Refuse a folder that holds something: nothing is overwritten.

        Raises:
            UsageError: when it exists and is not empty, or cannot be made.
        """
        if path.exists() and not path.is_dir():
            raise UsageError("this is a file", where=str(path), remedy="Give a folder that does not exist yet")
        if path.exists() and any(path.iterdir()):
            raise UsageError("the output folder exists", where=str(path), remedy="Give another --out, or resume it")
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            raise UsageError("no folder can be made here", where=str(path), remedy="Give another --out")

    @classmethod
    def create(cls, path: Path, study: Study) -> RunDirectory:
        """A new run in a folder that `require_new` let pass."""
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "study.yaml", study.to_yaml().encode())
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An earlier run.

        Raises:
            UsageError: when the folder holds no run.
        """
        if not (path / "study.yaml").exists():
            raise UsageError("this is no run directory", where=str(path), remedy="Give the --out of a run")
        return cls(path)

    def study(self) -> Study:
        """The resolved study."""
        return load_study(self.path / "study.yaml")

    def write_round(self, line: dict[str, Any]) -> None:
        """Append one line to rounds.jsonl."""
        path = self.path / "rounds.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def add_to_round(self, number: int, more: dict[str, Any]) -> None:
        """Add to the line of a round in rounds.jsonl."""
        lines = [line | more if line["round"] == number else line for line in self.rounds()]
        write_atomically(self.path / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())

    def rounds(self) -> Iterator[dict[str, Any]]:
        """The lines of rounds.jsonl."""
        return self.lines("rounds.jsonl")

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The lines of a JSON lines file; one that was cut off by a crash is left out."""
        file = self.path / name
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    def keep_rounds(self, last: int) -> None:
        """Drop what was written after round `last`: a resumed run writes it again."""
        for name in ("rounds.jsonl", "curve.jsonl"):
            lines = [json.dumps(line) + "\n" for line in self.lines(name) if line["round"] <= last]
            if lines or name == "rounds.jsonl":
                write_atomically(self.path / name, "".join(lines).encode())

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file atomically."""
        write_atomically(self.path / name, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises:
            UsageError: when the run has not written it.
            DataError: when it is damaged.
        """
        file = self.path / name
        if not file.exists():
            raise UsageError(f"the run has no {name}", where=str(self.path), remedy="Finish it with `gapweave resume`")
        with intact(file):
            return json.loads(file.read_text(encoding="utf-8"))
