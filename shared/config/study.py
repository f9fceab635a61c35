"""The study file: what all sites agree on. Every key here is a contract; docs/reference.md is generated from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from gapweave.shared.config.base import Name, StrictModel, parse, read_yaml
from gapweave.shared.config.formula import Formula, compile_formula
from gapweave.shared.config.modalities import ModalitySpec, PublicScore, category_codes
from gapweave.shared.config.sharing import Aggregation, Sharing, check_patterns
from gapweave.shared.config.simulation import Simulation
from gapweave.shared.config.training import Training
from gapweave.shared.errors import GapweaveError, UsageError

RESERVED = ("database", "modalities", "records")
"""Keys of a site file's `data` beside its modalities."""

TaskKind = Literal["binary", "multiclass", "multilabel"]


class Task(StrictModel):
    """What is predicted."""

    kind: TaskKind = Field(description="form of the label")
    label: str | list[str] = Field(description="name of the label; a list for multilabel")
    classes: list[str] | None = Field(None, description="class codes, for multiclass")

    @model_validator(mode="before")
    @classmethod
    def _class_codes(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("classes"), list):
            return {**data, "classes": category_codes(data["classes"])}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.label, list) != (self.kind == "multilabel"):
            raise ValueError("label is a list exactly when kind is multilabel")
        if isinstance(self.label, list) and (len(self.label) < 1 or len(set(self.label)) != len(self.label)):
            raise ValueError("label lists at least one name, each once")
        if not all(name.strip() for name in self.labels):
            raise ValueError("a label has a name")
        if (self.classes is not None) != (self.kind == "multiclass"):
            raise ValueError("classes are given exactly when kind is multiclass")
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) != len(self.classes)):
            raise ValueError("classes lists at least two codes, each once")
        return self

    @property
    def labels(self) -> list[str]:
        """Names of the label columns."""
        return self.label if isinstance(self.label, list) else [self.label]

    @property
    def class_names(self) -> list[str]:
        """Names behind the p_<class> columns of predictions."""
        return {"binary": ["0", "1"], "multiclass": self.classes or [], "multilabel": self.labels}[self.kind]

    @property
    def outputs(self) -> int:
        """Number of logits: 1 for binary, one a class, one a label."""
        return 1 if self.kind == "binary" else len(self.class_names)


class ModelConfig(StrictModel):
    """The model's parts, by registered name."""

    embedding: int = Field(16, ge=2, le=1024, description="width of each modality's embedding")
    fusion: str = Field("late", description="a registered fusion (docs/methods.md)")
    fusion_settings: dict[str, Any] = Field(default_factory=dict, description="settings that this fusion declares")
    imputer: str = Field("cra", description="a registered imputer")
    imputer_settings: dict[str, Any] = Field(default_factory=dict, description="settings that this imputer declares")
    linear_path: bool = Field(
        False,
        description="add to each modality's logits a linear function of its features, which starts at 0; what a small "
        "cohort can learn is mostly in it (docs/decisions/0021)",
    )
    feature_norm: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="L2 norm to which linear paths bring each record's features of a modality, so that under noise all "
        "modalities are heard alike; public scores are multiplied by it (docs/decisions/0024); null: as they are",
    )

    @model_validator(mode="after")
    def _read_by_linear_paths(self) -> Self:
        if self.feature_norm is not None and not self.linear_path:
            raise ValueError("feature_norm needs linear_path: true")
        return self


class SchemeConfig(StrictModel):
    """The training scheme, by registered name."""

    name: str = Field("none", description="a registered scheme (docs/methods.md)")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings that this scheme declares")


class PrivacyConfig(StrictModel):
    """Settings that change the guarantee; what only changes speed lives elsewhere."""

    enabled: bool = Field(True, description="false: nothing is noised, and sites must allow it")
    unit: Literal["patient"] = Field("patient", description="what is protected: all records of one patient")
    epsilon: float = Field(8.0, gt=0, description="target epsilon of the study, at each site, for add/remove")
    delta: float = Field(1e-5, gt=0, lt=1, description="target delta; a site's smaller one wins")
    max_grad_norm: float = Field(1.0, gt=0, description="clipping bound of one patient's gradient")
    clipping: Literal["flat", "group"] = Field(
        "flat",
        description="flat: one bound for all parameters; group: each of a site's G parameter groups on its own, to "
        "max_grad_norm / sqrt(G), at the same privacy",
    )
    engine: Literal["fast", "opacus"] = Field("fast", description="per-patient gradient engine")


