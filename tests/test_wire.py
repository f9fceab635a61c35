"""Messages: packed, read back bit for bit, refused with a reason, and hashed as a whole."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from gapweave.shared import PROTOCOL_VERSION, tensorfile
from gapweave.shared.tensorfile import Arrays
from gapweave.shared.wire import HEADER, ProtocolError, pack, request_hash, unpack


def some_arrays() -> Arrays:
    generator = np.random.default_rng(0)
    return {
        "encoder/labs": {"wide.weight": generator.normal(size=(4, 3)).astype(np.float32)},
        "fusion": {
            "gate": np.asarray(0.5, np.float32),
            "empty": np.zeros((0, 4), np.float32),
            "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
            "special": np.array([np.nan, np.inf, -0.0, 1e-45], np.float32),
        },
    }


def only(content: RecordDict) -> Array:
    """The one array in which a group travels."""
    [array] = content.array_records["fusion"].values()
    return array


def test_a_message_is_read_back_bit_for_bit() -> None:
    arrays = some_arrays()
    header, found = unpack(pack({"run": "r", "round": 3, "text": "ü", "plan": {"a": [1.5, None]}}, arrays))
    assert header == {"protocol": PROTOCOL_VERSION, "run": "r", "round": 3, "text": "ü", "plan": {"a": [1.5, None]}}
    assert found.keys() == arrays.keys()
    for group, part in arrays.items():
        assert found[group].keys() == part.keys()
        for name, value in part.items():
            assert found[group][name].dtype == np.float32
            assert found[group][name].shape == value.shape, name
            assert found[group][name].tobytes() == value.tobytes(), name


def test_a_message_without_arrays() -> None:
    header, arrays = unpack(pack({"status": "ok"}, {}))
    assert header["status"] == "ok"
    assert arrays == {}


def test_a_record_carries_the_name_of_its_parameter_group() -> None:
    content = pack({}, some_arrays())
    assert set(content.array_records) == {"encoder/labs", "fusion"}
    assert set(content.config_records) == {HEADER}
    assert not content.metric_records


def test_another_protocol_is_refused_with_both_versions() -> None:
    content = pack({"protocol": 7}, {})
    with pytest.raises(ProtocolError, match=f"protocol 7, this one {PROTOCOL_VERSION}") as caught:
        unpack(content)
    assert "same Gapweave version" in caught.value.remedy


def headed(text: Any) -> RecordDict:
    content = RecordDict()
    content[HEADER] = ConfigRecord({"json": text})
    return content


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"text"', "{}", b"\xff", 5], ids=lambda text: repr(text))
def test_a_header_of_another_form_is_refused(text: object) -> None:
    """By the one error that both sides expect: a strange message is a failed site, never a failed run."""
    with pytest.raises(ProtocolError):
        unpack(headed(text))


def test_a_message_of_something_else_is_refused() -> None:
    with pytest.raises(ProtocolError, match="without a Gapweave header"):
        unpack(RecordDict())


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.bool_])
def test_parameters_of_another_type_are_refused(dtype: type) -> None:
    content = pack({}, {})
    content["fusion"] = ArrayRecord({"bias": Array(np.zeros(3, dtype))})
    with pytest.raises(ProtocolError, match=np.dtype(dtype).name):
        unpack(content)


@pytest.mark.parametrize(
    "change", [{"data": b"garbage"}, {"data": b""}, {"stype": "pickle"}], ids=["garbage", "nothing", "pickle"]
)
def test_an_array_that_cannot_be_read_is_refused(change: dict[str, Any]) -> None:
    content = pack({}, {"fusion": {"bias": np.zeros(3, np.float32)}})
    for name, value in change.items():
        setattr(only(content), name, value)
    with pytest.raises(ProtocolError):
        unpack(content)


def test_a_pickle_is_never_loaded() -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("a pickle was loaded",))

    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap()], dtype=object), allow_pickle=True)
    content = pack({}, {"fusion": {"bias": np.zeros(3, np.float32)}})
    only(content).data = buffer.getvalue()
    with pytest.raises(ProtocolError):
        unpack(content)


def test_a_header_that_claims_gigabytes_costs_nothing() -> None:
    content = pack({}, {"fusion": {"bias": np.zeros(3, np.float32)}})
    array = only(content)
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(claim, {"descr": "<f4", "fortran_order": False, "shape": (2**30,)})
    array.data = claim.getvalue() + bytes(12)
    for shape in ((2**30,), (3,), (2**62, 4), (-1, -3), (1,) * 40):
        array.shape = shape
        tracemalloc.start()
        with pytest.raises(ProtocolError):
            unpack(content)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20


GOOD = '{"bias":[3]}'


@pytest.mark.parametrize(
    "key",
    [
        *("bias", "", "[3]", "null", "{", "[" * 10_000, '{"bias":3}', '{"bias":["3"]}', '{"bias":[true,3]}'),
        *('{"bias":[-3]}', '{"bias":[3.0]}', '{"bias":[2]}', '{"bias":[4]}', '{"bias":[1,1,1,1,1,1,1,1,3]}'),
        *('{"bias":[1099511627776,0,3]}', '{"a":[3],"bias":[3]}', '{"bias":[3],"bias":[3]}', '{"bias": [3]}', "{}"),
    ],
)
def test_an_array_is_cut_by_just_the_key_that_is_written(key: str) -> None:
    values = np.arange(3, dtype=np.float32)
    content = pack({}, {"fusion": {"bias": values}})
    assert list(content.array_records["fusion"]) == [GOOD]
    content["fusion"] = ArrayRecord({key: only(content)})
    with pytest.raises(ProtocolError):
        unpack(content)


def test_a_group_is_one_array() -> None:
    array = only(pack({}, {"fusion": {"bias": np.zeros(3, np.float32)}}))
    for arrays in ({}, {GOOD: array, '{"more":[3]}': array}):
        with pytest.raises(ProtocolError, match="other than one array"):
            unpack(RecordDict({**pack({}, {}), "fusion": ArrayRecord(arrays)}))


@given(
    data=st.binary(max_size=200),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    dtype=st.one_of(st.just("float32"), st.text(max_size=12)),
    stype=st.one_of(st.just("numpy.ndarray"), st.text(max_size=12)),
    cut=st.integers(0, 140),
)
def test_whatever_an_array_says_it_is_read_or_refused(
    data: bytes, shape: list[int], dtype: str, stype: str, cut: int
) -> None:
    """Arbitrary bytes, and the right ones cut off or followed by others: numbers come out only of what `pack` writes."""
    content = pack({}, {"fusion": {"bias": np.zeros(3, np.float32)}})
    array = only(content)
    whole = array.data
    array.data, array.dtype, array.stype = whole[:cut] + data, dtype, stype
    array.shape = tuple(shape) or (3,)
    try:
        _, arrays = unpack(content)
    except ProtocolError:
        return
    assert len(array.data) == len(whole) - 12 + arrays["fusion"]["bias"].nbytes


# The hash to which a charge is bound.


def test_the_same_request_has_the_same_hash() -> None:
    one = request_hash("train", {"run": "r", "round": 1}, some_arrays())
    assert one == request_hash("train", {"round": 1, "run": "r"}, dict(reversed(some_arrays().items())))
    header, arrays = unpack(pack({"run": "r", "round": 1}, some_arrays()))
    assert request_hash("train", header, arrays) == request_hash(
        "train", *unpack(pack({"round": 1, "run": "r"}, some_arrays()))
    )
    assert len(one) == 64


def test_requests_of_two_kinds_are_two() -> None:
    """A table of scores was had for the charge of a round: the bytes of both requests may be the same."""
    header, arrays = changed("nothing")
    assert request_hash("train", header, arrays) != request_hash("query.evaluate", header, arrays)


def changed(change: str) -> tuple[dict[str, Any], Arrays]:
    header: dict[str, Any] = {"run": "r", "round": 1}
    arrays = copy.deepcopy(some_arrays())
    if change == "header":
        header["round"] = 2
    elif change == "one bit":
        arrays["fusion"]["special"].view(np.uint32)[3] += 1
    elif change == "a name":
        arrays["fusion"]["other"] = arrays["fusion"].pop("gate")
    elif change == "a group":
        arrays["encoder/note"] = arrays.pop("encoder/labs")
    elif change == "a shape":
        arrays["encoder/labs"]["wide.weight"] = arrays["encoder/labs"]["wide.weight"].reshape(3, 4)
    elif change == "one array less":
        del arrays["fusion"]["empty"]
    return header, arrays


@pytest.mark.parametrize("change", ["header", "one bit", "a name", "a group", "a shape", "one array less"])
def test_any_change_of_a_request_changes_its_hash(change: str) -> None:
    assert request_hash("train", *changed(change)) != request_hash("train", *changed("nothing"))


def test_bytes_are_counted() -> None:
    assert tensorfile.size(some_arrays()) == 4 * (12 + 1 + 0 + 6 + 4)


def test_the_header_is_plain_json() -> None:
    content = pack({"round": 3}, {})
    assert json.loads(str(content.config_records[HEADER]["json"])) == {"protocol": PROTOCOL_VERSION, "round": 3}


@pytest.mark.long
@pytest.mark.fuzz
def test_a_fuzzer_guided_by_coverage_finds_nothing() -> None:
    pytest.importorskip("atheris")
    file = Path(__file__).parent / "fuzz_wire.py"
    done = subprocess.run(
        [sys.executable, file, "-max_total_time=40", "-rss_limit_mb=2048", "-verbosity=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
