"""Numbers of a site that its model uses and training does not change: public, or released once with noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gapweave.shared.features.numeric import NumericColumn
from gapweave.shared.features.ranges import BOUND

SPREADS = (0.2, 5.0)
"""Smallest and largest spread that a site uses, in the study's own scale, where noise leaves none smaller sure."""


@dataclass(frozen=True, kw_only=True)
class Rescaling:
    """Other centers and scales for the numeric columns of one modality, in publicly scaled units.

    Attributes:
        values: position of each column's value along the input's last axis.
        flags: position of its observed flag.
        centers: value mapped to 0.
        scales: distance mapped to 1.
    """

    values: tuple[int, ...]
    flags: tuple[int, ...]
    centers: tuple[float, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, columns: Sequence[NumericColumn], centers: Sequence[float], scales: Sequence[float]) -> Rescaling:
        """For these columns of one modality."""
        return cls(
            values=tuple(column.value for column in columns),
            flags=tuple(column.flag for column in columns),
            centers=tuple(centers),
            scales=tuple(scales),
        )

    def __call__(self, inputs: Tensor) -> Tensor:
        """[R, ..., F] rescaled; what was not observed stays 0."""
        values, flags = (torch.tensor(places, device=inputs.device) for places in (self.values, self.flags))
        moved = (inputs[..., values] - inputs.new_tensor(self.centers)) / inputs.new_tensor(self.scales)
        seen = inputs[..., flags] > 0
        return inputs.index_copy(-1, values, torch.where(seen, moved.clamp(-BOUND, BOUND), 0.0))


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What a site's model adds to what it learns; without any of it, the study's public scaling and no prior.

    Attributes:
        offset: [K] added to the logits of the fusion and of every modality's head; empty for none.
        rescaling: by modality.
    """

    offset: tuple[float, ...] = ()
    rescaling: Mapping[str, Rescaling] = field(default_factory=dict)

    def inputs(self, modality: str, inputs: Tensor) -> Tensor:
        """A modality's input as its encoder reads it."""
        return self.rescaling[modality](inputs) if modality in self.rescaling else inputs

    def logits(self, logits: Tensor) -> Tensor:
        """[..., K] with the prior's log-odds added."""
        return logits + logits.new_tensor(self.offset) if self.offset else logits

    def to_dict(self) -> dict[str, Any]:
        """As a model card keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Constants:
        """Read it from a model card."""
        parts = {
            name: Rescaling(**{key: tuple(values) for key, values in part.items()})
            for name, part in content["rescaling"].items()
        }
        return cls(offset=tuple(content["offset"]), rescaling=parts)
