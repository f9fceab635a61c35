"""The guard of a SuperNode, and the names of Flower's that both adapters use: this fails when Flower moves them."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gapweave.client import supernode
from gapweave.client.supernode import Guard, install
from gapweave.shared import PROTOCOL_VERSION, __version__
from gapweave.shared.card import CARD, install_card, refusal, run_card

OURS = f"the site runs Gapweave {__version__}, protocol {PROTOCOL_VERSION}"


def archive(files: dict[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as made:
        for name, text in files.items():
            made.writestr(name, text)
    return content.getvalue()


@pytest.mark.parametrize(
    ("bundle", "says"),
    [
        (b"", f"a bundle that is no run card of Gapweave; {OURS}"),
        (run_card() + b"\0", f"a bundle that is no run card of Gapweave; {OURS}"),
        (archive({"pyproject.toml": CARD, "more.py": "x = 1"}), f"a bundle that is no run card of Gapweave; {OURS}"),
        (archive({"pyproject.toml": CARD.replace("protocol ", "protocol 9")}), "the bundle is of Gapweave"),
        (archive({"pyproject.toml": '[project]\ndescription = "<b>Gapweave 1.0, protocol 2"'}), "no run card"),
        (archive({"pyproject.toml": "x" * 10}), "no run card"),
    ],
)
def test_bundles_that_are_refused(bundle: bytes, says: str) -> None:
    reason = refusal(bundle)
    assert reason is not None
    assert says in reason
    assert OURS in reason


def test_the_card_of_this_version_runs_and_holds_no_code() -> None:
    assert refusal(run_card()) is None
    with zipfile.ZipFile(io.BytesIO(run_card())) as card:
        assert card.namelist() == ["pyproject.toml", ".info/CONTENT"]


def test_the_card_is_unpacked_as_flower_does_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower finds it there and unpacks no other; what a full disk left of one is made good."""
    from flwr.cli.install import install_from_fab

    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flowers"))
    place = install_from_fab(run_card(), skip_prompt=True)
    theirs = {file.name: file.read_bytes() for file in place.iterdir()}
    for file in place.iterdir():
        file.unlink()
    assert install_from_fab(run_card(), skip_prompt=True) == place, "Flower takes the empty folder for the app"
    assert list(place.iterdir()) == []
    install_card(tmp_path / "flowers")
    assert {file.name: file.read_bytes() for file in place.iterdir()} == theirs
    assert [folder.name for folder in place.parent.iterdir()] == [place.name]
    install_card(tmp_path / "ours")
    assert install_from_fab(run_card(), skip_prompt=True) == place