class Preparation(StrictModel):
    """What each site learns about its own data before it trains: fixed and public, or released once with noise."""

    standardisation: Literal["public", "noisy"] = Field(
        "public",
        description="center and scale of table and series columns: the study's, or a noised mean and spread a site",
    )
    class_balance: Literal["none", "noisy"] | list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        "none",
        description="log-odds at which a site's logits start: 0, those of a noised count of its training labels, or of "
        "public prevalences (one number for binary, else one a class or label, in their order)",
    )

    @field_validator("class_balance", mode="before")
    @classmethod
    def _prevalences(cls, value: Any) -> Any:
        """One number stands for a list of one; pydantic would name the words only."""
        numbers = [value] if isinstance(value, (int, float)) else value
        shares = isinstance(numbers, list) and all(
            isinstance(number, (int, float)) and 0 < number < 1 for number in numbers
        )
        if not shares and numbers not in ("none", "noisy"):
            raise ValueError(f"none, noisy, or public prevalences between 0 and 1, found {value!r}")
        return numbers


class Evaluation(StrictModel):
    """Who is held out, and what of their scores may leave a site.

    The split is a keyed hash of the patient: the same in every run, and no site sees it.
    """

    test_fraction: float = Field(0.2, ge=0, lt=1, description="fraction of patients held out")
    split_seed: int = Field(0, description="key of the hash")
    folds: int | None = Field(None, ge=2, le=100, description="hold out one of K folds instead of a fraction")
    fold: int = Field(0, ge=0, description="the fold held out")
    epsilon: float | None = Field(
        0.5,
        gt=0,
        description="cost of a site's noised table of scores, within the study's epsilon and at most a quarter of it; "
        "null: no site is asked; a site with too few patients for it is not asked either, and spends nothing",
    )

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.folds is None and self.fold:
            raise ValueError(f"fold={self.fold} needs folds, in how many patients are divided")
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(f"fold={self.fold} must be below folds={self.folds}")
        return self


def _version(value: Any) -> Any:
    if value != 1:
        raise ValueError("this Gapweave reads version 1")
    return value


Version = Annotated[Literal[1], BeforeValidator(_version)]


