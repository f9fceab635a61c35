"""Where a site's data lie: files, tables and queries of a database, an OMOP CDM, folders of images."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from gapweave.shared.config.base import StrictModel
from gapweave.shared.config.modalities import category_code

Window = tuple[float | None, float | None]
"""Hours since the start of the visit: from, and up to but not including; null: no bound."""


class ConceptSet(StrictModel):
    """Concepts of the OMOP vocabulary."""

    concepts: list[int] = Field(min_length=1, description="concept ids")
    descendants: bool = Field(False, description="and all below them, by `concept_ancestor`")


Midnight = Literal["date", "time"]

_MIDNIGHT = "what a timestamp at midnight is: a date alone, or that time of day (a column of nothing else needs it)"


class LabelConditions(ConceptSet):
    """A label that is 1 when the visit has one of these conditions (OMOP), else 0."""

    hours: Window = Field((None, None), description="hours since the visit's start that count: [from, before]")
    link: Literal["visit", "person"] = Field("visit", description="whose conditions: the visit's, or the person's")
    midnight: Midnight | None = Field(None, description=_MIDNIGHT)


class LabelColumn(StrictModel):
    """A label: a column of the records or of a query, or conditions; its codes where they differ from the study's."""

    column: str | None = Field(None, description="column of the records, or of the query")
    query: str | None = Field(None, description="a SELECT on the database with the record id and the column")
    conditions: LabelConditions | None = Field(None, description="instead of a column: conditions of the OMOP CDM")
    codes: dict[str, str] | None = Field(None, description="local code -> the study's code")

    @model_validator(mode="before")
    @classmethod
    def _codes(cls, data: Any) -> Any:
        return _with_text_codes(data)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.column is None) == (self.conditions is None) or (self.conditions is not None and self.query):
            raise ValueError("a label is a column (of the records or of a query), or conditions")
        return self


def _not_zero(factor: float) -> float:
    if factor == 0:
        raise ValueError("a factor of 0 makes every value the same")
    return factor


Factor = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_not_zero)]


class ValueColumn(StrictModel):
    """A local column, or an item code, with its unit or codes."""

    column: str = Field(description="local column name; the item's code when values come in long form")
    unit: str | None = Field(None, description="local unit, converted to the study's (for example mg/dL)")
    factor: Factor | None = Field(None, description="multiply by this, instead of a unit")
    offset: float = Field(0.0, allow_inf_nan=False, description="add this after the factor")
    codes: dict[str, str] | None = Field(None, description="local code -> the study's category")
    missing: list[str] = Field(
        default_factory=list, description="local values that mean missing, before conversion (0, -9, unknown)"
    )

    @model_validator(mode="before")
    @classmethod
    def _codes(cls, data: Any) -> Any:
        if isinstance(data, str | int | float) and not isinstance(data, bool):
            return {"column": category_code(data) if not isinstance(data, str) else data}
        return _with_text_codes(data)


def _local_codes(key: Any) -> tuple[str, ...]:
    """The text forms of a local code; `true` without quotes is what a file may spell in capitals, or as 1."""
    text = str(key)
    return (category_code(key), *((text, text.lower(), text.upper()) if isinstance(key, bool) else ()))


def _with_text_codes(data: Any) -> Any:
    if isinstance(data, dict) and isinstance(data.get("codes"), dict):
        written = data["codes"].items()
        codes = {local: category_code(value) for key, value in written for local in _local_codes(key)}
        data = {**data, "codes": codes}
    if isinstance(data, dict) and isinstance(data.get("missing"), list):
        data = {**data, "missing": [category_code(value) for value in data["missing"]]}
    return data


_PASSWORD = re.compile(r"://[^:/@]*:[^@]*@|(?:password|passwd|pwd)(?:=|%3d)", re.IGNORECASE)


