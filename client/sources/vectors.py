"""Text as vectors of a frozen transformer that lies in a folder of the site: nothing is downloaded or trained."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gapweave.client.sources.records import Reading
from gapweave.shared.config.modalities import Vectors
from gapweave.shared.errors import DataError, UsageError

WEIGHTS = "model.safetensors"
"""The only format of weights that is read: it holds no code."""

LONGEST = 512
"""Tokens of a text that are read, where the transformer allows more."""


def encode(
    texts: Sequence[str], spec: Vectors, folder: str, reading: Reading
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Mean of the last hidden states over a text's tokens, of unit L2 norm; a long text counts by its beginning.

    Args:
        texts: R texts, empty when absent.
        spec: what the study says of the transformer.
        folder: where it lies, as the site file has it.
        reading: the modality.

    A patient's vectors are the same bit for bit whoever else is in the cohort: a difference of one bit in each of many
    patients' inputs would be a difference that no clipping bounds.

    Returns:
        inputs [R, width]; present [R]: the text has at least one word.

    Raises:
        UsageError: for a transformer that is not the study's, or one without what reads it.
        DataError: for a folder that is missing or holds none.
    """
    key = reading.key(".encoder")
    path = reading.files.find_folder(folder, key)
    _refuse_others(path, spec, key)
    tokenizer, model = _load(path, key)
    width = int(model.config.hidden_size)
    if width != spec.width:
        raise UsageError(
            f"the transformer's vectors have {width} numbers, the study's {spec.width}",
            where=key,
            remedy="Use the transformer that the study was written for",
        )
    present = np.array([re.search(r"\w\w", text) is not None for text in texts], np.bool_)
    inputs = np.zeros((len(texts), width), np.float32)
    rows = np.flatnonzero(present)
    for row in rows.tolist():  # one at a time: in a batch, the last bits of a vector depend on the other texts
        inputs[row] = _vector(texts[row], tokenizer, model)
    return inputs, present


def _refuse_others(path: Path, spec: Vectors, key: str) -> None:
    """Refuse weights that are not the study's: vectors of two transformers mean nothing to one another."""
    try:
        with (path / WEIGHTS).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        raise _none(path) from None
    if found != spec.sha256:
        raise UsageError(
            f"the transformer is not the study's: its {WEIGHTS} has the SHA-256 {found}",
            where=key,
            remedy=f"The study names {spec.sha256}",
        )


def _none(path: Path) -> DataError:
    return DataError(
        "the folder holds no transformer that can be read",
        where=str(path),
        remedy=f"It needs config.json, the files of the tokenizer and {WEIGHTS}",
    )


def _load(path: Path, key: str) -> tuple[Any, Any]:
    # Read when the library is imported.
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        remedy = "pip install 'gapweave[text]'"
        raise UsageError("vectors of text need transformers", where=key, remedy=remedy) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(path, **local)
            model = AutoModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32, **local)
    except Exception:  # a damaged folder can fail anywhere in the library
        raise _none(path) from None
    return tokenizer, model.eval()


def _vector(text: str, tokenizer: Any, model: Any) -> NDArray[np.float32]:
    most = min(LONGEST, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", LONGEST))
    tokens = tokenizer(text, truncation=True, max_length=most, return_tensors="pt")
    with torch.inference_mode():
        mean = model(**tokens).last_hidden_state[0].mean(0)
    result: NDArray[np.float32] = torch.nn.functional.normalize(mean, dim=0).numpy()
    return result
