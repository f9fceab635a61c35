"""Public scores: what a formula may say, what it computes, published scores by hand, and what a site makes of them."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from cohorts import LABS, VITALS, Hospital, study
from commandline import done

from gapweave.client.checks import check_site
from gapweave.client.template import site_template
from gapweave.shared.config import library
from gapweave.shared.config.expression import LARGEST, LONGEST, substitute
from gapweave.shared.config.formula import Reference, compile_formula
from gapweave.shared.config.study import Study, study_from_json
from gapweave.shared.errors import DataError, UsageError
from gapweave.shared.features.numeric import numeric_columns
from gapweave.shared.model import MultimodalModel

NUMBER = {"low": -1000, "high": 1000}
MODALITIES = study(
    {
        "labs": {
            "kind": "table",
            "columns": {"a": NUMBER, "b": NUMBER, "both": NUMBER, "ward": {"categories": ["x", "intensive care"]}},
        },
        "vitals": {"kind": "series", "hours": 4, "columns": {"pulse": NUMBER, "both": NUMBER}},
        "note": {"kind": "text"},
    }
).modalities
NAN = math.nan


def value(text: str, *, a: float = 3.0, b: float = NAN, ward: str | None = "x", pulse: float = 80.0) -> float:
    """A formula for one record with a = 3 and b missing; NaN is missing."""
    values: dict[Reference, Any] = {
        Reference(modality="labs", variable="a"): np.array([a]),
        Reference(modality="labs", variable="b"): np.array([b]),
        Reference(modality="labs", variable="ward"): np.array([ward], object),
        Reference(modality="vitals", variable="pulse", statistic="max"): np.array([pulse]),
    }
    (result,) = compile_formula(text, MODALITIES).evaluate(values, 1)
    return float(result)


# The language.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + a * 3 - 4 / 8", 10.5),
        ("-a ** 2", -9),
        ("labs.a", 3),
        ("(a > 2) + (a >= 3) + (a < 3) + (a <= 2) + (a == 3) + (a != 3)", 3),
        ("1 < a <= 3 < 4", 1),
        ("1 < a < 3", 0),
        ("a > 2 and a < 3", 0),
        ("a > 2 or a < 3", 1),
        ("not a", 0),
        ("10 if a > 2 else 20", 10),
        ("10 if a > 3 else 20", 20),
        ("min(a, 2, 5) + max(a, 2)", 5),
        ("abs(0 - a) + log(exp(a))", 6),
        ("max(vitals.pulse) / max(pulse)", 1),
        ("ward == 'x'", 1),
        ("ward != 'x'", 0),
        ("labs.ward == 'intensive care'", 0),
        ("points(a, [[None, 3, 1], [3, 5, 2], [5, None, 4]])", 2),
        ("points(a - 1, [[None, 3, 1], [3, 5, 2]])", 1),
        ("points(a + 2, [[3, 5, 2]])", 0),
        ("points(a, [[-1.5, 4, -2.5]])", -2.5),
        ("a +\n  a", 6),
    ],
)
def test_what_a_formula_computes(text: str, expected: float) -> None:
    assert value(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a + b", NAN),
        ("b > 1", NAN),
        ("not b", NAN),
        ("a > 1 or b > 1", NAN),
        ("max(a, b)", NAN),
        ("a if b else a", NAN),
        ("known(b, 7) + a", 10),
        ("known(a, 7)", 3),
        ("known(b > 1, 0) + a", 3),
        ("points(b, [[None, None, 5]]) + a", 3),
        ("a if a > 2 else b", 3),
        ("b if a > 2 else a", NAN),
        ("None if a > 2 else a", NAN),
        ("a / 0", NAN),
        ("log(0 - a)", NAN),
        ("(0 - a) ** 0.5", NAN),
        ("a * 9 ** 9 ** 9", NAN),
        ("exp(a * 1000) > 1", NAN),
    ],
)
def test_a_missing_value_makes_all_missing_but_what_says_otherwise(text: str, expected: float) -> None:
    assert value(text) == pytest.approx(expected, nan_ok=True)


def test_an_unknown_code_of_a_record_is_missing() -> None:
    assert math.isnan(value("ward == 'x'", ward=None))
    assert math.isnan(value("ward != 'x'", ward=None))


def test_a_record_that_has_none_of_the_variables_has_no_score() -> None:
    assert math.isnan(value("known(a, 0) + known(b, 0)", a=NAN))
    assert value("known(a, 0) + known(b, 0)", b=2.0, a=NAN) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("__import__('os').system('true')", "not a function at character 1"),
        ("a.__class__", "unknown variable 'a.__class__'"),
        ("a.b.c", "unknown variable"),
        ("(lambda: a)()", "not a function"),
        ("[a for a in b]", "not allowed in an expression at character 1"),
        ("a if (x := 3) else a", "not allowed"),
        ("f'{a}'", "not allowed"),
        ("a + 'x'", "not a number at character 5: \"'x'\""),
        ("a + True", "not a number"),
        ("a + 1j", "not a number"),
        ("a + 1e400", "not a number"),
        ("a % 2", "this operator is not allowed"),
        ("a // 2", "this operator is not allowed"),
        ("a in b", "this operator is not allowed"),
        ("~a", "this operator is not allowed"),
        ("sqrt(a)", "unknown function 'sqrt'"),
        ("minn(a, b)", "did you mean 'min'"),
        ("abs(a, b)", "abs takes another number of arguments than 2"),
        ("known(a, default=3)", "arguments are given without their names"),
        ("1 + 2", "reads no variable"),
        ("a +", "not an expression at character"),
        ("", "not an expression"),
        ("a\0", "not an expression"),
        ("aa + b", "unknown variable 'aa'"),
        ("labs.bot", "unknown variable 'labs.bot'; did you mean 'labs.both'"),
        ("note", "unknown variable 'note'"),
        ("1 + 2 + puls", "did you mean 'pulse' at character 9"),
        ("both", "several modalities (labs.both, vitals.both)"),
        ("pulse", "a series' variable: read last, mean, min, max of it"),
        ("max(a)", "max is a statistic of a series; labs is a table"),
        ("max(a + b)", "max of one term is a statistic of a series' variable"),
        ("ward", "a categorical variable"),
        ("ward > 'x'", "a categorical variable"),
        ("ward == a", "a categorical variable"),
        ("ward == 'intensive-care'", "unknown code 'intensive-care'; did you mean 'intensive care'"),
        ("points(a)", "points takes a term and a list"),
        ("points(a, [])", "points takes a term and a list"),
        ("points(a, [[1, 2]])", "a band is [low, high, points]"),
        ("points(a, [[2, 1, 3]])", "ascends"),
        ("points(a, [[1, 3, 1], [2, 4, 2]])", "not overlap at character 23"),
        ("points(a, [[1, None, 1], [2, 4, 2]])", "not overlap"),
        ("points(a, [[1, b, 1]])", "not a number"),
        ("a" * (LONGEST + 1), "characters, more than"),
        ("+".join("a" * (LARGEST // 2)), "parts, more than"),
        ("+".join("a" * 300), "nested more than"),
        ("-" * 3000 + "a", "nested"),
        ("-" * 9000 + "a", "nested"),
        ("(" * 9000 + "a" + ")" * 9000, "not an expression"),
    ],
    ids=lambda text: text[:30],
)
def test_what_is_no_formula_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        compile_formula(text, MODALITIES)
    assert "\n" not in str(caught.value)


def test_names_are_replaced_and_nothing_else() -> None:
    assert substitute("min(age, 3) + x.age + max(b, age)", {"age": "p + q", "min": "no"}) == (
        "min((p + q), 3) + x.age + max(b, (p + q))"
    )
    with pytest.raises(ValueError, match="not an expression"):
        substitute("age", {"age": "1 +"})


# Published scores, each by hand from its paper's table.


def score(name: str, **patient: float | None) -> float:
    """A score of the library for one patient; what is not given is not measured."""
    variables = {key: {"low": -1e5, "high": 1e5} for key in library.scores()[name]["means"]}
    spec = {"kind": "public_score", "score": name}
    of = study({"score": spec, "x": {"kind": "table", "columns": variables}})
    values = {Reference(modality="x", variable=key): np.array([given], float) for key, given in patient.items()}
    (result,) = of.formula("score").evaluate(values, 1)
    return float(result)


def test_qsofa() -> None:
    assert score("qsofa", resp_rate=22, bp_sys=100, gcs=14) == 3
    assert score("qsofa", resp_rate=21, bp_sys=101, gcs=15) == 0
    assert score("qsofa", resp_rate=30, gcs=15) == 1
    assert score("qsofa", bp_sys=80) == 1


def test_news2() -> None:
    well = {"resp_rate": 16, "spo2": 97, "oxygen": 0, "bp_sys": 120, "heart_rate": 75, "gcs": 15, "temperature": 37}
    assert score("news2", **well) == 0
    # 2 + 2 + 2 + 1 + 2 + 0 + 1
    ill = {"resp_rate": 22, "spo2": 93, "oxygen": 1, "bp_sys": 105, "heart_rate": 112, "gcs": 15, "temperature": 38.5}
    assert score("news2", **ill) == 10
    # 3 + 3 + 2 + 3 + 3 + 3 + 3: the most there is
    worst = {"resp_rate": 8, "spo2": 91, "oxygen": 1, "bp_sys": 90, "heart_rate": 40, "gcs": 14, "temperature": 35.0}
    assert score("news2", **worst) == 20
    # The other ends: 3 + 0 + 0 + 3 + 3 + 0 + 2
    high = {"resp_rate": 25, "spo2": 96, "oxygen": 0, "bp_sys": 220, "heart_rate": 131, "gcs": 15, "temperature": 39.1}
    assert score("news2", **high) == 11
    # 1 + 1 + 0 + 0 + 1 + 0 + 1
    little = {"resp_rate": 9, "spo2": 95, "oxygen": 0, "bp_sys": 219, "heart_rate": 91, "gcs": 15, "temperature": 36}
    assert score("news2", **little) == 4
    assert score("news2", heart_rate=120) == 2, "what is not measured scores 0"


SEPTIC = {
    # 12 + 4 + 5 + 3 + 9 + 4 + 6 + 3 + 3 + 1 + 3 + 4 + 7 + 6
    "age": 65, "heart_rate": 130, "bp_sys": 85, "temperature": 39.5, "ventilated": 1, "pf_ratio": 150, "urine_day": 800,
    "bun": 30, "wbc": 22, "potassium": 5.2, "sodium": 148, "bicarbonate": 17, "bilirubin": 5, "gcs": 10, "medical": 1,
}  # fmt: skip


def test_saps2() -> None:
    assert score("saps2", **SEPTIC) == 70
    well = {
        "age": 35, "heart_rate": 80, "bp_sys": 120, "temperature": 37, "ventilated": 0, "pf_ratio": 90, "urine_day": 1500,
        "bun": 15, "wbc": 8, "potassium": 4, "sodium": 140, "bicarbonate": 24, "bilirubin": 1, "gcs": 15, "medical": 0,
        "unscheduled_surgery": 0, "aids": 0, "metastatic_cancer": 0, "hematologic_malignancy": 0,
    }  # fmt: skip
    assert score("saps2", **well) == 0, "oxygenation counts under ventilation only"
    worst = {
        "age": 85, "heart_rate": 35, "bp_sys": 60, "temperature": 40, "ventilated": 1, "pf_ratio": 90, "urine_day": 300,
        "bun": 90, "wbc": 0.5, "potassium": 2, "sodium": 120, "bicarbonate": 10, "bilirubin": 7, "gcs": 4,
        "unscheduled_surgery": 1, "aids": 1, "metastatic_cancer": 1,
    }  # fmt: skip
    assert score("saps2", **worst) == 163, "the paper's maximum; of chronic diseases the gravest counts"
    # 15 + 2 + 6
    assert score("saps2", age=72, heart_rate=60, medical=1) == 23
    # 18 + 7 + 2 + 6 + 11 + 10 + 3 + 1 + 9 + 13 + 9 + 8: the other ends
    other = {
        "age": 80, "heart_rate": 160, "bp_sys": 200, "ventilated": 1, "pf_ratio": 200, "urine_day": 499, "bun": 84,
        "wbc": 20, "sodium": 145, "bilirubin": 6, "gcs": 8, "metastatic_cancer": 1, "unscheduled_surgery": 1,
    }  # fmt: skip
    assert score("saps2", **other) == 97


@pytest.mark.parametrize(("points", "death"), [(29, 0.10), (40, 0.25), (52, 0.50), (64, 0.75), (77, 0.90)])
def test_saps2_as_log_odds_gives_the_published_risk(points: int, death: float) -> None:
    """The points that the paper gives for these risks, which it rounds."""
    formula = substitute(library.scores()["saps2_logit"]["expression"], {"saps2": "a"})
    assert 1 / (1 + math.exp(-value(formula, a=points))) == pytest.approx(death, abs=0.008)


def test_saps2_as_log_odds_counts_the_same_points() -> None:
    assert score("saps2_logit", **SEPTIC) == pytest.approx(-7.7631 + 0.0737 * 70 + 0.9971 * math.log(71))
    assert score("saps2_logit", age=35) == pytest.approx(-7.7631)


def test_apache2_physiology() -> None:
    # 3 + 2 + 3 + 3 + 2 (A-a gradient 427.8 - 50 - 80 = 297.8) + 2 + 1 + 1 + 2 x 3 + 2 + 1 + 5
    ill = {
        "temperature": 39.5, "bp_mean": 60, "heart_rate": 145, "resp_rate": 36, "fio2": 60, "pao2": 80, "pco2": 40,
        "ph": 7.28, "sodium": 152, "potassium": 5.6, "creatinine": 2.1, "acute_renal_failure": 1, "hematocrit": 28,
        "wbc": 18, "gcs": 10,
    }  # fmt: skip
    assert score("apache2_physiology", **ill) == 31
    well = {
        "temperature": 37, "bp_mean": 90, "heart_rate": 80, "resp_rate": 16, "fio2": 21, "pao2": 90, "pco2": 40, "ph": 7.4,
        "bicarbonate": 10, "sodium": 140, "potassium": 4, "creatinine": 1, "hematocrit": 40, "wbc": 8, "gcs": 15,
    }  # fmt: skip
    assert score("apache2_physiology", **well) == 0, "with a pH, bicarbonate does not count"
    # 3 + 4 + 4 + 4 + 3 + 3 (bicarbonate for the pH) + 3 + 2 + 2 + 4 + 2 + 12
    low = {
        "temperature": 31, "bp_mean": 45, "heart_rate": 38, "resp_rate": 5, "fio2": 30, "pao2": 58, "bicarbonate": 16,
        "sodium": 115, "potassium": 2.7, "creatinine": 0.5, "hematocrit": 18, "wbc": 2, "gcs": 3,
    }  # fmt: skip
    assert score("apache2_physiology", **low) == 46
    # 4 + 4 + 4 + 4 + 4 (713 - 50 - 60 = 603) + 4 + 4 + 4 + 4 + 4 + 4
    high = {
        "temperature": 41, "bp_mean": 160, "heart_rate": 180, "resp_rate": 50, "fio2": 100, "pao2": 60, "pco2": 40,
        "ph": 7.7, "sodium": 180, "potassium": 7, "creatinine": 3.5, "hematocrit": 60, "wbc": 40,
    }  # fmt: skip
    assert score("apache2_physiology", **high) == 44


def test_every_score_lies_in_its_range_and_has_a_source() -> None:
    for name, entry in library.scores().items():
        assert re.search(r"\((19|20)\d\d\)", entry["source"]), name
        spec = {"kind": "public_score", "score": name}
        columns = {key: NUMBER for key in entry["means"]}
        of = study({"score": spec, "x": {"kind": "table", "columns": columns}})
        reads = {read.variable for read in of.formula("score").reads}
        assert reads == set(entry["means"]), f"{name}: a variable that is listed is read"
        assert numeric_columns(of, ["score"])[0].bound <= 5


def test_scores_are_listed_for_people_and_machines() -> None:
    lines = done("study", "scores").out.splitlines()
    assert any(line.startswith("saps2: Le Gall") for line in lines)
    assert any(line.split() == ["bun", "blood", "urea", "nitrogen,", "mg/dL"] for line in lines)
    assert set(json.loads(done("study", "scores", "--json").out)["scores"]) == set(library.scores())


# In a study.

SHOCK = {"kind": "public_score", "expression": "known(sodium, 0) + max(pulse)", "low": 0, "high": 500, "scale": 100}


def with_score(**keys: Any) -> Study:
    return study({"labs": LABS, "a_score": {**SHOCK, **keys}, "vitals": VITALS})


def test_a_published_score_is_written_out_when_the_study_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = {"resp_rate": "max(vitals.pulse) / 4", "bp_sys": "min(bp)", "gcs": None}
    spec = {"kind": "public_score", "score": "qsofa", "variables": mapped}
    of = study({"labs": LABS, "vitals": VITALS, "score": spec})
    written = of.modalities["score"].expression
    assert written == (
        "known((max(vitals.pulse) / 4) >= 22, 0) + known(min(bp) <= 100, 0) + known(None < 15, 0)"
    )  # fmt: skip
    plain = {"kind": "public_score", "expression": written, "low": 0, "high": 3, "center": 1, "scale": 1}
    assert study({"labs": LABS, "vitals": VITALS, "score": plain}).sha256 == of.sha256
    monkeypatch.setattr(library, "scores", dict)
    assert study_from_json(of.canonical()) == of
    assert of.sources == {"score": {"vitals"}}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"expression": "sodum"}, "modalities.a_score.expression: unknown variable 'sodum'; did you mean 'sodium'"),
        ({"expression": "a_score"}, "unknown variable 'a_score'"),
        ({"score": "qsofa"}, "not both"),
        ({"variables": {"x": "y"}}, "an expression names the study's own"),
        ({"low": 600}, "low=600 must be below high=500"),
        ({"unit": "mmHg"}, "unknown key 'unit'"),
    ],
    ids=str,
)
def test_a_score_that_does_not_fit_its_study_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        with_score(**keys)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"score": "qsofaa"}, "unknown score 'qsofaa'; did you mean 'qsofa'"),
        ({"score": "qsofa", "variables": {"bp": "min(bp)"}}, "unknown variable of qsofa 'bp'"),
        ({"score": "qsofa", "variables": {"gcs": "1 +"}}, "not an expression"),
        ({"score": "qsofa"}, "unknown variable 'resp_rate'"),
    ],
    ids=str,
)
def test_a_published_score_that_is_named_wrongly_is_refused(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        study({"labs": LABS, "vitals": VITALS, "score": {"kind": "public_score", **spec}})


# At a hospital.


@pytest.fixture
def hospital(tmp_path) -> Hospital:
    """Five records: sodium (in a unit of its own) for the first three, pulse for all but the third."""
    hospital = Hospital(tmp_path)
    hospital.records(5)
    hospital.write("labs.csv", {"id": ["r0", "r1", "r2"], "na": [0.14, 9.0, 0.13]})
    hospital.add("labs", file="labs.csv", columns={"sodium": {"column": "na", "unit": "mol/L"}})
    rows = {
        "id": ["r0", "r0", "r0", "r1", "r3", "r4", "r4"],
        "hour": [1, 5, 24, 3, 0, 2, -1],
        "hr": [80, 95, 200, 500, 60, 70, 99],
    }
    hospital.write("vitals.csv", rows)
    hospital.add("vitals", file="vitals.csv", time="hour", columns={"pulse": "hr"})
    return hospital


def score_of(hospital: Hospital, of: Study) -> list[float | None]:
    """The score of each record, in its own unit; None where absent."""
    batch = hospital.load(of).batch
    inputs, present = batch.inputs["a_score"], batch.present[:, of.order.index("a_score")]
    assert inputs.shape == (len(batch), 2)
    assert inputs[:, 1].bool().tolist() == present.tolist()
    assert inputs[~present].abs().sum() == 0
    spec = of.modalities["a_score"]
    middle = (spec.low + spec.high) / 2 if spec.center is None else spec.center
    scaled = [row * spec.scale + middle for row in inputs[:, 0].tolist()]
    return [pytest.approx(one, abs=1e-3) if here else None for one, here in zip(scaled, present.tolist(), strict=True)]


def test_values_are_in_the_studys_unit_and_range_and_window(hospital: Hospital) -> None:
    """The pulse of 200 at hour 24 and that before hour 0 are outside the window; 9 mol/L and 500/min are clipped."""
    assert score_of(hospital, with_score()) == [140 + 95, 180 + 300, None, 60, 70]


@pytest.mark.parametrize(
    ("statistic", "first"), [("last", 70.0), ("mean", 80.0), ("min", 70.0), ("max", 90.0)]
)  # fmt: skip
def test_statistics_of_a_series(hospital: Hospital, statistic: str, first: float) -> None:
    hospital.write("vitals.csv", {"id": ["r0"] * 3, "hour": [2, 1, 6], "hr": [80, 90, 70]})
    assert score_of(hospital, with_score(expression=f"{statistic}(vitals.pulse)"))[0] == first


def test_a_site_has_the_score_with_one_of_its_modalities(hospital: Hospital) -> None:
    of = with_score()
    assert hospital.site.held(of) == ["a_score", "labs", "vitals"]
    del hospital.content["data"]["labs"]
    assert hospital.site.held(of) == ["a_score", "vitals"]
    assert score_of(hospital, of) == [95, 300, None, 60, 70]
    del hospital.content["data"]["vitals"]
    assert hospital.site.held(of) == []
    with pytest.raises(DataError, match="none of the study's modalities"):
        hospital.load(of)


def test_a_variable_that_the_site_does_not_name_is_missing(hospital: Hospital) -> None:
    assert score_of(hospital, with_score(expression="known(temperature, 7) + sodium * 0")) == [7, 7, 7, None, None]
    assert score_of(hospital, with_score(expression="known(sex == 1, 2) + known(max(bp), 0) + 0 * sodium"))[:1] == [2]


def test_a_category_is_read_by_its_code(hospital: Hospital) -> None:
    hospital.write("labs.csv", {"id": ["r0", "r1", "r2"], "s": ["M", "F", ""]})
    hospital.add("labs", file="labs.csv", columns={"sex": {"column": "s", "codes": {"M": 1, "F": 0}}})
    assert score_of(hospital, with_score(expression="10 + (sex == 1)")) == [11, 10, None, None, None]


def test_what_a_simulation_hides_no_score_betrays(hospital: Hospital) -> None:
    """The score of a record is that of the modalities which are left to it."""
    hidden = study({"labs": LABS, "a_score": SHOCK, "vitals": VITALS}, simulation={"missing_rate": 0.6})
    of, labs, vitals = with_score(), hidden.order.index("labs"), hidden.order.index("vitals")
    present = hospital.load(hidden).batch.present
    before = hospital.load(of).batch.present
    assert not present.equal(before), "nothing is hidden: nothing is tested"
    expected: list[float | None] = []
    for sodium, pulse, has in zip([140, 180, 130, 0, 0], [95, 300, None, 60, 70], present.tolist(), strict=True):
        known = has[labs] * sodium
        expected.append(known + pulse if has[vitals] and pulse is not None else None)
    assert score_of(hospital, hidden) == expected


def test_a_site_file_does_not_name_a_score(hospital: Hospital) -> None:
    of = with_score()
    assert "  # a_score is computed from the others\n" in site_template("north", of)
    hospital.add("a_score", file="labs.csv", columns={"score": "na"})
    with pytest.raises(UsageError, match="the study computes 'a_score' from labs, vitals"):
        hospital.load(of)


def test_the_check_of_a_site_tells_the_share_of_a_score_and_every_oddity_once(hospital: Hospital) -> None:
    findings = check_site(with_score(), hospital.site, hospital.site_file)
    (line,) = [finding for finding in findings if finding.where.endswith("data.a_score")]
    assert line.message == "4 of 5 records have it (80%)"
    clipped = [finding for finding in findings if "lie outside" in finding.message]
    assert len(clipped) == len({finding.where for finding in clipped}) == 2


def test_to_the_model_a_score_is_a_table_of_one_variable(hospital: Hospital) -> None:
    of = with_score()
    batch = hospital.load(of).batch
    model = MultimodalModel(of, hospital.site.held(of))
    assert {"a_score", "labs"} <= set(model.encoders.keys())
    assert type(model.encoders["a_score"]) is type(model.encoders["labs"])
    assert model(batch.inputs, batch.present, batch.present).logits.isfinite().all()
    (column,) = numeric_columns(of, ["a_score"])
    assert (column.name, column.value, column.flag) == ("score", 0, 1)
