"""Who is held out: a keyed hash of the patient, the same at every site, or a column of the records."""

from __future__ import annotations

import hmac

import numpy as np
from numpy.typing import NDArray

from gapweave.client.sources.cells import code_text, missing
from gapweave.client.sources.records import Records
from gapweave.shared.config.site import Site
from gapweave.shared.config.study import Evaluation
from gapweave.shared.errors import DataError
from gapweave.shared.privacy.plan import VALIDATION_FOLDS

BASE = 10_000
"""Resolution of `test_fraction`."""


def test_patients(evaluation: Evaluation, site: Site, records: Records) -> NDArray[np.bool_]:
    """Which patients are held out, [P].

    Raises:
        DataError: for a split column that is missing or unclear, or that puts a patient on both sides.
    """
    if site.split.column is None:
        return np.array([held_out(patient, evaluation) for patient in records.patient_ids], np.bool_)
    return _by_column(site.split.column, evaluation, records)


def held_out(patient: str, evaluation: Evaluation) -> bool:
    """Whether the hash of a patient's id holds the patient out.

    >>> held_out("p1", Evaluation(test_fraction=0.0))
    False
    """
    digest = hmac.digest(str(evaluation.split_seed).encode(), patient.encode(), "sha256")
    number = int.from_bytes(digest[:8], "big")
    if evaluation.folds is not None:
        return number % evaluation.folds == evaluation.fold
    return number % BASE < round(BASE * evaluation.test_fraction)


def validation_fold(patient: str, evaluation: Evaluation) -> int:
    """Which of a site's `VALIDATION_FOLDS` a training patient is in, for choices that stay at the site.

    By another hash than who is held out, so that the folds of the others are as random as all.
    """
    key = f"{evaluation.split_seed}/validation"
    digest = hmac.digest(key.encode(), patient.encode(), "sha256")
    return int.from_bytes(digest[:8], "big") % VALIDATION_FOLDS


def _by_column(column: str, evaluation: Evaluation, records: Records) -> NDArray[np.bool_]:
    where = records.table.where(column)
    codes = code_text(records.table.column(column)).str.to_lowercase()
    named = codes.is_in(["train", "test"]).fill_null(False)
    numbered = codes.str.contains(r"^-?\d+$").fill_null(False)
    unclear = min(int((~named).sum()), int((~numbered).sum()))
    if unclear:
        empty = int(missing(codes).sum())
        raise DataError(
            f"{unclear} rows hold neither train/test nor, all of them, a fold number ({empty} are empty)",
            where=where,
            remedy="Write train or test in every row, or a whole number in every row",
        )
    test = (codes == ("test" if named.all() else str(evaluation.fold))).to_numpy()
    some, less = np.zeros((2, len(records.patient_ids)), np.bool_)
    some[records.patient[test]] = True
    less[records.patient[~test]] = True
    both = int((some & less).sum())
    if both:
        raise DataError(
            f"same patient in train and test: {both} patients",
            where=where,
            remedy="Give all records of a patient the same value, or use `split: {by: hash}`",
        )
    return some
