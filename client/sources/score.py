"""Public scores: what a study's formula makes of the values that the site has for its other modalities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapweave.client.sources import series, table
from gapweave.client.sources.records import Reading
from gapweave.shared.config.formula import Reference
from gapweave.shared.config.modalities import Categories, PublicScore, Range, SeriesModality, TableModality
from gapweave.shared.config.site import Site
from gapweave.shared.config.sources import ColumnsSource, MeasurementSource
from gapweave.shared.config.study import Study
from gapweave.shared.errors import UsageError
from gapweave.shared.features import table as features
from gapweave.shared.features.ranges import clip
from gapweave.shared.features.series import statistic

Columns = dict[Reference, NDArray[Any]]


def read(
    study: Study, site: Site, reading: Reading, present: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Compute a public score from the values of the modalities that it reads, clipped to their ranges.

    Args:
        study: gives the formula.
        site: says where the values lie; what it does not have is missing.
        reading: of the score.
        present: [R, M]; a record without a modality, or whose modality a simulation hides, has none of its values.

    Returns:
        inputs [R, 2]; present [R].

    Raises:
        UsageError: for a site file with an entry for the score, and as the modalities' own readers.
        DataError: as those.
    """
    name, spec = reading.modality, study.modalities[reading.modality]
    if name in site.data.modalities:
        raise UsageError(
            f"the study computes {name!r} from {', '.join(sorted(study.sources[name]))}",
            where=reading.key(),
            remedy="Remove the entry",
        )
    assert isinstance(spec, PublicScore)
    formula, values = study.formula(name), Columns()
    for modality in sorted(study.sources[name] & site.data.modalities.keys()):
        wanted = [one for one in formula.reads if one.modality == modality]
        # What is odd about the values, the modality's own reading tells.
        own = replace(reading, modality=modality, findings=[], shares={})
        here = present[:, study.order.index(modality)]
        for reference, column in _columns(study, site, own, wanted).items():
            column[~here] = None if column.dtype == object else np.nan
            values[reference] = column
    records = len(reading.records)
    return features.encode(spec.columns, {"score": formula.evaluate(values, records)}, records)


def _columns(study: Study, site: Site, reading: Reading, wanted: list[Reference]) -> Columns:
    """The references that the site has, of one modality, each [R]."""
    spec, source = study.modalities[reading.modality], site.data.modalities[reading.modality]
    if not isinstance(source, ColumnsSource | MeasurementSource):
        return {}
    read = {reference.variable for reference in wanted}
    names = [name for name in source.columns if name in read]
    if not names:
        return {}
    few = source.model_copy(update={"columns": {name: source.columns[name] for name in names}})
    if isinstance(spec, SeriesModality):
        events, records = series.events(spec, few, reading), len(reading.records)
        return {
            one: statistic(events[one.variable], spec.columns[one.variable], spec.hours, one.statistic, records)
            for one in wanted
            if one.statistic is not None and one.variable in names
        }
    assert isinstance(spec, TableModality)
    return {
        Reference(modality=reading.modality, variable=name): _in_range(column, spec.columns[name])
        for name, column in table.values(spec, few, reading).items()
    }


def _in_range(column: NDArray[Any], card: Range | Categories) -> NDArray[Any]:
    return column if isinstance(card, Categories) else clip(column, card)
