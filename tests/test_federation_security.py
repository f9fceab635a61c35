"""What must not cross between a hub and its hospitals, and who must not get through."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from federation import PORT, Federation
from networks import available

from gapweave.server.hub import Hub
from gapweave.shared.card import CARD
from gapweave.shared.privacy.ledger import read_ledger

pytestmark = [pytest.mark.long, pytest.mark.federation]
SETTINGS: dict[str, Any] = {
    "training.rounds": 1,
    "training.local_steps": 2,
    "aggregation.quorum": 1,
    "aggregation.deadline_s": 60,
}
NAME = "Zwyrtelka-Ozimkiewicz"
"""A patient's name that no file of ours holds by chance."""
NUMBER = 7_340_193.0
"""And a number of hers, the same in float32 and float64."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Two hospitals whose data hold canaries, and a hub whose traffic is written down after TLS ends."""
    if not available():
        message = "network namespaces cannot be made here: be root, and install iproute2 (packages.txt)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    made = Federation(tmp_path_factory.mktemp("federation"), 2, SETTINGS, patients=150)
    with made:
        for name in made.names:
            plant(made, name)
            made.change(name, policy={"epsilon": 500.0}, patients={"declared": 100})
        hostile = made.folder / "hostile"
        hostile.mkdir()
        (hostile / "sitecustomize.py").write_text(HOSTILE)
        made.environment["PYTHONPATH"] = str(hostile)
        traffic = made.folder / "traffic"
        traffic.mkdir()
        made.on("hub", "server", "start", "--no-proxy")
        del made.environment["PYTHONPATH"]
        words = [str(Path(__file__).parent / "recorder.py"), str(made.hub), str(PORT), str(PORT + 1), str(traffic)]
        recorder = made.network.start("hub", [sys.executable, *words])
        time.sleep(1)
        for name in made.names:
            made.on(name, "site", "start", str(made.site_file(name)))
        yield made
        recorder.kill()
        recorder.wait()


HOSTILE = """
import json, sys
from pathlib import Path
wish = Path(__file__).with_name("wish.json")
if wish.exists() and any("serverapp" in word for word in sys.orig_argv):
    import numpy as np
    from gapweave.server.aggregation import initial_groups
    from gapweave.shared import wire
    from gapweave.shared.config.study import study_from_json
    wanted, pack, studies = json.loads(wish.read_text()), wire.pack, []
    def hostile(header, arrays):
        if "study" in header and header["study"].startswith("{"):
            studies.append(study_from_json(header["study"]))
        elif arrays and studies:
            header = {**header, **wanted["header"]}
            if wanted["groups"]:
                arrays = {**arrays, **{g: v for g, v in initial_groups(studies[0]).items() if g not in arrays},
                          "encoder/labs": {"x": np.zeros(3, np.float32)}}
        return pack(header, arrays)
    wire.pack = hostile
"""
"""A server that asks for what no site may give."""


def plant(federation: Federation, name: str) -> None:
    """Her name in every text and her number in every table of a hospital, as one of its patients."""
    file = federation.site_file(name)
    records = yaml.safe_load(file.read_text())["data"]["records"]["file"]
    folder = (file.parent / records).parent
    for table in folder.glob("*.csv"):
        frame = pl.read_csv(table, infer_schema_length=None)
        changed = {}
        for column, kind in frame.schema.items():
            values = frame[column].to_list()
            # Identifiers stay: tables are joined by them.
            if column in ("record_id", "patient_id") or column.startswith(("deterior", "hour", "fold")):
                continue
            if kind.is_numeric():
                values[0] = NUMBER
                changed[column] = pl.Series(column, values, strict=False).cast(pl.Float64)
            elif "file" not in column:
                values[0] = NAME
                changed[column] = pl.Series(column, values)
        frame.with_columns(**changed).write_csv(table)


def spellings() -> dict[str, bytes]:
    name, number = NAME.encode(), struct.pack("<f", NUMBER)
    found = {
        "utf-8": name,
        "utf-16": NAME.encode("utf-16-le"),
        "lower": NAME.lower().encode(),
        "float32": number,
        "float64": struct.pack("<d", NUMBER),
        "digits": str(int(NUMBER)).encode(),
    }
    for shift in range(3):
        found[f"base64 at {shift}"] = base64.b64encode(b"x" * shift + name)[4 : -4 if shift else None][:20]
    return found


