"""The run card: the one bundle that a hub may send to its sites. It names the installed apps and holds no code.

Flower gives a site whatever code the server ships. A Gapweave site runs its own installed, vetted version only: the
card is the same, byte for byte, for all runs of a version, so that a site makes it itself and compares hashes. The
study travels in the run's configuration, where a site approves it by its own hash (docs/decisions/0016).
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tempfile
import tomllib
import zipfile
from functools import lru_cache
from pathlib import Path

from gapweave.shared import PROTOCOL_VERSION, __version__
from gapweave.shared.files import private_folder, write_atomically

CONFIG = {"study": "", "out": "", "run": "", "sites": ""}
"""Keys of a run's configuration: study (JSON), run directory, our own id of the run, registry of sites."""

CARD = f"""[build-system]
requires = []
build-backend = "none"

[project]
name = "gapweave-run-card"
version = "{__version__}"
description = "Gapweave {__version__}, protocol {PROTOCOL_VERSION}"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "gapweave"

[tool.flwr.app.components]
serverapp = "gapweave.server.app:app"
clientapp = "gapweave.client.app:app"

[tool.flwr.app.config]
""" + "".join(f'{key} = ""\n' for key in CONFIG)


@lru_cache(maxsize=1)
def run_card() -> bytes:
    """The bundle of this version; building it is deterministic."""
    from flwr.cli.build import build_fab_from_files

    bundle: bytes = build_fab_from_files({"pyproject.toml": CARD.encode()})[0]
    return bundle


def install_card(home: Path) -> None:
    """Unpack the card where Flower looks for it, whole or not at all.

    Flower takes a folder that is there for a complete one: after a full disk no run would ever start again.

    Args:
        home: FLWR_HOME of the side.

    Raises:
        OSError: when the disk does not take it.
    """
    from flwr.common.constant import APP_DIR, FAB_HASH_TRUNCATION

    digest = hashlib.sha256(run_card()).hexdigest()[:FAB_HASH_TRUNCATION]
    folder = home / APP_DIR / f"gapweave.gapweave-run-card.{__version__}.{digest}"
    file = folder / "pyproject.toml"
    if file.exists() and file.read_text(encoding="utf-8") == CARD:
        return
    shutil.rmtree(folder, ignore_errors=True)
    private_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        write_atomically(private_folder(Path(made) / "card") / file.name, CARD.encode())
        (Path(made) / "card").rename(folder)


def refusal(bundle: bytes) -> str | None:
    """Why a site must not run a bundle; None for this version's own card. Nothing of the bundle is run or unpacked."""
    if hashlib.sha256(bundle).digest() == hashlib.sha256(run_card()).digest():
        return None
    other = _described(bundle)
    ours = f"Gapweave {__version__}, protocol {PROTOCOL_VERSION}"
    if other is None or other == ours:
        return f"a bundle that is no run card of Gapweave; the site runs {ours}"
    return f"the bundle is of {other}; the site runs {ours}: install the same version on both sides"


def _described(bundle: bytes) -> str | None:
    """What a bundle says it is, if it says so in the words of a run card."""
    try:
        with zipfile.ZipFile(io.BytesIO(bundle)) as archive, archive.open("pyproject.toml") as file:
            text = str(tomllib.loads(file.read(1 << 16).decode())["project"]["description"])
    except Exception:  # a hostile archive may fail in any way; whatever it is, it is no card
        return None
    return text if re.fullmatch(r"Gapweave \d{1,4}(\.\w{1,8}){1,4}, protocol \d{1,6}", text) else None
