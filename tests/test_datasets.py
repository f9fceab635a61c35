"""`gapweave data`: a set is there as a whole, as published, or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gapweave.client.sources.files import Files
from gapweave.shared.errors import DataError, Unreachable, UsageError
from gapweave.sites import datasets
from gapweave.sites.datasets import DATA_SETS, DataSet, app, data_folder, data_set, status
from gapweave.sites.datasets_fetch import gather

FILES = {
    "table.csv": b"a,b\n1,2\n" * 5000,
    "images/one two.png": bytes(range(256)) * 40,
    "text.csv.gz": b"\x1f\x8bzip",
}


class Toy(DataSet):
    """A set of three small files."""

    def sums(self):
        return {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


TOY = Toy(name="toy", title="A toy", licence="CC0", source="example.org @ 1", citation="Nobody (2020)")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(datasets.DATA_SETS, "toy", TOY)
    monkeypatch.delenv("GAPWEAVE_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "published"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


def fetch(data, *words):
    return invoke("fetch", "toy", "--data", data, *words)


def stored(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


class Server:
    """A local server with Range support, whose misbehaviour a test chooses."""

    def __init__(self):
        self.requests = []
        self.cut = 0
        self.ranges = True
        self.errors = 0
        self.content = dict(FILES)
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/sets/toy"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler):
        name = handler.path.removeprefix("/sets/toy/").replace("%20", " ")
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1]) if self.ranges else 0
        self.requests.append((name, start))
        if self.errors:
            self.errors -= 1
            return handler.send_error(503)
        if name not in self.content:
            return handler.send_error(404)
        whole = self.content[name]
        body = whole[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if self.cut and len(body) > 1000:
            self.cut -= 1
            body = body[: len(body) // 2]
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(body)
        return None


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def test_a_folder_is_copied_whole(tmp_path, published):
    result = fetch(tmp_path / "data", "--from", published)
    assert result.exit_code == 0, result.output
    assert stored(tmp_path / "data" / "toy") == FILES
    assert "CC0" in result.output
    assert "Nobody (2020)" in result.output
    assert status(TOY, tmp_path / "data" / "toy") == "verified"


def test_a_folder_of_sets_may_be_named(tmp_path, published):
    published.rename(tmp_path / "toy")
    gather(TOY, str(tmp_path), tmp_path / "data" / "toy")
    assert stored(tmp_path / "data" / "toy") == FILES


def test_the_stored_folder_is_readable_like_any_other(tmp_path, published):
    plain = tmp_path / "plain"
    plain.mkdir()
    gather(TOY, str(published), tmp_path / "data" / "toy")
    assert (tmp_path / "data" / "toy").stat().st_mode == plain.stat().st_mode


def test_a_second_fetch_verifies_and_takes_nothing(tmp_path, published):
    fetch(tmp_path, "--from", published)
    result = fetch(tmp_path)
    assert result.exit_code == 0
    assert "already there" in result.output


def test_a_damaged_set_is_named_and_kept(tmp_path, published):
    fetch(tmp_path, "--from", published)
    (tmp_path / "toy" / "table.csv").write_text("mine")
    error = fetch(tmp_path, "--from", published).exception
    assert isinstance(error, DataError)
    assert "table.csv" in str(error)
    assert (tmp_path / "toy" / "table.csv").read_text() == "mine"
    assert status(TOY, tmp_path / "toy") == "damaged"


@pytest.mark.parametrize("harm", ["wrong", "missing"])
def test_a_bad_file_in_the_folder_leaves_nothing(tmp_path, published, harm):
    bad = published / "images" / "one two.png"
    bad.write_bytes(b"other") if harm == "wrong" else bad.unlink()
    error = fetch(tmp_path / "data", "--from", published).exception
    assert isinstance(error, DataError)
    assert error.exit_code == 6
    assert "images/one two.png" in str(error)
    assert list((tmp_path / "data").iterdir()) == []


def test_without_a_source_the_message_names_origin_and_licence(tmp_path):
    error = invoke("fetch", "heart_disease", "--data", tmp_path).exception
    assert isinstance(error, UsageError)
    assert error.exit_code == 2
    for part in ("RenHongJia/ProbabilisticGraphModels", "CC BY 4.0", "--from DIR"):
        assert part in str(error)


def test_an_unknown_set_names_the_nearest():
    with pytest.raises(UsageError, match="heart_disease"):
        data_set("hart_disease")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_a_data_error(tmp_path, published):
    (tmp_path / "data").mkdir(mode=0o500)
    error = fetch(tmp_path / "data", "--from", published).exception
    assert isinstance(error, DataError)
    assert "--data" in str(error)


def test_a_file_in_the_way_is_a_data_error(tmp_path, published):
    (tmp_path / "data").write_text("a file")
    error = fetch(tmp_path / "data", "--from", published).exception
    assert isinstance(error, DataError)


def test_an_address_is_downloaded(tmp_path, server):
    result = fetch(tmp_path, "--from", server.url)
    assert result.exit_code == 0, result.output
    assert stored(tmp_path / "toy") == FILES
    assert [start for _, start in server.requests] == [0, 0, 0]


def test_a_cut_download_goes_on_where_it_stopped(tmp_path, server):
    server.cut = 2
    gather(TOY, server.url, tmp_path / "toy", pause_s=0)
    assert stored(tmp_path / "toy") == FILES
    size = len(FILES["table.csv"])
    assert server.requests[:3] == [
        ("table.csv", 0),
        ("table.csv", size // 2),
        ("table.csv", size // 2 + size // 4),
    ]


def test_a_server_that_cannot_resume_is_asked_for_the_whole_file(tmp_path, server):
    server.cut, server.ranges = 1, False
    gather(TOY, server.url, tmp_path / "toy", pause_s=0)
    assert stored(tmp_path / "toy") == FILES


def test_a_passing_server_error_is_retried(tmp_path, server):
    server.errors = 2
    gather(TOY, server.url, tmp_path / "toy", pause_s=0)
    assert stored(tmp_path / "toy") == FILES


def test_a_wrong_byte_is_refused_and_leaves_nothing(tmp_path, server):
    content = bytearray(FILES["table.csv"])
    content[777] ^= 1
    server.content["table.csv"] = bytes(content)
    with pytest.raises(DataError, match=r"table\.csv differs"):
        gather(TOY, server.url, tmp_path / "toy", pause_s=0)
    assert list(tmp_path.iterdir()) == []


def test_a_lasting_server_error_is_unreachable(tmp_path, server):
    server.errors = 1000
    with pytest.raises(Unreachable, match="503"):
        gather(TOY, server.url, tmp_path / "toy", pause_s=0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_server_lacks_is_not_retried(tmp_path, server):
    del server.content["table.csv"]
    with pytest.raises(Unreachable, match="404"):
        gather(TOY, server.url, tmp_path / "toy", pause_s=0)
    assert len(server.requests) == 1


def test_no_server_is_unreachable(tmp_path, server):
    server.close()
    with pytest.raises(Unreachable, match="no answer after 5 attempts"):
        gather(TOY, server.url, tmp_path / "toy", pause_s=0)


def test_no_address_is_unreachable(tmp_path):
    with pytest.raises(Unreachable, match="no address"):
        gather(TOY, "http://127.0.0.1:port", tmp_path / "toy", pause_s=0)


def test_the_list_says_what_is_here(tmp_path, published):
    fetch(tmp_path, "--from", published)
    rows = {row["name"]: row for row in json.loads(invoke("list", "--data", tmp_path, "--json").output)}
    assert rows["toy"]["status"] == "verified"
    assert rows["toy"]["folder"] == str(tmp_path / "toy")
    assert rows["eicu_demo"]["status"] == "absent"
    assert "ODbL" in rows["eicu_demo"]["licence"]


def test_the_list_is_readable_too(tmp_path):
    output = invoke("list", "--data", tmp_path).output
    assert "heart_disease" in output
    assert "not there" in output


def test_the_data_folder_is_the_users_unless_chosen(tmp_path, monkeypatch):
    assert data_folder(tmp_path) == tmp_path
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert "gapweave" in str(data_folder())
    monkeypatch.setenv("GAPWEAVE_DATA", str(tmp_path / "chosen"))
    rows = json.loads(invoke("list", "--json").output)
    assert rows[0]["folder"].startswith(str(tmp_path / "chosen"))


def test_a_fetched_set_is_found_by_site_files_without_any_option(tmp_path, published, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    result = invoke("fetch", "toy", "--from", published)
    assert result.exit_code == 0, result.output
    found = Files(site_file=tmp_path / "site.yaml", data_dir=None).find("toy/table.csv")
    assert found.read_bytes() == FILES["table.csv"]


@pytest.mark.parametrize("name", ["covid_cxr", "eicu_demo", "heart_disease"])
def test_every_known_set_ships_its_hashes(name):
    sums = DATA_SETS[name].sums()
    assert "README.md" in sums
    assert all(len(digest) == 64 and not Path(path).is_absolute() for path, digest in sums.items())


@pytest.mark.parametrize("command", ["list", "fetch"])
def test_help_shows_an_example(command):
    assert "Example: gapweave data" in " ".join(invoke(command, "--help").output.split())


@pytest.mark.data
@pytest.mark.parametrize("name", ["covid_cxr", "eicu_demo", "heart_disease"])
def test_the_real_sets_are_as_published(real_data, name, tmp_path):
    assert status(DATA_SETS[name], real_data / name) == "verified"
    shutil.copytree(real_data / name, tmp_path / "from" / name)
    gather(DATA_SETS[name], str(tmp_path / "from"), tmp_path / name)
    assert status(DATA_SETS[name], tmp_path / name) == "verified"
