"""Images: a folder, and a records column with each record's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gapweave.client.sources.cells import missing
from gapweave.client.sources.records import Reading
from gapweave.shared.config.site import ImageSource
from gapweave.shared.config.study import ImageModality
from gapweave.shared.errors import DataError
from gapweave.shared.features import image as features

FORMATS = ("PNG", "JPEG")
"""Only these decoders are given a file, whatever its name says."""


def read(spec: ImageModality, source: ImageSource, reading: Reading) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read an image modality; an empty cell is a record without image.

    Returns:
        inputs [R, C, H, W] in [-1, 1], 0 where absent; present [R].

    Raises:
        DataError: for a folder that is none, and for files that are missing or cannot be decoded: how many, and
            the row of the first. File names are not told: they often hold a patient's id.
    """
    folder = reading.files.find_folder(source.folder)
    records = reading.records
    names = records.table.column(source.column).cast(str)
    present: NDArray[np.bool_] = ~missing(names).to_numpy()
    inputs = np.zeros((len(records), spec.channels, spec.size, spec.size), np.float32)
    bad: dict[str, list[int]] = {"are missing from the folder": [], "are truncated or no PNG or JPEG": []}
    for row in np.flatnonzero(present):
        path = folder / names[int(row)].strip()
        if not path.is_file():
            bad["are missing from the folder"].append(int(records.line[row]))
        elif not _decode(path, spec, inputs[row]):
            bad["are truncated or no PNG or JPEG"].append(int(records.line[row]))
    for problem, lines in bad.items():
        if lines:
            raise DataError(
                f"{len(lines)} of {int(present.sum())} images {problem} (the first: data row {min(lines)})",
                where=records.table.where(source.column),
                remedy=f"Replace these files in {source.folder!r}, or leave their cells empty",
            )
    return inputs, present


def _decode(path: Path, spec: ImageModality, into: NDArray[np.float32]) -> bool:
    """Decode one file; False when it cannot be."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            into[:] = features.encode(image, spec.size, spec.channels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True
