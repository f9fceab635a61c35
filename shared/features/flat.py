"""One record's input of any kind as a vector of features without parameters.

What linear models read: the linear paths of the heads, and the baselines. Features that are 0 or 1, or shares,
are centred at 1/2: a constant part of a patient's features says nothing of the patient, and yet takes up most of a
clipped gradient.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from gapweave.shared.config.modalities import ImageModality, ModalitySpec, PublicScore, SeriesModality, TextModality
from gapweave.shared.features import series, table

IMAGE_SIDE = 8
"""Rows and columns that an image is averaged to."""
TEXT_SCALE = 2.0
"""Hashed words have unit L2 norm, a table's features a norm of some units."""
MIDDLE = 0.5


def flat(spec: ModalitySpec, inputs: Tensor) -> Tensor:
    """[R, ...] inputs to [R, F] features, row by row.

    Args:
        spec: of the modality.
        inputs: as the site's sources give them.
    """
    if isinstance(spec, ImageModality):
        return functional.adaptive_avg_pool2d(inputs, IMAGE_SIDE).flatten(1)
    if isinstance(spec, TextModality):
        return inputs * TEXT_SCALE
    if isinstance(spec, SeriesModality):
        statistics = [statistic for _, statistic in series.summary_names(spec.columns)]
        chosen = [at for at, statistic in enumerate(statistics) if statistic in spec.statistics]
        values = series.summary(inputs, spec.columns)[:, chosen]
        shares = [statistics[at] in series.SHARES for at in chosen]
    else:
        values, shares = inputs, [table.is_flag(name) for name in table.names(spec.columns)]
    return values - MIDDLE * values.new_tensor(shares)


def of_norm(spec: ModalitySpec, features: Tensor, norm: float) -> Tensor:
    """The features with rows of this L2 norm; a row of zeros stays one.

    A clipped gradient is shared among modalities as their features are long, and so is what it can say against noise
    that knows no modality. At one length all of them are heard. A public score is only multiplied by it: how long its
    row is, is what it says.

    Args:
        spec: of the modality.
        features: [R, F], as `flat` gives them.
        norm: of a row.
    """
    return norm * (features if isinstance(spec, PublicScore) else functional.normalize(features, dim=1))


def width(spec: ModalitySpec) -> int:
    """F."""
    if isinstance(spec, ImageModality):
        return spec.channels * IMAGE_SIDE**2
    if isinstance(spec, TextModality):
        return spec.width
    if isinstance(spec, SeriesModality):
        return sum(statistic in spec.statistics for _, statistic in series.summary_names(spec.columns))
    return table.width(spec.columns)
