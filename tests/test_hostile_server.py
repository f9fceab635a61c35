"""A hostile server, message by message: it changes nothing at a site, and learns that it was refused.

The site is a deployed one: no simulation, one approved study, its real Flower app. Each request comes to a process
without memory, as Flower starts one for every message, in which nothing may open the site's data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hospitals import Wire, build, plan_of

from gapweave.client import app as client_app
from gapweave.client import participant as participant_module
from gapweave.client.app import FIXED_TEXTS
from gapweave.client.state import RunFolder
from gapweave.client.training import Step
from gapweave.server.aggregation import initial_groups
from gapweave.shared import wire
from gapweave.shared.config.study import Study
from gapweave.shared.errors import RefusedError
from gapweave.shared.privacy.ledger import LedgerView, read_ledger
from gapweave.shared.tensorfile import Arrays

RUN = "run-1"
ASKED = plan_of(private=True, sharing={"policy": "heads"})
"""What the hospital read and approved; three rounds."""
SECOND = plan_of(private=True, sharing={"policy": "heads"}, name="second")
"""Approved too."""
SHARED = ["fusion", "head/labs", "head/note", "head/vitals"]
PROTOCOL_TEXTS = {
    "a request of another form. Both sides must run the same Gapweave",
    "a message without a Gapweave header. Both sides must run Gapweave",
    "a study that cannot be read. Send it as `submit` does",
    "an array that cannot be read. Both sides must run Gapweave",
    "an array of type float64. Parameters travel as float32",
    "the other side speaks protocol 2, this one 1. Install the same Gapweave version on both sides",
    "the other side speaks protocol None, this one 1. Install the same Gapweave version on both sides",
    "the other side speaks protocol 1 , this one 1. Install the same Gapweave version on both sides",
}
"""What a request that cannot be read is told: it follows from the request alone."""


def model(*names: str, factor: float = 1.0) -> Arrays:
    """Initial groups, the shared ones by default."""
    start = initial_groups(plan_of(private=True))
    return {
        group: {name: (value * np.float32(factor)) for name, value in start[group].items()} for group in names or SHARED
    }


def round_header(**keys: Any) -> dict[str, Any]:
    return {"run": RUN, "study": ASKED.sha256, "round": 2, **keys}


@dataclass
class Site:
    """A hospital, and its end of the wire."""

    folder: Path
    grid: Wire

    def ask(self, kind: str, content: RecordDict) -> tuple[dict[str, Any], Arrays]:
        client_app.forget()
        return wire.unpack(self.grid.ask(kind, content).content)

    def prepare(self, of: Study = ASKED, run: str = RUN) -> dict[str, Any]:
        return self.ask(wire.PREPARE, wire.pack({"run": run, "study": of.canonical()}, {}))[0]

    def train(self, number: int, arrays: Arrays | None = None) -> tuple[dict[str, Any], Arrays]:
        return self.ask(wire.TRAIN, wire.pack(round_header(round=number), arrays or model()))

    def finish(self, arrays: Arrays | None = None) -> dict[str, Any]:
        return self.ask(wire.FINISH, wire.pack(round_header(round=1), arrays or model()))[0]

    @property
    def ledger(self) -> LedgerView:
        return read_ledger(self.folder / "state")

    def traces(self, root: Path) -> dict[str, bytes]:
        """Everything on disk, folders too; the ledger by its entries."""
        files = {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(root.rglob("*"))}
        rest = {path: content for path, content in files.items() if "/state/ledger" not in path}
        return rest | {"ledger": repr(self.ledger.entries).encode()}


def connect(folder: Path, patients: int = 24, seed: int = 0) -> Site:
    hospital = build(folder, "north", patients=patients, seed=seed)
    hospital.update("policy", studies=[ASKED.sha256, SECOND.sha256], epsilon=100.0)
    hospital.update("patients", declared=24)
    return Site(folder, Wire([hospital], simulation=False))


@pytest.fixture(autouse=True)
def _fresh_sites() -> Iterator[None]:
    client_app.forget()
    yield
    client_app.forget()


def begun(folder: Path) -> Site:
    """After the handshake and one honest round."""
    site = connect(folder)
    assert site.prepare()["status"] == "ok"
    assert site.train(1)[0]["status"] == "ok"
    return site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return begun(tmp_path / "hospital")


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """One site for all requests that change nothing."""
    return begun(tmp_path_factory.mktemp("town") / "hospital")


# Requests that a hostile server may send after the first round.

Request = tuple[str, RecordDict]


def prepare(of: Study | str, **keys: Any) -> Request:
    text = of if isinstance(of, str) else of.canonical()
    return wire.PREPARE, wire.pack({"run": RUN, "study": text, **keys}, {})


def train(arrays: Arrays | None = None, **keys: Any) -> Request:
    return wire.TRAIN, wire.pack(round_header(**keys), model() if arrays is None else arrays)


def last(arrays: Arrays | None = None, **keys: Any) -> Request:
    return wire.FINISH, wire.pack(round_header(**keys), model() if arrays is None else arrays)


def without(key: str, request: Request) -> Request:
    kind, content = request
    header, arrays = wire.unpack(content)
    packed = wire.pack({name: value for name, value in header.items() if name not in (key, "protocol")}, arrays)
    return kind, packed


def raw(text: object) -> Request:
    """A header that is written by hand."""
    return wire.TRAIN, RecordDict({wire.HEADER: ConfigRecord({"json": text})})


def bent(value: float) -> Arrays:
    """A model with one number replaced."""
    arrays = model()
    arrays["fusion"] = {name: part.copy() for name, part in arrays["fusion"].items()}
    next(iter(arrays["fusion"].values())).reshape(-1)[0] = value
    return arrays


def spread() -> Arrays:
    """One tensor with fewer numbers than the site's, which broadcasting would fill."""
    arrays = model()
    arrays["head/labs"] = {name: part.reshape(-1)[:1] for name, part in arrays["head/labs"].items()}
    return arrays


