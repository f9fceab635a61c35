"""What a comparison consists of: cells of the varied keys, times seeds, times folds. Nothing here does any work."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gapweave.shared import __version__
from gapweave.shared.config import Study, load_study
from gapweave.shared.config.overrides import expand, parse_variation
from gapweave.shared.errors import UsageError
from gapweave.sites.study_check import check_names

Cell = dict[str, Any]
"""Varied key, as it was typed, -> value."""

OWN_PATHS = ("seed", "evaluation.split_seed", "evaluation.folds", "evaluation.fold")
"""Paths of the study that `--seeds` and `--folds` set."""

SMOKE_ROUNDS, SMOKE_FOLDS, SMOKE_VALUES = 2, 2, 2


@dataclass(frozen=True, kw_only=True)
class Request:
    """A comparison as the command line asks for it.

    Attributes:
        study: the study file; None for the demo.
        overrides: of `--set` and `--rounds`.
        vary: key -> values, in the order given.
        seeds: each sets the study's seed and the seed of its split.
        folds: K of the grouped K-fold, or None to hold out what the study says.
        baselines: of `BASELINES`.
        joining: whether sites make the choices of the joining check.
        smoke: make it small.
        sites: folder of site files, or None.
        data: folder of data sets, or None.
        out: folder to write, or None for a new one.
        state: folder of the virtual sites' state, in which the budgets of all simulations add up; None: each simulation
            has a fresh one.
        continue_without: go on without sites whose data cannot be used.
    """

    study: Path | None
    overrides: dict[str, Any]
    vary: dict[str, list[Any]]
    seeds: tuple[int, ...]
    folds: int | None
    baselines: tuple[str, ...]
    joining: bool = False
    smoke: bool
    sites: Path | None
    data: Path | None
    out: Path | None
    state: Path | None = None
    continue_without: bool


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One simulation of a comparison.

    Attributes:
        study: with everything set.
        seed: of training and split.
        fold: the fold held out, or None.
        name: of its folder: a hash of all that decides its result.
    """

    study: Study
    seed: int
    fold: int | None
    name: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A cell with one seed: the units whose held-out patients are judged together, one a fold."""

    cell: Cell
    seed: int
    units: tuple[Unit, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a comparison will run.

    Attributes:
        study: its name.
        vary: key -> values.
        seeds: of all cells.
        folds: K, or None.
        baselines: of `BASELINES`.
        joining: whether sites make the choices of the joining check.
        trials: cell by cell, seed by seed.
    """

    study: str
    vary: dict[str, list[Any]]
    seeds: tuple[int, ...]
    folds: int | None
    baselines: tuple[str, ...]
    joining: bool = False
    trials: tuple[Trial, ...]

    @property
    def units(self) -> list[Unit]:
        """Each simulation once, also when two cells come down to the same study."""
        return list({unit.name: unit for trial in self.trials for unit in trial.units}.values())

    def spec(self, sites: Mapping[str, str], request: Request) -> dict[str, Any]:
        """What decides the results; a folder with another one is another comparison's.

        Args:
            sites: site file -> hash of its content.
            request: as asked for.
        """
        cells = [
            {"cell": trial.cell, "seed": trial.seed, "units": [u.name for u in trial.units]} for trial in self.trials
        ]
        return {
            "gapweave_version": __version__,
            "study": self.study,
            "vary": self.vary,
            "seeds": list(self.seeds),
            "folds": self.folds,
            "baselines": list(self.baselines),
            "joining": self.joining,
            "data": None if request.data is None else str(request.data),
            "state": None if request.state is None else str(request.state),
            "continue_without": request.continue_without,
            "sites": dict(sites),
            "cells": cells,
        }


def read_seeds(text: str | None, one: int | None = None) -> tuple[int, ...]:
    """`--seeds`, or the `--seed` in its place, as numbers.

    >>> read_seeds("0, 1,2")
    (0, 1, 2)

    Raises:
        UsageError: for anything but different whole numbers from 0 on, or both.
    """
    if text is not None and one is not None:
        raise UsageError("--seed and --seeds are both given", where="--seed", remedy="Give one of them")
    if text is None:
        text = "0,1,2" if one is None else str(one)
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words) or len({int(word) for word in words}) < len(words):
        raise UsageError(
            f"{text!r} is no list of different whole numbers", where="--seeds", remedy="Write for example 0,1,2"
        )
    return tuple(int(word) for word in words)


