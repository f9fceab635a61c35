"""Images as square arrays around zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image


def encode(image: Image, size: int, channels: int) -> NDArray[np.float32]:
    """Resize to a square and scale intensities to [-1, 1].

    Args:
        image: any mode; 16-bit and 32-bit greys are scaled by their mode's full range.
        size: height and width in pixels.
        channels: 1 (grey) or 3 (colour).

    Returns:
        [C, H, W].
    """
    from PIL.Image import Resampling

    if image.mode.startswith("I") or image.mode == "F":
        full = 1.0 if image.mode == "F" else 65535.0
        grey = np.clip(np.asarray(image, np.float32) / full, 0, 1) * 255
        from PIL import Image as module

        image = module.fromarray(grey.astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB").resize((size, size), Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32).reshape(size, size, channels).transpose(2, 0, 1)
    scaled: NDArray[np.float32] = pixels / 127.5 - 1
    return scaled
