"""`site check`: one run finds everything that it can, and a machine can read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cohorts import LABS, NOTE, VITALS, Hospital, study

from gapweave.client.checks import Finding, as_json, check_site
from gapweave.client.sources.findings import warnings_of
from gapweave.shared.config.study import Study
from gapweave.shared.errors import DataError


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    hospital = Hospital(tmp_path)
    hospital.records(40)
    hospital.labs(40, na=[140.0] * 40, sex=[0, 1] * 20)
    hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": "sex"})
    return hospital


def check(hospital: Hospital, of: Study | None = None) -> list[Finding]:
    return check_site(of or study({"labs": LABS}), hospital.site, hospital.site_file)


def by_id(findings: list[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.id == name]
    return finding


def test_a_good_site(hospital: Hospital) -> None:
    findings = check(hospital)
    assert {finding.status for finding in findings} == {"ok"}
    assert by_id(findings, "records").message == "40 records of 40 patients"
    assert by_id(findings, "modality").message == "40 of 40 records have it (100%); of those: sodium 100%, sex 100%"
    assert by_id(findings, "cohort").message.endswith("training patients")


def test_the_variables_that_are_missing_most_are_named(hospital: Hospital) -> None:
    hospital.labs(40, na=[140.0] * 20 + [""] * 20, sex=[0, 1] * 15 + [""] * 10)
    hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": "sex"})
    message = by_id(check(hospital), "modality").message
    assert message == "30 of 40 records have it (75%); of those: sodium 67%, sex 100%"


def test_json(hospital: Hospital) -> None:
    content = json.loads(json.dumps(as_json(check(hospital))))
    assert content["ok"] is True
    assert {tuple(line) for line in content["checks"]} == {("id", "status", "where", "message", "remedy")}
    hospital.update("patients", upper=30)
    content = as_json(check(hospital))
    assert content["ok"] is False
    assert "problem" in {line["status"] for line in content["checks"]}


def test_every_problem_in_one_run(hospital: Hospital) -> None:
    hospital.records(40, id=["r0", *[f"r{row}" for row in range(39)]], y=[0, 1, 2, 3] * 10, fold=["train", "x"] * 20)
    hospital.update("split", column="fold")
    hospital.update("patients", upper=30)
    hospital.content["subgroups"] = {"sex": "sexx"}
    hospital.add("labs", file="labs.csv", columns={"sodium": "natrium"})
    hospital.add("vitals", file="nothing.csv", time="hour", columns={"bp": "bp"})
    findings = check(hospital, study({"labs": LABS, "vitals": VITALS}))
    problems = [finding.id for finding in findings if finding.status == "problem"]
    assert problems == ["duplicates", "subgroups", "upper", "labels", "split", "modality", "modality"]
    assert all(finding.remedy for finding in findings if finding.status == "problem")


def test_modalities_are_checked_though_the_records_cannot_be_read(hospital: Hospital) -> None:
    hospital.update("records", file="nothing.csv")
    hospital.add("vitals", file="labs.csv", time="hour", columns={"bp": "bp"})
    findings = check(hospital)
    assert [(finding.id, finding.status) for finding in findings] == [
        ("records", "problem"),
        ("modality", "ok"),
        ("modality", "problem"),
        ("device", "ok"),
        ("server", "ok"),
    ]


def test_without_a_study_only_files_are_checked(hospital: Hospital) -> None:
    hospital.update("records", label={"y": "y", "z": "zz"})
    hospital.add("other", file="labs.csv", columns={"anything": "na", "else": "absent"})
    findings = check_site(None, hospital.site, hospital.site_file)
    assert [finding.where.rsplit(":", 1)[1] for finding in findings if finding.status == "problem"] == [
        "zz",
        "absent",
    ]


def test_implausible_values_are_counted_per_variable(hospital: Hospital) -> None:
    values: list[Any] = [140.0] * 40
    values[:4] = [np.inf, -np.inf, np.nan, 999.0]
    hospital.labs(40, na=values)
    finding = by_id(check(hospital), "range")
    assert finding.status == "warning"
    assert finding.message == "3 of 39 values lie outside [100, 180] mmol/L and are clipped"
    assert finding.where.endswith("labs.csv:na")
    batch = hospital.load(study({"labs": LABS})).batch
    assert batch.inputs["labs"].isfinite().all()
    assert batch.present[:4, 0].tolist() == [False, False, False, True]


def test_probably_another_unit(hospital: Hospital) -> None:
    hospital.labs(40, na=[3.2] * 9 + [140.0] * 31)
    finding = by_id(check(hospital), "unit")
    assert finding.status == "warning"
    assert finding.message == "9 of 40 values lie outside [100, 180] mmol/L: probably another unit"
    assert "`unit:`" in finding.remedy
    assert "`factor:`" in finding.remedy
    hospital.labs(40, na=[3.2] * 8 + [140.0] * 32)
    assert by_id(check(hospital), "range").message.startswith("8 of 40")


def test_text_in_numbers(hospital: Hospital) -> None:
    hospital.labs(40, na=["high", "1,5", "", "NA"] + ["140"] * 36)
    finding = by_id(check(hospital), "numbers")
    assert finding.message == "2 of 40 cells are not numbers and count as missing"


def test_no_cell_is_a_number(hospital: Hospital) -> None:
    hospital.labs(40, na=["", *["140,5"] * 39], sex=["m"] * 40)
    hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": "sex"})
    numbers, codes = by_id(check(hospital), "numbers"), by_id(check(hospital), "codes")
    assert (numbers.status, codes.status) == ("problem", "problem")
    assert numbers.message == "all 39 cells that are filled in are not numbers"
    assert "no comma" in numbers.remedy


def test_a_handful_of_cells_may_all_be_unreadable(hospital: Hospital) -> None:
    """A troponin that was always below its limit must not keep a hospital from training."""
    hospital.labs(40, na=["<0.01"] * 3 + [""] * 37, sex=["m"] * 3 + [""] * 37, x=["1"] * 40)
    hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": "sex", "glucose": "x"})
    numbers, codes = by_id(check(hospital), "numbers"), by_id(check(hospital), "codes")
    assert (numbers.status, codes.status) == ("warning", "warning")
    assert hospital.load(study({"labs": LABS})).batch.present[:, 0].all()


def long_form(hospital: Hospital, **items: int) -> None:
    """Rows of the values, so many records of each item."""
    rows = [(f"r{row}", item) for item, count in items.items() for row in range(count)]
    columns = {"id": [row[0] for row in rows], "item": [row[1] for row in rows], "value": ["3"] * len(rows)}
    hospital.write("long.csv", columns)
    hospital.add("labs", file="long.csv", item="item", value="value", columns={"sodium": "NA+", "glucose": "GLU"})


def test_an_item_that_no_row_has_is_a_problem(hospital: Hospital) -> None:
    """A mistyped code was believed to be a variable that was never measured."""
    long_form(hospital, **{"NA+": 40, "GLUC": 40})
    finding = by_id(check(hospital), "absent_item")
    assert finding.status == "problem"
    assert finding.message == "no row has item 'GLU'"
    assert finding.where.endswith("site.yaml:data.labs.columns.glucose")
    with pytest.raises(DataError, match="no row has item 'GLU'"):
        hospital.load(study({"labs": LABS}))


def test_an_item_that_only_others_have_is_none(hospital: Hospital) -> None:
    long_form(hospital, **{"NA+": 40, "GLU": 41})
    hospital.records(40, id=[*[f"r{row}" for row in range(1, 40)], "r99"])
    rows = {"id": ["r1", "other"], "item": ["NA+", "GLU"], "value": ["140", "5"]}
    hospital.write("long.csv", rows)
    assert "absent_item" not in {finding.id for finding in check(hospital)}


def test_an_empty_column_is_a_warning(hospital: Hospital) -> None:
    hospital.labs(40, sex=["", "NA"] * 20, note=[None] * 40, text=["cough"] * 40)
    hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": "sex"})
    hospital.add("note", file="labs.csv", columns=["note", "text"])
    found = [one for one in check(hospital, study({"labs": LABS, "note": NOTE})) if one.id == "empty"]
    assert [one.status for one in found] == ["warning", "warning"]
    assert [one.where.rsplit(":", 1)[1] for one in found] == ["sex", "note"]
    assert found[0].message == "'sex' is empty in all 40 rows of the site's records"


def test_a_variable_that_hardly_any_record_has(hospital: Hospital) -> None:
    hospital.labs(40, sex=[1, *[None] * 39])
    hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": "sex"})
    finding = by_id(check(hospital), "rare")
    assert (finding.status, finding.message) == ("warning", "1 of 40 records with 'labs' have 'sex'")
    hospital.labs(40, sex=[1, 0, *[None] * 38])
    hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": "sex"})
    assert "rare" not in {one.id for one in check(hospital)}


def test_unlabelled_records(hospital: Hospital) -> None:
    hospital.records(40, y=[None, *[0, 1] * 19, 0])
    assert by_id(check(hospital), "unlabelled").message == "1 of 40 records have no label and are not trained on"


def test_too_few_patients(hospital: Hospital) -> None:
    hospital.update("policy", min_patients=39)
    finding = by_id(check(hospital), "cohort")
    assert finding.status == "problem"
    assert "fewer than policy.min_patients=39" in finding.message


@pytest.mark.parametrize(
    ("public", "text"),
    [(1000, "patients.declared=1000 is over 2 times the number"), (3, "patients.declared=3 is less than 1/2 of")],
)
def test_a_declared_number_that_is_far_off(hospital: Hospital, public: int, text: str) -> None:
    hospital.update("patients", declared=public)
    finding = by_id(check(hospital), "declared")
    assert finding.status == "warning"
    assert finding.message.startswith(text)
    hospital.update("patients", declared=40, upper=39)
    assert by_id(check(hospital), "declared").message == "patients.declared=40 is above patients.upper=39"
    hospital.update("patients", declared=40, upper=10_000)
    assert "declared" not in {finding.id for finding in check(hospital)}


def test_a_run_is_warned_as_the_check_is(hospital: Hospital) -> None:
    """The loader was believed to say all; some warnings came from the check alone."""
    hospital.records(40, y=[None, *[0, 1] * 19, 0], patient=["a"] * 10 + [f"p{row}" for row in range(30)])
    hospital.labs(40, na=[3.2] * 9 + [999.0] + ["high"] + ["140"] * 29, sex=[None] * 40)
    hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": "sex"})
    hospital.add("vital", file="labs.csv", time="id", columns={"bp": "na"})
    hospital.add("note", file="labs.csv", columns=["sex"])
    hospital.update("patients", declared=1000)
    of = study({"labs": LABS, "vitals": VITALS, "note": NOTE})
    one, other = warnings_of(check(hospital, of)), warnings_of(hospital.findings(of))
    assert {finding.id for finding in one} == {
        *("record_cap", "unlabelled", "numbers", "unit", "empty", "modality", "unused", "declared", "empty_records")
    }
    assert set(one) == set(other)


@pytest.mark.parametrize(("values", "found"), [([-999.0] * 12, "missing"), ([900.0 + at for at in range(12)], "unit")])
def test_a_code_for_missing_is_told_from_another_unit(hospital: Hospital, values: list[float], found: str) -> None:
    hospital.labs(40, na=[*values, *[140.0] * 28])
    message = by_id(check(hospital), found).message
    assert message.startswith("12 of 40 values lie outside")
    assert "-999" not in message


def test_one_column_for_two_variables_or_labels_is_noted(hospital: Hospital) -> None:
    hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": "na"})
    hospital.update("records", label={"y": "y", "died": "y"})
    twice = [one.message for one in check(hospital) if one.id == "twice"]
    assert twice == [f"{a!r} and {b!r} are read from the same column" for a, b in (("died", "y"), ("sex", "sodium"))]
    hospital.update("records", label={"y": "y", "died": {"column": "y", "codes": {"1": "0", "0": "1"}}})
    assert [one.message for one in check(hospital) if one.id == "twice"] == twice[1:]


def test_classes_that_no_record_has_are_noted_and_counted(hospital: Hospital) -> None:
    hospital.records(40, y=["mild", "none yet"] * 20, a=[0, 1] * 20, b=[1] * 30 + [None] * 10)
    classes = {"kind": "multiclass", "label": "y", "classes": ["mild", "none yet", "severe"]}
    findings = check(hospital, study({"labs": LABS}, task=classes))
    assert by_id(findings, "labels").message == "40 records have a label: 20 mild, 20 none yet, 0 severe"
    assert by_id(findings, "classes").message == "no record is of the class 'severe'"
    hospital.update("records", label={"a": "a", "b": "b"})
    findings = check(hospital, study({"labs": LABS}, task={"kind": "multilabel", "label": ["a", "b"]}))
    assert by_id(findings, "labels").message == "40 records have a label: 20 of 40 a, 30 of 30 b"
    assert by_id(findings, "classes").message == "no two records differ in 'b'"


def test_a_class_that_is_called_like_a_missing_value(hospital: Hospital) -> None:
    """None for the class none counted as an empty cell: the site trained without its largest class."""
    of = study({"labs": LABS}, task={"kind": "multiclass", "label": "y", "classes": ["none", "mild", "severe"]})
    hospital.records(40, y=["none", "mild"] * 20)
    assert by_id(check(hospital, of), "labels").message.endswith("20 none, 20 mild, 0 severe")
    hospital.records(40, y=["None", "mild"] * 20)
    finding = by_id(check(hospital, of), "labels")
    assert (finding.status, finding.message[:9]) == ("problem", "20 rows h")
    hospital.records(40, y=[None, "mild"] * 20)
    assert by_id(check(hospital, of), "labels").message.startswith("20 records")


WIDE = {"kind": "table", "columns": {"sodium": {"low": 0, "high": 2000, "unit": "mmol/L"}}}


def test_values_that_fill_little_of_a_range_are_noted(hospital: Hospital) -> None:
    hospital.add("labs", file="labs.csv", columns={"sodium": "na"})
    hospital.labs(40, na=[130.0 + row for row in range(40)])
    finding = by_id(check(hospital, study({"labs": WIDE})), "scaling")
    assert finding.status == "warning"
    assert finding.message.startswith("sodium: ")
    assert "standardisation" in finding.remedy
    # Own scaling goes no finer than noise lets it: these values would still be a tenth of what they should be.
    finding = by_id(check(hospital, study({"labs": WIDE}, preparation={"standardisation": "noisy"})), "scaling")
    assert "also by own scaling" in finding.message
    assert "standardisation" not in finding.remedy


@pytest.mark.parametrize(
    ("labs", "keys"),
    [
        ({**WIDE, "columns": {"sodium": {"low": 0, "high": 2000, "center": 140, "scale": 5, "unit": "mmol/L"}}}, {}),
        ({**WIDE, "columns": {"sodium": {"low": 100, "high": 200, "unit": "mmol/L"}}}, {}),
        (WIDE, {"preparation": {"standardisation": "noisy"}, "privacy": {"enabled": False}}),
        ({**WIDE, "columns": {"sodium": {"low": 0, "high": 400}}}, {"preparation": {"standardisation": "noisy"}}),
    ],
    ids=["a scale of the study's", "a range that they fill", "own scaling without noise", "own scaling"],
)
def test_values_that_are_scaled_are_not_noted(hospital: Hospital, labs: dict[str, Any], keys: dict[str, Any]) -> None:
    hospital.add("labs", file="labs.csv", columns={"sodium": "na"})
    hospital.labs(40, na=[130.0 + row for row in range(40)])
    assert "scaling" not in {finding.id for finding in check(hospital, study({"labs": labs}, **keys))}


def test_record_cap(hospital: Hospital) -> None:
    hospital.records(40, patient=["a"] * 20 + [f"p{row}" for row in range(20)])
    assert by_id(check(hospital), "record_cap").message.startswith("12 of 40 records are dropped")


def test_modalities_that_only_one_side_knows(hospital: Hospital) -> None:
    hospital.add("vital", file="labs.csv", time="id", columns={"bp": "na"})
    hospital.add("genes", file="labs.csv", columns={"a": "na"})
    findings = check(hospital, study({"labs": LABS, "vitals": VITALS}))
    typo, genes = [finding for finding in findings if finding.id == "unused"]
    assert (typo.status, typo.remedy) == ("warning", "Did you mean 'vitals'?")
    assert (genes.status, genes.message) == ("ok", "the study does not use it")
    assert "the site lacks vitals" in [finding.message for finding in findings]


def test_a_file_of_which_no_row_is_of_the_records_is_a_problem(hospital: Hospital) -> None:
    """Leading zeros that a spreadsheet took away left a whole modality out, with a warning among others."""
    hospital.labs(40, id=[f"other{row}" for row in range(40)])
    findings = check(hospital)
    assert by_id(findings, "ids").status == "problem"
    assert by_id(findings, "modality").status == "warning"
    assert by_id(findings, "modality").message.startswith("none of the site's 40 records has 'labs'")
    assert by_id(findings, "classes").status == "problem"


def test_a_label_that_is_also_an_input_is_a_problem(hospital: Hospital) -> None:
    hospital.add("labs", file="records.csv", columns={"sodium": "y"})
    (finding,) = [one for one in check(hospital) if one.id == "label"]
    assert (finding.status, finding.message) == ("problem", "it reads the label's own column 'y'")
    hospital.add("note", file="records.csv", columns=["patient", "y"])
    assert len([one for one in check(hospital, study({"labs": LABS, "note": NOTE})) if one.id == "label"]) == 2
    hospital.add("labs", file="labs.csv", columns={"sodium": "na"})
    hospital.labs(40, y=[140.0] * 40)
    hospital.add("labs", file="labs.csv", columns={"sodium": "y"})
    assert not [one for one in check(hospital) if one.id == "label"], "another file's column of that name"
    hospital.add("labs", file="../" + hospital.folder.name + "/records.csv", columns={"sodium": "y"})
    assert [one.status for one in check(hospital) if one.id == "label"] == ["problem"], "by another way to the file"


def test_ids_of_patients_that_differ_by_case_are_noted(hospital: Hospital) -> None:
    hospital.records(40, patient=[f"{'pP'[row % 2]}{row // 2}" for row in range(40)])
    finding = by_id(check(hospital), "patients")
    assert finding.message.startswith("20 patients' ids differ from another's in nothing but case")
    assert finding.status == "warning"


def test_local_codes_that_pass_as_the_studys_beside_a_mapping_are_a_problem(hospital: Hospital) -> None:
    """1 and 2 for female and male, the study's 1 for male: of `{2: 1}` alone everybody became male."""
    hospital.labs(40, na=[140.0 + at % 7 for at in range(40)], sex=[1, 2] * 20)
    hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": {"column": "sex", "codes": {"2": "1"}}})
    finding = next(one for one in check(hospital) if one.status == "problem")
    assert finding.message == "cells stand for 1 both as they are and by `codes`"
    codes = {"2": "1", "1": "0"}
    hospital.add("labs", file="labs.csv", columns={"sodium": "na", "sex": {"column": "sex", "codes": codes}})
    assert not [one for one in check(hospital) if one.status == "problem"]
    hospital.add("labs", file="labs.csv", columns={"sodium": "na"})
    hospital.update("records", label={"y": {"column": "y", "codes": {"0": "1"}}})
    assert [one.message for one in check(hospital) if one.id == "labels"] == [finding.message]


