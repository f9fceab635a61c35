"""Every bad input gives its class of error, in one line, with a remedy and without a patient's value."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cohorts import CXR, LABS, NOTE, VITALS, Hospital, study
from PIL import Image

from gapweave.client.checks import check_site
from gapweave.shared.errors import DataError, GapweaveError, UsageError

SECRET = "zq77"
"""Part of every id and value below: no message may hold it."""

EVERYTHING = {"labs": LABS, "vitals": VITALS, "note": NOTE, "cxr": CXR}


def ids(count: int = 8) -> list[str]:
    return [f"{SECRET}-{row}" for row in range(count)]


def good(folder: Path) -> Hospital:
    """A hospital with all kinds of data and nothing wrong."""
    hospital = Hospital(folder)
    (folder / "images").mkdir()
    for name in ids():
        noise = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{name}.png")
    files = [f"{name}.png" for name in ids()]
    hospital.records(id=ids(), patient=ids(), image=files, start=["2024-05-01 13:00"] * 8, when=[1.0] * 8, bp=[120] * 8)
    hospital.labs(id=ids(), text=[SECRET] * 8)
    hospital.add("vitals", file="records.csv", time="when", columns={"bp": "bp"})
    hospital.add("note", file="labs.csv", columns=["text"])
    hospital.add("cxr", folder="images", column="image")
    return hospital


def raw(name: str, content: bytes) -> Callable[[Hospital], None]:
    return lambda hospital: void((hospital.folder / name).write_bytes(content))


def void(_: object) -> None:
    """Turn an expression's value into None."""


def records(**columns: list[Any]) -> Callable[[Hospital], None]:
    table = {"id": ids(), "patient": ids(), "y": [0, 1] * 4, "image": [""] * 8, "when": [1.0] * 8, "bp": [120] * 8}
    return lambda hospital: void(hospital.write("records.csv", {**table, **columns}))


def without(column: str) -> Callable[[Hospital], None]:
    table = {"id": ids(), "patient": ids(), "y": [0, 1] * 4, "image": [""] * 8, "when": [1.0] * 8, "bp": [120] * 8}
    del table[column]
    return lambda hospital: void(hospital.write("records.csv", table))


def source(name: str, **keys: Any) -> Callable[[Hospital], None]:
    return lambda hospital: hospital.add(name, **keys)


def part(name: str, **keys: Any) -> Callable[[Hospital], None]:
    return lambda hospital: hospital.update(name, **keys)


def both(*changes: Callable[[Hospital], None]) -> Callable[[Hospital], None]:
    def change(hospital: Hospital) -> None:
        for one in changes:
            one(hospital)

    return change


def truncate(name: str, keep: int) -> Callable[[Hospital], None]:
    return lambda hospital: void((hospital.folder / name).write_bytes((hospital.folder / name).read_bytes()[:keep]))


def drop(modality: str, hospital: Hospital) -> None:
    del hospital.content["data"][modality]


def huge_png(hospital: Hospital) -> None:
    Image.new("1", (20_000, 20_000)).save(hospital.folder / "images" / f"{SECRET}-0.png")


def parquet_of_lists(hospital: Hospital) -> None:
    hospital.write("lists.parquet", {"id": ids(), "na": [[1.0, 2.0]] * 8})
    hospital.add("labs", file="lists.parquet", columns={"sodium": "na"})


