"""The shape that all encoders share: a wide linear path beside a small nonlinear one, bounded by tanh.

The linear path lets a small cohort reach what logistic regression reaches (design: Cheng et al. 2016, arXiv
1606.07792); tanh rather than ReLU because bounded activations keep clipped gradients informative (Papernot et
al. 2021, arXiv 2007.14191).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WideDeep(nn.Module):
    """tanh(W x + V tanh(U x)).

    Args:
        features: width of x.
        embedding: width of the output.
        hidden: width of the nonlinear path.
    """

    def __init__(self, features: int, embedding: int, hidden: int = 16) -> None:
        super().__init__()
        self.wide = nn.Linear(features, embedding)
        self.hidden = nn.Linear(features, hidden)
        self.deep = nn.Linear(hidden, embedding)

    def forward(self, features: Tensor) -> Tensor:
        """[B, features] -> [B, embedding] in [-1, 1]."""
        return torch.tanh(self.wide(features) + self.deep(torch.tanh(self.hidden(features))))
