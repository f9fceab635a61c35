"""Numeric columns of table and series inputs, and where they stand."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from gapweave.shared.config.modalities import ModalitySpec, PublicScore, Range, SeriesModality, TableModality
from gapweave.shared.config.study import Study
from gapweave.shared.features.ranges import scale
from gapweave.shared.features.table import width

SCALE_IT = "Give center and scale in the study, or log: true, or take preparation.standardisation: noisy"
"""What to do about variables without a scale whose values fill little of their range."""


@dataclass(frozen=True, kw_only=True)
class NumericColumn:
    """One numeric variable of one modality.

    Attributes:
        modality: its name.
        name: of the variable.
        value: position of its value along the input's last axis.
        flag: position of its observed flag.
        bound: largest absolute value after public scaling.
        scaled: whether the study says what counts as 1; else it is a quarter of the range, however little values vary.
    """

    modality: str
    name: str
    value: int
    flag: int
    bound: float
    scaled: bool


def numeric_columns(study: Study, held: Collection[str]) -> tuple[NumericColumn, ...]:
    """The numeric variables of the held tables and scores, and of series those without a reference interval.

    In canonical order.
    """
    names = [name for name in study.order if name in held]
    return tuple(column for name in names for column in _columns(name, study.modalities[name]))


def _columns(modality: str, spec: ModalitySpec) -> Iterator[NumericColumn]:
    if isinstance(spec, SeriesModality):
        for at, name in enumerate(sorted(spec.columns)):
            measured = spec.columns[name]
            # Hinges are taken from the hours as they are scaled: these keep the scaling in which the interval is given.
            if measured.normal is None:
                yield _column(modality, name, measured, value=at, flag=len(spec.columns) + at)
    elif isinstance(spec, TableModality | PublicScore):
        at = 0
        for name in sorted(spec.columns):
            card = spec.columns[name]
            if isinstance(card, Range):
                yield _column(modality, name, card, value=at, flag=at + 1)
            at += width({name: card})


def _column(modality: str, name: str, card: Range, *, value: int, flag: int) -> NumericColumn:
    bound = float(np.abs(scale(np.array([card.low, card.high]), card)).max())
    return NumericColumn(
        modality=modality, name=name, value=value, flag=flag, bound=bound, scaled=card.scale is not None
    )
