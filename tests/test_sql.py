"""Tables and queries of a database: the cohorts of the files, read only, and errors that quote nothing."""

from __future__ import annotations

import json
import logging
import resource
import sqlite3
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import sqlalchemy as sa
import yaml
from cohorts import LABS, NOTE, VITALS, Hospital, assert_same, study
from databases import PASSWORD, Postgres, fill

from gapweave.client.checks import check_site, exit_code
from gapweave.client.data import load_cohort
from gapweave.client.sources import sql
from gapweave.client.sources.files import Files
from gapweave.shared.cli import _run
from gapweave.shared.config import load_site, load_study
from gapweave.shared.config.base import parse
from gapweave.shared.config.site import Site
from gapweave.shared.config.sources import Database, Rows
from gapweave.shared.errors import DataError, GapweaveError, Unreachable, UsageError
from gapweave.sites.demo.write import write_demo

SECRET = "zq77"
BOTH = pytest.mark.parametrize("kind", ["sqlite", "postgresql"])

Filler = Callable[[Mapping[str, pl.DataFrame]], dict[str, Any]]


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], tuple[Filler, sa.Engine]]:
    """Makes a database of a kind: what fills it and gives the site file's block, and its owner's engine."""

    def make(kind: str) -> tuple[Filler, sa.Engine]:
        if kind == "sqlite":
            engine = sa.create_engine(f"sqlite:///{tmp_path / 'hospital.db'}", poolclass=sa.NullPool)
            block: dict[str, Any] = {"url": "sqlite:///hospital.db"}
        else:
            cluster: Postgres = request.getfixturevalue("postgres")
            name = f"test_{uuid.uuid4().hex}"
            engine = cluster.create(name)
            password = tmp_path / "password"
            password.write_text(PASSWORD + "\n")
            password.chmod(0o600)
            block = {"url": cluster.url("reader", name), "password_file": "password"}

        def filled(frames: Mapping[str, pl.DataFrame]) -> dict[str, Any]:
            fill(engine, frames)
            return block

        return filled, engine

    return make


def in_database(site: Path, filled: Filler) -> dict[str, Any]:
    """A site file's content with every file as a table of a database."""
    content: dict[str, Any] = yaml.safe_load(site.read_text())
    frames = {}
    for name, source in content["data"].items():
        if "file" in source:
            path = site.parent / source.pop("file")
            frames[name] = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path)
            source["table"] = name
        else:
            source["folder"] = str((site.parent / source["folder"]).resolve())
    content["data"]["database"] = filled(frames)
    return content


@BOTH
@pytest.mark.parametrize("name", ["alder", "birch"])
def test_a_hospital_in_a_database_is_the_one_in_files(store: Any, tmp_path: Path, kind: str, name: str) -> None:
    """Wide and long form, hours and timestamps, numbers and codes."""
    demo = load_study(write_demo(tmp_path / "demo", hospitals=2, patients=30))
    path = tmp_path / "demo" / "sites" / f"{name}.yaml"
    expected = load_cohort(demo, load_site(path), site_file=path)
    content = in_database(path, store(kind)[0])
    long = content["data"]["labs"]
    if "item" in long:
        del long["table"]
        long["query"] = """SELECT labs.*, '10:30 100%' AS "of: day" FROM labs WHERE result::text NOT LIKE '%:x' ;"""
        if kind == "sqlite":
            long["query"] = long["query"].replace("::text", "")
    site = parse(Site, content, "site.yaml")
    assert_same(load_cohort(demo, site, site_file=tmp_path / "site.yaml"), expected)
    findings = check_site(demo, site, tmp_path / "site.yaml")
    assert {finding.status for finding in findings} == {"ok"}
    assert [one.message for one in findings if one.id == "database"] == (
        ["its user may only read"] if kind == "postgresql" else []
    )
    assert {one.status for one in check_site(None, site, tmp_path / "site.yaml")} == {"ok"}


def hospital_in(block: dict[str, Any], folder: Path) -> Hospital:
    hospital = Hospital(folder)
    hospital.content["data"]["database"] = block
    hospital.add("labs", table="labs", columns={"sodium": "na"})
    hospital.content["data"]["records"] = {"table": "records", "id": "id", "patient": "patient", "label": {"y": "y"}}
    return hospital


