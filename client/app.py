"""The Flower ClientApp: messages in, participants out. Errors cross the wire as a class and a fixed text."""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from gapweave.client.network import Networks
from gapweave.client.participant import Participant
from gapweave.client.sources.files import forget_files
from gapweave.client.state import RunFolder
from gapweave.client.supernode import CONTACT, TROUBLE
from gapweave.shared.config import load_site
from gapweave.shared.config.study import Study, study_from_json
from gapweave.shared.errors import BudgetExhausted, DataError, GapweaveError, NotApproved, NotIntact, RefusedError
from gapweave.shared.files import write_atomically
from gapweave.shared.messages import Evaluate, Finish, Prepare, Train, read_request
from gapweave.shared.privacy.head import Head
from gapweave.shared.tensorfile import Arrays
from gapweave.shared.wire import EVALUATE, TRAIN, ProtocolError, pack, request_hash, unpack

log = logging.getLogger(__name__)

app = ClientApp()

details: dict[str, str] = {}
"""The last error of each site of this process in full: for simulations, which may show everything; never sent."""

FIXED_TEXTS: dict[type[Exception], str] = {
    BudgetExhausted: "the site's privacy budget does not allow it",
    NotIntact: "the site's ledger is not intact",
    NotApproved: "the site has not approved this study: gapweave site approve SITE.yaml --study STUDY",
    RefusedError: "the site's policy does not allow it",
    DataError: "the site's data cannot be used for this study",
    GapweaveError: "the site cannot take part",
}
"""All that a server learns of an error; the detail stays in the site's own log."""

Answer = tuple[dict[str, Any], Arrays]


@app.query("prepare")  # type: ignore[untyped-decorator]
def prepare(message: Message, context: Context) -> Message:
    """The handshake: the study in, the site's capability out."""

    def work(header: dict[str, Any], arrays: Arrays) -> Answer:
        asked = read_request(Prepare, header)
        study = _offered(asked)
        site = participant(context.node_config, study)
        folder = site.folder(asked.run)
        folder.check_study(study.canonical())
        capability = site.prepare(asked.run, Head.from_dict(asked.echo))
        folder.keep_study(study.canonical())  # a run that was refused was never prepared
        return asdict(capability), {}

    return _reply(message, context, work)


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """One round: shared groups in, noised updates out."""

    def work(header: dict[str, Any], arrays: Arrays) -> Answer:
        asked = read_request(Train, header)
        site = participant(context.node_config, _study(context, asked))
        state = site.train(asked.run, asked.round, request_hash(TRAIN, header, arrays), arrays)
        return {"round": asked.round, "event": state.event, "ledger": state.ledger}, state.reply

    return _reply(message, context, work)


@app.query("evaluate")  # type: ignore[untyped-decorator]
def evaluate(message: Message, context: Context) -> Message:
    """How well the final model does, or the one after a round: its shared groups in, a noised table of counts out."""

    def work(header: dict[str, Any], arrays: Arrays) -> Answer:
        asked = read_request(Evaluate, header)
        site = participant(context.node_config, _study(context, asked))
        after = asked.round if asked.look else None
        return dict(site.evaluate(asked.run, request_hash(EVALUATE, header, arrays), arrays, after)), {}

    return _reply(message, context, work)


@app.train("finish")  # type: ignore[untyped-decorator]
def finish(message: Message, context: Context) -> Message:
    """The last message: the final shared groups in, only a status out."""

    def work(header: dict[str, Any], arrays: Arrays) -> Answer:
        asked = read_request(Finish, header)
        participant(context.node_config, _study(context, asked)).finish(asked.run, arrays)
        return {}, {}

    return _reply(message, context, work)


def _reply(message: Message, context: Context, work: Callable[[dict[str, Any], Arrays], Answer]) -> Message:
    """Do the work; an exception becomes a status that says nothing of the data."""
    try:
        header, arrays = unpack(message.content)
        answer, reply = work(header, arrays)
        _note(None)
        return Message(pack({"status": "ok", **answer}, reply), reply_to=message)
    except Exception as error:
        name = _name(context)
        details[name] = " ".join(str(error).split())  # a foreign part's own text may have lines
        return Message(pack({**_status(error), "site": name}, {}), reply_to=message)


