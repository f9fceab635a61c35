"""What each aggregation rule promises. An entry of the registry is tested here without a new test."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from gapweave.server.aggregators import AGGREGATORS, Mixer, Update
from gapweave.server.rules import bad_sites, promises, resolve, rule_for, start
from gapweave.server.rules_table import table as rules_table
from gapweave.shared.errors import TooFewSites, UsageError


def updates(sites: int, seed: int = 0) -> list[Update]:
    generator = np.random.default_rng(seed)
    return [
        {
            "weight": generator.normal(size=(7, 5)).astype(np.float32),
            "bias": generator.normal(size=5).astype(np.float32),
            "scalar": np.asarray(generator.normal(), np.float32),
        }
        for _ in range(sites)
    ]


def combine(rule: str, parts: list[Update]) -> Update:
    accumulator = start(rule, "fusion", len(parts))
    for part in parts:
        accumulator.add(part)
    return accumulator.finish()


ENOUGH = 11
"""Sites that every rule can work with, two of them bad."""
RULES = [name for name in AGGREGATORS if not isinstance(AGGREGATORS[name], Mixer)]
MIXERS = [name for name in AGGREGATORS if isinstance(AGGREGATORS[name], Mixer)]
CHAINS = [*RULES, *(f"{mixer}+trimmed_mean" for mixer in MIXERS)]
"""Every rule alone, and every pre-aggregator before a rule."""


def promising(promise: str) -> list[str]:
    return [rule for rule in CHAINS if promise in promises(rule)]


def whole(update: Update) -> np.ndarray:
    return np.concatenate([update[name].ravel() for name in sorted(update)]).astype(np.float64)


@pytest.mark.parametrize("rule", CHAINS)
def test_a_rule_gives_back_the_form_of_the_updates(rule: str) -> None:
    parts = updates(ENOUGH)
    kept = copy.deepcopy(parts)
    result = combine(rule, parts)
    assert result.keys() == parts[0].keys()
    for name, value in result.items():
        assert value.dtype == np.float32
        assert value.shape == parts[0][name].shape
        assert np.isfinite(value).all()
    for before, after in zip(kept, parts, strict=True):
        assert all(np.array_equal(before[name], after[name]) for name in before), "a rule leaves the updates alone"


@pytest.mark.parametrize("rule", promising("permutation"))
def test_a_rule_does_not_depend_on_the_order_of_the_sites(rule: str) -> None:
    parts = updates(ENOUGH, seed=1)
    straight = combine(rule, parts)
    for order in (parts[::-1], parts[4:] + parts[:4]):
        for name, value in combine(rule, order).items():
            np.testing.assert_allclose(value, straight[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", promising("equal"))
def test_a_rule_keeps_what_all_sites_agree_on(rule: str) -> None:
    (update,) = updates(1, seed=2)
    for name, value in combine(rule, [update] * ENOUGH).items():
        np.testing.assert_allclose(value, update[name], rtol=1e-6)


@pytest.mark.parametrize("rule", promising("translation"))
def test_a_rule_moves_with_the_updates(rule: str) -> None:
    parts, (shift,) = updates(ENOUGH, seed=3), updates(1, seed=4)
    moved = [{name: value + 5 * shift[name] for name, value in part.items()} for part in parts]
    expected = whole(combine(rule, parts)) + 5 * whole(shift)
    np.testing.assert_allclose(whole(combine(rule, moved)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bad", ["huge", "negative", "same", "near"])
@pytest.mark.parametrize("rule", promising("breakdown"))
def test_a_rule_stays_with_the_honest_sites(rule: str, bad: str) -> None:
    """Two bad of eleven: the result is no farther from the honest mean than the farthest honest site."""
    parts = updates(ENOUGH, seed=5)
    honest = np.stack([whole(part) + 3 for part in parts[2:]])
    parts = [{name: value + np.float32(3) for name, value in part.items()} for part in parts]
    for at in range(2):
        scale = {"huge": 1e6, "negative": -10.0, "same": 100.0, "near": 3.0}[bad]
        lie = parts[5] if bad == "same" else parts[at]
        parts[at] = {name: value * np.float32(scale) for name, value in lie.items()}
    middle = honest.mean(0)
    reach = np.linalg.norm(honest - middle, axis=1).max()
    assert np.linalg.norm(whole(combine(rule, parts)) - middle) <= reach


def test_the_mean_breaks_down() -> None:
    """The test of the others can fail."""
    parts = updates(ENOUGH, seed=5)
    parts[0] = {name: value * np.float32(1e6) for name, value in parts[0].items()}
    assert np.linalg.norm(whole(combine("mean", parts))) > 1e4


@pytest.mark.parametrize("rule", CHAINS)
def test_a_rule_with_fewer_sites_than_its_theorem_needs_says_so(rule: str) -> None:
    """It raises, and never changes its parameters; from its smallest number on it gives numbers."""
    fine = []
    for sites in range(ENOUGH + 1):
        try:
            result = combine(rule, updates(sites)) if sites else start(rule, "fusion", 0).finish()
        except TooFewSites:
            continue
        assert np.isfinite(whole(result)).all()
        fine.append(sites)
    stages, f = resolve(rule), [bad_sites(sites) for sites in range(ENOUGH + 1)]
    rows = [(sites + 1) // 2 if rule.startswith("bucketing") else sites for sites in range(ENOUGH + 1)]
    assert fine == [n for n in range(1, ENOUGH + 1) if rows[n] >= stages[-1].needs(f[n]) and n >= stages[0].needs(f[n])]
    assert 0 not in fine


@pytest.mark.parametrize(("rule", "expected"), [("median", [3.0]), ("trimmed_mean", [11 / 3]), ("mean", [24.0])])
def test_rules_by_hand(rule: str, expected: list[float]) -> None:
    values = [{"x": np.array([value], np.float32)} for value in (-1, 3, 2, 110, 6)]
    np.testing.assert_allclose(combine(rule, values)["x"], expected, rtol=1e-6)


def test_distance_rules_by_hand() -> None:
    """Five points on a line, one far away: Krum averages the four near ones, and the geometric median is the middle."""
    values = [{"x": np.array([value, 0], np.float32)} for value in (0, 1, 2, 3, 1000)]
    np.testing.assert_allclose(combine("multi_krum", values)["x"], [1.5, 0], atol=1e-6)
    np.testing.assert_allclose(combine("geometric_median", values)["x"], [2, 0], atol=1e-3)
    np.testing.assert_allclose(combine("norm_bound", values)["x"], [(0 + 1 + 2 + 3 + 6) / 5, 0], atol=1e-6)
    mixed = combine("nnm+median", values)["x"]
    np.testing.assert_allclose(mixed, [1.5, 0], atol=1e-6)  # rows 1.5 four times, and the far one's own neighbours


def test_the_default_rule_follows_the_number_of_holders() -> None:
    assert [rule_for("auto", sites) for sites in (1, 2, 3, 4, 5, 9)] == [
        *["norm_bound"] * 2, *["median"] * 2, *["nnm+trimmed_mean"] * 2,
    ]  # fmt: skip


def test_the_documentation_lists_what_every_stage_promises() -> None:
    page = Path(__file__).parent.parent / "docs" / "aggregation.md"
    assert rules_table() in page.read_text(encoding="utf-8"), "run python -m gapweave.server.rules_table"


@pytest.mark.parametrize("chain", ["nnm", "median+nnm", "median+mean"])
def test_a_chain_ends_with_its_only_rule(chain: str) -> None:
    with pytest.raises(UsageError, match="chain"):
        resolve(chain)


def test_the_mean_is_the_mean_even_where_float32_sums_fail() -> None:
    values = [np.float32(1e8), np.float32(1), np.float32(-1e8), np.float32(1)]
    assert combine("mean", [{"x": np.full(2, value)} for value in values])["x"].tolist() == [0.5, 0.5]
