"""Images: a folder, and a records column with each record's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gapweave.client.sources import dicom
from gapweave.client.sources.cells import missing
from gapweave.client.sources.records import Reading
from gapweave.shared.config.modalities import ImageModality
from gapweave.shared.config.sources import ImageSource
from gapweave.shared.errors import DataError, UsageError
from gapweave.shared.features import image as features

FORMATS = ("PNG", "JPEG")
"""Only these decoders of pictures are given a file, whatever its name says; DICOM has its own."""


def read(spec: ImageModality, source: ImageSource, reading: Reading) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read an image modality; an empty cell is a record without image.

    Returns:
        inputs [R, C, H, W] in [-1, 1], 0 where absent; present [R].

    Raises:
        DataError: for a folder that is none, and for files that are missing or cannot be decoded: how many, and
            the row of the first. File names are not told: they often hold a patient's id.
        UsageError: for DICOM files without what reads them.
    """
    folder = reading.files.find_folder(source.folder, reading.key())
    records = reading.records
    names = records.table.column(source.column).cast(str)
    present: NDArray[np.bool_] = ~missing(names).to_numpy()
    inputs = np.zeros((len(records), spec.channels, spec.size, spec.size), np.float32)
    bad: dict[tuple[str, str], list[int]] = {}
    for row in np.flatnonzero(present):
        try:
            inputs[row] = _decode(folder / names[int(row)].strip(), spec, reading)
        except dicom.Unreadable as error:
            bad.setdefault((error.what, error.remedy), []).append(int(records.line[row]))
    if bad:
        of = int(present.sum())
        found = [
            f"{len(lines)} of {of} images {what} (the first: data row {min(lines)})" for (what, _), lines in bad.items()
        ]
        remedies = "; ".join(dict.fromkeys(remedy for _, remedy in bad))
        raise DataError(
            "; ".join(found),
            where=records.table.where(source.column),
            remedy=f"{remedies} in {source.folder!r}, or leave their cells empty",
        )
    return inputs, present


def _decode(path: Path, spec: ImageModality, reading: Reading) -> NDArray[np.float32]:
    """One file as [C, H, W].

    Raises:
        dicom.Unreadable: when it cannot be used.
    """
    from PIL import Image, ImageOps

    try:
        there = path.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered; its message would tell the name
        there = False
    if not there:
        raise dicom.Unreadable("are missing from the folder, or may not be read", "Put these files")
    try:
        if dicom.is_dicom(path):
            return features.encode(dicom.read(path), spec.size, spec.channels)
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            # Cameras store how they were held beside the picture.
            return features.encode(ImageOps.exif_transpose(image), spec.size, spec.channels)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise dicom.Unreadable(dicom.DAMAGED) from None
    except ImportError:
        raise UsageError(
            "DICOM files need pydicom", where=reading.key(".folder"), remedy="pip install 'gapweave[images]'"
        ) from None
