"""Tables and queries of a hospital's database, in parts, so that rows that are not needed are never held."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import polars as pl

from gapweave.client.sources.files import Files, Table
from gapweave.client.sources.place import Keep
from gapweave.shared.config.sources import Rows
from gapweave.shared.errors import DataError, GapweaveError, Unreachable, UsageError

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, CursorResult, Engine, Executable

PART = 5_000
"""Rows that are fetched at a time."""

PATIENCE = 10
"""Seconds that a connection may take."""

_MAY_WRITE = """
SELECT EXISTS (
    SELECT 1 FROM information_schema.role_table_grants
    WHERE privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')
    AND table_schema NOT IN ('information_schema', 'pg_catalog')
) OR (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) AS may_write
"""


def read(source: Rows, wanted: Iterable[str], files: Files, key: str, keep: Keep | None = None) -> Table:
    """Read those of the wanted columns that a table or query has; see `place.read_source`.

    The rows are put in the order of their values, column by column as they are wanted, for a database promises
    none: the same rows are the same cohort, and what counts as the first of several does not change.
    """
    wanted = tuple(wanted)
    if source.query is not None:
        query = source.query
        return run(lambda: _query(query), wanted, files, f"{key}.query", keep)
    # Columns that nobody asked for are not fetched: one may hold what fills the memory, or what no driver understands.
    if source.table is not None:
        name, where = source.table, f"{key}.table"
        names = run(lambda: _part_of(name, None), (), files, where).names
        found = run(lambda: _part_of(name, [one for one in names if one in wanted]), wanted, files, where, keep)
        return replace(found, names=names)
    from gapweave.client.sources.cdm import VISIT_COLUMNS, visits

    return replace(run(lambda: visits(files, wanted), wanted, files, f"{key}.omop", keep), names=VISIT_COLUMNS)


def run(
    statement: Callable[[], Executable],
    wanted: Iterable[str],
    files: Files,
    where: str,
    keep: Keep | None = None,
    whole: Collection[str] = (),
) -> Table:
    """Run one statement that reads.

    Args:
        statement: makes it; called when SQLAlchemy is known to be there.
        wanted: columns of the result.
        files: for the database.
        where: key of the site file, for messages.
        keep: what of a part is needed.
        whole: columns that hold whole numbers, whatever their values are; all others are text.

    Raises:
        DataError: when the database refuses the statement.
        Unreachable: when it cannot be connected.
        UsageError: for an address or driver that is wrong.
    """
    asked = tuple(dict.fromkeys(wanted))
    with _connected(files) as connection, _told(where):
        options = {"stream_results": True, "max_row_buffer": PART}
        result = connection.execute(statement(), execution_options=options)
        names = _names(result)
        at = {name: names.index(name) for name in asked if name in names}
        nothing = _frame([], at, whole)
        parts, rows = [nothing if keep is None else keep(nothing)], 0
        for fetched in result.partitions(PART):
            part = _frame(fetched, at, whole)
            rows += len(fetched)
            parts.append(part if keep is None else keep(part))
    return Table(place=where, names=names, wanted=frozenset(asked), frame=_ordered(parts), rows=rows, named=True)


def may_write(files: Files) -> bool | None:
    """Whether the user of the database may change a table; None where that cannot be told (PostgreSQL only).

    Raises:
        DataError: and the other errors of `run`, also where it cannot be told.
    """
    table = run(lambda: _right(files), ["may_write"], files, files.key("data.database"))
    may = table.frame["may_write"][0]
    return None if may is None else may == "1"


def _right(files: Files) -> Executable:
    from sqlalchemy import null, select, text

    assert files.database is not None
    if files.database.url.startswith("postgres"):
        return text(_MAY_WRITE)
    return select(null().label("may_write"))


def _query(query: str) -> Executable:
    from sqlalchemy import text

    # A colon before a word would be a parameter; there are none.
    return text(re.sub(r"(?<![:\w\\]):(?=\w+(?!:))", r"\\:", query.strip().rstrip(";")))


def _part_of(table_name: str, columns: list[str] | None) -> Executable:
    """The given columns of a table or view; None: no row of all of them."""
    from sqlalchemy import column, false, literal, literal_column, select, table

    schema, _, name = table_name.rpartition(".")
    chosen: list[Any] = [literal_column("*")] if columns is None else [column(one) for one in columns] or [literal(1)]
    statement = select(*chosen).select_from(table(name, schema=schema or None))
    return statement.where(false()) if columns is None else statement


def _names(result: CursorResult[Any]) -> tuple[str, ...]:
    """Names of the result's columns, one as often as it occurs."""
    cursor = result.cursor
    if cursor is None or cursor.description is None:
        raise ValueError("no rows")
    return tuple(str(column[0]) for column in cursor.description)


@contextmanager
def _connected(files: Files) -> Iterator[Connection]:
    """A transaction that only reads, as far as the database knows such ones."""
    engine = _engine(files)
    try:
        with _told(files.key("data.database"), connecting=True):
            connection = engine.connect()
        with connection:
            if engine.dialect.name == "postgresql":
                connection = connection.execution_options(
                    isolation_level="REPEATABLE READ", postgresql_readonly=True
                )  # fmt: skip
            yield connection
    finally:
        engine.dispose()