def frames(count: int = 8) -> dict[str, pl.DataFrame]:
    ids = [f"{SECRET}-{row}" for row in range(count)]
    return {
        "records": pl.DataFrame({"id": ids, "patient": ids, "y": [row % 2 for row in range(count)]}),
        "labs": pl.DataFrame({"id": ids, "na": [140.0 + row for row in range(count)], "text": [SECRET] * count}),
    }


@BOTH
def test_the_order_of_the_database_means_nothing(store: Any, tmp_path: Path, kind: str) -> None:
    filled, _ = store(kind)
    block = filled({"records": frames()["records"][::-1], "labs": frames()["labs"].sample(8, shuffle=True, seed=3)})
    hospital = hospital_in(block, tmp_path)
    cohort = hospital.load(study({"labs": LABS}))
    assert list(cohort.record_ids) == frames()["records"]["id"].to_list()
    hospital.update("records", query="SELECT * FROM records ORDER BY id DESC")
    del hospital.content["data"]["records"]["table"]
    assert_same(hospital.load(study({"labs": LABS})), cohort)


def source(name: str, **keys: Any) -> Callable[[Hospital], None]:
    return lambda hospital: hospital.add(name, **keys)


def records(**keys: Any) -> Callable[[Hospital], None]:
    return lambda hospital: hospital.content["data"]["records"].update(keys)


def database(**keys: Any) -> Callable[[Hospital], None]:
    def change(hospital: Hospital) -> None:
        block = hospital.content["data"]["database"]
        port = sa.make_url(block["url"]).port
        hospital.content["data"]["database"] = {
            key: value.format(port=port) for key, value in {**block, **keys}.items() if value is not None
        }

    return change


def loose(hospital: Hospital) -> None:
    (hospital.folder / "password").chmod(0o640)