def test_flower_has_what_the_guard_replaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its loop asks for a bundle by the connection's fifth part, verifies it, and answers with the module's error."""
    flower = importlib.import_module("flwr.supernode.start_client_internal")
    command = importlib.import_module("flwr.supernode.cli.flower_supernode")
    assert command.start_client_internal is flower.start_client_internal
    source = inspect.getsource(flower.start_client_internal) + inspect.getsource(flower._pull_and_store_message)
    for words in ("with _init_connection(", "_verify_fab(fab, trusted_entities)", "Message(FAB_VERIFICATION_ERROR"):
        assert words in source
    assert source.index("_verify_fab(fab") < source.index("state.store_fab(fab)")
    asked: dict[str, Any] = {}

    @contextmanager
    def connection(*_: Any, **__: Any) -> Any:
        bundle = SimpleNamespace(content=archive({"evil.py": ""}), verifications={})
        yield (1, lambda: None, "send", "get_run", lambda *_: bundle, "pull", "push", "confirm")

    monkeypatch.setattr(flower, "_init_connection", connection)
    monkeypatch.setattr(flower, "start_client_internal", lambda **keywords: asked.update(keywords))
    monkeypatch.setattr(flower, "_verify_fab", flower._verify_fab)
    monkeypatch.setattr(flower, "FAB_VERIFICATION_ERROR", flower.FAB_VERIFICATION_ERROR)
    contact = tmp_path / "contact.json"
    client = importlib.import_module("flwr.supernode.fleet_http_client").FleetHttpClient
    monkeypatch.setattr(client, "SendNodeHeartbeat", client.SendNodeHeartbeat)
    monkeypatch.setattr(supernode, "start_worker", lambda address: asked.update(worker=address))
    install(Guard(contact))(trusted_entities=None, other=1, runtime_api_address="127.0.0.1:5")
    assert asked["worker"] == "127.0.0.1:5"
    assert asked["isolation"] == "process", "Flower starts no program of its own for messages"
    assert asked["trusted_entities"], "without a trusted entity Flower verifies nothing"
    assert asked["other"] == 1
    with flower._init_connection() as (_, receive, _, _, get_fab, *_):
        assert json.loads(contact.read_text())["time"] > 0
        receive()
        fab = get_fab("hash", 1)
        assert fab.verifications["valid_license"]
        assert not flower._verify_fab(fab, {})
        assert OURS in flower.FAB_VERIFICATION_ERROR.reason


def test_a_supernode_that_gives_up_ends() -> None:
    """Else nobody would start it again: Flower's own server in a thread would keep the process."""
    code = """
import importlib, threading, time
command = importlib.import_module("flwr.supernode.cli.flower_supernode")
command.flower_supernode = lambda: threading.Thread(target=time.sleep, args=(100,)).start()
from gapweave.client.supernode import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=50, check=False)
    assert done.returncode == 1


def test_flower_has_what_the_hub_calls() -> None:
    from flwr.cli.build import build_fab_from_files
    from flwr.common.constant import ErrorCode
    from flwr.proto import control_pb2
    from flwr.supercore.control import ControlHttpClient
    from flwr.supernode.fleet_http_client import FleetHttpClient

    for call in ("StartRun", "StopRun", "ListRuns", "StreamLogs", "ListNodes", "RegisterNode", "UnregisterNode"):
        assert hasattr(ControlHttpClient, call)
        assert hasattr(control_pb2, f"{call}Request")
    assert {"ActivateNode", "DeactivateNode"} <= set(dir(FleetHttpClient))
    assert ErrorCode.INVALID_FAB
    assert callable(build_fab_from_files)
    routes = inspect.getsource(importlib.import_module("flwr.supernode.fleet_http_client"))
    from gapweave.server.proxy import CALLS

    paths = {line.split("/v1/fleet/")[1].split('"')[0] for line in routes.splitlines() if "/v1/fleet/" in line}
    assert paths == {*CALLS, "register-node", "unregister-node"}, "the proxy lets through what a site asks, no more"


def test_a_site_in_a_run_asks_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer to Flower's loop costs 3 s of sleep there: none is given for a while after a message."""
    now = [0.0]
    monkeypatch.setattr(supernode.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(supernode.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    answers = iter([None, "first", None, None, "second", *[None] * 1000])
    receive = Guard().receive(lambda: next(answers))
    assert receive() is None
    assert receive() == "first"
    now[0] += 500.0  # of training
    assert receive() == "second"
    assert now[0] == 500.0 + 2 * supernode.BUSY_POLL_S
    assert receive() is None
    asked = now[0]
    assert supernode.RUN_S <= asked - 501.0 <= supernode.RUN_S + 1
    assert receive() is None
    assert now[0] == asked


def test_the_worker_has_one_thread_when_it_forks() -> None:
    """A lock that another thread holds while a process forks is never released in the child."""
    code = "import os; from gapweave.client.supernode import preload; preload(); print(os.listdir('/proc/self/task'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("'") == 2, done.stdout


def test_flower_has_what_the_worker_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop launches by the executor, and a message's process ends by leaving; what it leaves in memory is gone."""
    command = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    factory = importlib.import_module("flwr.supercore.superexec.executor.factory")
    executor = importlib.import_module("flwr.supercore.superexec.executor.subprocess_executor")
    assert "executor.launch" in inspect.getsource(
        importlib.import_module("flwr.supercore.superexec.plugin").AutoExecPlugin.launch_task
    )
    assert isinstance(
        factory.get_executor("subprocess", executor_config=None, insecure=True, root_certificates_path=None),
        executor.SubprocessExecutor,
    )
    read, write = os.pipe()

    def handle(address: str, token: str, insecure: bool, parent_pid: int) -> None:
        os.write(write, f"{address} {token} {insecure} {parent_pid} {os.getpid()}".encode())
        os.environ["LEFT_BY_A_MESSAGE"] = "1"
        sys.exit(3)

    monkeypatch.setattr(command, "run_clientapp", handle)
    spec = SimpleNamespace(runtime_api_address="127.0.0.1:1", token="t", insecure=True, parent_pid=os.getpid())
    assert supernode.fork(None, spec).status.name == "ACCEPTED"
    *said, child = os.read(read, 1000).decode().split()
    assert said == ["127.0.0.1:1", "t", "True", str(os.getpid())]
    assert int(child) != os.getpid()
    assert os.waitpid(int(child), 0)[1] == 0
    assert "LEFT_BY_A_MESSAGE" not in os.environ
