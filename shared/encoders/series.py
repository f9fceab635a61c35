"""Encoder of hourly series: summary statistics beside a small convolutional branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gapweave.shared.config.modalities import SeriesModality
from gapweave.shared.encoders import ENCODERS, TwoStage
from gapweave.shared.features.series import summary, summary_width
from gapweave.shared.schema import Modality


@ENCODERS.register("series")
class SeriesEncoder(TwoStage):
    """[B, T, 2V] -> [B, d].

    The wide path reads the summary statistics (last, mean, ..., time since the last value); the deep path reads
    them together with the mean and the last hours of a convolution over time.
    """

    def __init__(self, modality: Modality, embedding: int, hidden: int = 16) -> None:
        super().__init__()
        width = modality.shape[1]
        self.hours, self.channels = modality.shape
        assert isinstance(modality.spec, SeriesModality)
        self.columns = modality.spec.columns
        statistics = summary_width(self.columns)
        self.convolution = nn.Conv1d(width, hidden, kernel_size=3, padding=1)
        self.norm = nn.GroupNorm(1, hidden)
        self.wide = nn.Linear(statistics, embedding)
        self.hidden = nn.Linear(statistics + 2 * hidden, hidden)
        self.deep = nn.Linear(hidden, embedding)

    def features(self, inputs: Tensor) -> Tensor:
        """[B, T, 2V] -> [B, 2VT + S]: the hours, channels first, then the summary statistics."""
        return torch.cat([inputs.transpose(1, 2).flatten(1), summary(inputs, self.columns)], dim=1)

    def embed(self, features: Tensor) -> Tensor:
        """[B, 2VT + S] -> [B, d]."""
        window, statistics = features.tensor_split((self.hours * self.channels,), dim=1)
        window = window.view(-1, self.channels, self.hours)
        hours = torch.tanh(self.norm(self.convolution(window)))
        pooled = torch.cat([statistics, hours.mean(2), hours[:, :, -3:].mean(2)], dim=-1)
        return torch.tanh(self.wide(statistics) + self.deep(torch.tanh(self.hidden(pooled))))
