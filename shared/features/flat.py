"""One record's input of any kind as a vector of features without parameters.

What linear models read: the linear path of each modality's head, and the baselines.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from gapweave.shared.config.modalities import ImageModality, ModalitySpec, SeriesModality, TextModality
from gapweave.shared.features import series, table

IMAGE_SIDE = 8
"""Rows and columns that an image is averaged to."""
TEXT_SCALE = 2.0
"""Hashed words have unit L2 norm, a table's features a norm of some units."""


def flat(spec: ModalitySpec, inputs: Tensor) -> Tensor:
    """[R, ...] inputs to [R, F] features, row by row.

    Args:
        spec: of the modality.
        inputs: as the site's sources give them.
    """
    if isinstance(spec, SeriesModality):
        return series.summary(inputs, spec.columns)
    if isinstance(spec, ImageModality):
        return functional.adaptive_avg_pool2d(inputs, IMAGE_SIDE).flatten(1)
    return inputs * TEXT_SCALE if isinstance(spec, TextModality) else inputs


def width(spec: ModalitySpec) -> int:
    """F."""
    if isinstance(spec, SeriesModality):
        return series.summary_width(spec.columns)
    if isinstance(spec, ImageModality):
        return spec.channels * IMAGE_SIDE**2
    return spec.width if isinstance(spec, TextModality) else table.width(spec.columns)