def doubles() -> Request:
    kind, content = train()
    content["fusion"] = ArrayRecord(
        {name: Array(value.astype(np.float64)) for name, value in model()["fusion"].items()}
    )
    return kind, content


def bomb() -> Request:
    """An array of a few bytes that says it is of 4 TiB."""
    kind, content = train()
    head = str({"descr": "<f4", "fortran_order": False, "shape": (2**40,)}).encode()
    head += b" " * (63 - (len(head) + 10) % 64) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + b"1234"
    content["fusion"] = ArrayRecord({"x": Array("float32", (2**40,), "numpy.ndarray", data)})
    return kind, content


def pickled() -> Request:
    kind, content = train()
    content["fusion"] = ArrayRecord({"x": Array("object", (1,), "numpy.ndarray", b"\x80\x04K\x01.")})
    return kind, content


OTHER_STUDIES = {
    "no privacy": {"private": False},
    "more rounds": {"private": True, "training": {"rounds": 30}},
    "more steps": {"private": True, "training": {"local_steps": 50}},
    "a larger clip": {"private": True, "privacy": {"max_grad_norm": 1e6}},
    "less noise": {"private": True, "privacy": {"epsilon": 90}},
    "a larger delta": {"private": True, "privacy": {"delta": 0.1}},
    "encoders shared": {"private": True, "sharing": {"policy": "all"}},
    "fine-tuning": {"private": True, "training": {"finetune": True}},
}
STRANGE_ROUNDS: dict[str, Any] = {
    "zero": 0,
    "negative": -1,
    "the next after the last": 4,
    "far beyond": 10**6,
    "too large for 64 bits": 10**30,
    "true": True,
    "a fraction": 2.5,
    "a whole fraction": 2.0,
    "text": "2",
    "null": None,
    "a list": [2],
    "nan": math.nan,
}
STRANGE_RUNS: dict[str, Any] = {
    "above": "../../../escaped",
    "absolute": "/tmp/escaped-run",
    "dot": ".",
    "dots": "..",
    "empty": "",
    "with a slash": "run-1/../run-1",
    "with a line": "run-1\n",
    "with a null": "run-1\0",
    "long": "r" * 101,
    "never prepared": "run-2",
    "a number": 1,
    "a list": ["run-1"],
    "null": None,
}
EXTRA: dict[str, Any] = {
    "steps": 50,
    "n_hat": 1,
    "noise_multiplier": 0,
    "max_grad_norm": 1e9,
    "sample_rate": 1,
    "metrics": True,
    "groups": ["encoder/labs"],
    "simulation": True,
    "state": "/tmp",
}
GROUPS: dict[str, Callable[[], Arrays]] = {
    "an encoder that stays at home": lambda: model(*SHARED, "encoder/labs"),
    "the imputer that stays at home": lambda: model(*SHARED, "imputer"),
    "an encoder alone": lambda: model("encoder/labs"),
    "one group less": lambda: model(*SHARED[1:]),
    "no groups": dict,
    "a group of another name": lambda: model() | {"../fusion": model()["fusion"]},
    "a tensor more": lambda: model() | {"fusion": {**model()["fusion"], "more": np.zeros(1, np.float32)}},
    "tensors to be spread": spread,
    "a nan": lambda: bent(math.nan),
    "an infinity": lambda: bent(-math.inf),
}

HOSTILE: dict[str, Callable[[], Request]] = {
    **{f"handshake: {name}": lambda keys=keys: prepare(plan_of(**keys)) for name, keys in OTHER_STUDIES.items()},
    **{
        f"handshake of a new run: {name}": lambda keys=keys: prepare(plan_of(**keys), run="run-2")
        for name, keys in OTHER_STUDIES.items()
    },
    "handshake: another approved study": lambda: prepare(SECOND),
    "handshake with an echo of text": lambda: prepare(ASKED, echo="ledger"),
    "handshake with an echo of fractions": lambda: prepare(ASKED, echo={"site": "north", "length": 1.5, "hash": "f"}),
    "handshake: no JSON": lambda: prepare("{"),
    "handshake: no study": lambda: prepare("[1]"),
    "handshake: unknown key": lambda: prepare(ASKED.canonical()[:-1] + ',"n_hat":1}'),
    "handshake: endless nesting": lambda: prepare("[" * 100_000),
    **{f"handshake with {key}": lambda key=key: prepare(ASKED, **{key: EXTRA[key]}) for key in EXTRA},
    **{
        f"handshake of run {name}": lambda run=run: prepare(SECOND.canonical()[:-1], run=run)
        for name, run in STRANGE_RUNS.items()
    },
    **{f"round {name}": lambda number=number: train(round=number) for name, number in STRANGE_ROUNDS.items()},
    **{f"round of run {name}": lambda run=run: train(run=run) for name, run in STRANGE_RUNS.items()},
    **{f"round with {key}": lambda key=key: train(**{key: EXTRA[key]}) for key in EXTRA},
    **{f"round with {name}": lambda make=make: train(make()) for name, make in GROUPS.items()},
    **{f"round without {key}": lambda key=key: without(key, train()) for key in ("run", "study", "round")},
    "round again with another model": lambda: train(model(factor=1.5), round=1),
    "round of another study": lambda: train(study=SECOND.sha256),
    "round of a whole study": lambda: train(study=ASKED.canonical()),
    "round of a study with a fraction": lambda: train(study=1.5),
    "round of doubles": doubles,
    "round of 4 TiB": bomb,
    "round of pickles": pickled,
    **{f"end with {key}": lambda key=key: last(**{key: EXTRA[key]}) for key in EXTRA},
    **{f"end with {name}": lambda make=make: last(make()) for name, make in GROUPS.items()},
    **{f"end of run {name}": lambda run=run: last(run=run) for name, run in STRANGE_RUNS.items()},
    "end of another study": lambda: last(study=SECOND.sha256),
    "another protocol": lambda: train(protocol=2),
    "a protocol of text": lambda: train(protocol="1 "),
    "a true protocol": lambda: train(protocol=True),
    "no protocol": lambda: raw('{"run": "run-1"}'),
    "no JSON": lambda: raw("{"),
    "a list": lambda: raw("[]"),
    "a number": lambda: raw(7),
    "endless nesting": lambda: raw("[" * 100_000),
    "no header": lambda: (wire.TRAIN, RecordDict()),
}


