"""DICOM files as grey or colour pictures of eight bits, as they are meant to be shown.

Only the elements that say how pixels are stored and shown are parsed: name, id and dates of the patient stay
unread bytes.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image
    from pydicom import Dataset

MAGIC = b"DICM"
"""Behind a preamble of 128 bytes, in every DICOM file."""

MOST_PIXELS = 2**26
"""Larger pictures are refused before they are decoded: 8,192 x 8,192 takes two gigabytes while it is read."""

DAMAGED = "are truncated or no PNG, JPEG or DICOM"

_GREY = ("MONOCHROME1", "MONOCHROME2")
_PALETTE = [
    f"{colour}PaletteColorLookupTable{part}" for colour in ("Red", "Green", "Blue") for part in ("Data", "Descriptor")
]
_READ: list[str] = [
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
    "PlanarConfiguration", "PhotometricInterpretation", "NumberOfFrames", "PixelData", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter",
    "WindowWidth", "VOILUTFunction", "VOILUTSequence", "PatientOrientation", "ImageOrientationPatient",
    *_PALETTE, "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
]  # fmt: skip


class Unreadable(Exception):
    """A file that cannot be used.

    Args:
        what: what such files are, as the end of "3 of 9 images ...".
        remedy: what to do with them.
    """

    def __init__(self, what: str, remedy: str = "Replace these files") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, whatever its name says."""
    with path.open("rb") as file:
        return file.read(132)[128:] == MAGIC


def read(path: Path) -> Image:
    """The picture in a file: rescaled, windowed, black is low, head up and the patient's left on the right.

    The first window or table of values of interest is used; without one the whole range of the stored bits.

    Raises:
        Unreadable: for several frames, a compression without decoder, a colour space that is not known, or a
            damaged file.
        ImportError: when pydicom is not installed.
    """
    import pydicom
    from PIL import Image

    # Its warnings and log lines quote values.
    logging.getLogger("pydicom").propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, specific_tags=list(_READ))
            _refuse(dataset)
            pixels = _grey(dataset) if dataset.PhotometricInterpretation in _GREY else _colour(dataset)
            return Image.fromarray(np.ascontiguousarray(_upright(pixels, _orientation(dataset))))
    except (Unreadable, ImportError):
        raise
    except Exception:  # a damaged file can fail anywhere in pydicom, in its own and in every other way
        raise Unreadable(DAMAGED) from None


def _refuse(dataset: Dataset) -> None:
    from pydicom.pixels import get_decoder

    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise Unreadable("are DICOM with several frames", "Export the frame that counts as a file of its own")
    if dataset.Rows * dataset.Columns > MOST_PIXELS:
        raise Unreadable(f"have more than {MOST_PIXELS} pixels", "Export smaller files")
    if dataset.get("HighBit") not in (None, dataset.BitsStored - 1):
        raise Unreadable("keep their bits where no reader looks for them (HighBit)", "Export these files again")
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        known = get_decoder(syntax).is_available
    except NotImplementedError:
        known = False
    if not known:
        # A name from the standard's list; an unknown identifier is not repeated.
        name = f" as {syntax.name}" if syntax.name != str(syntax) else ""
        raise Unreadable(
            f"are DICOM compressed{name}, which no installed decoder reads",
            "Install a decoder for pydicom (pylibjpeg), or export these files uncompressed",
        )


def _grey(dataset: Dataset) -> NDArray[np.uint8]:
    from pydicom.pixels import pixel_array

    bits = int(dataset.BitsStored)
    low = -(2.0 ** (bits - 1)) if dataset.PixelRepresentation else 0.0
    values, bounds = pixel_array(dataset).astype(np.float64), np.array([low, low + 2**bits - 1])
    if dataset.get("ModalityLUTSequence"):
        values, bounds = _looked_up(values, dataset.ModalityLUTSequence[0], dataset)
    elif dataset.get("RescaleSlope") is not None:
        slope, intercept = float(dataset.RescaleSlope), float(dataset.get("RescaleIntercept") or 0)
        values, bounds = values * slope + intercept, np.sort(bounds * slope + intercept)
    if dataset.get("VOILUTSequence"):
        values, bounds = _looked_up(values, dataset.VOILUTSequence[0], dataset)
    elif dataset.get("WindowWidth") is not None and dataset.get("WindowCenter") is not None:
        values, bounds = _windowed(values, dataset), np.array([0.0, 1.0])
    share = np.clip((values - bounds[0]) / (bounds[1] - bounds[0]), 0, 1)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        share = 1 - share
    result: NDArray[np.uint8] = np.rint(share * 255).astype(np.uint8)
    return result


def _looked_up(
    values: NDArray[np.float64], table: Dataset, dataset: Dataset
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values through a table of the file, and the bounds of what it gives."""
    entries, first, bits = (int(number) for number in table.LUTDescriptor)
    entries = entries or 2**16
    data: Any = table.LUTData
    if isinstance(data, bytes):
        wide = "<u2" if dataset.original_encoding[1] else ">u2"
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * entries else wide)
    at = np.clip(np.rint(values) - first, 0, entries - 1).astype(np.int64)
    return np.asarray(data, np.float64)[at], np.array([0.0, 2.0**bits - 1])


def _windowed(values: NDArray[np.float64], dataset: Dataset) -> NDArray[np.float64]:
    """Shares of the first window (PS3.3, C.11.2.1.2 and 3): 0 at or below it, 1 at or above."""
    center, width = (float(np.atleast_1d(dataset[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    function = dataset.get("VOILUTFunction") or "LINEAR"
    if function == "SIGMOID":
        share: NDArray[np.float64] = 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
        return share
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width <= 0:
        return (values > center).astype(np.float64)
    return (values - center) / width + 0.5


def _colour(dataset: Dataset) -> NDArray[np.uint8]:
    from pydicom.pixels import apply_color_lut, pixel_array

    pixels = pixel_array(dataset)  # which turns YBR into RGB
    full = 2 ** int(dataset.BitsStored) - 1
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        full = np.iinfo(pixels.dtype).max
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise Unreadable("are DICOM in colours that are not known", "Export them as grey or RGB")
    result: NDArray[np.uint8] = np.rint(pixels / full * 255).astype(np.uint8)
    return result


def _orientation(dataset: Dataset) -> tuple[str, str]:
    """Whereto a row and a column run, as letters (Left, Right, Anterior, Posterior, Head, Foot); empty: unknown."""
    letters = [str(one) for one in dataset.get("PatientOrientation") or []]
    if len(letters) == 2 and all(one and set(one) <= set("LRAPHF") for one in letters):
        return letters[0][0], letters[1][0]
    cosines = dataset.get("ImageOrientationPatient")
    if cosines is None or len(cosines) != 6:
        return "", ""
    row, column = np.array([float(one) for one in cosines]).reshape(2, 3)
    return _letter(row), _letter(column)


def _letter(direction: NDArray[np.float64]) -> str:
    axis = int(np.abs(direction).argmax())
    return ("RAF" if direction[axis] < 0 else "LPH")[axis]


def _upright(pixels: NDArray[np.uint8], orientation: tuple[str, str]) -> NDArray[np.uint8]:
    """Columns run to the feet or the back, rows to the patient's left or back; as stored where that is unknown."""
    along, down = orientation
    if not along or not down:
        return pixels
    if along in "HF" and down not in "HF":
        pixels, along, down = pixels.swapaxes(0, 1), down, along
    if along in "RA":
        pixels = pixels[:, ::-1]
    if down in "HA":
        pixels = pixels[::-1]
    return pixels
