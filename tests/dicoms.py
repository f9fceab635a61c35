"""Writing DICOM files, for tests and for hospitals in a demonstration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import set_pixel_data
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid


def write_dicom(
    path: Path,
    pixels: NDArray[Any],
    *,
    bits: int | None = None,
    photometric: str = "MONOCHROME2",
    syntax: str | None = None,
    **elements: Any,
) -> Path:
    """Write a picture as a DICOM file.

    Args:
        path: the file.
        pixels: [H, W], or [H, W, 3], or [F, H, W] with ``NumberOfFrames``.
        bits: of a stored value (default: all of the type).
        photometric: its interpretation.
        syntax: identifier to compress with, which pydicom can write (RLE).
        elements: further elements by keyword.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID = "Doe^Jane", "42"
    stored = bits or pixels.dtype.itemsize * 8
    set_pixel_data(dataset, pixels, photometric, stored)
    for name, value in elements.items():
        setattr(dataset, name, value)
    if syntax is not None:
        dataset.compress(syntax)
    dataset.save_as(path, enforce_file_format=True)
    return path


def table(values: list[int], *, first: int, bits: int) -> Dataset:
    """An item of a sequence of lookup tables."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(values), first, bits])
    item.add_new("LUTData", "US", values)
    return item


def as_dicom(source: Path, target: Path) -> Path:
    """Copy a folder of PNG files as DICOM, each under the same name with `.dcm`."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB" if image.mode not in ("1", "L") else "L"))
        photometric = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
        write_dicom(target / f"{file.stem}.dcm", pixels, photometric=photometric)
    return target