def _status(error: Exception) -> dict[str, str]:
    """What the server learns of an error; the rest goes to the site's own log."""
    if isinstance(error, ProtocolError):
        return {"status": "failed", "error": "ProtocolError", "text": str(error)}
    if isinstance(error, GapweaveError):
        log.warning("%s", error)
        _note(str(error))
        status = "refused" if isinstance(error, RefusedError) else "failed"
        kind = next(kind for kind in type(error).__mro__ if kind in FIXED_TEXTS)
        return {"status": status, "error": kind.__name__, "text": FIXED_TEXTS[kind]}
    # Whatever it was, its text may quote a record: not even the site's own log gets it.
    reference = uuid.uuid4().hex[:12]
    places = [f"{Path(at.filename).name}:{at.lineno} {at.name}" for at in traceback.extract_tb(error.__traceback__)]
    log.error("internal error %s: %s at %s", reference, type(error).__name__, " < ".join(reversed(places)))
    _note(f"internal error {reference} ({type(error).__name__}). The log of the SuperNode names its place")
    text = f"internal error at the site, reference {reference}"
    return {"status": "failed", "error": "InternalError", "text": text}


def _note(trouble: str | None) -> None:
    """Keep what a deployed site failed at, for its own `site status`, until it answers a message well."""
    contact = os.environ.get(CONTACT)
    if contact is None:
        return
    file = Path(contact).with_name(TROUBLE)
    with suppress(OSError):  # a full disk is trouble enough
        if trouble is None:
            file.unlink(missing_ok=True)
        else:
            write_atomically(file, json.dumps({"time": time.time(), "text": trouble}).encode(), durable=False)


def _name(context: Context) -> str:
    """The site's declared name, for the status of an error."""
    try:
        return load_site(Path(str(context.node_config["site"]))).name
    except (KeyError, GapweaveError):
        return f"node-{context.node_id}"


def _state(config: Mapping[str, Any]) -> Path:
    """The site's state folder: given by a simulation, else what its site file says."""
    if config.get("state"):
        return Path(str(config["state"]))
    file = Path(str(config["site"]))
    return file.parent / load_site(file).state


def _offered(asked: Prepare) -> Study:
    """The study of a handshake."""
    try:
        return study_from_json(asked.study)
    except (ValueError, RecursionError):
        raise ProtocolError("a study that cannot be read", remedy="Send it as `submit` does") from None


def _study(context: Context, asked: Train | Evaluate | Finish) -> Study:
    """The study that the handshake of this run brought, which the request must name."""
    content = RunFolder(_state(context.node_config), asked.run).study()
    if content is None:
        raise RefusedError("this run was never prepared", remedy="Start with the handshake")
    study = study_from_json(content)
    if asked.study != study.sha256:
        raise RefusedError("the request names another study than the handshake", remedy="Start another run")
    return study


def participant(config: Mapping[str, Any], study: Study) -> Participant:
    """The site's part in a study; in one process (the inline engine) its data are read once.

    Args:
        config: Flower's node configuration: `site` (file), and for simulations `state`, `data`, `simulation` and
            `anchored`.
        study: what all sites agree on.
    """
    file = Path(str(config["site"]))
    data = Path(str(config["data"])) if config.get("data") else None
    simulation = bool(config.get("simulation", False))
    anchored = bool(config.get("anchored", not simulation))
    now = file.stat()
    changed = (now.st_mtime_ns, now.st_size, now.st_ino)
    return _cached(file, changed, _state(config), data, simulation, anchored, study.canonical())


_networks: Networks = {}


@lru_cache(maxsize=1024)
def _cached(
    file: Path, changed: tuple[int, ...], state: Path, data: Path | None, simulation: bool, anchored: bool, study: str
) -> Participant:
    return Participant(
        study_from_json(study),
        load_site(file),
        site_file=file,
        state=state,
        data_dir=data,
        simulation=simulation,
        anchored=anchored,
        networks=_networks,
    )


def forget() -> None:
    """Drop the participants and tables of finished simulations."""
    _cached.cache_clear()
    _networks.clear()
    forget_files()
    details.clear()
