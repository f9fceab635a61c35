"""The device that a site trains on: what its site file names, if this machine has it."""

from __future__ import annotations

from pathlib import Path

import torch

from gapweave.shared.errors import UsageError


def find_device(name: str, site_file: Path) -> torch.device:
    """The device of a name, `auto` being the first GPU, or the CPU where there is none.

    Raises:
        UsageError: when this machine has no such device.
    """
    there = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not (there and (device.index or 0) < torch.cuda.device_count()):
        driver = "the driver answers" if Path("/proc/driver/nvidia").exists() else "no NVIDIA driver is loaded"
        raise UsageError(
            f"there is no {name} on this machine; {driver}",
            where=f"{site_file}:device",
            remedy="Mend driver and CUDA build of torch, or write device: auto",
        )
    return device