HEADER = b"id,patient,y,image,when,bp\n"
BAD: dict[str, tuple[Callable[[Hospital], None], type[GapweaveError], str]] = {
    "no records file": (
        part("records", file="nothing.csv"),
        DataError,
        "site.yaml:data.records: there is no nothing.csv",
    ),
    "records file is a folder": (
        part("records", file="images"),
        DataError,
        "images: this is a folder, not a file",
    ),
    "image folder is a file": (
        source("cxr", folder="labs.csv", column="image"),
        DataError,
        "labs.csv: this is a file, not a folder",
    ),
    "unknown extension": (
        both(raw("a.xlsx", b""), part("records", file="a.xlsx")),
        DataError,
        "Known types: csv, parquet, tsv",
    ),
    "not UTF-8": (
        raw("records.csv", HEADER + f"{SECRET},\xe9,1,,1\n".encode("latin-1")),
        DataError,
        "not UTF-8",
    ),
    "UTF-16": (raw("records.csv", HEADER.decode().encode("utf-16")), DataError, "is not UTF-8 text. Save it as UTF-8"),
    "UTF-32": (raw("records.csv", HEADER.decode().encode("utf-32")), DataError, "is not UTF-8 text. Save it as UTF-8"),
    "carriage returns": (
        raw("records.csv", HEADER.replace(b"\n", b"\r") * 3),
        DataError,
        "lines end with a carriage return alone. Save it with the line ends",
    ),
    "UTF-16 without a mark": (raw("records.csv", HEADER.decode().encode("utf-16-le")), DataError, "not UTF-8 text"),
    "no header": (
        raw("records.csv", f"{SECRET}-1,{SECRET},2024-12-03 10:00,PNE\n{SECRET}-2,{SECRET},,PNE\n".encode()),
        DataError,
        "no column 'id'. It has 4 columns; has the file a header line?",
    ),
    "no header, near a name": (
        raw("records.csv", f"idd,{SECRET}\n1,2\n".encode()),
        DataError,
        "has the file a header line?",
    ),
    "no header, a name by chance": (
        raw("records.csv", f"patient,2024-12-03,{SECRET}\n1,2,3\n".encode()),
        DataError,
        "has the file a header line?",
    ),
    "no header, a value that is a name": (
        raw("records.csv", f"id-a,{SECRET},y,hypertension\nid-b,{SECRET},n,asthma\nid-c,{SECRET},y,asthma\n".encode()),
        DataError,
        "has the file a header line?",
    ),
    "no header, one name of several": (
        raw("records.csv", f"{SECRET},y,asthma\n{SECRET},n,hypertension\n".encode()),
        DataError,
        "has the file a header line?",
    ),
    "label twice": (raw("records.csv", b"id,patient,y,y\n1,2,1,0\n"), DataError, "the column 'y' occurs twice"),
    "value three times": (raw("labs.csv", b"id,na,na,text,na\n1,2,1,0,7\n"), DataError, "'na' occurs 3 times"),
    "too many cells": (
        raw("records.csv", HEADER + f"{SECRET},a,1,,1,120,9,9\n".encode()),
        DataError,
        "malformed",
    ),
    "empty file": (raw("records.csv", b""), DataError, "the file is empty"),
    "header only": (raw("records.csv", HEADER), DataError, "has no rows"),
    "no Parquet": (
        both(raw("a.parquet", SECRET.encode()), part("records", file="a.parquet")),
        DataError,
        "damaged or no parquet. Copy or export it again",
    ),
    "no gzip": (
        both(raw("a.csv.gz", SECRET.encode()), part("records", file="a.csv.gz")),
        DataError,
        "a.csv.gz:id",
    ),
    "cut gzip": (
        both(raw("a.csv.gz", gzip.compress(HEADER * 99)[:-20]), part("records", file="a.csv.gz")),
        DataError,
        "the compressed file is damaged or incomplete. Copy it again",
    ),
    "cut Parquet": (
        both(
            lambda hospital: void(hospital.write("a.parquet", {"id": ids()})),
            truncate("a.parquet", 50),
            part("records", file="a.parquet"),
        ),
        DataError,
        "damaged",
    ),
    "a short row": (
        raw("records.csv", f"id,patient,y,note\nr0,p0,1,\nr1,p1,0,x\nr2,{SECRET}\n".encode()),
        DataError,
        "1 rows have fewer cells than the header (the first: line 4)",
    ),
    "a short row after a long report": (
        raw("records.csv", f"id,patient,y,note\nr0,p0,1,\nr1,p1,0,{SECRET * 70_000}\nr2,p2\n".encode()),
        DataError,
        "1 rows have fewer cells than the header (the first: line 4)",
    ),
    "a file that was cut off": (
        both(raw("a.csv.gz", gzip.compress(HEADER * 9 + HEADER[:-8])), part("records", file="a.csv.gz")),
        DataError,
        "have fewer cells than the header",
    ),
    "semicolons": (raw("records.csv", b"id;patient;y\n1;2,5;3\n"), DataError, "separated by semicolons, not commas"),
    "tabs": (raw("records.csv", b"id\tpatient\n1\t2\n"), DataError, "separated by tabs, not commas"),
    "no id column": (part("records", id="idd"), DataError, "no column 'idd'. Did you mean 'id'?"),
    "no patient column": (without("patient"), DataError, "no column 'patient'"),
    "no label column": (without("y"), DataError, "records.csv:y"),
    "no columns": (
        part("records", id="idd", patient="pat"),
        DataError,
        "no column 'idd' (nor 'pat'). Did you mean 'id'?",
    ),
    "no split column": (part("split", column="whn"), DataError, "Did you mean 'when'?"),
    "no filter column": (part("records", where={"site": 1}), DataError, "records.csv:site"),
    "no subgroup column": (part("subgroups", sex="sex"), DataError, "records.csv:sex"),
    "empty id": (records(id=[None, *ids(7)]), DataError, "1 rows have no id"),
    "empty patient": (records(patient=[None, "NA", *ids(6)]), DataError, "2 rows have no id"),
    "record twice": (records(id=[*ids(7), f"{SECRET}-6"]), DataError, "1 rows repeat the record id"),
    "nobody left": (part("records", where={"y": SECRET}), DataError, "none of 8 rows fulfils `where`"),
    "strange label": (
        records(y=[0, 1, SECRET, 2, "", 0, 1, 0]),
        DataError,
        "2 rows hold a label that is not one of 0, 1",
    ),
    "booleans beside numbers": (records(y=["True", "0", *["1", "0"] * 3]), DataError, "cells stand for 1 both"),
    "one class": (records(y=[1] * 8), DataError, "one-class site"),
    "patient on both sides": (
        both(records(patient=[SECRET] * 8, when=[0, 1] * 4), part("split", column="when")),
        DataError,
        "same patient in train and test: 1 patients",
    ),
    "no file of values": (
        source("labs", file="no.csv", columns={"sodium": "na"}),
        DataError,
        "there is no no.csv",
    ),
    "no value column": (
        source("labs", file="labs.csv", columns={"sodium": "naa"}),
        DataError,
        "labs.csv:naa",
    ),
    "no id column of values": (
        source("labs", file="labs.csv", id="idx", columns={"sodium": "na"}),
        DataError,
        "labs.csv:idx",
    ),
    "lists": (parquet_of_lists, DataError, "not text, numbers or times"),
    "unknown variable": (
        source("labs", file="labs.csv", columns={"sodum": "na"}),
        UsageError,
        "the study has no variable 'sodum' in 'labs'. Did you mean 'sodium'?",
    ),
    "unknown unit": (
        source("labs", file="labs.csv", columns={"sodium": {"column": "na", "unit": "mmool"}}),
        UsageError,
        "the unit 'mmool' is not known",
    ),
    "other quantity": (
        source("labs", file="labs.csv", columns={"sodium": {"column": "na", "unit": "mg/dL"}}),
        UsageError,
        "'mg/dL' cannot be converted to the study's unit 'mmol/L'",
    ),
    "time without window": (
        source("labs", file="records.csv", time="when", columns={"sodium": "y"}),
        UsageError,
        "no prediction time",
    ),
    "no time column": (
        source("vitals", file="records.csv", time="hour", columns={"bp": "bp"}),
        DataError,
        "records.csv:hour",
    ),
    "text for time": (
        source("vitals", file="records.csv", time="id", columns={"bp": "bp"}),
        DataError,
        "does not hold numbers (hours). For timestamps, give `index`",
    ),
    "timestamps without index": (
        source("vitals", file="records.csv", time="start", columns={"bp": "bp"}),
        DataError,
        "does not hold numbers (hours)",
    ),
    "hours with index": (
        source("vitals", file="records.csv", time="when", index="start", columns={"bp": "bp"}),
        DataError,
        "does not hold timestamps",
    ),
    "no index column": (
        source("vitals", file="records.csv", time="start", index="begin", columns={"bp": "bp"}),
        DataError,
        "records.csv:begin",
    ),
    "one time zone": (
        both(
            lambda hospital: void(
                hospital.write("zoned.csv", {"id": ids(), "at": ["2024-05-01 13:00:00Z"] * 8, "bp": [120] * 8})
            ),
            source("vitals", file="zoned.csv", time="at", index="start", columns={"bp": "bp"}),
        ),
        DataError,
        "only one names a time zone",
    ),
    "no text column": (source("note", file="labs.csv", columns=["txt"]), DataError, "Did you mean 'text'?"),
    "no image folder": (source("cxr", folder="pictures", column="image"), DataError, "there is no pictures"),
    "no image column": (source("cxr", folder="images", column="img"), DataError, "records.csv:img"),
    "no image": (
        records(image=["", f"{SECRET}.png", *[""] * 6]),
        DataError,
        "1 of 1 images are missing from the folder",
    ),
    "an image's name that no file can have": (
        records(image=["", f"{SECRET * 60}.png", *[""] * 6]),
        DataError,
        "1 of 1 images are missing from the folder, or may not be read",
    ),
    "cut and missing images": (
        both(
            truncate(f"images/{SECRET}-3.png", 500),
            lambda hospital: (hospital.folder / f"images/{SECRET}-5.png").unlink(),
        ),
        DataError,
        "(the first: data row 4); 1 of 8 images are missing from the folder, or may not be read (the first: data row 6)",
    ),
    "cut image": (truncate(f"images/{SECRET}-3.png", 500), DataError, "(the first: data row 4)"),
    "no picture": (
        raw(f"images/{SECRET}-3.png", SECRET.encode()),
        DataError,
        "1 of 8 images are truncated or no PNG",
    ),
    "decompression bomb": (huge_png, DataError, "1 of 8 images are truncated or no PNG"),
    "nothing for the study": (
        both(*(partial(drop, name) for name in EVERYTHING)),
        DataError,
        "none of the study's modalities",
    ),
    "other kind": (source("cxr", file="labs.csv", columns=["na"]), UsageError, "of the kind image"),
    "label code mapped to nothing known": (
        part("records", label={"y": {"column": "y", "codes": {"PNE": "pneumnia"}}}),
        UsageError,
        "label.y.codes.PNE: the code 'PNE' is mapped to 'pneumnia', which is none of the study's. Map it to one of 0, 1",
    ),
    "code mapped to nothing known": (
        source("labs", file="labs.csv", columns={"sex": {"column": "na", "codes": {"f": "01x"}}}),
        UsageError,
        "data.labs.columns.sex.codes.f: the code 'f' is mapped to '01x'",
    ),
    "code mapped to no number": (
        source("labs", file="labs.csv", columns={"sodium": {"column": "na", "codes": {"low": "few"}}}),
        UsageError,
        "mapped to 'few', which is no number. Map it to a number, or to '' for missing",
    ),
    "label not mapped": (part("records", label={}), UsageError, "maps no column to the study's label 'y'"),
}


