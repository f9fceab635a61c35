"""DICOM: the picture that a viewer shows, the same arrays as from PNG, and nothing of the patient in a message."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from cohorts import CXR, Hospital, assert_same, study
from dicoms import as_dicom, table, write_dicom
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import UID, JPEGLSLossless, RLELossless

from gapweave.client.sources import dicom
from gapweave.shared.errors import DataError, GapweaveError, UsageError

SECRET = "zq77"

NOISE = np.random.default_rng(0).integers(0, 256, (30, 40), np.uint8)
DEEP = np.random.default_rng(1).integers(-1024, 3072, (30, 40)).astype(np.int16)
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def shown(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(dicom.read(path))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("L", 3), ("RGB", 1)])
def test_dicom_gives_the_arrays_of_the_png(tmp_path: Path, mode: str, channels: int) -> None:
    rng = np.random.default_rng(7)
    hospital = Hospital(tmp_path)
    (tmp_path / "png").mkdir()
    for row in range(8):
        pixels = rng.integers(0, 256, (33, 21, *([3] if mode == "RGB" else [])), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "png" / f"{row}.png")
    as_dicom(tmp_path / "png", tmp_path / "dcm")
    cohorts = []
    for kind in ("png", "dcm"):
        hospital.records(image=[f"{row}.{kind}" for row in range(7)] + [""])
        hospital.add("cxr", folder=kind, column="image")
        cohorts.append(hospital.load(study({"cxr": {**CXR, "channels": channels}})))
    assert_same(*cohorts)
    assert cohorts[0].batch.present[:, 0].tolist() == [True] * 7 + [False]
    assert cohorts[0].batch.inputs["cxr"][0].std() > 0.01


WINDOWS: dict[str, dict[str, Any]] = {
    "linear": {"WindowCenter": 40, "WindowWidth": 400},
    "the first of two": {"WindowCenter": [-600, 40], "WindowWidth": [1500, 400]},
    "exact": {"WindowCenter": 100, "WindowWidth": 300, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 100, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
    "none": {},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_rescaled_and_windowed_as_pydicom_does(tmp_path: Path, name: str) -> None:
    """Its processing is the judge; its scale is that of the stored values."""
    elements = {"RescaleSlope": 0.5, "RescaleIntercept": -100, **WINDOWS[name]}
    path = write_dicom(tmp_path / "a.dcm", DEEP, bits=13, **elements)
    dataset = pydicom.dcmread(path)
    expected = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    low, high = (-4096 * 0.5 - 100, 4095 * 0.5 - 100)
    np.testing.assert_allclose(shown(path), (expected - low) / (high - low) * 255, atol=0.501)
    assert len(np.unique(shown(path))) > 60


def test_an_identity_window_and_a_negative_slope(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", NOISE, WindowCenter=128, WindowWidth=256)
    np.testing.assert_array_equal(shown(path), NOISE)
    path = write_dicom(tmp_path / "b.dcm", NOISE, RescaleSlope=-1, RescaleIntercept=0)
    np.testing.assert_array_equal(shown(path), 255 - NOISE)


def test_white_is_low_in_monochrome1(tmp_path: Path) -> None:
    np.testing.assert_array_equal(shown(write_dicom(tmp_path / "a", NOISE, photometric="MONOCHROME1")), 255 - NOISE)
    path = write_dicom(tmp_path / "b", NOISE, photometric="MONOCHROME1", WindowCenter=0, WindowWidth=50)
    assert int(shown(path)[NOISE > 30].max()) == 0


def test_lookup_tables(tmp_path: Path) -> None:
    """An 8-bit table of more than 256 entries, which pydicom's own function overflows on."""
    values = [min(255, at // 4) for at in range(1024)]
    path = write_dicom(tmp_path / "a.dcm", RAMP, bits=12, VOILUTSequence=[table(values, first=1000, bits=8)])
    expected = np.clip((RAMP.astype(int) - 1000) // 4, 0, 255)
    np.testing.assert_array_equal(shown(path), expected)
    path = write_dicom(
        tmp_path / "b.dcm", NOISE, ModalityLUTSequence=[table([7 * at for at in range(256)], first=0, bits=16)],
        WindowCenter=704, WindowWidth=2,
    )  # fmt: skip
    np.testing.assert_array_equal(shown(path), np.where(NOISE > 100, 255, 0))


def test_compressed_by_runs(tmp_path: Path) -> None:
    np.testing.assert_array_equal(shown(write_dicom(tmp_path / "a", NOISE, syntax=RLELossless)), NOISE)


@pytest.mark.parametrize(
    ("stored", "elements"),
    [
        (NOISE, {}),
        (NOISE, {"PatientOrientation": ["L", "F"]}),
        (NOISE, {"PatientOrientation": ["LE", "V"]}),
        (NOISE[:, ::-1], {"PatientOrientation": ["R", "F"]}),
        (NOISE[::-1], {"PatientOrientation": ["LH", "H"]}),
        (NOISE[:, ::-1], {"PatientOrientation": ["A", "FR"]}),
        (NOISE.T, {"PatientOrientation": ["F", "L"]}),
        (NOISE.T[:, ::-1], {"PatientOrientation": ["H", "P"]}),
        (NOISE, {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}),
        (NOISE[::-1, ::-1], {"ImageOrientationPatient": [-0.99, 0.1, 0, 0.1, -0.99, 0]}),
    ],
)
def test_head_up_and_left_on_the_right(tmp_path: Path, stored: Any, elements: dict[str, Any]) -> None:
    np.testing.assert_array_equal(shown(write_dicom(tmp_path / "a", stored.copy(), **elements)), NOISE)


def relabelled(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new.ljust(len(old), b"\0")))
    return path


def bad(path: Path, kind: str) -> None:
    """A file of `kind`, whose patient has a secret name."""
    named = {"PatientName": SECRET, "PatientID": SECRET}
    if kind == "frames":
        write_dicom(path, np.stack([NOISE, NOISE]), NumberOfFrames=2, **named)
    elif kind == "colours":
        write_dicom(path, NOISE, **named)
        relabelled(path, b"MONOCHROME2", b"HSV")
    else:
        write_dicom(path, NOISE, AcquisitionDate="20240101", syntax=RLELossless if "syntax" in kind else None, **named)
    if "syntax" in kind:
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = JPEGLSLossless if kind == "syntax" else UID("1.2.3.77777")
        dataset.save_as(path, implicit_vr=False, little_endian=True)
    elif kind == "high bits":
        dataset = pydicom.dcmread(path)
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 15
        dataset.PixelData = NOISE.astype(np.uint16).tobytes()
        dataset.save_as(path)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif kind == "no pixels":
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "strange value":
        relabelled(path, b"DA\x08\x0020240101", b"DA\x08\x00" + SECRET.encode() + b"zq77")
        path.write_bytes(path.read_bytes()[:-9])
    elif kind == "empty":
        path.write_bytes(b"\0" * 128 + b"DICM")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("frames", "1 of 8 images are DICOM with several frames (the first: data row 3)"),
        ("syntax", "are DICOM compressed as JPEG-LS Lossless Image Compression, which no installed decoder reads"),
        ("other syntax", "are DICOM compressed, which no installed decoder reads"),
        ("colours", "are DICOM in colours that are not known"),
        ("high bits", "keep their bits where no reader looks for them"),
        ("cut", "are truncated or no PNG, JPEG or DICOM"),
        ("no pixels", "are truncated or no PNG, JPEG or DICOM"),
        ("strange value", "are truncated or no PNG, JPEG or DICOM"),
        ("empty", "are truncated or no PNG, JPEG or DICOM"),
    ],
)
def test_bad_files(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, text: str) -> None:
    hospital = Hospital(tmp_path)
    (tmp_path / "images").mkdir()
    files = [f"{SECRET}-{row}.dcm" for row in range(8)]
    for name in files:
        write_dicom(tmp_path / "images" / name, NOISE)
    bad(tmp_path / "images" / files[2], kind)
    hospital.records(image=files)
    hospital.add("cxr", folder="images", column="image")
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        with pytest.raises(DataError) as caught:
            hospital.load(study({"cxr": CXR}))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert SECRET not in f"{caught.value}{caplog.text}{[str(one.message) for one in warned]}"
    assert caught.value.__cause__ is None


def test_without_pydicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital = Hospital(tmp_path)
    write_dicom(tmp_path / "a.dcm", NOISE)
    hospital.records(image=["a.dcm"] * 8)
    hospital.add("cxr", folder=".", column="image")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(GapweaveError, match=r"gapweave\[images\]") as caught:
        hospital.load(study({"cxr": CXR}))
    assert type(caught.value) is UsageError
