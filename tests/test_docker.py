"""Images, compose files and units, without a container engine: linted, held against schemas, and their steps run."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dockerfile
import jsonschema
import pytest
import yaml
from dockerfile import Image, Step, steps

from gapweave.shared import __version__

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE = sorted(DOCKER.glob("compose*.yaml"))
UNITS = sorted((DOCKER / "systemd").glob("*.service"))
USER = 10001
EXPOSURE = 25
"""Tenths of systemd's own measure of how much a service could do, of 10."""


def require(missing: list[str]) -> None:
    """Skip where programs are missing; in CI they must not be."""
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {', '.join(missing)}: make setup-system")


def missing(*programs: str) -> list[str]:
    return [program for program in programs if shutil.which(program) is None]


def content(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    words = [str(Path(sys.executable).parent / "hadolint"), "--no-color", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def compose_schema() -> jsonschema.Draft202012Validator:
    """The schema of the Compose specification, as check-jsonschema ships it."""
    files = importlib.metadata.files("check-jsonschema") or []
    (file,) = (file for file in files if file.name == "compose-spec.json")
    schema = json.loads(Path(str(file.locate())).read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_compose_files_follow_their_schema(file: Path, compose_schema: jsonschema.Draft202012Validator) -> None:
    assert [error.message for error in compose_schema.iter_errors(content(file))] == []
    wrong = content(file)
    next(iter(wrong["services"].values()))["read_onyl"] = True
    assert list(compose_schema.iter_errors(wrong))


@pytest.mark.parametrize("file", [file for file in COMPOSE if "gpu" not in file.name], ids=lambda file: file.name)
def test_compose_services_are_closed_and_name_what_is_there(file: Path) -> None:
    services = content(file)["services"]
    for name, service in services.items():
        assert service["read_only"], name
        assert service["tmpfs"] == ["/tmp"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert re.fullmatch(rf"gapweave-(server|site):{re.escape(__version__)}", service["image"]), name
        assert set(service.get("depends_on", {})) <= set(services)
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DOCKER / source).is_file(), volume


def test_only_a_hub_publishes_a_port_and_only_one() -> None:
    found = {
        f"{file.name} {name}": service["ports"]
        for file in COMPOSE
        for name, service in content(file)["services"].items()
        if "ports" in service
    }
    assert found == {"compose.hub.yaml hub": ["${GAPWEAVE_PORT:-9092}:${GAPWEAVE_PORT:-9092}"]}


def test_the_gpu_file_changes_services_that_there_are() -> None:
    assert set(content(DOCKER / "compose.gpu.yaml")["services"]) <= set(
        content(DOCKER / "compose.site.yaml")["services"]
    )


def test_images_copy_only_what_the_context_holds() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if line and not line.startswith("#")) == "*"
    held = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word.rstrip("/")
        for file in DOCKERFILES
        for name, rest in steps(file.read_text(encoding="utf-8"))
        if name == "COPY"
        for word in rest.split()[:-1]
    }
    assert copied == held


def beginning(one: list[Step], other: list[Step]) -> list[Step]:
    """The steps with which both begin: an engine runs them once."""
    return [step for step, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def test_images_begin_with_the_same_steps() -> None:
    assert len(beginning(*(steps(file.read_text(encoding="utf-8")) for file in DOCKERFILES))) > 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CMD gapweave", "CMD is not known"),
        ("ADD a b", "ADD is not known"),
        ("FROM alpine", "nothing stands for alpine"),
        ("COPY --from=build /a ./", "without options"),
        ("COPY a /b", "only into a folder below WORKDIR"),
        ("run true", "run is not known"),
    ],
)
def test_the_helper_fails_on_what_it_does_not_know(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Image(tmp_path).build(steps(text), tmp_path)


def test_the_helper_is_short() -> None:
    assert len(Path(dockerfile.__file__).read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_are_valid_and_closed(unit: Path, tmp_path: Path) -> None:
    require(missing("systemd-analyze"))
    text = unit.read_text(encoding="utf-8")
    (command,) = re.findall(r"^ExecStart=(.*)$", text, flags=re.MULTILINE)
    program, *words = command.split()
    # Nothing is installed where the unit says.
    here = tmp_path / unit.name
    here.write_text(text.replace(program, sys.executable).replace("User=gapweave", "User=nobody"))
    for arguments in (["verify", "--man=no"], ["security", "--offline=true", f"--threshold={EXPOSURE}"]):
        done = subprocess.run(["systemd-analyze", *arguments, str(here)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        assert "Unknown" not in done.stderr
    here.write_text(text.replace(program, sys.executable) + "\n[Service]\nProtectSystm=strict\n")
    wrong = subprocess.run(["systemd-analyze", "verify", str(here)], capture_output=True, text=True, check=False)
    assert "ProtectSystm" in wrong.stderr
    image = DOCKER / ("server.Dockerfile" if "hub" in unit.name else "site.Dockerfile")
    entry = json.loads(dict(steps(image.read_text(encoding="utf-8")))["ENTRYPOINT"])
    assert words[:3] == entry[1:4], "unit and image start the same"


@pytest.mark.parametrize(("file", "status"), [("server", 5), ("site", 1)])
def test_a_health_check_says_what_does_not_run(file: str, status: int, tmp_path: Path) -> None:
    """And is no program that fails whatever it finds: images are built in the long tests only."""
    health = json.loads(
        dict(steps((DOCKER / f"{file}.Dockerfile").read_text(encoding="utf-8")))["HEALTHCHECK"].split("CMD ")[1]
    )
    here = {"/opt/gapweave/health.py": str(DOCKER / "health.py"), "/site/site.yaml": str(tmp_path / "site.yaml")}
    gapweave = str(Path(sys.executable).parent / "gapweave")
    words = [{"python": sys.executable, "gapweave": gapweave, **here}.get(word, word) for word in health]
    environment = os.environ | {"GAPWEAVE_HUB": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    for begun in (["server", "init", "--host", "hub.example.org"], ["site", "init", "--connection", "connection.yaml"]):
        subprocess.run([gapweave, *begun], cwd=tmp_path, env=environment, check=True, capture_output=True)
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Image]]:
    """Both images; the steps with which both begin are run once."""
    require(missing("debootstrap", "unshare", "ip", "chroot") + ([] if os.geteuid() == 0 else ["root"]))
    folder = tmp_path_factory.mktemp("images")
    wanted = {file.name.split(".")[0]: steps(file.read_text(encoding="utf-8")) for file in DOCKERFILES}
    common = beginning(*wanted.values())
    image = dict(common[:1])["ARG"].partition("=")[2]
    first = Image(dockerfile.base(folder / "server", image)).build(common, ROOT)
    # By links: a step replaces files, it does not write into them.
    subprocess.run(["cp", "-al", str(folder / "server"), str(folder / "site")], check=True)
    second = Image(folder / "site", dict(first.known), dict(first.env), workdir=first.workdir)
    yield {
        "server": first.build(wanted["server"][len(common) :], ROOT),
        "site": second.build(wanted["site"][len(common) :], ROOT),
    }
    subprocess.run(["rm", "-rf", str(folder)], check=True)  # 2 GB


SERVED = """{entry} & pid=$!
until {health}; do sleep 1; kill -0 $pid; done
{after}
kill $pid && wait $pid
echo ended with $?
"""


FAILING = """sleep 5; {health}
until grep 'waiting 5 s' state/service/service.json; do
    python -c 'import json, os
pid = json.load(open("state/service/service.json"))["supernode"]["pid"]
pid and os.kill(pid, 9)' || true
    sleep 0.2
done
{health}
"""
"""A site whose hub is away is healthy, and so is one that waits before it starts its process again."""


def served(image: Image, volumes: dict[Path, str], after: str = ":") -> str:
    """Start what the image starts, wait until its health check agrees, and end it as an engine does."""
    entry, health = shlex.join(image.entrypoint), shlex.join(image.healthcheck)
    script = SERVED.format(entry=entry, health=health, after=after)
    return image.run(["timeout", "100", "sh", "-ec", script], volumes)


@pytest.mark.long
def test_images_build_and_serve_without_network_or_a_writable_root(images: dict[str, Image], tmp_path: Path) -> None:
    server, site = images["server"], images["site"]
    assert server.user == site.user == f"{USER}:{USER}"
    mine = tmp_path / "mine"
    mine.mkdir()
    os.chown(mine, USER, USER)
    for image, seen in ((server, "/hub"), (site, "/site")):
        assert "Federated training" in image.run(["gapweave", "--help"], {mine: seen})
        assert image.run(["id", "-u"], {mine: seen}).strip() == str(USER)
        with pytest.raises(RuntimeError, match="Read-only file system"):
            image.run(["touch", f"{image.root.name}", "/x"], {mine: seen}, user="0:0")
        image.run(["touch", f"{seen}/x", "/tmp/x"], {mine: seen})
    made = server.run(["gapweave", "server", "init", "--host", "hub.example.org"], {mine: "/hub"})
    assert "sites will connect to hub.example.org:9092" in made
    assert (mine / "hub.yaml").stat().st_uid == USER
    assert "ended with 0" in served(server, {mine: "/hub"}, "gapweave server status")


@pytest.mark.long
def test_the_demo_sets_itself_up_and_a_site_without_its_hub_is_healthy(
    images: dict[str, Image], tmp_path: Path
) -> None:
    setup = content(DOCKER / "compose.demo.yaml")["services"]["setup"]
    for name in ("hub", "sites"):
        (tmp_path / name).mkdir()
    shutil.copy(DOCKER / "demo.sh", tmp_path / "sites" / "demo.sh")
    seen = {tmp_path / "hub": "/hub", tmp_path / "sites": "/sites"}
    capabilities = ",".join(["-all", *(f"+{name.lower()}" for name in setup["cap_add"])])
    variables = [f"{name}={value}" for name, value in setup["environment"].items()]
    words = ["setpriv", f"--bounding-set={capabilities}", "env", *variables, *setup["entrypoint"]]
    words[-1] = words[-1].replace("/demo.sh", "/sites/demo.sh")
    said = images["site"].run(words, seen, user=setup["user"])
    assert said.count("approved: ") == 3
    assert "set up already" in images["site"].run(words, seen, user=setup["user"])
    alder = {tmp_path / "sites" / "alder": "/site"}
    # No hub listens there.
    connection = tmp_path / "sites" / "alder" / "connection.yaml"
    connection.write_text(connection.read_text(encoding="utf-8").replace("host: hub", "host: 127.0.0.1"))
    found = served(images["site"], alder, FAILING.format(health=shlex.join(images["site"].healthcheck)))
    assert "waiting 5 s to start again" in found
    assert "ended with 0" in found
    assert "ended with 0" in served(images["server"], {tmp_path / "hub": "/hub"})
