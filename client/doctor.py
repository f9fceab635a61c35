"""`gapweave site check`, the part beyond the data: machine, network, hub, ledger, budget.

Each check that fails says what to do; one that cannot be made because an earlier one failed is left out.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from gapweave.client.anchor import Anchor, check_remembered
from gapweave.client.approval import site_plan
from gapweave.client.budget import Budget
from gapweave.client.keys import check_key, public_file
from gapweave.client.service import Deployment
from gapweave.client.sources.findings import Finding, Status
from gapweave.client.supernode import known_to_hub
from gapweave.shared import PROTOCOL_VERSION, __version__
from gapweave.shared.config.connection import Connection
from gapweave.shared.config.site import Site
from gapweave.shared.config.study import Study
from gapweave.shared.errors import GapweaveError, UsageError
from gapweave.shared.privacy.ledger import LEDGER_FILE, read_ledger
from gapweave.shared.report.wording import budget

LEAST_DISK, FAIR_DISK = 200e6, 2e9
LEAST_MEMORY, FAIR_MEMORY = 500e6, 2e9
AHEAD_S, BEHIND_S = 4.0, 280.0
"""How far a site's clock may be off: Flower refuses signatures from 5 s ahead, or 305 s old."""
SEEN_S = 30.0
ANSWER_S = 10.0


