"""What a site keeps of a run: whole or not there, and read back as it was."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import four_kinds, random_model

from gapweave.client.state import RoundState, RunFolder, read_model, to_arrays, to_tensors
from gapweave.shared import tensorfile
from gapweave.shared.config.study import study_from_json
from gapweave.shared.errors import GapweaveError
from gapweave.shared.files import write_atomically, write_new
from gapweave.shared.model import groups


def some_state(number: int = 4) -> RoundState:
    part = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3) + number, "scalar": np.asarray(2.5, np.float32)}
    return RoundState(
        round=number,
        request="a" * 64,
        event={"kind": "dp_sgd", "steps": 3, "noise_multiplier": 1.25},
        private={"encoder/labs": part, "imputer": part},
        momentum={"fusion": {"bias": np.zeros(0, np.float32)}},
        reply={"fusion": part},
    )


def assert_same(one: RoundState, other: RoundState) -> None:
    assert (one.round, one.request, one.event) == (other.round, other.request, other.event)
    for name in ("private", "momentum", "reply"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.keys() == right.keys()
        for group, part in left.items():
            assert part.keys() == right[group].keys()
            for key, value in part.items():
                assert value.shape == right[group][key].shape
                assert value.tobytes() == right[group][key].tobytes()


def test_a_site_starts_before_the_first_round(tmp_path: Path) -> None:
    assert_same(RunFolder(tmp_path, "run").load(), RoundState())


def test_a_round_is_read_back_as_it_was(tmp_path: Path) -> None:
    """Scalars stay scalars and empty tensors stay; the reply is the same to the last bit."""
    RunFolder(tmp_path, "run").save(some_state())
    assert_same(RunFolder(tmp_path, "run").load(), some_state())
    RunFolder(tmp_path, "run").save(some_state(5))
    assert_same(RunFolder(tmp_path, "run").load(), some_state(5))
    assert_same(RunFolder(tmp_path, "another-run").load(), RoundState())


def test_a_crash_leaves_the_old_round_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path, "run")
    folder.save(some_state(1))

    def crash(*_: object) -> None:
        raise OSError(5, "power cut")

    for moment in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os if moment == "fsync" else Path, moment, crash)
            with pytest.raises(GapweaveError, match="power cut"):
                folder.save(some_state(2))
        assert_same(RunFolder(tmp_path, "run").load(), some_state(1))
    folder.save(some_state(2))
    assert_same(RunFolder(tmp_path, "run").load(), some_state(2))


def test_a_file_is_durable_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("sync") or sync(handle))
    monkeypatch.setattr(Path, "replace", lambda self, target: order.append("rename") or replace(self, target))
    write_atomically(tmp_path / "file", b"content")
    assert order == ["sync", "rename", "sync"], "content, name, and the folder that holds the name"
    assert (tmp_path / "file").read_bytes() == b"content"


def test_state_is_for_its_owner_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "state", "run")
    folder.save(some_state())
    folder.save_model("model", {}, {})
    for path in [folder.path, *folder.path.iterdir()]:
        assert path.stat().st_mode & 0o077 == 0, path.name


def test_an_existing_file_is_not_overwritten_by_write_new(tmp_path: Path) -> None:
    write_new(tmp_path / "site.yaml", "first")
    with pytest.raises(GapweaveError, match="exists"):
        write_new(tmp_path / "site.yaml", "second")
    assert (tmp_path / "site.yaml").read_text() == "first"


@pytest.mark.parametrize("run", ["../outside", "/tmp/outside", "a/b", "..", "", ".", "a\0b", "run\n", "x" * 300])
def test_a_run_id_cannot_lead_out_of_the_state_folder(tmp_path: Path, run: str) -> None:
    # Believed: run ids are our own. True: they come in a message, and named a folder to write to.
    state = tmp_path / "inner" / "state"
    with pytest.raises(GapweaveError):
        RunFolder(state, run)
    assert not (tmp_path / "outside").exists()
    assert not list(tmp_path.rglob("outside"))


def test_a_kept_model_comes_back_with_its_card(tmp_path: Path) -> None:
    model = random_model(four_kinds())
    folder = RunFolder(tmp_path, "run")
    folder.save_model("model", groups(model), {"site": "north", "prior": [0.25]})
    loaded, card = read_model(folder.path / "model.safetensors")
    assert card == {"site": "north", "prior": [0.25]}
    for group, part in groups(model).items():
        for name, value in part.items():
            assert torch.equal(loaded[group][name], value)
    with pytest.raises(GapweaveError, match="left no finetuned"):
        read_model(folder.path / "finetuned.safetensors")
    assert read_model(folder.path / "model.safetensors")[1] == card


def test_arrays_and_tensors_are_copies() -> None:
    """What was packed for sending does not change when training goes on."""
    tensor = torch.zeros(3)
    arrays = to_arrays({"fusion": {"bias": tensor}})
    tensors = to_tensors(arrays)
    tensor += 1
    arrays["fusion"]["bias"] += 5
    assert not tensors["fusion"]["bias"].any()
    assert tensor.tolist() == [1, 1, 1]


def test_a_study_is_remembered_for_later_messages(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    assert folder.study() is None
    of = four_kinds()
    folder.keep_study(of.canonical())
    assert study_from_json(RunFolder(tmp_path, "run").study()).sha256 == of.sha256


def test_a_tensor_file_holds_groups_and_a_note(tmp_path: Path) -> None:
    arrays = {"encoder/labs": {"wide.weight": np.ones((2, 3), np.float32)}, "fusion": {"b": np.zeros((), np.float32)}}
    content = tensorfile.dump(arrays, {"round": 3, "text": "é"})
    found, note = tensorfile.parse(content)
    assert note == {"round": 3, "text": "é"}
    assert {group: {name: value.shape for name, value in part.items()} for group, part in found.items()} == {
        "encoder/labs": {"wide.weight": (2, 3)},
        "fusion": {"b": ()},
    }
    assert tensorfile.parse(tensorfile.dump({}, {"empty": True})) == ({}, {"empty": True})
    transposed = {"g": {"x": np.arange(6, dtype=np.float32).reshape(2, 3).T}}
    assert np.array_equal(tensorfile.parse(tensorfile.dump(transposed, {}))[0]["g"]["x"], transposed["g"]["x"])