def opened(content: bytes) -> Iterator[bytes]:
    """The bytes, and whatever in them can be decompressed."""
    yield content
    for magic, bits in ((b"\x1f\x8b\x08", 31), (b"\x78\x9c", 15), (b"\x78\xda", 15), (b"\x78\x01", 15)):
        at = content.find(magic)
        while at >= 0:
            with suppress(zlib.error):
                yield zlib.decompressobj(bits).decompress(content[at:], 1 << 24)
            at = content.find(magic, at + 1)


def leaks(files: list[Path]) -> list[str]:
    return [
        f"{label} in {file}"
        for file in files
        for part in opened(file.read_bytes())
        for label, spelling in spellings().items()
        if spelling in part
    ]


def test_the_search_for_canaries_finds_them(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for label, spelling in spellings().items():
        file.write_bytes(b"..." + spelling + b"...")
        assert any(found.startswith(label) for found in leaks([file])), label
    file.write_bytes(b"..." + zlib.compress(NAME.encode() * 3))
    assert leaks([file])
    array = np.array([1.0, NUMBER], np.float32)
    file.write_bytes(array.tobytes())
    assert leaks([file])


def test_canaries_never_leave_a_hospital(federation: Federation) -> None:
    """Of data, of a parser that fails on them, of an exception: not in traffic, not in the hub's files, not in logs."""
    run = federation.submit()
    assert federation.wait(run, 300)["status"] == "completed", federation.logs()
    # A value that cannot be read where a number must be: the parser's own message would quote it.
    file = federation.site_file("birch")
    before = file.read_text()
    labs = (file.parent / yaml.safe_load(before)["data"]["labs"]["file"]).resolve()
    kept = labs.read_text()
    lines = kept.splitlines()
    lines[2] = ",".join([*lines[2].split(",")[:-1], NAME])
    labs.write_text("\n".join(lines))
    try:
        run = federation.submit()
        state = federation.wait(run, 300)
        assert state["status"] == "completed", f"{state}\n{federation.logs()}"
        summary = json.loads((federation.directory(run) / "summary.json").read_text())
        assert summary["sites"]["birch"]["status"] == "failed", summary["sites"]["birch"]
    finally:
        labs.write_text(kept)
    traffic = list((federation.folder / "traffic").iterdir())
    assert sum(file.stat().st_size for file in traffic) > 50_000, "the recorder saw the messages"
    assert any(b"query.prepare" in file.read_bytes() for file in traffic)
    hub = [file for file in federation.hub.rglob("*") if file.is_file() and file.suffix != ".lock"]
    logs = [file for name in federation.names for file in (federation.state(name) / "service").rglob("*.log*")]
    assert leaks([*traffic, *hub, *logs]) == []


def spent(federation: Federation) -> dict[str, float]:
    found = {}
    for name in federation.names:
        words = ("site", "budget", str(federation.site_file(name)), "--json")
        found[name] = json.loads(federation.on(name, *words))["epsilon"]
    return found


@pytest.mark.parametrize("wish", ["privacy.enabled=false", "training.local_steps=50", "privacy.max_grad_norm=100.0"])
def test_another_study_than_the_approved_one_is_refused(federation: Federation, wish: str) -> None:
    """Without noise, with more steps, with another clip: it is another study, by its hash."""
    before = spent(federation)
    text = federation.on("hub", "submit", str(federation.study), *federation.words(), "--set", wish, "--wait", code=3)
    assert "every site refused the study" in text
    assert text.count("the site has not approved this study: gapweave site approve") == len(federation.names)
    assert spent(federation) == before


WISHES = {
    "more steps": ({"local_steps": 50}, False),
    "another clip": ({"max_grad_norm": 100.0}, False),
    "no noise": ({"privacy": {"enabled": False}}, False),
    "raw metrics": ({"metrics": "raw"}, False),
    "other groups": ({}, True),
}


@pytest.mark.parametrize("name", WISHES)
def test_a_hostile_server_gets_nothing(federation: Federation, name: str) -> None:
    """Within an approved study it asks for more, over the real wire: nothing is trained, and no round is charged."""
    header, groups = WISHES[name]
    wish = federation.folder / "hostile" / "wish.json"
    wish.write_text(json.dumps({"header": header, "groups": groups}))
    rounds = {site: trained(federation, site) for site in federation.names}
    try:
        text = federation.on("hub", "submit", str(federation.study), *federation.words(), "--wait", code=4)
    finally:
        wish.unlink()
    assert "0 sites answered in round 1" in text
    assert {site: trained(federation, site) for site in federation.names} == rounds


def trained(federation: Federation, name: str) -> int:
    """Rounds that a hospital's ledger was charged for."""
    entries = read_ledger(federation.state(name)).entries
    return sum(entry.kind == "charge" and entry.body["event"]["kind"] == "dp_sgd" for entry in entries)


def test_only_owners_read_keys_and_states(federation: Federation) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    for name in federation.names:
        assert mode(federation.site_file(name).with_suffix(".key")) == 0o600
        for folder in [federation.state(name), *federation.state(name).rglob("*")]:
            assert (
                not folder.is_dir() or mode(folder) == 0o700 or folder.is_relative_to(federation.state(name) / "flower")
            )
    assert mode(federation.hub) == 0o700
    for secret in ("ca.key", "server.key", "superlink.db"):
        assert mode(federation.hub / secret) & 0o077 == 0, secret
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    secrets = [federation.site_file(name).with_suffix(".key").read_text() for name in federation.names]
    secrets += [
        (federation.hub / name).read_text() for name in ("ca.key", "server.key", "server.crt", "connection.yaml")
    ]
    for secret in secrets:
        assert all(line not in running for line in secret.splitlines()[1:3])


ASK = """
import sys, httpx
for method, url in (line.split() for line in sys.argv[2:]):
    try:
        answer = httpx.request(method, url, verify=sys.argv[1], timeout=5, content=b"",
                               headers={"content-type": "application/protobuf"})
        print(answer.status_code)
    except httpx.TransportError as error:
        print(type(error).__name__)
"""


def asked(federation: Federation, *requests: str) -> list[str]:
    """What a hospital's host gets for requests of its own making."""
    words = [sys.executable, "-c", ASK, str(federation.hub / "ca.crt"), *requests]
    done = federation.network.run("birch", words)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_nothing_but_the_calls_of_a_site_goes_through_the_proxy(federation: Federation) -> None:
    """By nginx's own configuration, at another port; and the SuperLink's port is closed to other hosts."""
    text = (federation.hub / "nginx.conf").read_text().replace(f"listen {PORT} ssl", "listen 9443 ssl")
    (federation.hub / "other.conf").write_text(text)
    command = ["nginx", "-p", f"{federation.hub}/", "-c", str(federation.hub / "other.conf")]
    proxy = federation.network.start("hub", command)
    time.sleep(1)
    try:
        base = "https://hub.test:9443"
        closed = [
            *("/v1/control/list-runs", "/v1/control/start-run", "/v1/control/register-node", "/v1/fleet/register-node"),
            *("/v1/fleet/unregister-node", "/v1/runtime/x", "/v1/fleet/../control/list-runs", "/", "/docs"),
            *(
                "/v1/fleet/%2e%2e/control/list-runs",
                "/v1/control/list-runs/../../fleet/get-run/../../control/list-runs",
            ),
        ]
        answers = asked(federation, *(f"POST {base}{path}" for path in closed))
        assert set(answers) <= {"404", "400", "405"}, dict(zip(closed, answers, strict=True))
        assert asked(federation, f"GET {base}/v1/gapweave") == ["200"]
        # Through the proxy a call of a site without a signature comes to the SuperLink, which refuses it.
        assert asked(federation, f"POST {base}/v1/fleet/pull-messages") == ["401"]
    finally:
        proxy.terminate()
        proxy.wait()
    for port in (PORT + 1, PORT + 2):
        assert asked(federation, f"POST https://hub.test:{port}/v1/control/list-runs") == ["ConnectError"]


SIGNED = """
import datetime, sys, httpx
from base64 import b64encode
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
ca, own, other, node = sys.argv[1:5]
own, other = (load_ssh_private_key(open(file, "rb").read(), None) for file in (own, other))
def ask(signer, shown, seconds=0, tamper=b""):
    stamp = (datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=seconds)).isoformat()
    headers = {"content-type": "application/protobuf", TIMESTAMP_HEADER: stamp}
    if signer is not None:
        headers[FLEET_HTTP_SIGNATURE_HEADER] = b64encode(sign_message(signer, stamp.encode() + tamper)).decode()
        headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = b64encode(public_key_to_bytes(shown.public_key())).decode()
    body = PullMessagesRequest(node=Node(node_id=int(node))).SerializeToString()
    headers.update(EXTRA)
    return httpx.post("https://hub.test:9092/v1/fleet/pull-messages", content=body, headers=headers, verify=ca).status_code
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
class Context: request = httpx.Request("POST", "https://x")
EXTRA = {}
try:
    RuntimeVersionHttpInterceptor(component_name="SuperNode").intercept(Context, lambda context: None)
    EXTRA = {k: v for k, v in Context.request.headers.items() if k.startswith("flwr") or k.startswith("x-")}
except Exception: pass
print(ask(own, own), ask(None, None), ask(own, own, tamper=b"!"), ask(other, other), ask(other, own),
      ask(own, own, seconds=-400), ask(own, own, seconds=60))
"""


def test_signatures(federation: Federation) -> None:
    """Its own is good; none, a wrong one, another site's, another's for its key, an old and a future one are not."""
    own, other = (str(federation.site_file(name).with_suffix(".key")) for name in federation.names)
    node = Hub(federation.hub).registered()[federation.names[0]]
    words = [sys.executable, "-c", SIGNED, str(federation.hub / "ca.crt"), own, other, str(node)]
    done = federation.network.run("birch", words)
    assert done.stdout.split() == ["200", *["401"] * 6], done.stdout + done.stderr


def test_bundles_with_code_do_not_run(federation: Federation, tmp_path: Path) -> None:
    """One with code, and one of another version, which is named; at no site is anything of them unpacked."""
    mark = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\nfrom gapweave.client.app import app\n"
    other = CARD.replace("0.1.0", "9.8.7")
    hostile = CARD.replace("gapweave.client.app:app", "hostile.client:app")
    bundles = {
        "code": {"pyproject.toml": hostile, "hostile/__init__.py": "", "hostile/client.py": code},
        "version": {"pyproject.toml": other},
    }
    for label, files in bundles.items():
        run = f"{label}-run"
        out = federation.hub / "runs" / run
        started = federation.network.run(
            "hub", [sys.executable, "-c", START, str(federation.hub), json.dumps(files), run, study(federation)],
            federation.environment,
        )  # fmt: skip
        assert started.returncode == 0, started.stderr
        deadline = time.monotonic() + 200
        while not (out / "failure.json").exists():
            assert time.monotonic() < deadline, federation.logs()
            time.sleep(1)
        text = json.loads((out / "failure.json").read_text())["error"]
        assert "9.8.7" in text if label == "version" else "no run card" in text, text
        assert "0.1.0" in text
    assert not mark.exists()
    for name in federation.names:
        unpacked = list((federation.state(name) / "flower").rglob("hostile*"))
        assert unpacked == []
        assert "refused" in (federation.state(name) / "service" / "logs" / "supernode.log").read_text()


START = """
import hashlib, json, sys
from pathlib import Path
from flwr.cli.build import build_fab_from_files
import gapweave.shared.card as card
from gapweave.server.hub import Hub
from gapweave.server.superlink import Control
hub, files, run, study = Hub(Path(sys.argv[1])), json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
bundle = build_fab_from_files({name: text.encode() for name, text in files.items()})[0]
card.run_card = lambda: bundle
with Control(hub) as control:
    control.start({"study": study, "out": str(hub.runs / run), "run": run, "sites": str(hub.registry)})
"""


def study(federation: Federation) -> str:
    from gapweave.shared.config import load_study

    return load_study(federation.study, SETTINGS).canonical()


def test_the_bundle_is_the_same_everywhere() -> None:
    """Sites compare its hash with that of their own: it must not depend on machine or library."""
    from gapweave.shared.card import run_card

    digest = hashlib.sha256(run_card()).hexdigest()
    code = "import hashlib; from gapweave.shared.card import run_card; print(hashlib.sha256(run_card()).hexdigest())"
    environment = {**os.environ, "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest
