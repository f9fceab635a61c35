"""Files of ours that were half copied or overwritten: said by name, with what to do, in place of an internal error."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commandline import done, hospitals, run

DAMAGE = {
    "cut off": lambda content: content[:150],
    "emptied": lambda content: b"",
    "noise": lambda content: b"\x9d" * 400,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study of three little hospitals, and a finished run of it."""
    folder = tmp_path_factory.mktemp("damage")
    study = hospitals(folder / "demo")
    done("simulate", study, "--out", folder / "run", "--rounds", 1)
    return study, folder / "run"


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("checkpoint/server.safetensors", "resume"),
        ("checkpoint/simulation.json", "resume"),
        ("summary.json", "report"),
        ("summary.json", "predict"),
        ("sites/alder/runs/*/model.safetensors", "predict"),
    ],
)
def test_a_damaged_file_is_named(
    finished: tuple[Path, Path], tmp_path: Path, file: str, command: str, how: str
) -> None:
    study, copy = finished[0], tmp_path / "run"
    shutil.copytree(finished[1], copy)
    if command == "resume":
        (copy / "summary.json").unlink()
    (damaged,) = copy.glob(file)
    damaged.write_bytes(DAMAGE[how](damaged.read_bytes()))
    words = [command, copy]
    if command == "predict":
        words += ["--site", study.parent / "sites" / "alder.yaml", "--out", tmp_path / "predictions.csv"]
    error = run(*words, code=6).error
    assert error.startswith(f"error: {damaged}: the file is damaged or incomplete. ")