SODIUM = {"sodium": "na"}
ANY: dict[str, tuple[Callable[[Hospital], None], type[GapweaveError], str]] = {
    "no table": (
        source("labs", table="lab", columns=SODIUM),
        DataError,
        "data.labs.table: the database refused the query",
    ),
    "no schema": (source("labs", table="a.labs", columns=SODIUM), DataError, "the database refused the query"),
    "no column": (
        source("labs", table="labs", columns={"sodium": "naa"}),
        DataError,
        "data.labs.table:naa: there is no column 'naa'. Did you mean 'na'?",
    ),
    "nothing near": (source("labs", table="labs", columns={"sodium": "x"}), DataError, "Its columns are: id, na, text"),
    "column twice": (
        source("labs", query="SELECT id, na, na FROM labs", columns=SODIUM),
        DataError,
        "the column 'na' occurs twice",
    ),
    "no SQL": (source("labs", query=f"SELEC {SECRET}", columns=SODIUM), DataError, "the database refused the query"),
    "two statements": (
        source("labs", query="SELECT * FROM labs; DELETE FROM labs", columns=SODIUM),
        DataError,
        "it must be one SELECT",
    ),
    "change": (source("labs", query="DELETE FROM labs", columns=SODIUM), DataError, "the database refused the query"),
    "hidden change": (
        source("labs", query="DELETE FROM labs RETURNING id, na", columns=SODIUM),
        DataError,
        "the database refused the query",
    ),
    "nobody": (records(where={"y": 7}), DataError, "data.records.table:y: none of 8 rows fulfils `where`"),
    "bytes": (
        source("labs", query="SELECT id, {bytes} AS na FROM labs", columns=SODIUM),
        DataError,
        "the column holds Binary, not text, numbers or times",
    ),
    "no URL": (database(url="hospital"), UsageError, "the URL of the database cannot be understood"),
    "no driver": (database(url="mssql+pyodbc://a@b/c"), UsageError, "there is no driver for this database"),
    "no such driver": (database(url="oracel://a@b/c"), UsageError, "there is no driver for this database"),
    "no file": (database(url="sqlite:///nothing.db"), DataError, "there is no nothing.db"),
    "no file named": (database(url="sqlite://"), UsageError, "the URL names no file"),
}
POSTGRES: dict[str, tuple[Callable[[Hospital], None], type[GapweaveError], str]] = {
    "a value that cannot be converted": (
        source("labs", query="SELECT id, text::float AS na FROM labs", columns=SODIUM),
        DataError,
        "the database refused the query (InvalidTextRepresentation)",
    ),
    "a right that is not given": (
        source("labs", query="SELECT id, na FROM secret", columns=SODIUM),
        DataError,
        "(InsufficientPrivilege)",
    ),
    "nobody listens": (
        database(url="postgresql+psycopg://reader@127.0.0.1:9/x"),
        Unreachable,
        "data.database: the database cannot be connected",
    ),
    "wrong user": (
        database(url=f"postgresql+psycopg://{SECRET}@127.0.0.1:{{port}}/x"),
        Unreachable,
        "Check address, user and password",
    ),
    "no password file": (database(password_file="nothing"), UsageError, "the password file cannot be read"),
    "a password for all": (loose, UsageError, "others can read the password file. chmod 600"),
    "no variable": (
        database(password_file=None, password_env="GAPWEAVE_NO_SUCH"),
        UsageError,
        "the environment has no GAPWEAVE_NO_SUCH",
    ),
}
CASES = [*(("sqlite", name) for name in ANY), *(("postgresql", name) for name in {**ANY, **POSTGRES})]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_bad_databases(store: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, name: str) -> None:
    change, error, text = {**ANY, **POSTGRES}[name]
    filled, engine = store(kind)
    hospital = hospital_in(filled(frames()), tmp_path)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE secret AS SELECT * FROM labs"))
        if kind == "postgresql":
            connection.execute(sa.text("REVOKE ALL ON secret FROM reader"))
            connection.execute(sa.text("GRANT ALL ON labs TO reader"))
    change(hospital)
    labs = hospital.content["data"]["labs"]
    if "query" in labs:
        labs["query"] = labs["query"].replace("{bytes}", r"'\x00'::bytea" if kind == "postgresql" else "x'00'")
    with caplog.at_level(logging.DEBUG), pytest.raises(GapweaveError) as caught:
        hospital.load(study({"labs": LABS}))
    assert type(caught.value) is error
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.where
    assert caught.value.remedy
    said = f"{caught.value}{caplog.text}".replace(str(tmp_path), "")
    assert SECRET not in said
    assert PASSWORD not in said
    findings = check_site(study({"labs": LABS}), hospital.site, hospital.site_file)
    assert exit_code(findings) == (5 if error is Unreachable else 6)  # as a run of it exits
    lines = " ".join(map(str, findings))
    assert text.split(". ")[0].rsplit(": ")[-1] in lines
    assert SECRET not in lines.replace(str(tmp_path), "")
    assert not (tmp_path / "nothing.db").exists()
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM labs")).scalar() == 8


def test_a_password_from_the_environment(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital = hospital_in(store("postgresql")[0](frames()), tmp_path)
    database(password_file=None, password_env="HOSPITAL_DB")(hospital)
    monkeypatch.setenv("HOSPITAL_DB", PASSWORD)
    assert hospital.load(study({"labs": LABS})).batch.present.all()
    monkeypatch.setenv("HOSPITAL_DB", "wrong")
    with pytest.raises(Unreachable):
        hospital.load(study({"labs": LABS}))


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (f"postgresql://reader:{SECRET}@host/name", "the URL holds a password; remove it and name a `password_file`"),
        (f"mssql+pyodbc:///?odbc_connect=UID%3Da%3BPWD%3D{SECRET}", "the URL holds a password"),
        ({"url": f"postgresql://host/name?user=a&password={SECRET}"}, "the URL holds a password"),
        ({"url": "postgresql://host/name", "password": SECRET}, "unknown key 'password'; did you mean 'password_"),
        ({"url": "a://b", "password_file": "a", "password_env": "b"}, "give password_file or password_env, not both"),
        (None, "labs lies in a database; name it by `database`"),
    ],
)
def test_what_a_site_file_may_not_say(tmp_path: Path, block: Any, text: str) -> None:
    hospital = hospital_in(block, tmp_path)
    hospital.content["data"]["records"] = {"file": "records.csv", "id": "id", "patient": "patient"}
    if block is None:
        del hospital.content["data"]["database"]
    with pytest.raises(UsageError) as caught:
        parse(Site, hospital.content, "site.yaml")
    assert text in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("places", [{}, {"file": "a.csv", "table": "a"}])
