"""What several fusions are made of."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from gapweave.shared.config.base import StrictModel


class HiddenSettings(StrictModel):
    """A head with a hidden layer."""

    hidden: int = Field(24, ge=1, le=4096, description="tanh units beside the linear path")


class Head(nn.Module):
    """A linear path beside a small nonlinear one: W x + V tanh(U x).

    Args:
        width: of x.
        outputs: K.
        hidden: tanh units.
    """

    def __init__(self, width: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, outputs)
        self.hidden = nn.Linear(width, hidden)
        self.deep = nn.Linear(hidden, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, width] -> [B, K]."""
        logits: Tensor = self.wide(inputs) + self.deep(torch.tanh(self.hidden(inputs)))
        return logits


class Numbers(nn.Module):
    """Learned numbers that no input goes into, as an Embedding: per-patient gradients of a bare tensor are not known.

    Args:
        rows: number of rows.
        width: numbers a row.
        start: initial value of all.
    """

    def __init__(self, rows: int, width: int, start: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        nn.init.constant_(self.table.weight, start)

    def forward(self, used: Tensor) -> Tensor:
        """[B, rows, width], the same for each record of a [B, M] mask."""
        index = torch.arange(self.table.num_embeddings, device=used.device)
        numbers: Tensor = self.table(index.expand(len(used), -1))
        return numbers


class Docks(nn.Module):
    """A linear layer a modality, into one space.

    Args:
        modalities: M.
        embedding: d.
        width: of the space.
        start: initial bias; None as torch draws it.
    """

    def __init__(self, modalities: int, embedding: int, width: int, start: float | None = None) -> None:
        super().__init__()
        layers = [nn.Linear(embedding, width) for _ in range(modalities)]
        if start is not None:
            for layer in layers:
                nn.init.constant_(layer.bias, start)
        self.layers = nn.ModuleList(layers)

    def forward(self, slots: Tensor, used: Tensor) -> Tensor:
        """[B, M, d] -> [B, M, width], 0 for modalities not used, whose slots are not read."""
        clean = present_only(slots, used)
        docked = torch.stack([layer(clean[:, at]) for at, layer in enumerate(self.layers)], dim=1)
        return present_only(docked, used)


def present_only(values: Tensor, used: Tensor, absent: float = 0.0) -> Tensor:
    """[B, M, F] with a constant for modalities not used: chosen, as zero times NaN is NaN."""
    return torch.where(used.unsqueeze(-1), values, absent)


def equal_shares(used: Tensor) -> Tensor:
    """[B, M]: 1 over the number of modalities used; 0 in a record without any."""
    return used / used.sum(1, keepdim=True).clamp(min=1)


def softmax_shares(scores: Tensor, used: Tensor) -> Tensor:
    """[B, ..., M] scores to a softmax over the modalities used; 0 in a record without any."""
    some = used.any(-1, keepdim=True)
    masked = torch.where(used, scores, -torch.inf)
    return torch.where(used, torch.softmax(torch.where(some, masked, 0.0), -1), 0.0)


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """[B, M] and [B, M, F] to [B, F]."""
    return (weights.unsqueeze(-1) * values).sum(1)


def mean_used(values: Tensor, used: Tensor) -> Tensor:
    """[B, M] to [B]: the mean over the modalities used; 0 in a record without any."""
    return torch.where(used, values, 0.0).sum(1) / used.sum(1).clamp(min=1)
