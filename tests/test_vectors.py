"""Text as vectors of a frozen transformer in a folder: the right ones, no network, and one transformer for all."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cohorts import Hospital, study
from hospitals import build, publish
from transformer import WIDTH, write_transformer

from gapweave.shared.cli import _run
from gapweave.shared.config.study import Study
from gapweave.shared.errors import DataError, GapweaveError, UsageError

TEXTS = ["cough fever", "clear", "", "fever fever days " * 30, "no change", "well", "unheard of", "."]
SECRET = "zq77"


def of_vectors(sha256: str, width: int = WIDTH) -> Study:
    return study({"note": {"kind": "text", "vectors": {"width": width, "sha256": sha256}}})


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    hospital = Hospital(tmp_path)
    hospital.records()
    hospital.write("note.csv", {"id": [f"r{row}" for row in range(8)], "text": TEXTS})
    hospital.add("note", file="note.csv", columns=["text"], encoder="bert")
    return hospital


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("offline")
def test_vectors_are_the_mean_over_the_tokens_of_each_text(hospital: Hospital) -> None:
    """Against each text by itself, without padding; a long one counts by what the transformer can read."""
    from transformers import AutoModel, AutoTokenizer

    sha256 = write_transformer(hospital.folder / "bert")
    batch = hospital.load(of_vectors(sha256), labels=False).batch
    assert batch.present[:, 0].tolist() == [True, True, False, True, True, True, True, False]
    model = AutoModel.from_pretrained(hospital.folder / "bert").eval()
    tokenizer = AutoTokenizer.from_pretrained(hospital.folder / "bert")
    for row, text in enumerate(TEXTS):
        tokens = tokenizer([text], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            mean = model(**tokens).last_hidden_state[0].mean(0)
        expected = mean / mean.norm() if batch.present[row, 0] else torch.zeros(WIDTH)
        torch.testing.assert_close(batch.inputs["note"][row], expected, rtol=0, atol=1e-5)


def test_a_patients_vectors_do_not_depend_on_the_others_texts(tmp_path: Path) -> None:
    """To the last bit: texts that were encoded together moved each other's, for many patients at once."""
    sha256, found = write_transformer(tmp_path / "bert", width=96), []
    for number, others in enumerate((["well"] * 4, ["fever fever days " * 5, "clear", "days", "cough clear"])):
        (tmp_path / str(number)).mkdir()
        hospital = Hospital(tmp_path / str(number))
        hospital.records()
        texts = [*others, *["cough fever days"] * 4]
        hospital.write("note.csv", {"id": [f"r{row}" for row in range(8)], "text": texts})
        hospital.add("note", file="note.csv", columns=["text"], encoder=str(tmp_path / "bert"))
        found.append(hospital.load(of_vectors(sha256, 96), labels=False).batch.inputs["note"][4:])
    assert torch.equal(*found)
    assert len({row.numpy().tobytes() for row in found[0]}) == 1


def no_weights(hospital: Hospital) -> None:
    """A pickle would run code."""
    (hospital.folder / "bert" / "model.safetensors").rename(hospital.folder / "bert" / "pytorch_model.bin")


def no_config(hospital: Hospital) -> None:
    (hospital.folder / "bert" / "config.json").write_text(SECRET)


def code(hospital: Hospital) -> None:
    """A folder that asks for its own code."""
    path = hospital.folder / "bert" / "config.json"
    content = json.loads(path.read_text())
    content |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    path.write_text(json.dumps(content))
    (hospital.folder / "bert" / "own.py").write_text("raise SystemExit('code of the folder was run')")


def note(**keys: Any) -> Callable[[Hospital], None]:
    return lambda hospital: hospital.content["data"]["note"].update(keys)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("change", "width", "error", "text"),
    [
        (note(encoder=None), WIDTH, UsageError, "data.note.encoder: the study asks for vectors of a transformer"),
        (note(encoder="other"), WIDTH, DataError, "there is no other"),
        (note(encoder="note.csv"), WIDTH, DataError, "this is a file, not a folder"),
        (no_weights, WIDTH, DataError, "the folder holds no transformer that can be read"),
        (no_config, WIDTH, DataError, "the folder holds no transformer that can be read"),
        (code, WIDTH, DataError, "the folder holds no transformer that can be read"),
        (lambda _: None, 32, UsageError, "the transformer's vectors have 24 numbers, the study's 32"),
    ],
)
def test_what_is_refused(
    hospital: Hospital, change: Callable[[Hospital], None], width: int, error: type[GapweaveError], text: str
) -> None:
    sha256 = write_transformer(hospital.folder / "bert")
    change(hospital)
    with pytest.raises(GapweaveError) as caught:
        hospital.load(of_vectors(sha256, width))
    assert type(caught.value) is error
    assert text in str(caught.value)
    assert SECRET not in str(caught.value)


def test_another_transformer_is_refused_with_both_sums(hospital: Hospital) -> None:
    ours = write_transformer(hospital.folder / "bert", seed=1)
    theirs = write_transformer(hospital.folder / "theirs", seed=2)
    with pytest.raises(UsageError, match=f"has the SHA-256 {ours}. The study names {theirs}"):
        hospital.load(of_vectors(theirs))


def test_without_the_extra(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = write_transformer(hospital.folder / "bert")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"gapweave\[text\]"):
        hospital.load(of_vectors(sha256))


def test_a_federation_on_vectors(tmp_path: Path) -> None:
    sha256 = write_transformer(tmp_path / "bert")
    (tmp_path / "sites").mkdir()
    for name in ("north", "south"):
        hospital = build(tmp_path / name, name, held=("labs", "note"))
        hospital.content["data"]["note"]["encoder"] = str(tmp_path / "bert")
        (tmp_path / "sites" / f"{name}.yaml").write_text(publish(hospital).read_text())
        for file in ("records.csv", "labs.csv", "note.csv"):
            (tmp_path / "sites" / f"{name}-{file}").write_bytes((hospital.folder / file).read_bytes())
        content = yaml.safe_load((tmp_path / "sites" / f"{name}.yaml").read_text())
        for source in content["data"].values():
            source["file"] = f"{name}-{source['file']}"
        (tmp_path / "sites" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    content = json.loads(of_vectors(sha256).canonical())
    content["training"] |= {"rounds": 2}
    content["privacy"] |= {"enabled": False}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    assert _run(["simulate", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "run")], debug=True) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {row["status"] for row in summary["sites"].values()} == {"ok"}
