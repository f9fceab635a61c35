"""What crosses the wire: a JSON header and one ArrayRecord for each parameter group.

No pickles, no code, no per-patient number; a record's name is its parameter group's. A group travels as one array,
whose key tells how it is cut: Flower asks for each array by requests of its own, four times on the way.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from gapweave.shared import PROTOCOL_VERSION
from gapweave.shared.errors import GapweaveError
from gapweave.shared.tensorfile import Arrays, shaped

HEADER = "header"
PREPARE, TRAIN, EVALUATE, FINISH = "query.prepare", "train", "query.evaluate", "train.finish"
"""Message types: the handshake, one round, how well the final groups do, and the final groups to keep."""


OTHER_TYPES = frozenset({"float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool"})
"""Types that a message names back to the sender; any other text of its stays out of messages."""
MOST_AXES = 8
DEEPEST = 40
"""Nests in each other of a header: a study has seven."""
USUAL = 20_000
"""Length of a text of names and shapes that is kept."""


class ProtocolError(GapweaveError):
    """A message that this version cannot or will not read."""


def pack(
    header: Mapping[str, Any], arrays: Mapping[str, Mapping[str, NDArray[np.float32]] | ArrayRecord]
) -> RecordDict:
    """Build a message's content; the protocol version is added to the header.

    Args:
        header: anything that JSON holds.
        arrays: by group, as they are or as `records` made them for several messages.
    """
    records = RecordDict()
    text = json.dumps({"protocol": PROTOCOL_VERSION, **header}, sort_keys=True)
    records[HEADER] = ConfigRecord({"json": text})
    for group, tensors in arrays.items():
        records[group] = tensors if isinstance(tensors, ArrayRecord) else _record(tensors)
    return records


def records(groups: Arrays) -> dict[str, ArrayRecord]:
    """Groups as they travel, for messages to many sites: these share the bytes."""
    return {group: _record(tensors) for group, tensors in groups.items()}


def _record(tensors: Mapping[str, NDArray[np.float32]]) -> ArrayRecord:
    """One group's arrays as they travel."""
    key = _dumps({name: list(value.shape) for name, value in tensors.items()})
    shape, kind = (sum(value.size for value in tensors.values()),), np.result_type(*tensors.values(), np.float32)
    # What Flower's own conversion gives, without its second per hundred messages.
    parts = (np.ascontiguousarray(value, kind).data for value in tensors.values())
    record = ArrayRecord()  # given a dictionary, it would make each array again
    record[key] = Array(str(kind), shape, "numpy.ndarray", b"".join([_npy_header(shape, kind.str), *parts]))
    return record


def _dumps(layout: Mapping[str, list[int]]) -> str:
    return json.dumps(layout, separators=(",", ":"))


@lru_cache(maxsize=4096)
def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """The first bytes of an .npy file, which say what follows."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def unpack(content: RecordDict, longest: float = math.inf) -> tuple[dict[str, Any], Arrays]:
    """Read a message's content; its arrays are views of it, and cannot be written to.

    Args:
        content: of the message.
        longest: characters that its header may have.

    Raises:
        ProtocolError: for another protocol version, naming both, or a message of another shape.
    """
    # Flower's `array_records` and `config_records` write each record into the message again, checked.
    said = content.get(HEADER)
    try:
        text = str(said["json"]) if isinstance(said, ConfigRecord) else ""
        header = json.loads(text) if len(text) <= longest else None
    except (KeyError, ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or not _writable(header):
        raise ProtocolError("a message without a Gapweave header", remedy="Both sides must run Gapweave")
    if header.get("protocol") != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the other side speaks protocol {header.get('protocol')}, this one {PROTOCOL_VERSION}",
            remedy="Install the same Gapweave version on both sides",
        )
    return header, {group: _cut(record) for group, record in content.items() if isinstance(record, ArrayRecord)}


def _writable(header: dict[str, Any]) -> bool:
    """Whether what was read can be written again: halves of characters and deep nests are legal JSON, and end a run."""
    level: list[Any] = [header]
    for _ in range(DEEPEST):
        below = (value.values() if isinstance(value, dict) else value for value in level)
        inner = [one for values in below for one in values]
        keys = (key for value in level if isinstance(value, dict) for key in value)
        try:
            "".join(text for text in (*keys, *inner) if isinstance(text, str)).encode()
        except UnicodeEncodeError:
            return False
        level = [one for one in inner if isinstance(one, dict | list)]
        if not level:
            return True
    return False


def _cut(record: ArrayRecord) -> dict[str, NDArray[np.float32]]:
    """A group's arrays from the one that travelled."""
    if len(record) != 1:
        raise ProtocolError("a group of other than one array", remedy="Both sides must run Gapweave")
    [(key, array)] = record.items()
    values, layout = _read(array), (_known if len(key) <= USUAL else _layout)(key)
    if values.shape != (sum(map(math.prod, layout.values())),):
        raise ProtocolError("an array that its key does not describe", remedy="Both sides must run Gapweave")
    return shaped(values, layout)


def _layout(key: str) -> dict[str, list[int]]:
    """Names and shapes, of just the text that `record` writes."""
    try:
        layout = json.loads(key)
    except (ValueError, RecursionError):
        layout = None
    if not isinstance(layout, dict) or not all(map(_is_shape, layout.values())) or _dumps(layout) != key:
        raise ProtocolError("an array without names and shapes", remedy="Both sides must run Gapweave")
    return layout


_known = lru_cache(maxsize=256)(_layout)
"""Of texts that are no longer than usual: each round has the same ones."""


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= MOST_AXES
        and all(type(size) is int and 0 <= size < 2**40 for size in shape)
    )


def _read(array: Array) -> NDArray[np.float32]:
    """An array of just the bytes that `pack` writes. No general reader: a header may claim gigabytes, or a pickle."""
    if array.dtype in OTHER_TYPES:
        raise ProtocolError(f"an array of type {array.dtype}", remedy="Parameters travel as float32")
    shape = tuple(array.shape)
    plain = len(shape) <= MOST_AXES and all(isinstance(size, int) and 0 <= size < 2**40 for size in shape)
    header = _npy_header(shape, "<f4") if plain else b""
    declared = (array.dtype, array.stype) == ("float32", "numpy.ndarray")
    as_written = plain and declared and array.data.startswith(header)
    if not as_written or len(array.data) != len(header) + 4 * math.prod(shape):
        raise ProtocolError("an array that cannot be read", remedy="Both sides must run Gapweave")
    return np.frombuffer(array.data, np.float32, offset=len(header)).reshape(shape)


def request_hash(kind: str, header: Mapping[str, Any], arrays: Arrays) -> str:
    """SHA-256 over a whole request: what a charge is bound to. Flower's own ids are no part of it.

    Args:
        kind: of message: a request to train and one to evaluate may hold the same bytes.
        header: of the message.
        arrays: of the message.
    """
    digest = hashlib.sha256(json.dumps([kind, header], sort_keys=True).encode())
    for group in sorted(arrays):
        for name in sorted(arrays[group]):
            value = arrays[group][name]
            digest.update(f"\n{group}/{name}/{value.shape}\n".encode())
            digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()
