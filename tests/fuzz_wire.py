"""A target of Atheris, which mutates what led to new branches: `python tests/fuzz_wire.py -max_total_time=60`.

Whatever bytes come as a message: it is read, or refused by the one error that both sides expect.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))

with atheris.instrument_imports(include=["gapweave.shared.wire"]):
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    from gapweave.shared import PROTOCOL_VERSION
    from gapweave.shared.wire import HEADER, ProtocolError, _npy_header, pack, unpack

MOST_NUMBERS = 1 << 20


def message(data: atheris.FuzzedDataProvider) -> RecordDict:
    """A message of fuzzed parts, half of them nearly right."""
    content = RecordDict()
    text = data.ConsumeUnicodeNoSurrogates(60)
    content[HEADER] = ConfigRecord({"json": f'{{"protocol": {PROTOCOL_VERSION}}}' if data.ConsumeBool() else text})
    for at in range(data.ConsumeIntInRange(0, 3)):
        likely = data.ConsumeBool()
        shape = tuple(data.ConsumeIntListInRange(data.ConsumeIntInRange(0, 2), -1, 3 if likely else 1 << 41))
        dtype = data.PickValueInList(["float32", "float32", "float64", "object", data.ConsumeUnicodeNoSurrogates(8)])
        stored = data.PickValueInList(["numpy.ndarray", data.ConsumeUnicodeNoSurrogates(8)])
        start = _npy_header(shape, "<f4") if likely and min(shape, default=0) >= 0 else b"\x93NUMPY\x01\x00"
        size = 4 * math.prod(shape) if likely else 200
        numbers = data.ConsumeBytes(max(0, min(size, 4000)))
        array = Array(dtype, shape, stored, start + numbers.ljust(size if data.ConsumeBool() else 0, b"\0"))
        cut = data.PickValueInList([[math.prod(shape)], list(shape), [size, 1]]) if likely else [200]
        key = data.PickValueInList(
            [f'{{"x":{json.dumps(cut, separators=(",", ":"))}}}', data.ConsumeUnicodeNoSurrogates(20)]
        )
        content[f"group{at}"] = ArrayRecord({key: array})
    return content


def one(data: bytes) -> None:
    """Read one message; what was read is written and read back the same."""
    try:
        header, arrays = unpack(message(atheris.FuzzedDataProvider(data)))
    except ProtocolError:
        return
    assert sum(value.size for part in arrays.values() for value in part.values()) < MOST_NUMBERS
    again, same = unpack(pack(header, arrays))
    assert json.dumps(again, sort_keys=True) == json.dumps(header, sort_keys=True)
    assert all(
        same[group][name].tobytes() == value.tobytes() for group in arrays for name, value in arrays[group].items()
    )


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
