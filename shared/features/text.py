"""Text as hashed words: no vocabulary is learned from patients, so none has to be protected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def encode(texts: Sequence[str], buckets: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Hash words and word pairs into buckets (signed, L2-normalised; Weinberger et al. 2009, arXiv 0902.2206).

    Args:
        texts: R texts, empty when absent.
        buckets: number of hash buckets.

    Returns:
        inputs [R, buckets]; present [R]: the text has at least one word.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(n_features=buckets, ngram_range=(1, 2), norm="l2", dtype=np.float32)
    words = HashingVectorizer(n_features=1, norm=None, alternate_sign=False).transform(texts)
    inputs: NDArray[np.float32] = hashing.transform(texts).toarray().astype(np.float32)
    present: NDArray[np.bool_] = words.toarray()[:, 0] > 0
    return inputs, present
