"""The site file: what one hospital alone decides. The server can only ask; these limits always win."""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from gapweave.shared.config.base import SiteName, StrictModel, parse, read_yaml, unknown_key
from gapweave.shared.config.sources import Database, Records, Source, in_database
from gapweave.shared.config.study import Study, Version


class SiteData(StrictModel):
    """Where the site's data lie: `records`, and one entry for each modality that it has."""

    database: Database | None = Field(None, description="where `table` and `query` are read from; a URL, or a block")
    records: Records = Field(description="the list of records")
    modalities: dict[str, Source] = Field(default_factory=dict, description="written as flat keys: modality -> source")

    @classmethod
    def accepts_key(cls, key: str) -> bool:
        """Modality names are keys too; those that a study does not use are ignored by it."""
        return True

    @model_validator(mode="before")
    @classmethod
    def _collect(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "modalities" in data:
            return data
        if "records" not in data and (meant := difflib.get_close_matches("records", map(str, data), n=1, cutoff=0.7)):
            raise PydanticCustomError("unknown_key", "{text}", {"text": unknown_key(meant[0], ["records"])})
        own = {key: data[key] for key in ("database", "records") if key in data}
        return {"modalities": {key: value for key, value in data.items() if key not in own}, **own}

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        sources = {"records": self.records, **self.records.label, **self.modalities}
        for name, source in sources.items():
            if self.database is None and in_database(source):
                raise ValueError(f"{name} lies in a database; name it by `database`")
        return self


class Split(StrictModel):
    """How patients are divided into training and test."""

    by: Literal["hash"] | None = Field(None, description="hash: by the keyed hash of the patient id (the default)")
    column: str | None = Field(None, description="a records column with `train`/`test`, or a fold number")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.by is not None and self.column is not None:
            raise ValueError("give `by` or `column`, not both")
        return self


class Patients(StrictModel):
    """Public sizes. The true number of patients enters no released value."""

    declared: int | None = Field(
        None,
        ge=1,
        description="public number of training patients; null: released once with noise, and charged",
    )
    upper: int = Field(10_000, ge=1, description="upper order of magnitude N of the cohort: delta <= 1/(10 N)")
    max_records: int = Field(8, ge=1, description="records a patient that are used; further ones are dropped")


class Policy(StrictModel):
    """The hospital's own limits."""

    epsilon: float = Field(10.0, gt=0, description="cap over everything that the site ever releases")
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of the cap")
    min_patients: int = Field(20, ge=1, description="refuse to train on fewer patients")
    releases: tuple[Literal["update", "counts"], ...] = Field(
        ("update", "counts"), description="kinds of release that are allowed"
    )
    unnoised: Literal["refuse", "allow"] = Field("refuse", description="test runs without privacy")
    studies: list[str] = Field(default_factory=list, description="approved study hashes; a deployment runs no other")
    anchor: str | None = Field(None, description="file outside the state folder that keeps the ledger's head")


class ServerLink(StrictModel):
    """How the site reaches its hub; both files are relative to the site file."""

    connection: str = Field("connection.yaml", description="the hub's connection file: its address and certificate")
    key: str = Field("site.key", description="the site's private key, readable by its owner only")


class Site(StrictModel):
    """A site file, all defaults filled in."""

    version: Version = Field(description="format of the file: 1")
    name: str = Field(pattern=SiteName, description="name of the site")
    data: SiteData = Field(description="where the data lie")
    split: Split = Field(default_factory=Split, description="training and test patients")
    subgroups: dict[str, str] = Field(
        default_factory=dict, description="subgroup -> records column; a simulation's summary has metrics by each"
    )
    cohort: str | None = Field(None, description="a label of the cohort")
    patients: Patients = Field(default_factory=Patients, description="public sizes")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    state: str = Field("state", description="folder of the ledger and private parameters, relative to the site file")
    policy: Policy = Field(default_factory=Policy, description="the hospital's own limits")
    server: ServerLink | None = Field(None, description="the hub that the site works for; null: none, simulations only")

    @property
    def delta(self) -> float:
        """Delta of a ledger that is opened now: the policy's, and at most a tenth of a patient among all."""
        return min(self.policy.delta, 0.1 / self.patients.upper)

    def held(self, study: Study) -> list[str]:
        """The study's modalities that the site has, in canonical order: a declared, public fact.

        It has those of which it declares data, and the public scores that read at least one of these.
        """
        own = self.data.modalities.keys()
        return [name for name in study.order if name in own or own & study.sources.get(name, frozenset())]


def load_site(path: Path) -> Site:
    """Read a site file; a simulation asks for it at several places, so an unchanged one is read once.

    Raises:
        UsageError: naming file, key and remedy.
    """
    changed = path.stat() if path.is_file() else None
    return _load(path, changed and (changed.st_mtime_ns, changed.st_size, changed.st_ino))


@lru_cache(maxsize=1024)
def _load(path: Path, version: tuple[int, int, int] | None) -> Site:
    return parse(Site, read_yaml(path, "site"), str(path))
