"""What an installed Gapweave contains: every package, every data file, one version."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gapweave.shared import __version__

ROOT = Path(__file__).parents[1]
SIDES = ("shared", "client", "server", "sites")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def data_files() -> set[str]:
    """Files beside the modules that the program reads when it runs."""
    wanted = {".yaml", ".html", ".css", ".js", ".svg", ".json", ".csv"}
    return {
        str(file.relative_to(ROOT))
        for side in SIDES
        for file in (ROOT / side).rglob("*")
        if file.is_file() and (file.suffix in wanted or file.name == "SHA256SUMS")
    }


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    listed = project["tool"]["setuptools"]["packages"]
    there = {
        ".".join(["gapweave", *file.parent.relative_to(ROOT).parts])
        for side in SIDES
        for file in (ROOT / side).rglob("__init__.py")
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == there
    assert set(project["tool"]["setuptools"]["package-dir"]) == {f"gapweave.{side}" for side in SIDES}


def test_every_data_file_is_listed(project: dict[str, Any]) -> None:
    patterns = [
        "/".join([*package.split(".")[1:], pattern])
        for package, of in project["tool"]["setuptools"]["package-data"].items()
        for pattern in of
    ]
    files = data_files()
    for pattern in patterns:
        assert fnmatch.filter(files, pattern), f"{pattern} names no file"
    assert not [file for file in files if not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)]


def test_there_is_one_version(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == __version__ == importlib.metadata.version("gapweave")


def test_the_command_is_installed(project: dict[str, Any]) -> None:
    assert project["project"]["scripts"] == {"gapweave": "gapweave.shared.cli:main"}
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="gapweave")
    assert callable(script.load())


@pytest.mark.long
def test_a_wheel_holds_modules_and_data(project: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "benchmarks")
    shutil.copytree(ROOT, source, ignore=left_out)
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path / "out"), "."]
    if importlib.util.find_spec("setuptools"):
        words.insert(-1, "--no-build-isolation")
    built = subprocess.run(words, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "out").glob(f"gapweave-{__version__}-*.whl")
    inside = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {Path("gapweave", name) for name in data_files()} <= inside
    assert {path.suffix for path in inside} >= {".yaml", ".html"}
    assert any(path.name == "SHA256SUMS" for path in inside)
    modules = {Path("gapweave", file.relative_to(ROOT)) for side in SIDES for file in (ROOT / side).rglob("*.py")}
    assert {path for path in inside if path.suffix == ".py"} == modules
