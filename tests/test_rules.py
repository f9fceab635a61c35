"""Parameters of a rule: how a study writes them, what they change, and which are refused before anybody trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cohorts import Hospital
from hospitals import build
from pretence import Pretence, Pretender, loop, moved, study_of

from gapweave.server.aggregation import initial_groups
from gapweave.server.aggregators import combine
from gapweave.server.rules import bad_sites, protection, resolve, rule_for, start, written
from gapweave.shared import wire
from gapweave.shared.config.base import parse
from gapweave.shared.config.sharing import AnyRule, Rule
from gapweave.shared.config.study import Study
from gapweave.shared.errors import TooFewSites, UsageError
from gapweave.sites.study_check import check_names, check_study

LINE = (-50.0, 0.0, 1.0, 2.0, 3.0, 60.0, 70.0)


def combined(rule: AnyRule, values: tuple[float, ...] = LINE) -> float:
    accumulator = start(rule, "fusion", len(values))
    for value in values:
        accumulator.add({"x": np.array([value, 0], np.float32)})
    return float(accumulator.finish()["x"][0])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("trimmed_mean", (0 + 1 + 2 + 3 + 60) / 5),
        (Rule(rule="trimmed_mean", f=2), (1 + 2 + 3) / 3),
        (Rule(rule="trimmed_mean", f=3), 2),
        # squared distances to the three nearest: of 60 are 10, 57, 58 (sum 6713), of -50 are 50, 51, 52 (7805)
        (Rule(rule="multi_krum", f=2), (0 + 1 + 2 + 3 + 60) / 5),
        # lengths 50 0 1 2 3 60 70, of which the median is 3; each may be as long as that, twice, or three times that
        (Rule(rule="norm_bound", bound=1), (-3 + 0 + 1 + 2 + 3 + 3 + 3) / 7),
        (Rule(rule="norm_bound", bound=2), (-6 + 0 + 1 + 2 + 3 + 6 + 6) / 7),
        ("norm_bound", (-9 + 0 + 1 + 2 + 3 + 9 + 9) / 7),
    ],
    ids=str,
)
def test_parameters_by_hand(rule: AnyRule, expected: float) -> None:
    assert combined(rule) == pytest.approx(expected, rel=1e-6)


def test_a_bucket_has_as_many_updates_as_the_study_says() -> None:
    """Ten updates in buckets of five are two rows, whose mean is that of all; in pairs they are five."""
    mixer = resolve(Rule(rule="bucketing+mean", size=5))[0]
    assert [mixer.rows(n) for n in (10, 11)] == [2, 3]
    assert combined(Rule(rule="bucketing+mean", size=5), tuple(map(float, range(10)))) == pytest.approx(4.5)
    with pytest.raises(TooFewSites):
        start(Rule(rule="bucketing+median", size=5), "fusion", 10)
    start(Rule(rule="bucketing+median", size=5, f=1), "fusion", 11)


def test_f_is_what_the_study_says_and_else_goes_by_the_holders() -> None:
    assert [bad_sites(n) for n in (4, 9, 13)] == [1, 2, 3]
    rule = Rule(rule="trimmed_mean", f=2)
    assert [bad_sites(n, rule) for n in (5, 9, 13)] == [2, 2, 2]
    assert protection(rule, 13) == "2 bad of 13"
    assert rule_for(rule, 13) == rule
    assert written(rule) == "trimmed_mean (f=2)"


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"rule": "trimmed_mean", "g": 2}, "aggregation.encoder/*: unknown key 'g'; known keys: f"),
        ({"rule": "bucketing+median", "sise": 3}, "unknown key 'sise'; did you mean 'size'"),
        ({"rule": "mean", "f": 2}, "unknown key 'f'; mean has no parameters"),
        ({"rule": "trimmed_mean", "f": 0}, "aggregation.encoder/*.f: Input should be greater than or equal to 1"),
        ({"rule": "trimmed_mea", "f": 1}, "did you mean 'trimmed_mean'"),
    ],
    ids=str,
)
def test_what_no_stage_declares_is_refused(rule: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_names(study_of(aggregation={"encoder/*": rule}))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "says"),
    [({"f": 2}, "required"), ({"rule": "auto", "f": 2}, "name a rule"), (3, "valid string")],
    ids=str,
)
def test_what_is_no_rule_is_refused(rule: Any, says: str) -> None:
    content = json.loads(study_of().canonical())
    content["aggregation"]["default"] = rule
    with pytest.raises(UsageError, match=says) as caught:
        parse(Study, content, "study")
    assert "aggregation.default" in str(caught.value)


def test_two_ways_to_write_a_rule_are_one_study_and_it_survives_yaml() -> None:
    plain, mapped = study_of(), study_of(aggregation={"default": {"rule": "mean"}})
    assert plain.sha256 == mapped.sha256
    of = study_of(aggregation={"default": {"rule": "trimmed_mean", "f": 2}, "encoder/*": "median"})
    again = parse(Study, yaml.safe_load(of.to_yaml()), "study")
    assert again == of
    assert again.aggregation.of("fusion") == Rule(rule="trimmed_mean", f=2)
    assert (
        of.sha256 != study_of(aggregation={"default": {"rule": "trimmed_mean", "f": 1}, "encoder/*": "median"}).sha256
    )


def test_an_f_too_large_for_the_holders_is_refused_with_the_group_named(tmp_path: Path) -> None:
    """Five hospitals, three of which have notes: f = 2 needs five holders of every group that it is asked for."""
    held = [["labs", "note"]] * 3 + [["labs"]] * 2
    hospitals: list[Hospital] = [build(tmp_path / str(at), f"site{at}", have) for at, have in enumerate(held)]
    sites = [hospital.site for hospital in hospitals]
    assert not check_study(study_of(aggregation={"default": {"rule": "trimmed_mean", "f": 1}}), sites)
    found = check_study(study_of(aggregation={"default": {"rule": "trimmed_mean", "f": 2}}), sites)
    assert "trimmed_mean (f=2) of 'encoder/note' is not safe with 2 bad of 3 sites" in str(found[0])
    assert len(found) == 2
    fitting = {"default": {"rule": "trimmed_mean", "f": 2}, "encoder/note": "mean", "head/note": "mean"}
    assert not check_study(study_of(aggregation=fitting), sites)
    with pytest.raises(UsageError, match="is not safe with 1 bad of 2 sites"):
        check_study(study_of(aggregation={"default": "trimmed_mean"}), sites[:2])  # nothing would be trained jointly


def test_a_sample_too_small_for_its_rule_is_refused(tmp_path: Path) -> None:
    """Every round would ask two of the sites, and leave all groups alone."""
    sites = [build(tmp_path / str(at), f"site{at}").site for at in range(4)]
    asked = {"quorum": 2, "sample": 2}
    for aggregation in ({"default": "median"}, {"default": "auto", "strict": True}):
        with pytest.raises(UsageError, match=r"sample: 2 of 4 holders"):
            check_study(study_of(aggregation={**aggregation, **asked}), sites)
        assert not check_study(study_of(aggregation={**aggregation, **asked, "sample": 3}), sites)
    assert not check_study(study_of(aggregation={"default": "auto", **asked}), sites)


def test_a_study_that_shares_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing would be trained jointly"):
        check_study(study_of(sharing={"policy": {"*": "local"}}), [build(tmp_path / "one", "one").site])


def test_a_run_that_would_leave_all_groups_alone_asks_nobody_to_train(tmp_path: Path) -> None:
    """A hub learns from the handshake who holds what."""
    grid = Pretence(*map(Pretender, "ab"))
    with pytest.raises(TooFewSites, match="is not safe with 1 bad of 2 sites"):
        loop(tmp_path, study_of(aggregation={"default": "median"}), grid).run()
    assert {kind for kind, _, _ in grid.asked} == {wire.PREPARE}


@pytest.mark.parametrize("rule", [{"rule": "trimmed_mean", "f": 3}, "bulyan", {"rule": "bucketing+median", "f": 2}])
def test_a_group_left_alone_is_not_said_to_be_protected(rule: Any, tmp_path: Path) -> None:
    of = study_of(aggregation={"default": "mean", "fusion": rule}, training={"rounds": 1})
    run = loop(tmp_path, of, Pretence(*map(Pretender, "abcd")))
    run.run()
    line = next(run.directory.rounds())["groups"]["fusion"]
    assert line["left_alone"]
    assert line["protects"] == "none"


@pytest.mark.parametrize("numbers", [5, 17, 513, 100_003])
@pytest.mark.parametrize("longer", [3e4, 1e12])
def test_one_of_two_moves_a_group_no_further_than_the_bound(numbers: int, longer: float) -> None:
    """Around the long one the length of the other was lost in rounding, and what was three times that with it."""
    generator = np.random.default_rng(numbers)
    for _ in range(20):
        honest = generator.normal(size=numbers).astype(np.float32)
        lie = (longer * generator.normal(size=numbers)).astype(np.float32)
        if numbers > 4096:
            lie[:: numbers // 4096] *= 1e-12  # as short as the other one where it is looked for
        for pair in ((honest, lie), (lie, honest)):
            accumulator = start("norm_bound", "fusion", 2)
            for row in pair:
                accumulator.add({"x": row})
            found = accumulator.finish()["x"].astype(np.float64)
            length = np.linalg.norm(honest.astype(np.float64))
            assert np.linalg.norm(found - honest / 2) == pytest.approx(1.5 * length, rel=1e-3)


def test_buckets_do_not_depend_on_the_order_of_the_sites() -> None:
    """Drawn from rounded lengths they did, in one of a hundred draws."""
    stages = resolve("bucketing+median")
    for seed in range(400):
        generator = np.random.default_rng(seed)
        rows = generator.normal(size=(9, generator.integers(5, 3000))).astype(np.float32)
        straight, mixed = (combine(part, stages, 2) for part in (rows, rows[generator.permutation(9)]))
        np.testing.assert_allclose(straight, mixed, rtol=0, atol=1e-3)


def test_a_round_uses_the_parameters_and_logs_them(tmp_path: Path) -> None:
    of = study_of(aggregation={"default": {"rule": "trimmed_mean", "f": 2}}, training={"rounds": 1})
    steps = (1.0, 2.0, 3.0, 4.0, 30.0)
    run = loop(tmp_path, of, Pretence(*[Pretender(name, step) for name, step in zip("abcde", steps, strict=True)]))
    run.run()
    assert moved(initial_groups(of), run.state.groups)["fusion"] == 3
    line = next(run.directory.rounds())["groups"]["fusion"]
    assert (line["rule"], line["quorum"], line["protects"]) == ("trimmed_mean (f=2)", 5, "2 bad of 5")
