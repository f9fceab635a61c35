"""Server optimisers by hand, and over a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gapweave.server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gapweave.shared import PROTOCOL_VERSION, tensorfile
from gapweave.shared.config.sharing import Aggregation
from gapweave.shared.errors import UsageError
from gapweave.shared.optimizers import ServerOptimizer

KINDS = ["none", "momentum", "adam", "yogi", "adagrad"]


def changes(kind: str, values: list[float], **keys: float) -> list[float]:
    settings = Aggregation(server_optimizer=kind, server_floor=0.5, server_beta2=0.75, **keys)
    optimizer = ServerOptimizer(settings)
    return [float(optimizer.step("fusion", {"w": np.array([value], np.float32)})["w"][0]) for value in values]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [2.0, 4.0]),
        ("momentum", [2.0, 0.5 * 2 + 4]),
        # first moments 1 and 2.5; second ones by the three rules
        ("adam", [1 / (1 + 0.5), 2.5 / (4.75**0.5 + 0.5)]),
        ("yogi", [1 / (1 + 0.5), 2.5 / (5**0.5 + 0.5)]),
        ("adagrad", [1 / (2 + 0.5), 2.5 / (20**0.5 + 0.5)]),
    ],
)
def test_two_steps_by_hand(kind: str, expected: list[float]) -> None:
    assert changes(kind, [2.0, 4.0], server_momentum=0.5) == pytest.approx(expected, rel=1e-6)
    doubled = changes(kind, [2.0, 4.0], server_momentum=0.5, server_lr=2)
    assert doubled == pytest.approx([2 * value for value in expected], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_continues_bit_for_bit(kind: str, tmp_path: Path) -> None:
    settings, generator = Aggregation(server_optimizer=kind), np.random.default_rng(0)
    rounds = [{"w": generator.normal(size=(3, 2)).astype(np.float32)} for _ in range(4)]
    straight = ServerOptimizer(settings)
    expected = [straight.step("encoder/labs", value) for value in rounds][2:]
    first = ServerOptimizer(settings)
    for value in rounds[:2]:
        first.step("encoder/labs", value)
    groups = {"encoder/labs": rounds[0]}
    save_checkpoint(tmp_path, Checkpoint(run="r", study="s", round=2, groups=groups, moments=first.moments))
    found = load_checkpoint(tmp_path, "s")
    assert found is not None
    assert found.groups.keys() == groups.keys()
    second = ServerOptimizer(settings, found.moments)
    for value, change in zip(rounds[2:], expected, strict=True):
        assert np.array_equal(second.step("encoder/labs", value)["w"], change["w"])


def test_a_checkpoint_of_another_protocol_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(run="r", study="s", round=1, groups={"fusion": {"w": np.zeros(1, "f4")}}))
    (file,) = tmp_path.iterdir()
    arrays, note = tensorfile.parse(file.read_bytes())
    file.write_bytes(tensorfile.dump(arrays, {**note, "protocol": PROTOCOL_VERSION + 1}))
    with pytest.raises(UsageError, match=f"protocol {PROTOCOL_VERSION + 1}"):
        load_checkpoint(tmp_path, "s")