def test_rows_lie_in_one_place(tmp_path: Path, places: dict[str, str]) -> None:
    hospital = Hospital(tmp_path)
    hospital.add("labs", columns={"sodium": "na"}, **places)
    with pytest.raises(UsageError, match="give one of file, table, query and omop"):
        parse(Site, hospital.content, "site.yaml")


def test_the_check_warns_of_a_user_who_may_write(store: Any, tmp_path: Path) -> None:
    filled, engine = store("postgresql")
    hospital = hospital_in(filled(frames()), tmp_path)
    with engine.begin() as connection:
        connection.execute(sa.text("GRANT INSERT ON labs TO reader"))
    (finding,) = [one for one in check_site(None, hospital.site, hospital.site_file) if one.id == "database"]
    assert (finding.status, finding.message) == ("warning", "its user may change tables")


def test_a_database_that_is_not_there_is_told_once(tmp_path: Path) -> None:
    hospital = hospital_in({"url": "sqlite:///nothing.db"}, tmp_path)
    for of in (None, study({"labs": LABS})):
        problems = [one for one in check_site(of, hospital.site, hospital.site_file) if one.status == "problem"]
        assert [(one.id, one.message.split(";")[0]) for one in problems] == [("database", "there is no nothing.db")]


def test_types_of_a_database(store: Any, tmp_path: Path) -> None:
    """Decimals, time zones and identifiers, which files do not have."""
    hospital = hospital_in(store("postgresql")[0](frames()), tmp_path)
    hospital.add("labs", query="SELECT id, na::numeric(9,3) AS na FROM labs", columns=SODIUM)
    hospital.content["data"]["records"] = {
        "query": "SELECT id, md5(id)::uuid AS patient, y = 1 AS y, timestamptz '2024-05-01 13:00+02' AS start FROM records",
        **{"id": "id", "patient": "patient", "label": {"y": "y"}},
    }
    hospital.add(
        "vitals", time="at", index="start", columns={"bp": "na"},
        query="SELECT id, na, timestamptz '2024-05-01 11:30+00' AS at FROM labs",
    )  # fmt: skip
    hospital.add("note", query="SELECT id, current_date AS text FROM labs", columns=["text"])
    batch = hospital.load(study({"labs": LABS, "vitals": VITALS, "note": NOTE})).batch
    assert batch.present.all()
    assert sorted(batch.target[:, 0].tolist()) == [0.0] * 4 + [1.0] * 4
    assert batch.inputs["vitals"][:, 0, 2].all()


def test_postgresql_reads_in_parts_in_a_transaction_that_only_reads(store: Any, tmp_path: Path) -> None:
    """A cursor at the server: without one the driver holds the whole result."""
    hospital = hospital_in(store("postgresql")[0](frames()), tmp_path)
    files = Files(site_file=hospital.site_file, database=hospital.site.data.database)
    query = "SELECT current_setting('transaction_read_only') AS a, current_setting('transaction_isolation') AS b, (SELECT count(*) FROM pg_cursors) AS c"
    table = sql.run(lambda: sa.text(query), ["a", "b", "c"], files, "x")
    assert table.frame.row(0) == ("on", "repeatable read", "1")


@pytest.mark.parametrize("odd", [12.5, "x", "2024-05-01 05:00+02:00", None, 2**62])
def test_how_one_row_is_written_changes_no_other(tmp_path: Path, odd: object) -> None:
    """A type for the whole column follows from all its values: ids of 18 digits became one beside a fraction."""
    others = [
        (900000000000207001, "2024-05-01 00:00:00"),
        (900000000000207002, "2024-05-02 13:00:00"),
        (3, "1"),
        (20, "2"),
    ]

    def read(rows: list[tuple[object, object]]) -> pl.DataFrame:
        path = tmp_path / "h.db"
        path.unlink(missing_ok=True)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE t (id, at)")
            connection.executemany("INSERT INTO t VALUES (?, ?)", rows)
            connection.commit()
        files = Files(site_file=tmp_path / "site.yaml", database=Database(url="sqlite:///h.db"))
        return sql.read(Rows(table="t"), ["id", "at"], files, "data.t").frame

    alone = read([*others])
    assert alone["id"].to_list() == ["3", "20", "900000000000207001", "900000000000207002"], "by number, told apart"
    together = read([(odd, odd), *others])
    assert len(together) == 5
    mine = pl.Series([None if odd is None else str(odd)])
    assert together.filter(~pl.col("id").eq_missing(mine)).equals(alone)