class Study(StrictModel):
    """A study file, all defaults filled in."""

    version: Version = Field(description="format of the file: 1")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100, description="name of the study")
    task: Task = Field(description="what is predicted")
    modalities: dict[Annotated[str, Field(pattern=Name)], ModalitySpec] = Field(
        min_length=1, description="kinds of data, by name"
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="the model's parts")
    scheme: SchemeConfig = Field(default_factory=SchemeConfig, description="the training scheme")
    sharing: Sharing = Field(default_factory=Sharing, description="which parameter groups leave a site")
    training: Training = Field(default_factory=Training, description="local training")
    aggregation: Aggregation = Field(default_factory=Aggregation, description="the server's rules")
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig, description="the guarantee")
    preparation: Preparation = Field(default_factory=Preparation, description="what sites learn before training")
    seed: int = Field(0, ge=0, description="initial weights and public choices; never a site's private draws")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="who is held out")
    simulation: Simulation = Field(default_factory=Simulation, description="for simulations only")

    @model_validator(mode="after")
    def _reaches_late_rounds(self) -> Self:
        if self.training.early_stop is not None and self.aggregation.average_last:
            raise ValueError("aggregation.average_last averages rounds that training.early_stop may never reach")
        return self

    @model_validator(mode="after")
    def _knows_its_noise(self) -> Self:
        others = [name for name in ("momentum", "scaffold") if getattr(self.training, name)]
        if self.aggregation.shrink and others:
            raise ValueError(f"aggregation.shrink needs to know what becomes of noise: leave out training.{others[0]}")
        return self

    @model_validator(mode="after")
    def _one_prevalence_each(self) -> Self:
        given = self.preparation.class_balance
        if isinstance(given, list) and len(given) != self.task.outputs:
            raise ValueError(f"preparation.class_balance lists {len(given)} numbers, the task has {self.task.outputs}")
        return self

    @model_validator(mode="after")
    def _patterns_match(self) -> Self:
        check_patterns(self.sharing, self.aggregation, self.order)
        return self

    @model_validator(mode="after")
    def _formulas_fit(self) -> Self:
        for name in self.scores:
            try:
                self.formula(name)
            except ValueError as error:
                raise ValueError(f"modalities.{name}.expression: {error}") from None
        return self

    @field_validator("modalities")
    @classmethod
    def _named(cls, modalities: dict[str, ModalitySpec]) -> dict[str, ModalitySpec]:
        for name in RESERVED:
            if name in modalities:
                raise ValueError(f"no modality can be called {name!r}: site files have that key for something else")
        return modalities

    @cached_property
    def scores(self) -> tuple[str, ...]:
        """Names of the modalities that are computed from others, in canonical order."""
        return tuple(name for name in self.order if isinstance(self.modalities[name], PublicScore))

    @cached_property
    def sources(self) -> dict[str, frozenset[str]]:
        """By public score, the modalities that it reads."""
        return {name: frozenset(read.modality for read in self.formula(name).reads) for name in self.scores}

    def formula(self, name: str) -> Formula:
        """What a public score computes."""
        spec = self.modalities[name]
        assert isinstance(spec, PublicScore)
        return compile_formula(spec.expression, self.modalities)

    @model_validator(mode="after")
    def _starts_somewhere(self) -> Self:
        begun = [name for name, spec in self.modalities.items() if isinstance(spec, PublicScore) and spec.start]
        if begun and not (self.model.linear_path and self.task.kind == "binary"):
            raise ValueError(f"modalities.{begun[0]}.start needs model.linear_path and a binary task")
        return self

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Names of the modalities in canonical (alphabetical) order, whatever the file's order."""
        return tuple(sorted(self.modalities))

    @cached_property
    def shrinkage(self) -> float:
        """L2 shrinkage of all parameters: weight decay, and the ridge at the public prevalence."""
        balance = self.preparation.class_balance
        shares = balance if isinstance(balance, list) else [0.5]
        variance = sum(share * (1 - share) for share in shares) / len(shares)
        return self.training.weight_decay + self.training.ridge * variance

    def canonical(self) -> str:
        """The resolved study as canonical JSON: what sites and server exchange, and what is hashed."""
        return self._canonical

    @cached_property
    def _canonical(self) -> str:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @cached_property
    def sha256(self) -> str:
        """Hash by which a site approves a study."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved study as YAML, all defaults written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_study(path: Path, overrides: dict[str, Any] | None = None) -> Study:
    """Read a study file.

    Args:
        path: the file.
        overrides: dotted path -> value, as `--set` gives them (see `overrides.py`).

    Raises:
        UsageError: naming file, key and remedy.
    """
    from gapweave.shared.config.overrides import apply

    content = read_yaml(path, "study")
    changed = apply(content, overrides or {})
    try:
        return parse(Study, changed, str(path))
    except UsageError as error:
        if not overrides:
            raise
        parse(Study, content, str(path))  # where the file alone is wrong, that is what there is to mend
        key = error.where.removeprefix(f"{path}:")
        raise UsageError(error.what, where=f"command line:{key}", remedy="Correct that option") from None


@contextmanager
def naming_study(path: Path) -> Iterator[None]:
    """Say which file a study is from in an error that knows only that it is the study's."""
    try:
        yield
    except GapweaveError as error:
        if error.where.startswith("study:"):
            error.where = f"{path}{error.where.removeprefix('study')}"
        raise


@lru_cache(maxsize=64)
def study_from_json(text: str) -> Study:
    """The study that a message carries; a study is frozen, so the same text gives the same object."""
    return parse(Study, json.loads(text), "study")
