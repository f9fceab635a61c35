"""Parameter groups and a JSON note in one safetensors file: one rename replaces both together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

Arrays = dict[str, dict[str, NDArray[np.float32]]]
"""Parameter groups: group -> name -> array."""

_NOTE = "gapweave"


def dump(arrays: Mapping[str, Mapping[str, NDArray[np.float32]]], note: Mapping[str, Any]) -> bytes:
    """Serialise groups; the note is kept in the file's metadata.

    Args:
        arrays: group -> name -> array; neither group nor name may hold a "|".
        note: anything that JSON holds.
    """
    tensors = {
        f"{group}|{name}": np.asarray(value, order="C")
        for group, part in arrays.items()
        for name, value in part.items()
    }
    return save(tensors, metadata={_NOTE: json.dumps(note, sort_keys=True)})


def parse(content: bytes) -> tuple[Arrays, dict[str, Any]]:
    """Read what `dump` wrote: the groups, and the note.

    Raises:
        ValueError, KeyError or TypeError: for anything else.
    """
    length = int.from_bytes(content[:8], "little")
    note: dict[str, Any] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_NOTE])
    arrays: Arrays = {}
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    for key, value in tensors.items():
        group, name = key.split("|")
        arrays.setdefault(group, {})[name] = value
    return arrays, note


def read_note(path: Path) -> dict[str, Any]:
    """The note of a file that `dump` wrote, without its arrays."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    note: dict[str, Any] = json.loads(json.loads(header)["__metadata__"][_NOTE])
    return note


def flat(part: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """A group's arrays in one vector, in the mapping's order."""
    return np.concatenate([value.ravel() for value in part.values()])


def shaped(vector: NDArray[np.float32], shapes: Mapping[str, Sequence[int]]) -> dict[str, NDArray[np.float32]]:
    """One vector as a group's arrays, views of it, in the order of their shapes."""
    ends = accumulate(map(math.prod, shapes.values()))
    return {
        name: vector[end - math.prod(shape) : end].reshape(shape)
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    }


def size(arrays: Mapping[str, Mapping[str, NDArray[np.float32]]]) -> int:
    """Bytes of the arrays."""
    return sum(value.nbytes for tensors in arrays.values() for value in tensors.values())
