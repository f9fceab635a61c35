"""Every `sh` block of the documentation is run as it stands, page by page, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gapweave.shared.service import Service

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The README begins with getting the source and ends with `make test`, which CI runs as itself.
ELSEWHERE = re.compile(r"^(git clone .*|cd gapweave|make test)( .*)?$")


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def script(page: Path) -> str:
    lines = [line for block in blocks(page) for line in block.splitlines() if not ELSEWHERE.match(line)]
    return "\n".join(["set -euo pipefail", *lines, ""])


def end_services(folder: Path) -> list[str]:
    """End the hub and sites that a page has left running; which they were."""
    services = [Service(lock.parent, str(lock.parent)) for lock in folder.rglob("service.lock")]
    return [service.what for service in services if service.stop()]


def commands_run(page: Path, tmp_path: Path) -> None:
    text = script(page)
    if "GAPWEAVE_DATA" in text and not os.environ.get("GAPWEAVE_DATA"):
        assert not os.environ.get("CI"), "CI must set GAPWEAVE_DATA"
        pytest.skip("GAPWEAVE_DATA is not set: this page uses real data sets")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "GAPWEAVE": str(ROOT),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }
    where = ROOT if page.name == "README.md" else tmp_path
    output = tmp_path / "output.txt"  # no pipe: what a page leaves running would hold it open
    with output.open("w") as file:
        try:
            words = ["bash", "-c", text]
            done = subprocess.run(words, cwd=where, env=environment, stdout=file, stderr=file, timeout=840, check=False)
        finally:
            left = end_services(tmp_path)
    assert done.returncode == 0, output.read_text()
    assert not left, f"the page leaves running: {left}"


def parameters(*, hub: bool) -> list[Any]:
    return [
        pytest.param(page, id=page.name) for page in PAGES if blocks(page) and ("server start" in script(page)) == hub
    ]


@pytest.mark.docs
class TestPagesThatStartAHub:
    """A class of their own, so that one process runs them in turn: all take the same port."""

    @pytest.mark.parametrize("page", parameters(hub=True))
    def test_commands_run(self, page: Path, tmp_path: Path) -> None:
        commands_run(page, tmp_path)


@pytest.mark.docs
@pytest.mark.parametrize("page", parameters(hub=False))
def test_commands_run(page: Path, tmp_path: Path) -> None:
    commands_run(page, tmp_path)


def test_the_reference_page_is_current() -> None:
    from gapweave.shared.config.reference import markdown

    assert (ROOT / "docs" / "reference.md").read_text(encoding="utf-8").strip() == markdown().strip()


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