def test_columns_that_nobody_asked_for_are_not_fetched(tmp_path: Path) -> None:
    """One text that is none, or one endless time, in any column stopped the site."""
    with closing(sqlite3.connect(tmp_path / "h.db")) as connection:
        connection.execute('CREATE TABLE t (id, "Odd name", na, other)')
        connection.execute("INSERT INTO t VALUES (1, 'x', 140.0, CAST(x'ff' AS TEXT))")
        connection.commit()
    files = Files(site_file=tmp_path / "site.yaml", database=Database(url="sqlite:///h.db"))
    table = sql.read(Rows(table="t"), ["id", "Odd name", "lacking"], files, "data.t")
    assert table.names == ("id", "Odd name", "na", "other")
    assert table.frame.rows() == [("1", "x")]
    with pytest.raises(DataError, match="there is no column 'lacking'"):
        table.column("lacking")
    with pytest.raises(DataError, match="the database refused the query"):
        sql.read(Rows(table="t"), ["other"], files, "data.t")


def test_a_database_that_is_locked_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0.1))
    files = Files(site_file=tmp_path / "site.yaml", database=Database(url="sqlite:///h.db"))
    with closing(sqlite3.connect(tmp_path / "h.db", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE t (id)")
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Unreachable, match="the database is locked"):
            sql.read(Rows(table="t"), ["id"], files, "data.t")
    (tmp_path / "h.db").write_bytes(b"no database" * 100)
    with pytest.raises(DataError, match="the file is damaged or no SQLite database"):
        sql.read(Rows(table="t"), ["id"], files, "data.t")


@BOTH
def test_rows_of_others_are_never_held(store: Any, tmp_path: Path, kind: str) -> None:
    """200,000 rows of 2 kB, of which eight are the site's."""
    hospital = hospital_in(store(kind)[0](frames()), tmp_path)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000)"
    text = "'" + "x" * 2000 + "'"
    hospital.add(
        "note", columns=["text"],
        query=f"{numbers} SELECT 'other' AS id, {text} || i AS text FROM n UNION ALL SELECT id, text FROM labs",
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batch = hospital.load(study({"labs": LABS, "note": NOTE})).batch
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert batch.present.all()
    assert grown < 150, "MB; all rows together are 400"


def test_a_site_without_the_extra_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    files = Files(site_file=tmp_path / "site.yaml", database=Database(url="sqlite:///a.db"))
    with pytest.raises(UsageError, match=r"gapweave\[sql\]"):
        sql.run(lambda: sa.text("SELECT 1"), ["a"], files, "x")


def test_a_simulation_without_a_site_whose_database_is_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_demo(tmp_path / "demo", hospitals=3, patients=30)
    site = tmp_path / "demo" / "sites" / "birch.yaml"
    content = yaml.safe_load(site.read_text())
    content["data"]["database"] = "postgresql+psycopg://reader@127.0.0.1:9/x"
    content["data"]["labs"] |= {"table": "labs"}
    del content["data"]["labs"]["file"]
    site.write_text(yaml.safe_dump(content))
    words = ["simulate", str(path), "--rounds", "1", "--set", "privacy.enabled=false"]
    assert _run([*words, "--out", str(tmp_path / "a")], debug=False) == Unreachable.exit_code
    assert "or go on with --continue-without" in capsys.readouterr().err
    assert _run([*words, "--continue-without", "--out", str(tmp_path / "b")], debug=True) == 0
    rows = json.loads((tmp_path / "b" / "summary.json").read_text())["sites"]
    assert {name: row["status"] for name, row in rows.items()} == {"alder": "ok", "birch": "failed", "cedar": "ok"}
