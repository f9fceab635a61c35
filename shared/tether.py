"""Run a command that ends when the process that started it does: `python -m gapweave.shared.tether COMMAND ...`.

A supervisor that is killed must not leave a site or a hub behind that nobody watches, and whose ports are taken.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Linux, prctl(2): the signal that this process gets when its parent dies; it outlives execve(2)."""


def main() -> None:
    """Tether this process to its parent and become the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(os.environ.get("GAPWEAVE_SUPERVISOR", os.getppid())):
            sys.exit(1)  # the parent died before the line above
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