class Database(StrictModel):
    """A database of the hospital, read through SQLAlchemy (extra `sql`) in a transaction that only reads."""

    url: str = Field(description="postgresql+psycopg://user@host/name, sqlite:///file.db, ...; never with a password")
    password_file: str | None = Field(None, description="file that holds the password, readable by its owner only")
    password_env: str | None = Field(None, description="environment variable that holds the password")
    cdm: str | None = Field(None, description="schema of the OMOP CDM's tables (default: the user's own)")

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, data: Any) -> Any:
        return {"url": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _secret(self) -> Self:
        if _PASSWORD.search(self.url):
            raise ValueError("the URL holds a password; remove it and name a `password_file` or `password_env`")
        if self.password_file is not None and self.password_env is not None:
            raise ValueError("give password_file or password_env, not both")
        return self


class Rows(StrictModel):
    """Where rows lie: in a file, or in the site's database."""

    file: str | None = Field(None, description="CSV (also .gz) or Parquet")
    table: str | None = Field(None, description="instead of `file`: a table or view of the database, as schema.table")
    query: str | None = Field(None, description="instead of `file`: a SELECT on the database")
    omop: Literal["visits"] | None = Field(
        None, description="instead of `file`: visits: the OMOP CDM's visit_occurrence with each visit's person"
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if sum(place is not None for place in (self.file, self.table, self.query, self.omop)) != 1:
            raise ValueError("give one of file, table, query and omop")
        return self


class Records(Rows):
    """The list of records: one row each, with patient and label."""

    id: str = Field(description="column that identifies a record")
    patient: str = Field(description="column that identifies the patient")
    label: dict[str, LabelColumn] = Field(default_factory=dict, description="the study's label -> local column")
    where: dict[str, Any] = Field(
        default_factory=dict, description="keep rows whose column equals the value, or one of a list"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if isinstance(data, dict) and "omop" in data:
            data = {"id": "visit_occurrence_id", "patient": "person_id", **data}
        if isinstance(data, dict) and isinstance(data.get("label"), dict):
            label = {
                key: {"column": value} if isinstance(value, str) else value for key, value in data["label"].items()
            }
            return {**data, "label": label}
        return data


class ColumnsSource(Rows):
    """Values for a table or series modality: one column a variable, or long form (item, value)."""

    id: str | None = Field(None, description="record id column (default: that of records)")
    time: str | None = Field(None, description="hours since the record's index time, or a timestamp")
    index: str | None = Field(None, description="records column with the index time, when `time` is a timestamp")
    midnight: Midnight | None = Field(None, description=_MIDNIGHT)
    item: str | None = Field(None, description="long form: column with the item's code")
    value: str | None = Field(None, description="long form: column with the value")
    columns: dict[str, ValueColumn] = Field(min_length=1, description="the study's variable -> local column")

    @model_validator(mode="after")
    def _long_form(self) -> Self:
        if (self.item is None) != (self.value is None):
            raise ValueError("item and value come together")
        return self


_ENCODER = "folder of the transformer (extra `text`), where the study asks for its vectors"


class TextSource(Rows):
    """Text columns, joined in their order."""

    id: str | None = Field(None, description="record id column (default: that of records)")
    time: str | None = Field(None, description="hours since the record's index time, or a timestamp")
    index: str | None = Field(None, description="records column with the index time, when `time` is a timestamp")
    midnight: Midnight | None = Field(None, description=_MIDNIGHT)
    columns: list[str] = Field(min_length=1, description="local text columns")
    encoder: str | None = Field(None, description=_ENCODER)


Take = Literal["last", "first", "min", "max", "mean"]


class Measured(ConceptSet):
    """A variable of the OMOP CDM's measurements."""

    units: dict[int, Factor | str] = Field(
        default_factory=dict,
        description="unit_concept_id (0: none) -> its unit, or a factor to the study's; other units are refused",
    )
    take: Take | None = Field(
        None, description="which value of a table's variable counts (default: that of the source)"
    )


class MeasurementSource(StrictModel):
    """Values for a table or series modality from the OMOP CDM's measurements."""

    omop: Literal["measurements"] = Field(description="measurements of the visit")
    hours: Window = Field((None, None), description="hours since the visit's start that count: [from, before]")
    link: Literal["visit", "person"] = Field("visit", description="whose measurements: the visit's, or the person's")
    midnight: Midnight | None = Field(None, description=_MIDNIGHT)
    take: Take = Field("last", description="which value of a table's variable counts")
    columns: dict[str, Measured] = Field(min_length=1, description="the study's variable -> concepts")


class ClinicalSource(StrictModel):
    """Text from the OMOP CDM: notes, or names of conditions."""

    omop: Literal["notes", "conditions"] = Field(description="texts of notes, or names of conditions")
    hours: Window = Field((None, None), description="hours since the visit's start that count: [from, before]")
    link: Literal["visit", "person"] = Field("visit", description="whose: the visit's, or the person's")
    midnight: Midnight | None = Field(None, description=_MIDNIGHT)
    concepts: list[int] = Field(
        default_factory=list, description="only these: types or classes of notes, or conditions (default: all)"
    )
    descendants: bool = Field(False, description="and all below them, by `concept_ancestor`")
    encoder: str | None = Field(None, description=_ENCODER)


class ImageSource(StrictModel):
    """A folder of images, named by a column of the records file."""

    folder: str = Field(description="folder of PNG, JPEG or DICOM files (DICOM: extra `images`)")
    column: str = Field(description="records column with the file name; empty: no image")


def _source_shape(value: Any) -> str:
    omop = value.get("omop") if isinstance(value, dict) else getattr(value, "omop", None)
    if omop in ("measurements", "notes", "conditions"):
        return "measurements" if omop == "measurements" else "clinical"
    if isinstance(value, ImageSource) or (isinstance(value, dict) and "folder" in value):
        return "image"
    columns = value.get("columns") if isinstance(value, dict) else getattr(value, "columns", None)
    return "text" if isinstance(columns, list) else "columns"


Source = Annotated[
    Annotated[ColumnsSource, Tag("columns")]
    | Annotated[TextSource, Tag("text")]
    | Annotated[MeasurementSource, Tag("measurements")]
    | Annotated[ClinicalSource, Tag("clinical")]
    | Annotated[ImageSource, Tag("image")],
    Discriminator(_source_shape),
]


def in_database(source: Source | Rows | LabelColumn) -> bool:
    """Whether a source needs the site's database."""
    if isinstance(source, Rows):
        return source.file is None
    if isinstance(source, LabelColumn):
        return source.query is not None or source.conditions is not None
    return isinstance(source, MeasurementSource | ClinicalSource)