def test_the_good_hospital_is_good(tmp_path: Path) -> None:
    hospital = good(tmp_path)
    assert hospital.load(study(EVERYTHING)).batch.present.all()
    assert {finding.status for finding in check_site(study(EVERYTHING), hospital.site, hospital.site_file)} <= {
        "ok",
        "problem",
    }


@pytest.mark.parametrize("name", BAD)
def test_bad_input(tmp_path: Path, name: str) -> None:
    change, kind, text = BAD[name]
    hospital = good(tmp_path)
    change(hospital)
    with pytest.raises(GapweaveError) as caught:
        hospital.load(study(EVERYTHING))
    error = caught.value
    assert type(error) is kind
    assert error.exit_code == {DataError: 6, UsageError: 2}[kind]
    assert text in str(error)
    assert "\n" not in str(error)
    assert error.where
    assert error.remedy
    assert SECRET not in str(error).replace(str(tmp_path), "")


@pytest.mark.parametrize("name", BAD)
def test_the_check_finds_what_training_refuses(tmp_path: Path, name: str) -> None:
    change, _, text = BAD[name]
    hospital = good(tmp_path)
    change(hospital)
    findings = check_site(study(EVERYTHING), hospital.site, hospital.site_file)
    problems = [finding for finding in findings if finding.status == "problem" and finding.id != "cohort"]
    lines = [f"{finding.where}: {finding.message}. {finding.remedy}" for finding in problems]
    assert any(text in line for line in lines)
    assert all(finding.where and finding.remedy for finding in problems)
    for finding in findings:
        line = f"{finding.where} {finding.message} {finding.remedy}".replace(str(tmp_path), "")
        assert SECRET not in line
        assert "\n" not in line


