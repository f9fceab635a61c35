"""Encoder of images: a small strided CNN beside a linear path over a thumbnail."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gapweave.shared.encoders import ENCODERS
from gapweave.shared.features.flat import IMAGE_SIDE
from gapweave.shared.schema import Modality


@ENCODERS.register("image")
class ImageEncoder(nn.Module):
    """[B, C, H, W] -> [B, d].

    Strided 3x3 convolutions with GroupNorm halve the side until at most 8 pixels are left; their mean over a
    4x4 grid is read by the deep path.
    """

    def __init__(self, modality: Modality, embedding: int, hidden: int = 16) -> None:
        super().__init__()
        channels, side, _ = modality.shape
        stages: list[nn.Module] = []
        width = channels
        while side > IMAGE_SIDE:
            wider = min(32, 8 * (1 + len(stages) // 3))
            stages += [
                nn.Conv2d(width, wider, kernel_size=3, stride=2, padding=1),
                nn.GroupNorm(4, wider),
                nn.Tanh(),
            ]
            width, side = wider, (side + 1) // 2
        self.stages = nn.Sequential(*stages)
        self.wide = nn.Linear(channels * IMAGE_SIDE**2, embedding)
        self.hidden = nn.Linear(width * 16, hidden)
        self.deep = nn.Linear(hidden, embedding)

    def forward(self, image: Tensor) -> Tensor:
        """Embed an image."""
        thumbnail = functional.adaptive_avg_pool2d(image, IMAGE_SIDE).flatten(1)
        grid = functional.adaptive_avg_pool2d(self.stages(image), 4).flatten(1)
        return torch.tanh(self.wide(thumbnail) + self.deep(torch.tanh(self.hidden(grid))))
