"""Copying or downloading a data set: checked file by file, there as a whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from gapweave.shared.errors import DataError, Unreachable
from gapweave.sites.datasets import SUMS, DataSet

if TYPE_CHECKING:
    import httpx

ATTEMPTS = 5
"""Attempts in a row that bring nothing new before a download is given up."""

PAUSE_S = 0.5
"""Seconds before the second attempt; doubled each time."""

_log = logging.getLogger(__name__)

Receive = Callable[[str, Path], None]
"""Bring one file, named by its path in the set, to a local path."""


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def gather(entry: DataSet, source: str, folder: Path, *, pause_s: float = PAUSE_S) -> None:
    """Bring a set's files from a folder or an address into `folder`, which must not exist.

    Args:
        entry: the set.
        source: a folder, or an http(s) address, below which the files lie under their paths in the set.
        folder: where the set shall be. It appears when every file is there and as published.
        pause_s: seconds before a download's second attempt.

    Raises:
        DataError: for a file that is missing from the folder, or differs from the published one.
        Unreachable: for an address that does not give the file.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _receiver(source, entry.name, pause_s) as receive, _unfinished(folder) as work:
        sums = entry.sums()
        for name, digest in _progress(sums, entry.name):
            target = work / name
            target.parent.mkdir(parents=True, exist_ok=True)
            receive(name, target)
            if sha256(target) != digest:
                raise DataError(
                    f"{name} differs from the published file (SHA-256)",
                    where=source,
                    remedy=f"Get {name} from {entry.source}; nothing was stored",
                )
        lines = (f"{digest}  {name}\n" for name, digest in sums.items())
        (work / SUMS).write_text("".join(lines), encoding="utf-8")
        work.rename(folder)


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, on the same file system; whatever is left of it at the end is removed."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as outer:
        work = Path(outer) / folder.name  # below, since the temporary folder itself is readable by its owner only
        work.mkdir()
        yield work


def _progress(sums: dict[str, str], title: str) -> Iterator[tuple[str, str]]:
    """The files in turn, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(sums.items(), description=title, console=console, transient=True, disable=not console.is_terminal)


@contextlib.contextmanager
def _receiver(source: str, name: str, pause_s: float) -> Iterator[Receive]:
    if not source.startswith(("http://", "https://")):
        inside = Path(source) / name
        yield _Folder(inside if inside.is_dir() else Path(source))
        return
    import httpx

    with httpx.Client(timeout=httpx.Timeout(30, connect=10), follow_redirects=True) as client:
        yield _Address(client, source, pause_s)


class _Folder:
    """Files of a local folder."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def __call__(self, name: str, target: Path) -> None:
        path = self._base / name
        if not path.is_file():
            raise DataError(f"there is no {name} below it", where=str(self._base), remedy="Check --from")
        shutil.copyfile(path, target)


class _Address:
    """Files below an address; a cut download goes on where it stopped."""

    def __init__(self, client: httpx.Client, base: str, pause_s: float) -> None:
        self._client = client
        self._base = base.rstrip("/")
        self._pause_s = pause_s

    def __call__(self, name: str, target: Path) -> None:
        import httpx

        url = f"{self._base}/{quote(name)}"
        target.touch()
        idle, problem = 0, ""
        while idle < ATTEMPTS:
            before = target.stat().st_size
            if idle:
                time.sleep(self._pause_s * 2 ** (idle - 1))
            try:
                self._receive(url, target)
                return
            except httpx.TransportError as error:
                problem = type(error).__name__
            except httpx.HTTPStatusError as error:
                code = error.response.status_code
                if code < 500:
                    raise Unreachable(f"the server answers {code}", where=url, remedy="Check --from") from None
                problem = f"the server answers {code}"
            except httpx.InvalidURL as error:
                raise Unreachable(f"no address ({error})", where=url, remedy="Check --from") from None
            idle = 1 if target.stat().st_size > before else idle + 1
            _log.info("%s stopped (%s) after %d bytes", url, problem, target.stat().st_size)
        raise Unreachable(
            f"no answer after {ATTEMPTS} attempts ({problem})",
            where=url,
            remedy="Check the address and the network",
        )

    def _receive(self, url: str, target: Path) -> None:
        """Append what is missing, or start again where the server does not resume.

        The bytes are taken as they lie on the server: a `.gz` file stays one.
        """
        have = target.stat().st_size
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with self._client.stream("GET", url, headers=headers) as response:
            if response.status_code == 416:  # nothing is missing, or the file has changed: the hash will tell
                return
            response.raise_for_status()
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            with target.open("ab" if resumed else "wb") as stream:
                for chunk in response.iter_raw():
                    stream.write(chunk)