@pytest.mark.parametrize("name", BAD)
def test_the_check_without_a_study_never_fails(tmp_path: Path, name: str) -> None:
    hospital = good(tmp_path)
    BAD[name][0](hospital)
    for finding in check_site(None, hospital.site, hospital.site_file):
        assert SECRET not in f"{finding.where} {finding.message} {finding.remedy}".replace(str(tmp_path), "")


def test_a_column_that_nobody_needs_may_occur_twice(tmp_path: Path) -> None:
    hospital = good(tmp_path)
    rows = [f"{name},{at},x,y" for at, name in enumerate(ids(), 140)]
    (tmp_path / "labs.csv").write_text("\n".join(["id,na,comment,comment", *rows]))
    assert hospital.load(study({"labs": LABS})).batch.present.all()


def test_a_long_name_is_not_shown(tmp_path: Path) -> None:
    hospital = good(tmp_path)
    (tmp_path / "records.csv").write_text(f"id,{SECRET * 20},sex,y,start\n1,2,3,1,\n")
    with pytest.raises(DataError, match=r"Its columns are: id, sex, y, start$"):
        hospital.load(study(EVERYTHING))


def test_the_nearest_class_is_named(tmp_path: Path) -> None:
    hospital = good(tmp_path)
    part("records", label={"y": {"column": "y", "codes": {"PNE": "pneumnia", "x": ""}}})(hospital)
    task = {"kind": "multiclass", "label": "y", "classes": ["normal", "pneumonia"]}
    with pytest.raises(UsageError, match="Did you mean 'pneumonia'"):
        hospital.load(study({"labs": LABS}, task=task))


