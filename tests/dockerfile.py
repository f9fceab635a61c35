"""Runs the steps of a Dockerfile where no container engine is: in a Debian tree that debootstrap makes.

It knows the instructions that our files have, in their forms, and fails on anything else. For `python:3.11-slim-bookworm` stands
the same release of Debian with Debian's own Python 3.11. `Image.run` runs a command as a container would.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BASES = {"python:3.11-slim-bookworm": ("bookworm", "python3.11,python3-pip,ca-certificates")}
"""Images that can be stood for: release of Debian and its packages."""
STEPS = ("ARG", "COPY", "ENTRYPOINT", "ENV", "FROM", "HEALTHCHECK", "RUN", "USER", "WORKDIR")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
Step = tuple[str, str]


def steps(text: str) -> list[Step]:
    """Instructions with their arguments; comments left out, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined)]


def base(folder: Path, image: str) -> Path:
    """Make the tree that stands for an image."""
    release, packages = BASES[image]
    words = ["debootstrap", "--variant=minbase", f"--include={packages}", release, str(folder)]
    subprocess.run(words, check=True, capture_output=True, text=True)
    (folder / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
    (folder / "usr/local/bin/python").symlink_to("/usr/bin/python3.11")
    return folder


def of_pip() -> list[str]:
    """Files and folders of this machine that pip is told to read: indexes, wheels, certificates."""
    told = {}
    for what in ("list", "debug"):
        words = [sys.executable, "-m", "pip", "config", what]
        told[what] = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    # The files of an index lie beside its pages.
    found = [path.removesuffix("/simple") for path in re.findall(r"/\w[\w./-]*", told["list"])]
    found += re.findall(r"(/\S+), exists: True", told["debug"])
    return [path for path in dict.fromkeys(found) if Path(path).exists()]


@dataclass
class Image:
    """A tree, changed by `build`, and what a Dockerfile says of it; `known` are build arguments."""

    root: Path
    known: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    user: str = "0:0"
    workdir: str = "/"
    healthcheck: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)

    def build(self, wanted: Sequence[Step], context: Path) -> Image:
        """Run steps; ValueError for an instruction, or a form of one, that is not known."""
        for word, rest in wanted:
            if word not in STEPS:
                raise ValueError(f"{word} is not known")
            getattr(self, f"_{word.lower()}")(rest, context)
        return self

    def run(self, words: Sequence[str], volumes: Mapping[Path, str], user: str = "") -> str:
        """Run a command as a container would: the image's user, a read-only root, an empty /tmp, no network.

        Args:
            words: of the command.
            volumes: folders of this machine, and where they are seen.
            user: another than the image's.
        """
        mounts = ["ip link set lo up", "mount -t tmpfs tmpfs tmp"]
        mounts += [f"mkdir -p .{seen}; mount --bind {folder} .{seen}" for folder, seen in volumes.items()]
        mounts += ["mount -o remount,ro,bind ."]
        return self._inside(mounts, words, self.env, user or self.user, "--net")

    def _inside(
        self, mounts: Sequence[str], words: Sequence[str], env: Mapping[str, str], user: str, *options: str
    ) -> str:
        """In namespaces of its own, whose end is the end of all its mounts and processes."""
        first = ["set -e", f"mount --bind {self.root} {self.root}", f"cd {self.root}", "mount -t proc proc proc"]
        last = 'exec chroot --userspec="$0" . env -i "$@"'
        script = "\n".join([*first, "mount --rbind /dev dev", *mounts, last])
        own = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", *options]
        inside = ["sh", "-c", f'cd {self.workdir} && exec "$@"', "sh", *words]
        command = [*own, "sh", "-c", script, user, *(f"{name}={value}" for name, value in env.items()), *inside]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
        return done.stdout

    def _run(self, rest: str, _: Path) -> None:
        """With the network, and with what pip reads on this machine, but nothing else of it."""
        mounts = ["cp -L /etc/resolv.conf etc/"]
        for path in of_pip():
            make = f"mkdir -p .{path}" if Path(path).is_dir() else f"mkdir -p .{Path(path).parent}; touch .{path}"
            mounts += [make, f"mount --bind -o ro {path} .{path}"]
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self._inside(mounts, ["sh", "-c", rest], {**self.known, **pip, **self.env}, self.user)

    def _from(self, rest: str, _: Path) -> None:
        image = re.sub(r"\$\{(\w+)\}", lambda name: self.known[name[1]], rest)
        if image not in BASES:
            raise ValueError(f"nothing stands for {image}")

    def _arg(self, rest: str, _: Path) -> None:
        name, _, value = rest.partition("=")
        self.known.setdefault(name, value)

    def _env(self, rest: str, _: Path) -> None:
        self.env |= dict(pair.split("=", 1) for pair in shlex.split(rest))

    def _user(self, rest: str, _: Path) -> None:
        self.user = rest

    def _workdir(self, rest: str, _: Path) -> None:
        self.workdir = rest
        (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _copy(self, rest: str, context: Path) -> None:
        *sources, target = rest.split()
        if not target.endswith("/") or target.startswith("/") or sources[0].startswith("-"):
            raise ValueError(f"COPY {rest}: only into a folder below WORKDIR, and without options")
        folder = self.root / self.workdir.lstrip("/") / target
        for source in sources:
            if source.endswith("/"):
                shutil.copytree(context / source, folder, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(context / source, folder)

    def _healthcheck(self, rest: str, _: Path) -> None:
        self.healthcheck = json.loads(rest.partition("CMD ")[2])

    def _entrypoint(self, rest: str, _: Path) -> None:
        self.entrypoint = json.loads(rest)