def test_a_usual_value_far_from_the_public_centre_is_noted(hospital: Hospital) -> None:
    """All inside the range, as milligrams are that should be millimoles: nothing was said."""
    hospital.labs(40, na=[118.0 + at % 3 for at in range(40)])
    finding = by_id(check(hospital), "unit")
    assert "the middle value is 3.5 times the usual spread away from the usual 140" in finding.message
    hospital.labs(40, na=[132.0 + at % 3 for at in range(40)])
    assert "unit" not in {one.id for one in check(hospital)}


@pytest.mark.parametrize(
    ("card", "values", "unit"),
    [
        ("bun", (5.1, 5.7, 6.4), "mmol/L"),
        ("magnesium", (0.8, 0.85, 0.9), "mmol/L"),
        ("haemoglobin", (110.0, 121.0, 133.0), "g/L"),
        ("weight", (160.0, 176.0, 190.0), "lb"),
        ("temperature", (98.0, 98.4, 99.1), "degF"),
        ("creatinine", (80.0, 88.0, 97.0), "umol/L"),
        ("pao2", (10.5, 12.0, 13.0), "kPa"),
    ],
)
def test_the_unit_that_would_make_values_usual_is_named(
    hospital: Hospital, card: str, values: tuple[float, ...], unit: str
) -> None:
    """Urea in mmol/L, magnesium in mmol/L and weights in pounds lie in the range: nothing was said."""
    hospital.labs(40, na=[values[at % 3] for at in range(40)])
    hospital.add("labs", file="labs.csv", columns={card: "na"})
    of = study({"labs": {"kind": "table", "columns": {card: {"card": card}}}})
    finding = next(one for one in check(hospital, of) if one.id == "unit")
    assert f"another unit, perhaps {unit}" in finding.message
    hospital.add("labs", file="labs.csv", columns={card: {"column": "na", "unit": unit}})
    assert not [one for one in check(hospital, of) if one.id == "unit"]


def test_patients_who_are_ill_are_not_in_another_unit(hospital: Hospital) -> None:
    """Of a dialysis ward."""
    hospital.labs(40, na=[45.0 + at % 9 for at in range(40)])
    hospital.add("labs", file="labs.csv", columns={"bun": "na"})
    of = study({"labs": {"kind": "table", "columns": {"bun": {"card": "bun"}}}})
    assert "unit" not in {one.id for one in check(hospital, of)}


def test_labelled_records_without_any_modality_are_counted(hospital: Hospital) -> None:
    """They were in no line: 24 held out and 121 to train on were 145 of 150 patients."""
    hospital.records(40)
    hospital.labs(33)
    finding = by_id(check(hospital), "empty_records")
    assert finding.status == "warning"
    assert finding.message.startswith("7 of 40 labelled records have none of the study's modalities")
