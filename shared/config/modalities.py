"""The study file's modalities: kinds of data, their variables, and the public ranges of these."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from gapweave.shared.config.base import Name, StrictModel
from gapweave.shared.config.library import from_card, from_score

Variable = Annotated[str, Field(pattern=Name)]


class Scaling(StrictModel):
    """What is plausible of a number, and how it becomes an input: public, and the same at every site."""

    low: float = Field(description="lowest plausible value; smaller ones are clipped and counted by `site check`")
    high: float = Field(description="highest plausible value; larger ones are clipped and counted")
    center: float | None = Field(None, description="value mapped to 0 (default: the middle of the range)")
    scale: float | None = Field(None, gt=0, description="distance mapped to 1 (default: a quarter of the range)")
    log: bool = Field(False, description="take logarithms first; the range must be positive")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low={self.low:g} must be below high={self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a positive range, low={self.low:g}")
        return self


class Range(Scaling):
    """A numeric variable: public plausible range and scaling, the same at every site."""

    normal: tuple[float, float] | None = Field(
        None,
        description="reference interval [low, high]; how far a value lies above and below it become inputs too",
    )
    unit: str | None = Field(None, description="the study's unit; site files convert to it")
    molar_mass: float | None = Field(None, gt=0, description="g/mol, to convert between mass and amount of substance")
    other_units: dict[str, tuple[float, float]] = Field(
        default_factory=dict,
        description="units whose way to the study's no rule gives, or another than units do: unit -> [factor, offset]",
    )
    card: str | None = Field(
        None,
        exclude=True,
        description="a card of the library (`gapweave study cards`), which gives all that is not written beside it",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_card(cls, data: Any) -> Any:
        """Written out when the study is read: it does not depend on the library that a site has installed."""
        return from_card(data) if isinstance(data, dict) and data.get("card") is not None else data

    @model_validator(mode="after")
    def _normal_inside(self) -> Self:
        if self.normal is not None and not self.low <= self.normal[0] < self.normal[1] <= self.high:
            raise ValueError(
                f"normal=[{self.normal[0]:g}, {self.normal[1]:g}] must ascend, inside [{self.low:g}, {self.high:g}]"
            )
        return self


class Categories(StrictModel):
    """A categorical variable: a closed public list of codes; any other value counts as missing."""

    categories: list[str] = Field(min_length=2, description="codes, in a fixed order; one input each")

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("categories"), list):
            return {**data, "categories": category_codes(data["categories"])}
        return data

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        twice = next((code for code in self.categories if self.categories.count(code) > 1), None)
        if twice is not None:
            raise ValueError(f"the category {twice!r} stands twice (1, 1.0 and 01 are one code)")
        return self


_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)


def category_codes(values: list[Any]) -> list[Any]:
    """Each as `category_code` writes it; YAML's null is no code, and stays for the type to refuse."""
    return [None if value is None else category_code(value) for value in values]


def category_code(value: Any) -> str:
    """The text form under which codes are compared: 1, 1.0, "1" and "01" are one code.

    Text is a number only in plain decimals, and whole numbers keep all digits: the ward 2E1 is not the ward 20, and
    codes of 18 digits (SNOMED CT) are not rounded to one.

    >>> category_code(1.0), category_code("1.0"), category_code("AP"), category_code("2E1"), category_code("0.50")
    ('1', '1', 'AP', '2E1', '0.5')
    >>> category_code("900000000000207008"), category_code(900000000000207008)
    ('900000000000207008', '900000000000207008')
    """
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    text = str(value).strip()
    if not _DECIMAL.fullmatch(text):
        return text
    exact = Decimal(text)
    return str(int(exact)) if exact == exact.to_integral_value() else repr(float(exact))


def _variable_kind(value: Any) -> str:
    categorical = isinstance(value, Categories) or (isinstance(value, dict) and "categories" in value)
    return "categories" if categorical else "range"


Column = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Categories, Tag("categories")], Discriminator(_variable_kind)
]


class _Modality(StrictModel):
    encoder: str | None = Field(None, description="a registered encoder (default: the one of the kind)")


class TableModality(_Modality):
    """One row of variables a record."""

    kind: Literal["table"] = Field(description="kind of data")
    columns: dict[Variable, Column] = Field(min_length=1, description="variables by name")
    hours: int | None = Field(
        None,
        gt=0,
        description="prediction time, for sites whose values carry a time: later ones are never read",
    )


Statistic = Literal["last", "mean", "min", "max", "slope", "count", "since", "observed", "hinges"]


class SeriesModality(_Modality):
    """Variables by hour, up to the prediction time."""

    kind: Literal["series"] = Field(description="kind of data")
    hours: int = Field(gt=0, le=24 * 90, description="length of the window; later events are never read")
    columns: dict[Variable, Range] = Field(min_length=1, description="variables by name")
    statistics: list[Statistic] = Field(
        default_factory=lambda: list(get_args(Statistic)),
        min_length=1,
        description="what the linear path and the baselines read of each variable; under noise a few are better",
    )


class ImageModality(_Modality):
    """One image a record."""

    kind: Literal["image"] = Field(description="kind of data")
    size: int = Field(ge=8, le=1024, description="height and width in pixels; images are resized to it")
    channels: Literal[1, 3] = Field(1, description="1 grey, 3 colour")


class Vectors(StrictModel):
    """A frozen transformer that every site has in a folder of its own."""

    width: int = Field(ge=2, le=8192, description="numbers of a vector: the transformer's hidden size")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of its model.safetensors")


class TextModality(_Modality):
    """Free text a record, as hashed words, or as vectors of a frozen transformer."""

    kind: Literal["text"] = Field(description="kind of data")
    vectors: Vectors | None = Field(None, description="vectors of this transformer instead of hashed words")
    buckets: int = Field(512, ge=16, le=2**18, description="number of hash buckets")
    hours: int | None = Field(None, gt=0, description="prediction time, for sites whose notes carry a time")

    @property
    def width(self) -> int:
        """Numbers of one record's input."""
        return self.buckets if self.vectors is None else self.vectors.width


class PublicScore(_Modality, Scaling):
    """A number computed from variables of the other modalities by a published formula; no site file names it."""

    kind: Literal["public_score"] = Field(description="kind of data")
    expression: str = Field(description="the formula (docs/study-and-site.md)")
    score: str | None = Field(
        None,
        exclude=True,
        description="a published score of the library (`gapweave study scores`) instead of `expression`",
    )
    start: float = Field(
        0.0,
        description="log-odds per `scale` of the score with which its head's linear path begins: public knowledge, "
        "at no cost (needs model.linear_path and a binary task)",
    )
    variables: dict[str, str | None] = Field(
        default_factory=dict,
        exclude=True,
        description="variable of that score -> expression over the study's variables; null: the study has none of it",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_library(cls, data: Any) -> Any:
        """Written out when the study is read, as a card is."""
        return from_score(data) if isinstance(data, dict) and data.get("score") is not None else data

    @model_validator(mode="after")
    def _one_formula(self) -> Self:
        if self.variables:
            raise ValueError("variables map those of a `score`; an expression names the study's own")
        return self

    @property
    def columns(self) -> dict[str, Range]:
        """Its input is that of a table of one variable."""
        fields = {name: getattr(self, name) for name in Scaling.model_fields}
        return {"score": Range(**fields)}


ModalitySpec = Annotated[
    TableModality | SeriesModality | ImageModality | TextModality | PublicScore, Field(discriminator="kind")
]