def test_where_was_looked_is_written_plainly(tmp_path: Path) -> None:
    hospital = good(tmp_path)
    hospital.update("records", file="../other/nothing.csv")
    with pytest.raises(DataError) as caught:
        hospital.load(study(EVERYTHING))
    assert f"looked in {tmp_path.parent / 'other'}" in str(caught.value)


def test_images_of_all_kinds_are_read(tmp_path: Path) -> None:
    hospital = good(tmp_path)
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "images" / f"{SECRET}-0.png")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "images" / f"{SECRET}-1.jpg", quality=95)
    files = [f"{SECRET}-0.png", f"{SECRET}-1.jpg", "", "NA", *[f"{name}.png" for name in ids()[4:]]]
    records(image=files)(hospital)
    batch = hospital.load(study({"cxr": CXR})).batch
    assert batch.inputs["cxr"].shape == (8, 1, 8, 8)
    assert batch.present[:, 0].tolist() == [True, True, False, False, True, True, True, True]
    assert float(batch.inputs["cxr"][0].max()) > 0.8
    assert float(batch.inputs["cxr"][0].min()) < -0.8
    assert float(batch.inputs["cxr"][1].max()) == -1
    half = np.zeros((16, 16), np.uint8)
    half[:8] = 255
    held = Image.Exif()
    held[274] = 6  # a quarter turn
    Image.fromarray(half).save(tmp_path / "images" / f"{SECRET}-1.jpg", quality=95, exif=held)
    turned = hospital.load(study({"cxr": CXR})).batch.inputs["cxr"][1, 0]
    assert float(turned[:, -1].min()) > 0.9 > -0.9 > float(turned[:, 0].max()), "the upper half is the right one"
    colour = {"kind": "image", "size": 16, "channels": 3}
    assert hospital.load(study({"cxr": colour})).batch.inputs["cxr"].shape == (8, 3, 16, 16)
