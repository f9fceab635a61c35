"""Shrinkage by hand, against noise drawn through the real rounds, and over a resumed run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pretence import study_of

from gapweave.server.aggregation import GroupAggregation
from gapweave.server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gapweave.server.history import History, decay_of
from gapweave.server.shrinkage import noise_square, responses, shrunk
from gapweave.shared.config.study import Study
from gapweave.shared.late import add_late, late_mean
from gapweave.shared.optimizers import ServerOptimizer
from gapweave.shared.shrinkage import ALONG, best_share, share_kept
from gapweave.shared.tensorfile import Arrays


def of(rounds: int = 4, training: dict[str, Any] | None = None, **aggregation: Any) -> Study:
    base = study_of().model_dump(mode="json")
    base["training"] |= {"rounds": rounds, **(training or {})}
    base["aggregation"] |= {"shrink": True, **aggregation}
    base["privacy"]["enabled"] = True
    return Study.model_validate(base)


def test_a_unit_of_each_round_by_hand() -> None:
    assert responses(of(3), 3, 0.0) == pytest.approx([1, 1, 1])
    momentum = of(3, server_optimizer="momentum", server_momentum=0.5, server_lr=2)
    assert responses(momentum, 3, 0.0) == pytest.approx([2 * 1.75, 2 * 1.5, 2])
    # Rounds 3 and 4 are averaged: what comes in round 4 is in one of the two.
    assert responses(of(4, average_last=0.5), 4, 0.0) == pytest.approx([1, 1, 1, 0.5])


def test_the_ridge_takes_its_part_of_each_round() -> None:
    ridge = of(3, training={"weight_decay": 0.1, "lr": 1.0, "local_steps": 1})
    assert responses(ridge, 3, 0.0) == pytest.approx([0.81, 0.9, 1])


def test_the_proximal_term_holds_back_the_ridge() -> None:
    study = of(2, training={"weight_decay": 0.1, "proximal": 0.2, "lr": 0.5, "local_steps": 3})
    # From 1: the ridge takes .05; the proximal term pulls back to 1 in the steps after.
    value = 1.0
    for _ in range(3):
        value -= 0.5 * (0.1 * value + 0.2 * (value - 1))
    assert responses(study, 2, 0.0) == pytest.approx([value, 1])


def test_a_history_brings_a_unit_in_parts() -> None:
    decay = 0.5
    by_hand = [0.5 ** (number - 1) * (1 - decay) / (1 - decay**number) for number in (1, 2, 3)]
    assert responses(of(3), 3, decay)[0] == pytest.approx(sum(by_hand))


def test_what_is_kept_where_the_square_is_sure() -> None:
    for square in (1.5, 2.5, 10.0, 1e4, 1e12):
        assert best_share(square, 1.0, 1e6) == pytest.approx(1 - 1 / square, abs=2e-3)
    assert share_kept(0.0, 1.0, 100.0) == 1, "nothing was learnt, nothing is taken away"
    assert share_kept(1.0, 0.0, math.inf) == 1, "no noise"


@pytest.mark.parametrize("freedom", [2.0, 60.0, 777.0])
@pytest.mark.parametrize("square", [1e-6, 0.5, 1.0])
def test_something_is_kept_of_what_may_all_be_noise(freedom: float, square: float) -> None:
    kept = best_share(square, 1.0, freedom)
    assert 0 < kept < 1.5 / math.sqrt(freedom), "half a normal with the sd of the estimate, sqrt(2 / freedom)"


def test_it_errs_less_than_the_positive_part_where_any_share_may_be_signal() -> None:
    generator, n = np.random.default_rng(0), 60
    errors: dict[str, list[float]] = {"mean": [], "positive part": []}
    for share in generator.uniform(size=2000):
        signal = generator.normal(size=n)
        signal *= math.sqrt(share / (1 - share) * n / float(signal @ signal))
        learnt = signal + generator.normal(size=n)
        square = float(learnt @ learnt)
        for name, kept in (("mean", best_share(square, n, n)), ("positive part", max(0.0, 1 - n / square))):
            errors[name].append(float(((kept * learnt - signal) ** 2).sum()))
    gained = np.subtract(errors["positive part"], errors["mean"])
    assert gained.mean() > 3 * gained.std() / math.sqrt(len(gained))


def test_degrees_of_freedom_by_hand() -> None:
    study = of(2, default="mean")
    square, freedom = noise_square(study, {"a": [1.0, 1.0], "b": [0.0, 3.0]}, {"a": 4, "b": 6})
    assert square == pytest.approx(4 * 2 + 6 * 3)
    assert freedom == pytest.approx(26**2 / (4 * 4 + 6 * 9))


def test_the_start_and_the_share_that_is_kept() -> None:
    start: Arrays = {"head/labs": {"w": np.array([1.0, 0.0], np.float32)}}
    reached: Arrays = {"head/labs": {"w": np.array([4.0, 1.0], np.float32)}}
    # 2 numbers, 4 rounds that each bring a unit, variance .5 each
    found, kept = shrunk(of(4, default="mean"), start, reached, {"head/labs": [0.5] * 4})
    odds = best_share(3**2 + 1**2, 2 * 4 * 0.5, 2.0)
    odds /= 1 - odds
    assert kept == pytest.approx(ALONG * odds / (1 + ALONG * odds))
    np.testing.assert_allclose(found["head/labs"]["w"], [1 + 3 * kept, kept], rtol=1e-6)


def test_a_history_brings_the_ridge_late() -> None:
    # Round 1: 1, kept in the history. Round 2: the sites send -0.5; the rule sees (0.5 * 1 - 0.5) / 1.5 = 0.
    ridge = of(2, training={"weight_decay": 0.5, "lr": 1.0, "local_steps": 1})
    assert responses(ridge, 2, 0.5)[0] == pytest.approx(1.0)
    # Round 3: they send -0.5 again; (0.25 - 0.5 * 0.5 - 0.5) / 1.75.
    ridge = of(3, training={"weight_decay": 0.5, "lr": 1.0, "local_steps": 1})
    assert responses(ridge, 3, 0.5)[0] == pytest.approx(1 - 0.5 / 1.75)


RULES = [("mean", 0.15), ("median", 0.5), ("trimmed_mean", 0.3), ("nnm+trimmed_mean", 0.3)]
MOMENTUM = {"server_optimizer": "momentum", "server_lr": 1.5, "average_last": 0.5}


@pytest.mark.parametrize(("rule", "within"), RULES)
@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("optimizer", [{}, MOMENTUM])
def test_noise_alone_is_as_long_as_expected(rule: str, within: float, optimizer: dict[str, Any], ridge: float) -> None:
    """Sites of unlike noise, 20 rounds, 2,000 numbers: the length is known to about 5 % from the numbers alone."""
    study = of(20, {"weight_decay": ridge, "lr": 1.0, "local_steps": 1}, default=rule, **optimizer)
    generator, sds = np.random.default_rng(0), {"a": 1.0, "b": 1.5, "c": 0.7, "d": 3.0, "e": 1.0}
    start: Arrays = {"head/labs": {"w": np.zeros(2000, np.float32)}}
    current, late, noise = start, Arrays(), []
    server, history = ServerOptimizer(study.aggregation), History(decay_of(study))
    for number in range(1, 21):
        combine = GroupAggregation(study, current, server, history=history)
        for site, sd in sds.items():
            noised = generator.normal(0, sd, 2000) - ridge * current["head/labs"]["w"]
            sent = {"head/labs": {"w": noised.astype(np.float32)}}
            combine.add(site, sent, noise_sd=sd)
        current, lines = combine.finish()
        assert lines["head/labs"]["screened"] == {}
        noise.append(combine.noise["head/labs"])
        late = add_late(study, number, late, current)
    reached = late_mean(study, late) or current
    square = float((reached["head/labs"]["w"].astype(np.float64) ** 2).sum())
    expected, _ = noise_square(study, {"head/labs": noise}, {"head/labs": 2000})
    assert expected == pytest.approx(square, rel=within)


def test_without_shrinkage_or_with_unknown_noise_nothing_is_tried() -> None:
    start: Arrays = {"head/labs": {"w": np.zeros(3, np.float32)}}
    for study, sd in ((of(), 0.0), (study_of(), 1.0)):
        combine = GroupAggregation(study, start)
        for site in "abc":
            combine.add(site, {"head/labs": {"w": np.ones(3, np.float32)}}, noise_sd=sd)
        combine.finish()
        assert combine.noise == {"head/labs": 0.0}


def test_a_checkpoint_keeps_the_noise_of_the_rounds(tmp_path: Path) -> None:
    groups: Arrays = {"fusion": {"w": np.zeros(2, np.float32)}}
    save_checkpoint(tmp_path, Checkpoint(run="r", study="s", round=2, groups=groups, noise={"fusion": [0.5, 0.25]}))
    found = load_checkpoint(tmp_path, "s")
    assert found is not None
    assert found.noise == {"fusion": [0.5, 0.25]}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"aggregation": {"server_optimizer": "adam"}}, "adam is not linear"),
        ({"training": {"momentum": 0.9}}, "training.momentum"),
    ],
)
def test_what_hides_the_noise_is_refused(change: dict[str, dict[str, Any]], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        of(training=change.get("training"), **change.get("aggregation", {}))


def test_a_run_whose_change_is_noise_ends_at_the_public_start(tmp_path: Path) -> None:
    from gapweave.server.aggregation import initial_groups
    from gapweave.shared import tensorfile
    from gapweave.shared.rundir import RunDirectory
    from gapweave.sites.demo import write_demo
    from gapweave.sites.simulate import commands

    study = write_demo(tmp_path / "demo", hospitals=2, patients=60)
    overrides = {
        "aggregation.shrink": True,
        "privacy.epsilon": 0.5,
        "training.rounds": 3,
        "model.fusion": "late",
        "model.imputer": "none",
    }
    places = commands.Places(sites=None, data=None, out=tmp_path / "run", state=None)
    commands.start(study, overrides, places, baselines=(), continue_without=False)
    directory = RunDirectory.open(tmp_path / "run")
    last = json.loads((tmp_path / "run" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["kept"] < ALONG * 0.1 / (1 + (ALONG - 1) * 0.1), "a tenth of its length"
    assert "% was kept" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    final, _ = tensorfile.parse((directory.model / "shared.safetensors").read_bytes())
    start = initial_groups(directory.study())
    checkpoint = load_checkpoint(directory.checkpoint, directory.study().sha256)
    assert checkpoint is not None
    for group, part in final.items():
        for name, value in part.items():
            change = checkpoint.groups[group][name] - start[group][name]
            np.testing.assert_allclose(
                value, start[group][name] + last["kept"] * change, atol=2e-4 * np.abs(change).max()
            )