def check_machine(state: Path) -> Iterator[Finding]:
    """Disk and memory."""
    place = next(folder for folder in (state, *state.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    yield _amount("disk", str(state), free, LEAST_DISK, FAIR_DISK, "free on the disk of the state folder", "Free some")
    if place == state and state.stat().st_mode & 0o077:
        yield _finding("state", "problem", str(state), "others can enter the state folder", f"chmod 700 {state}")
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield _amount("memory", "this machine", memory, LEAST_MEMORY, FAIR_MEMORY, "of memory free", "End other programs")


def _amount(check: str, where: str, amount: float, least: float, fair: float, what: str, remedy: str) -> Finding:
    status: Status = "problem" if amount < least else "warning" if amount < fair else "ok"
    return _finding(check, status, where, f"{amount / 1e9:.1f} GB {what}", "" if status == "ok" else remedy)


def check_device(site: Site, site_file: Path) -> Finding:
    """Whether the device that the site file names is there."""
    import torch

    from gapweave.client.device import find_device

    where = f"{site_file}:device"
    try:
        device = find_device(site.device, site_file)
    except UsageError as error:
        return _finding("device", "problem", where, error.what, error.remedy)
    if device.type == "cpu":
        return _finding("device", "ok", where, "trains on the CPU")
    name = torch.cuda.get_device_name(device)
    return _finding("device", "ok", where, f"trains on {name}, CUDA {torch.version.cuda}")


def check_policy(site: Site, site_file: Path, state: Path) -> Iterator[Finding]:
    """What a run would refuse whatever the study is."""
    where = f"{site_file}:policy"
    if "update" not in site.policy.releases:
        yield _finding("policy", "problem", f"{where}.releases", "the site releases no model updates", "Add `update`")
    if site.policy.anchor is not None:
        status: Status = "warning" if site.server is None else "problem"  # most simulations need none
        anchor = site_file.parent / site.policy.anchor
        try:
            Anchor(anchor, state, site.name)
        except UsageError as error:
            yield _finding("policy", status, f"{where}.anchor", error.what, error.remedy)
        else:
            if not os.access(anchor.parent, os.W_OK | os.X_OK):
                remedy = "Let the user that runs the site write there; under systemd name it in ReadWritePaths"
                yield _finding("policy", status, f"{where}.anchor", "the anchor cannot be written", remedy)


def check_budget(study: Study, site: Site, state: Path, patients: int | None) -> Iterator[Finding]:
    """The ledger, and whether its cap has room for the study."""
    where, view = str(state / LEDGER_FILE), None
    if (state / LEDGER_FILE).exists():
        try:
            view = read_ledger(state)
            if view.intact:
                check_remembered(state, view)
        except GapweaveError as error:
            yield _finding("ledger", "problem", where, error.what, error.remedy)
            return
        if not view.intact:
            remedy = "Find out who changed it; then `gapweave site recover`"
            yield _finding("ledger", "problem", where, "the ledger was changed", remedy)
            return
        taken, cap = view.bound([*view.outstanding()]), site.policy.epsilon
        yield _finding("ledger", "ok", where, f"intact; epsilon {budget(taken)} of {cap:g} is spent or reserved")
        if site.delta < view.delta * (1 - 1e-9):
            message = f"delta is {view.delta:g} since the ledger was opened; policy and patients.upper now ask for less"
            remedy = "All figures stay at the ledger's; a smaller delta needs a state folder, and patients, of its own"
            yield _finding("delta", "warning", where, message, remedy)
    else:
        yield _finding("ledger", "ok", where, f"none yet; the cap is epsilon {site.policy.epsilon:g}")
    if not study.privacy.enabled:
        allowed = site.policy.unnoised == "allow"
        status: Status = "warning" if allowed else "problem"
        remedy = "Only for data that need no protection" if allowed else "Enable privacy in the study"
        yield _finding("plan", status, "study:privacy.enabled", "the study trains without noise", remedy)
        return
    size = site.patients.declared or patients
    if not size:
        return
    try:
        report = site_plan(study, site, size, view)
    except UsageError as error:
        yield _finding("plan", "problem", error.where, error.what, error.remedy)
        return
    first = [*report.plan.preparation, *report.plan.schedule()[:1]]
    if view is not None and Budget(view).with_more(first) > site.policy.epsilon:
        held = ", or give up runs that will not go on (gapweave site budget)" if view.open_runs else ""
        remedy = f"Raise policy.epsilon if the hospital agrees{held}"
        yield _finding("budget", "problem", where, "the cap has no room for a single round of this study", remedy)
    warnings = list(report.warnings())
    for warning in warnings:
        yield _finding("plan", "warning", "study:privacy", warning.rstrip("."))
    if not warnings:
        yield _finding("plan", "ok", "study:privacy", f"epsilon {report.plan.epsilon:.3g} for {size} patients")


def check_approval(study: Study, site: Site, site_file: Path) -> Finding:
    """Whether the hospital said yes to the study."""
    if study.sha256 in site.policy.studies:
        return _finding("approval", "ok", f"{site_file}:policy.studies", f"study {study.name} is approved")
    remedy = f"gapweave site approve {site_file} --study STUDY"
    return _finding(
        "approval", "warning", f"{site_file}:policy.studies", f"study {study.name} is not approved yet", remedy
    )


def check_hub(deployment: Deployment) -> Iterator[Finding]:
    """The way to the hub, step by step, up to the first that fails."""
    try:
        connection = deployment.connection()
    except UsageError as error:
        yield _finding(
            "connection", "problem", error.where or str(deployment.connection_file), error.what, error.remedy
        )
        return
    yield _finding("connection", "ok", str(deployment.connection_file), f"the hub {connection.name}")
    usable = True
    try:
        check_key(deployment.key)
        yield _finding("key", "ok", str(deployment.key), "the private key is readable by its owner only")
    except UsageError as error:
        usable = False
        yield _finding("key", "problem", error.where, error.what, error.remedy)
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    if proxy:
        remedy = f"If it must not, add {connection.host} to NO_PROXY"
        yield _finding("proxy", "warning", "HTTPS_PROXY", "connections go through the hospital's proxy", remedy)
    reached = yield from _reach(connection)
    if reached and usable:
        yield _authentication(deployment, connection)


def _reach(connection: Connection) -> Generator[Finding, None, bool]:
    """Name, port, certificate, version and clock; whether the hub can be worked with."""
    where = connection.address
    try:
        socket.getaddrinfo(connection.host, connection.port)
    except (socket.gaierror, UnicodeError):  # of a part that is empty, or longer than a name's may be
        remedy = "Correct `host`, or ask the network team for the name"
        yield _finding("name", "problem", where, f"the name {connection.host} is not known here", remedy)
        return False
    try:
        context = ssl.create_default_context(cadata=connection.ca)
    except ssl.SSLError:
        remedy = "Ask the hub for its connection.yaml again"
        yield _finding("connection", "problem", "connection:ca", "the hub's certificate cannot be read", remedy)
        return False
    answer = _about(connection, context)
    if isinstance(answer, Finding):
        yield answer
        return False
    yield _finding("server", "ok", where, "the hub answers, with its own certificate")
    clock = _clock(answer.date, where)
    version = _version(answer.protocol, answer.version, where)
    yield from (version, clock)
    return "problem" not in (clock.status, version.status)


@dataclass(frozen=True)
class _About:
    date: str
    version: str
    protocol: int


def _about(connection: Connection, context: ssl.SSLContext) -> _About | Finding:
    """What the hub says of itself, or why it says nothing."""
    import httpx

    where = connection.address
    try:
        answer = httpx.get(f"https://{connection.address}/v1/gapweave", verify=context, timeout=ANSWER_S)
        content = answer.json()
        return _About(answer.headers["date"], str(content["gapweave"]), int(content["protocol"]))
    except httpx.TransportError as error:
        reason = _certificate_error(error)
        if reason:
            remedy = "The hub renews it: gapweave server start" if "expired" in reason else "Ask the hub"
            return _finding("tls", "problem", where, reason, remedy)
        remedy = "Ask the network team for this one outbound port, and whether the hub runs"
        return _finding("server", "problem", where, "the hub does not answer", remedy)
    except (ValueError, KeyError):
        remedy = "Correct host and port in connection.yaml"
        return _finding("server", "problem", where, "something else than a Gapweave hub answers", remedy)


def _certificate_error(error: BaseException | None) -> str | None:
    """What is wrong with the hub's certificate, if that was it."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"the hub's certificate is not valid: {error.verify_message}"
        if isinstance(error, ssl.SSLError):
            return "what answers does not speak TLS as a hub does"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            detail = str(error).partition("verify failed: ")[2].partition(" (_ssl")[0]
            return f"the hub's certificate is not valid: {detail or 'it cannot be verified'}"
        if "WRONG_VERSION_NUMBER" in str(error):
            return "what answers does not speak TLS as a hub does"
        error = error.__cause__ or error.__context__
    return None


def _clock(date: str, where: str) -> Finding:
    """The site's clock against the hub's, which is told to the second."""
    ahead = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds() - 0.5
    text = f"this clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the hub's"
    if ahead > AHEAD_S or ahead < -BEHIND_S:
        return _finding("clock", "problem", where, text, "Set it by NTP: the hub refuses signatures of another time")
    if ahead < -SEEN_S:
        return _finding("clock", "warning", where, text, "Set it by NTP")
    return _finding("clock", "ok", where, "this clock agrees with the hub's")


def _version(protocol: int, version: str, where: str) -> Finding:
    if protocol != PROTOCOL_VERSION or version != __version__:
        text = f"the hub runs Gapweave {version}, protocol {protocol}; this site {__version__}, {PROTOCOL_VERSION}"
        return _finding("version", "problem", where, text, "Install the same version on both sides")
    return _finding("version", "ok", where, f"both sides run Gapweave {version}")


def _authentication(deployment: Deployment, connection: Connection) -> Finding:
    where = str(public_file(deployment.key))
    if deployment.service.pid() is not None:
        # The hub takes one connection a key: to try it now would tell nothing.
        log = deployment.service.log_file("supernode")
        if deployment.connected():
            return _finding("authentication", "ok", where, "the site is connected")
        return _finding("authentication", "warning", where, "the site runs, and is not connected", f"Look at {log}")
    try:
        known = known_to_hub(connection.address, connection.ca.encode(), deployment.key.read_bytes())
    except Exception:  # a key of another kind, or a connection lost in between
        known = False
    if known:
        return _finding("authentication", "ok", where, "the hub lets this key in")
    remedy = (
        f"Send {where} to the hub: gapweave server add-site {deployment.site.name} --key FILE; "
        "a site that was killed is let in again after a minute"
    )
    return _finding("authentication", "problem", where, "the hub does not let this key in", remedy)


def _finding(check: str, status: Status, where: str, message: str, remedy: str = "") -> Finding:
    return Finding(id=check, status=status, where=where, message=message, remedy=remedy)
