"""What a site's files become: cohorts, targets, splits, and what is hidden in simulations."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Any

import pytest
import torch
from cohorts import LABS, VITALS, Hospital, assert_same, sodium_of, study
from hypothesis import given, settings
from hypothesis import strategies as st

from gapweave.client.sources.split import held_out
from gapweave.shared.config.study import Evaluation
from gapweave.shared.errors import DataError, UsageError


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    hospital = Hospital(tmp_path)
    hospital.records()
    hospital.labs()
    return hospital


def test_shapes_and_types(hospital: Hospital) -> None:
    cohort = hospital.load(study({"labs": LABS, "vitals": VITALS}))
    batch = cohort.batch
    assert set(batch.inputs) == {"labs"}
    assert batch.inputs["labs"].shape == (8, 8)
    assert batch.present.tolist() == [[True, False]] * 8
    assert batch.target.shape == batch.label_mask.shape == (8, 1)
    assert batch.target.dtype == batch.weight.dtype == batch.inputs["labs"].dtype == torch.float32
    assert batch.patient.dtype == torch.int64
    assert cohort.test.dtype == batch.present.dtype == torch.bool
    assert cohort.site == "north"


def test_records_of_a_patient_are_together_in_file_order(hospital: Hospital) -> None:
    hospital.records(patient=["b", "a", "b", "c", "a", "b", "c", "d"])
    cohort = hospital.load(study({"labs": LABS}))
    assert cohort.record_ids == ("r0", "r2", "r5", "r1", "r4", "r3", "r6", "r7")
    assert cohort.patient_ids == ("b", "a", "c", "d")
    assert cohort.batch.patient.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert cohort.batch.weight.tolist() == pytest.approx([1 / 3] * 3 + [1 / 2] * 4 + [1])
    sodium = sodium_of(cohort)
    assert sodium.tolist() == pytest.approx([140, 142, 145, 141, 144, 143, 146, 147])


def test_cap_keeps_the_first_records_and_counts_the_rest(hospital: Hospital) -> None:
    hospital.records(patient=["a", "a", "a", "b", "a", "b", "c", "d"])
    hospital.update("patients", max_records=2)
    findings: list[Any] = []
    cohort = hospital.load(study({"labs": LABS}), findings=findings)
    assert cohort.record_ids == ("r0", "r1", "r3", "r5", "r6", "r7")
    assert [finding.message[:14] for finding in findings] == ["2 of 8 records"]
    assert len(hospital.load(study({"labs": LABS}), labels=False).record_ids) == 8, "everybody is predicted for"


def test_weight_counts_usable_records_only(hospital: Hospital) -> None:
    hospital.records(patient=["a"] * 4 + ["b", "c", "d", "e"], y=[0, 1, None, 1, 0, 1, None, 0])
    hospital.labs(na=[140, None, 140, 140, 140, 140, 140, None])
    cohort = hospital.load(study({"labs": LABS}))
    assert cohort.batch.weight.tolist() == pytest.approx([1 / 2, 0, 0, 1 / 2, 1, 1, 0, 0])
    assert cohort.batch.label_mask[:, 0].tolist() == [True, True, False, True, True, True, False, True]


def test_training_and_testing_have_usable_patients_only(hospital: Hospital) -> None:
    hospital.records(y=[0, 1, None, 1, 0, 1, None, 0], fold=["train"] * 4 + ["test"] * 4)
    hospital.update("split", column="fold")
    cohort = hospital.load(study({"labs": LABS}))
    training, testing = cohort.training(), cohort.testing()
    assert (training.patients, testing.patients) == (3, 3)
    assert training.patient.tolist() == testing.patient.tolist() == [0, 1, 2]
    assert training.target[:, 0].tolist() == [0, 1, 1]
    assert testing.target[:, 0].tolist() == [0, 1, 0]


def test_binary_codes(hospital: Hospital) -> None:
    plain = hospital.load(study({"labs": LABS}))
    hospital.records(y=["no", "yes"] * 4)
    hospital.update("records", label={"y": {"column": "y", "codes": {"no": 0, "yes": 1}}})
    assert_same(hospital.load(study({"labs": LABS})), plain)
    hospital.update("records", label={"y": {"column": "y", "codes": {False: 0, True: 1}}})
    for no, yes in (("False", "True"), ("false", "true"), ("FALSE", "TRUE"), (0, 1)):
        hospital.records(y=[no, yes] * 4)
        assert_same(hospital.load(study({"labs": LABS})), plain)
    hospital.update("records", label={"y": "y"})
    hospital.records(y=[0.0, 1.0] * 4)
    assert_same(hospital.load(study({"labs": LABS})), plain)


def test_multiclass(hospital: Hospital) -> None:
    hospital.records(y=["a", "b", "c", "", "a", "b", "3.0", "a"])
    task = {"kind": "multiclass", "label": "y", "classes": ["c", "a", "b", 3]}
    batch = hospital.load(study({"labs": LABS}, task=task)).batch
    assert batch.target.argmax(1).tolist() == [1, 2, 0, 0, 1, 2, 3, 1]
    assert batch.target.sum(1).tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert batch.label_mask.tolist() == [[row != 3] * 4 for row in range(8)]


@pytest.mark.parametrize("words", [("True", "False"), ("true", "false"), ("TRUE", "FALSE"), (True, False)])
def test_a_label_of_booleans(hospital: Hospital, words: tuple[Any, Any]) -> None:
    """As pandas, R and databases write them."""
    yes, no = words
    hospital.records(y=[yes, no, None, yes, no, yes, no, yes])
    batch = hospital.load(study({"labs": LABS})).batch
    assert batch.target[:, 0].tolist() == [1, 0, 0, 1, 0, 1, 0, 1]
    assert batch.label_mask[:, 0].tolist() == [row != 2 for row in range(8)]


def test_multilabel(hospital: Hospital) -> None:
    hospital.records(one=[0, 1, None, 1, 0, 1, 0, 1], two=[1, None, None, 0, 0, 1, 1, 1])
    hospital.update("records", label={"a": "one", "b": "two"})
    batch = hospital.load(study({"labs": LABS}, task={"kind": "multilabel", "label": ["b", "a"]})).batch
    assert batch.target.tolist()[:4] == [[1, 0], [0, 1], [0, 0], [0, 1]]
    assert batch.label_mask.tolist()[:4] == [[True, True], [False, True], [False, False], [True, True]]
    assert batch.weight.tolist() == [1, 1, 0, 1, 1, 1, 1, 1]


def test_multilabel_with_one_varied_label_is_no_one_class_site(hospital: Hospital) -> None:
    hospital.records(one=[1] * 8, two=[0, 1] * 4)
    hospital.update("records", label={"a": "one", "b": "two"})
    task = {"kind": "multilabel", "label": ["a", "b"]}
    hospital.load(study({"labs": LABS}, task=task, evaluation={"test_fraction": 0}))
    hospital.records(one=[1] * 8, two=[0] * 8)
    with pytest.raises(DataError, match="one-class site"):
        hospital.load(study({"labs": LABS}, task=task))


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ({"kind": "binary", "label": "y"}, [1] * 8),
        ({"kind": "multiclass", "label": "y", "classes": [0, 1, 2]}, [2] * 8),
        ({"kind": "binary", "label": "y"}, [1, 1, 1, 1, 0, 0, 0, 0]),
    ],
)
def test_one_class_training_set_is_refused(hospital: Hospital, task: dict[str, Any], labels: list[int]) -> None:
    hospital.records(y=labels, fold=["train"] * 4 + ["test"] * 4)
    hospital.update("split", column="fold")
    with pytest.raises(DataError, match="one-class site"):
        hospital.load(study({"labs": LABS}, task=task))


def test_no_label_is_refused(hospital: Hospital) -> None:
    hospital.records(y=[""] * 8)
    with pytest.raises(DataError, match="no training record has a label"):
        hospital.load(study({"labs": LABS}))


def test_prediction_needs_neither_labels_nor_split(hospital: Hospital) -> None:
    hospital.write("records.csv", {"id": ["r0", "r1", "r2"], "patient": ["a", "a", "b"]})
    hospital.update("split", column="fold")
    hospital.content["subgroups"] = {"sex": "sex"}
    hidden = study({"labs": LABS}, simulation={"missing_rate": 0.9})
    cohort = hospital.load(hidden, labels=False)
    assert cohort.batch.weight.tolist() == [0.5, 0.5, 1]
    assert not cohort.batch.label_mask.any()
    assert cohort.batch.present.all()
    assert not cohort.test.any()
    assert cohort.subgroups == {"sex": (None, None, None)}


def test_subgroups_are_codes_per_record(hospital: Hospital) -> None:
    hospital.records(sex=[0.0, 1.0, None, 1.0, 0.0, 1.0, 0.0, 1.0])
    hospital.content["subgroups"] = {"sex": "sex"}
    assert hospital.load(study({"labs": LABS})).subgroups == {"sex": ("0", "1", None, "1", "0", "1", "0", "1")}


@pytest.mark.parametrize("wanted", [1, 1.0, "1", "1.0", [1, 7]])
def test_where_compares_codes(hospital: Hospital, wanted: Any) -> None:
    hospital.records(ward=[1.0, 1.0, 1.0, 1.0, 2.0, 2.0, None, 2.0])
    hospital.update("records", where={"ward": wanted})
    assert hospital.load(study({"labs": LABS})).record_ids == ("r0", "r1", "r2", "r3")


@pytest.mark.parametrize("kind", ["records.csv", "records.tsv", "records.parquet"])
@pytest.mark.parametrize("ids", [list(range(8)), [float(row) for row in range(8)], [str(row) for row in range(8)]])
@pytest.mark.parametrize("values", ["labs.csv", "labs.parquet"])
def test_whole_number_ids_match_across_formats(tmp_path: Path, kind: str, ids: list[Any], values: str) -> None:
    hospital = Hospital(tmp_path)
    hospital.write(kind, {"id": ids, "patient": [f"p{row}" for row in range(8)], "y": [0, 1] * 4})
    hospital.update("records", file=kind)
    for other in ([float(row) for row in range(8)], list(range(8))):
        hospital.write(values, {"id": other, "na": [140.0 + row for row in range(8)]})
        hospital.add("labs", file=values, columns={"sodium": "na"})
        cohort = hospital.load(study({"labs": LABS}))
        assert cohort.record_ids == tuple(str(row) for row in range(8))
        assert cohort.batch.present.all()


def test_leading_zeros_are_kept(hospital: Hospital) -> None:
    ids = ["001", "002", "1", "2", "5", "6", "7", "8"]
    hospital.records(id=ids)
    hospital.labs(id=["1", "001", *ids[1:2], *ids[3:]])
    sodium = sodium_of(hospital.load(study({"labs": LABS})))
    assert sodium.tolist()[:4] == pytest.approx([141, 142, 140, 143])


def expected_hash(patient: str, seed: int) -> int:
    digest = hmac.new(str(seed).encode(), patient.encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big")


@settings(deadline=None)
@given(st.text(min_size=1), st.integers(0, 5), st.floats(0, 0.99))
def test_split_is_a_keyed_hash(patient: str, seed: int, fraction: float) -> None:
    test = held_out(patient, Evaluation(split_seed=seed, test_fraction=fraction))
    assert test == (expected_hash(patient, seed) % 10_000 < round(10_000 * fraction))


@settings(deadline=None)
@given(st.text(min_size=1), st.integers(2, 10))
def test_every_patient_is_in_one_fold(patient: str, folds: int) -> None:
    assert sum(held_out(patient, Evaluation(folds=folds, fold=fold)) for fold in range(folds)) == 1


def test_split_is_the_same_at_every_site_and_never_straddles(tmp_path: Path) -> None:
    patients = [f"p{row // 3}" for row in range(90)]
    held: list[dict[str, bool]] = []
    for name, order in (("north", range(90)), ("south", reversed(range(90)))):
        hospital = Hospital(tmp_path, name)
        rows = list(order)
        hospital.records(90, patient=[patients[row] for row in rows])
        hospital.labs(90)
        cohort = hospital.load(study({"labs": LABS}))
        held.append(dict(zip(cohort.patient_ids, cohort.test.tolist(), strict=True)))
        assert cohort.training().patients + cohort.testing().patients == 30
        assert len(cohort.training()) + len(cohort.testing()) == 90
    assert held[0] == held[1]
    assert 0 < sum(held[0].values()) < 15


@pytest.mark.parametrize("values", [["Train"] * 6 + ["TEST"] * 2, [0, 1, 2, 0, 1, 2, 3.0, 3]])
def test_split_column(hospital: Hospital, values: list[Any]) -> None:
    hospital.records(fold=values)
    hospital.update("split", column="fold")
    cohort = hospital.load(study({"labs": LABS}, evaluation={"folds": 4, "fold": 3}))
    assert cohort.test.tolist() == [False] * 6 + [True] * 2


def test_same_patient_in_train_and_test(hospital: Hospital) -> None:
    hospital.records(patient=["a", "a", "b", "b", "c", "d", "e", "f"], fold=["train", "test"] * 4)
    hospital.update("split", column="fold")
    with pytest.raises(DataError, match="same patient in train and test: 2 patients"):
        hospital.load(study({"labs": LABS}))


@pytest.mark.parametrize("values", [["train"] * 7 + ["tset"], ["train"] * 7 + [None], ["train"] * 7 + ["3"]])
def test_unclear_split_column(hospital: Hospital, values: list[Any]) -> None:
    hospital.records(fold=values)
    hospital.update("split", column="fold")
    with pytest.raises(DataError, match="1 rows hold neither train/test nor"):
        hospital.load(study({"labs": LABS}))


def test_site_without_the_studys_modalities(hospital: Hospital) -> None:
    with pytest.raises(DataError, match="none of the study's modalities"):
        hospital.load(study({"vitals": VITALS}))


def test_unmapped_label_is_a_usage_error(hospital: Hospital) -> None:
    with pytest.raises(UsageError, match="maps no column to the study's label 'z'"):
        hospital.load(study({"labs": LABS}, task={"kind": "binary", "label": "z"}))


def test_wrong_form_of_a_modality_is_a_usage_error(hospital: Hospital) -> None:
    hospital.add("vitals", file="labs.csv", columns=["na"])
    with pytest.raises(UsageError, match="kind series"):
        hospital.load(study({"vitals": VITALS}))