def read_variations(texts: list[str]) -> dict[str, list[Any]]:
    """`--vary` options: key -> values.

    >>> read_variations(["fusion=late,concat", "training.lr=1e-2,0.1"])
    {'fusion': ['late', 'concat'], 'training.lr': [0.01, 0.1]}

    Raises:
        UsageError: when a key or a value comes twice.
    """
    result: dict[str, list[Any]] = {}
    for text in texts:
        key, values = parse_variation(text)
        numbers = [_number(value) for value in values]
        if key in result:
            raise UsageError(f"{key!r} is varied twice", where="--vary", remedy=f"Write {key}=v1,v2,... once")
        if any(_same(a, b) for a, b in itertools.combinations(numbers, 2)):
            raise UsageError(f"{key!r} has a value twice", where="--vary", remedy="Give each value once")
        result[key] = numbers
    return result


def _number(value: Any) -> Any:
    """1e-3 as a number: YAML 1.1 reads it as text."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def _same(first: Any, second: Any) -> bool:
    return bool(first == second) and isinstance(first, bool) == isinstance(second, bool)


def make_plan(request: Request, study_file: Path) -> Plan:
    """Resolve and check every study of a comparison.

    Raises:
        UsageError: for the first key or value that does not hold, of all cells, also those that smoke leaves out.
    """
    _refuse_conflicts(request)
    plan = _plan(request, study_file)
    return _plan(_smaller(request), study_file) if request.smoke else plan


def _smaller(request: Request) -> Request:
    return replace(
        request,
        overrides={**request.overrides, "training.rounds": SMOKE_ROUNDS},
        vary={key: values[:SMOKE_VALUES] for key, values in request.vary.items()},
        seeds=request.seeds[:1],
        folds=None if request.folds is None else min(SMOKE_FOLDS, request.folds),
    )


def _plan(request: Request, study_file: Path) -> Plan:
    cells = [dict(zip(request.vary, values, strict=True)) for values in itertools.product(*request.vary.values())]
    trials = tuple(
        Trial(
            cell=cell, seed=seed, units=tuple(_unit(request, study_file, cell, seed, fold) for fold in _folds(request))
        )
        for cell in cells
        for seed in request.seeds
    )
    return Plan(
        study=trials[0].units[0].study.name,
        vary=request.vary,
        seeds=request.seeds,
        folds=request.folds,
        baselines=request.baselines,
        joining=request.joining,
        trials=trials,
    )


RECIPE = "recipe"
"""The preset that any other key may change."""


def _folds(request: Request) -> list[int | None]:
    return [None] if request.folds is None else list(range(request.folds))


def _unit(request: Request, study_file: Path, cell: Cell, seed: int, fold: int | None) -> Unit:
    own: dict[str, Any] = {"seed": seed, "evaluation.split_seed": seed}
    if fold is not None:
        own |= {"evaluation.folds": request.folds, "evaluation.fold": fold}
    study = load_study(study_file, _paths(request.overrides, cell, own))
    check_names(study)
    content = json.dumps([study.canonical(), sorted(request.baselines), request.joining])
    return Unit(study=study, seed=seed, fold=fold, name=hashlib.sha256(content.encode()).hexdigest()[:16])


def _paths(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Aliases and presets resolved: a later source wins, whatever name a key was given, and all win over a recipe."""
    result: dict[str, Any] = {}
    options = [option for source in sources for option in source.items()]
    for key, value in sorted(options, key=lambda option: option[0] != RECIPE):
        for path, resolved in expand(key, value).items():
            result.pop(path, None)
            result[path] = resolved
    return result


def _refuse_conflicts(request: Request) -> None:
    """Two keys that set one path would make a cell's name lie about its study."""
    varied = {key: {path for value in values for path in expand(key, value)} for key, values in request.vary.items()}
    for (first, one), (second, other) in itertools.combinations(varied.items(), 2):
        if RECIPE not in (first, second) and _overlap(one, other):
            raise UsageError(f"{first!r} and {second!r} set the same key", where="--vary", remedy="Vary one of them")
    chosen = {key: set(expand(key, value)) for key, value in request.overrides.items()}
    for option, keys in (("--vary", varied), ("--set", chosen)):
        for key, paths in keys.items():
            if _overlap(paths, set(OWN_PATHS)):
                raise UsageError(f"compare itself sets {key!r}", where=option, remedy="Use --seeds and --folds")


def _overlap(first: set[str], second: set[str]) -> bool:
    return any(a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.") for a in first for b in second)