def _engine(files: Files) -> Engine:
    where = files.key("data.database")
    try:
        from sqlalchemy import create_engine, make_url
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError
        from sqlalchemy.pool import NullPool
    except ImportError:
        raise UsageError("a database needs SQLAlchemy", where=where, remedy="pip install 'gapweave[sql]'") from None
    assert files.database is not None
    try:
        url = make_url(files.database.url)
        if url.get_backend_name() == "sqlite":
            return create_engine("sqlite://", creator=_sqlite(url, files, where), poolclass=NullPool)
        waiting = {"connect_timeout": PATIENCE} if url.get_backend_name() in ("postgresql", "mysql", "mariadb") else {}
        url = url.set(password=_password(files))
        return create_engine(url, poolclass=NullPool, hide_parameters=True, connect_args=waiting)
    except (ImportError, NoSuchModuleError):
        remedy = "Install the driver that the URL names; 'gapweave[sql]' has the one of postgresql+psycopg"
        raise UsageError("there is no driver for this database", where=where, remedy=remedy) from None
    except (ArgumentError, ValueError):
        remedy = "Write it as in postgresql+psycopg://user@host/name or sqlite:///file.db"
        raise UsageError("the URL of the database cannot be understood", where=where, remedy=remedy) from None


def _sqlite(url: URL, files: Files, where: str) -> Callable[[], sqlite3.Connection]:
    """Opens a file that exists, for reading only; a plain connection would create it."""
    if not url.database or url.database == ":memory:":
        raise UsageError("the URL names no file", where=where, remedy="Write it as in sqlite:///file.db")
    path = files.find(url.database, where)
    return lambda: sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)


def _password(files: Files) -> str | None:
    """The password, from where the site file says; None leaves it to the driver (peer, certificate, Kerberos).

    Raises:
        UsageError: when it is not there, or others can read it.
    """
    database = files.database
    assert database is not None
    if database.password_env is not None:
        found = os.environ.get(database.password_env)
        if found is None:
            where = files.key("data.database.password_env")
            raise UsageError(
                f"the environment has no {database.password_env}", where=where, remedy="Set it to the password"
            )
        return found
    if database.password_file is None:
        return None
    path = files.site_file.parent / Path(database.password_file)
    try:
        if path.stat().st_mode & 0o077:
            raise UsageError("others can read the password file", where=str(path), remedy=f"chmod 600 {path}")
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError):
        remedy = "Write the password into it, and chmod 600"
        raise UsageError("the password file cannot be read", where=str(path), remedy=remedy) from None


@contextmanager
def _told(where: str, *, connecting: bool = False) -> Iterator[None]:
    """Errors of the database as ours: its own texts quote values, queries and addresses, so only the kind is told."""
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    try:
        yield
    except GapweaveError:
        raise
    except (SQLAlchemyError, sqlite3.Error, ValueError, OverflowError) as error:
        if connecting or (isinstance(error, DBAPIError) and error.connection_invalidated):
            remedy = "Check address, user and password, and that the database is up and lets this machine in"
            what = "the database cannot be connected" if connecting else "the connection to the database was lost"
            raise Unreachable(what, where=where, remedy=remedy) from None
        # SQLite's own words for these hold no value.
        if "database is locked" in str(error):
            raise Unreachable("the database is locked", where=where, remedy="Try again when nobody writes") from None
        if "not a database" in str(error) or "malformed" in str(error):
            raise DataError("the file is damaged or no SQLite database", where=where, remedy="Copy it again") from None
        kind = type(error.orig if isinstance(error, DBAPIError) and error.orig is not None else error).__name__
        remedy = "Try the query by hand as the same user: it must be one SELECT on tables that the user may read"
        raise DataError(f"the database refused the query ({kind})", where=where, remedy=remedy) from None


def _frame(rows: Sequence[Sequence[Any]], at: dict[str, int], whole: Collection[str]) -> pl.DataFrame:
    columns = [_series(name, [row[place] for row in rows]) for name, place in at.items()]
    return pl.DataFrame([one.cast(pl.Int64, strict=False) if one.name in whole else one for one in columns])


def _series(name: str, values: list[Any]) -> pl.Series:
    """Values of one column of a part as text, each by itself, as a text file would hold them.

    A type for the whole column would follow from all its values: one patient's odd one would change how the others' are
    read, an id of 18 digits beside a fraction say.
    """
    if any(isinstance(value, bytes | memoryview) for value in values):
        return pl.Series(name, [None if value is None else b"" for value in values], dtype=pl.Binary)  # refused later
    return pl.Series(name, [None if value is None else _text(value) for value in values], dtype=pl.String)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    # A text file has a point and no exponent in a decimal number, and a blank between date and time.
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def _ordered(parts: list[pl.DataFrame]) -> pl.DataFrame:
    """All parts as one, by the value of each column in turn: numbers first, as numbers, then other texts."""
    if not parts[0].width:
        return parts[0]
    for name in parts[0].columns:
        if len({part.schema[name] for part in parts}) > 1:  # bytes in some parts only
            parts = [part.with_columns(pl.lit(b"").alias(name)) for part in parts]
    frame = pl.concat(parts)
    columns = [pl.col(name) for name, kind in frame.schema.items() if kind != pl.Binary]
    keys = [key for column in columns for key in (column.cast(pl.Float64, strict=False), column)]
    return frame.sort(keys, nulls_last=True, maintain_order=True) if keys else frame