def no_data(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on the site's data cannot be opened; whoever tries is noted."""
    tried: list[str] = []

    def refuse(*_: object, **__: object) -> None:
        tried.append("data were opened")
        raise AssertionError("data were opened")

    monkeypatch.setattr(participant_module, "load_cohort", refuse)
    return tried


def check_reply(header: dict[str, Any], arrays: Arrays) -> None:
    """Nothing but the fixed words of a refusal."""
    assert not arrays
    assert header.keys() == {"protocol", "status", "error", "text", "site"}
    assert (header["protocol"], header["site"]) == (1, "north")
    if header["error"] == "ProtocolError":
        assert header["status"] == "failed"
        assert header["text"] in PROTOCOL_TEXTS
    else:
        kind = next(kind for kind in FIXED_TEXTS if kind.__name__ == header["error"])
        assert header["status"] == ("refused" if issubclass(kind, RefusedError) else "failed")
        assert header["text"] == FIXED_TEXTS[kind]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_changes_nothing_and_learns_only_that(
    name: str, town: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, tried = town.traces(town.folder.parent), no_data(monkeypatch)
    check_reply(*town.ask(*HOSTILE[name]()))
    assert not tried
    assert town.traces(town.folder.parent) == before


def test_the_replies_do_not_tell_two_hospitals_apart(tmp_path: Path) -> None:
    """Other patients, another number of them, more rounds done: the same words to every hostile request."""
    one, other = connect(tmp_path / "one"), connect(tmp_path / "other", patients=60, seed=4)
    for site in (one, other):
        site.prepare()
        site.train(1)
    other.prepare(SECOND, "run-9")
    for name, make in HOSTILE.items():
        kind, content = make()
        assert one.ask(kind, content) == other.ask(kind, content), name


def test_a_site_without_a_handshake_refuses_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, tried = connect(tmp_path / "hospital"), no_data(monkeypatch)
    for request in (train(), train(round=1), last(), last(round=1)):
        check_reply(*site.ask(*request))
    assert not tried
    assert not (site.folder / "state").exists(), "not even a folder"


@pytest.mark.parametrize("kind", ["evaluate", "query", "query.metrics", "query.ledger", "train.again", "train.state"])
def test_there_is_no_other_question(kind: str, town: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower turns the exception into an error reply of its class and text: they name the type of the message only."""
    before, tried = town.traces(town.folder.parent), no_data(monkeypatch)
    client_app.forget()
    (context,) = town.grid._contexts.values()
    with pytest.raises(ValueError, match="function registered") as caught:
        client_app.app(Message(wire.pack(round_header(), model()), 1000, kind, group_id=kind), context)
    assert str(town.folder) not in str(caught.value)
    assert "north" not in str(caught.value)
    assert not tried
    assert town.traces(town.folder.parent) == before


def test_what_rides_beside_the_header_is_not_read(tmp_path: Path) -> None:
    plain, laden = connect(tmp_path / "one"), connect(tmp_path / "two")
    content = wire.pack({"run": RUN, "study": ASKED.canonical()}, model("encoder/labs"))
    content["config"] = ConfigRecord({"noise_multiplier": 0.0, "n_hat": 1, "local_steps": 99})
    answers = laden.ask(wire.PREPARE, content)[0], plain.prepare()
    assert [answer.pop("ledger")["length"] for answer in answers] == [3, 3]
    assert answers[0] == answers[1]
    assert [entry.body for entry in laden.ledger.entries] == [entry.body for entry in plain.ledger.entries]


# Orders of honest requests that are not honest.


def charged(site: Site) -> list[str]:
    return [event.released for event in site.ledger.events()]


def test_the_schedule_is_all_that_can_be_had(site: Site) -> None:
    """Skipping, repeating and going back buys no round more, and no round twice."""
    _, first = site.train(3)
    assert sorted(first) == SHARED
    for number in (2, 1, 3, 4, 5):
        check_reply(*site.train(number, model(factor=1.1)))
    again, arrays = site.train(3)
    assert again["status"] == "ok"
    assert all(np.array_equal(arrays[group][name], value) for group in first for name, value in first[group].items())
    assert charged(site) == ["update of round 1", "update of round 3"]
    assert site.ledger.spent() <= 8


def test_a_handshake_again_reserves_nothing_more(site: Site) -> None:
    before = site.ledger.entries
    assert site.prepare() == site.prepare()
    assert site.ledger.entries == before


def test_a_lying_echo_stops_the_site_and_tells_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that claims entries which the ledger lacks: the hospital's people have to look at it."""
    before, tried = site.ledger.entries, no_data(monkeypatch)
    for length, digest in ((10**6, "f" * 64), (1, "f" * 64)):
        echo = {"site": "north", "length": length, "hash": digest}
        check_reply(*site.ask(*prepare(ASKED, echo=echo)))
    assert site.ledger.entries == before
    assert not tried


def test_a_run_that_is_over_stays_over(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    _, reply = site.train(2)
    assert site.finish()["status"] == "ok"
    kept = (RunFolder(site.folder / "state", RUN).path / "model.safetensors").read_bytes()
    before, tried = site.ledger.entries, no_data(monkeypatch)
    assert site.finish()["status"] == "ok", "a server that was interrupted says it twice"
    check_reply(site.finish(model(factor=2.0)), {})
    for number in (1, 2, 3):
        check_reply(*site.train(number, model(factor=1.1)))
    again = site.train(2)
    assert again[0]["status"] == "ok"
    assert all(np.array_equal(again[1][group][name], value) for group in reply for name, value in reply[group].items())
    assert site.ledger.entries == before
    assert not tried
    monkeypatch.undo()
    site.prepare()
    check_reply(*site.train(3))
    assert site.ledger.entries == before
    assert (RunFolder(site.folder / "state", RUN).path / "model.safetensors").read_bytes() == kept


def test_a_run_cannot_end_before_its_first_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a server could have the hospital fine-tune and keep any model."""
    site = connect(tmp_path / "hospital")
    site.prepare()
    before, tried = site.traces(tmp_path), no_data(monkeypatch)
    check_reply(site.finish(), {})
    assert site.traces(tmp_path) == before
    assert not tried


def test_a_study_that_the_hospital_takes_back_is_over(site: Site, tmp_path: Path) -> None:
    """The handshake is no licence: the policy is asked at every message."""
    text = (site.folder / "site.yaml").read_text(encoding="utf-8")
    (site.folder / "site.yaml").write_text(text.replace(ASKED.sha256, "f" * 64), encoding="utf-8")
    before = site.traces(tmp_path)
    for request in (prepare(ASKED), train(), train(round=1), last()):
        check_reply(*site.ask(*request))
    assert site.traces(tmp_path) == before


# Parameters that aim at one patient.


@pytest.mark.parametrize("sign", [-1, 1])
def test_parameters_that_no_study_has_are_refused_before_the_ledger_is_asked(
    sign: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = connect(tmp_path / "hospital")
    site.prepare()
    sent = model()
    group, name = next((group, name) for group, part in sent.items() for name in part)
    sent[group][name] = sent[group][name].copy()
    sent[group][name].flat[0] = sign * 1001
    before = site.traces(tmp_path)
    assert site.train(1, sent)[0]["status"] == "refused"
    assert "beyond 1000" in caplog.text
    assert site.traces(tmp_path) == before
    sent[group][name].flat[0] = sign * 1000
    assert site.train(1, sent)[0]["status"] == "ok"


@pytest.mark.parametrize("factor", [1e3, 1e10, 1e30, 1e38])
def test_huge_parameters_get_no_more_than_the_clip(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everyone's contribution is clipped: without noise a round moves the groups by at most lr n C / (q n_hat).

    So it is by itself, were the bounds on what a site takes and on where its own steps lead not there.
    """
    for room in ("participant", "training"):
        monkeypatch.setattr(f"gapweave.client.{room}.LARGEST", math.inf)
    site = connect(tmp_path / "hospital")
    site.prepare()
    monkeypatch.setattr(Step, "_noised", lambda self, total: total)
    sent = {
        group: {name: np.full_like(value, factor) for name, value in part.items()} for group, part in model().items()
    }
    header, reply = site.train(1, sent)
    assert header["status"] == "ok"
    moved = np.concatenate([value.ravel() for part in reply.values() for value in part.values()])
    rounding = factor * np.finfo(np.float32).eps * math.sqrt(len(moved))
    assert np.linalg.norm(moved) <= ASKED.training.lr * 1.001 + rounding
    kept = RunFolder(site.folder / "state", RUN).load().private
    start = initial_groups(plan_of(private=True))
    away = [kept[group][name] - start[group][name] for group in kept for name in kept[group]]
    assert np.linalg.norm(np.concatenate([part.ravel() for part in away])) <= ASKED.training.lr * 1.001
