"""What noise hides in one round: updates without their noise, sites against the others, lies as large as the noise."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hospitals import build, participant, plan_of
from pretence import Pretence, Pretender, loop, study_of

from gapweave.server import aggregators
from gapweave.server.aggregation import GroupAggregation, initial_groups
from gapweave.server.aggregators import Update, believed, bounded, combine, gram_of
from gapweave.server.agreement import CERTAIN, Agreement, against_the_others, agreements
from gapweave.server.history import History
from gapweave.server.rules import resolve
from gapweave.server.screening import noise_sd, norm, too_long, too_quiet
from gapweave.shared.config.study import Study
from gapweave.shared.tensorfile import Arrays
from gapweave.sites.simulate.attacks import wanted

PLAN = {"noise_multiplier": 1.5, "sample_rate": 0.25, "n_hat": 200}
SITES = ("a", "b", "c", "d", "e", "f")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noised(size: int, generator: np.random.Generator, signal: float = 0.0) -> Update:
    return {"w": (generator.normal(size=size) + signal).astype(np.float32)}


# The noise that an honest update must hold.


@pytest.mark.parametrize(("decay", "proximal", "steps"), [(0.0, 0.0, 1), (0.0, 0.0, 5), (0.1, 0.0, 5), (0.1, 0.3, 7)])
def test_the_expected_noise_is_that_of_real_updates(tmp_path: Path, decay: float, proximal: float, steps: int) -> None:
    of = plan_of(
        private=True,
        training={"local_steps": steps, "lr": 0.4, "weight_decay": decay, "proximal": proximal, "batch": 20},
        privacy={"max_grad_norm": 0.01, "epsilon": 1},
    )
    site = participant(build(tmp_path / "a", "north"), of)
    plan = site.prepare("run-1").plan
    start = {group: initial_groups(of)[group] for group in site.shared}
    zero = {group: {name: np.zeros_like(value) for name, value in part.items()} for group, part in start.items()}
    reply = site.train("run-1", 1, "0" * 64, zero).reply
    size = sum(value.size for part in reply.values() for value in part.values())
    length = math.sqrt(sum(norm(part) ** 2 for part in reply.values()))
    sd = noise_sd(of, plan)
    assert length / math.sqrt(size) == pytest.approx(sd, rel=0.12), "gradients are clipped to next to nothing"
    assert too_quiet(length, size, sd) is None
    assert too_quiet(0.5 * length, size, sd) is not None


def test_one_number_of_noise_is_never_a_fault_of_scale() -> None:
    # Believed: a norm of 30 times the median one is a fault. True: of six single numbers of noise three may be tiny, and
    # an honest small site has most noise; it happened to one.
    generator, found, sds = rng(7), {"with": 0, "without": 0}, np.array([0.35, 0.5, 0.6, 0.65, 1.0, 0.8])
    for _ in range(3000):
        lengths = dict(zip(SITES, np.abs(generator.normal(0, sds)), strict=True))
        found["without"] += bool(too_long(lengths))
        found["with"] += bool(too_long(lengths, 0.6))
    assert found["with"] == 0 < found["without"]
    assert too_long({**dict.fromkeys(SITES, 1.0), "a": 100.0}, 1.0).keys() == {"a"}


@pytest.mark.parametrize("size", [1, 5, 100, 10_000])
def test_honest_noise_is_never_called_too_quiet(size: int) -> None:
    generator = rng()
    for _ in range(200):
        assert too_quiet(float(np.linalg.norm(generator.normal(0, 0.3, size))), size, 0.3) is None
    if size >= 100:
        assert too_quiet(0.3 * math.sqrt(size) / 2, size, 0.3) is not None
    assert too_quiet(0.0, size, 0.0) is None, "nothing is known of it"


@pytest.mark.parametrize(
    ("keys", "plan"),
    [
        ({"private": False}, PLAN),
        ({"private": True, "training": {"momentum": 0.5}}, PLAN),
        ({"private": True}, {}),
        ({"private": True}, {**PLAN, "n_hat": 0}),
        ({"private": True}, {**PLAN, "n_hat": "many"}),
        ({"private": True}, {**PLAN, "noise_multiplier": math.inf}),
        ({"private": True}, {**PLAN, "noise_multiplier": None}),
        ({"private": True}, {**PLAN, "noise_multiplier": 10**400}),
        ({"private": True}, {"noise_multiplier": 1, "sample_rate": 1e-200, "n_hat": 1e-200}),
    ],
)
def test_where_noise_is_unknown_nobody_is_judged_by_it(keys: dict[str, Any], plan: dict[str, Any]) -> None:
    assert noise_sd(plan_of(**keys), plan) == 0


# Who pulls against the others.


def test_unrelated_updates_have_standard_normal_agreements() -> None:
    generator = rng()
    numbers = [list(agreements({site: noised(50, generator) for site in SITES}).values()) for _ in range(2000)]
    assert abs(np.mean(numbers)) < 0.05
    assert np.std(numbers) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("bad", [1, 2])
@pytest.mark.parametrize("size", [20, 2000])
def test_who_turns_every_update_around_is_found_and_nobody_else(bad: int, size: int) -> None:
    names = SITES if bad == 1 else (*SITES, "g", "h", "i")
    generator, direction = rng(1), rng(2).normal(size=size) / size**0.25
    so_far = {site: Agreement() for site in names}
    for _ in range(30):
        rows = {site: generator.normal(size=size) + 1.3 * direction for site in names}
        sent = {site: {"w": (-row if site in names[:bad] else row).astype(np.float32)} for site, row in rows.items()}
        for site, number in agreements(sent).items():
            so_far[site] += number
    found = against_the_others(so_far)
    assert found.keys() == set(names[:bad])


def test_two_that_send_the_same_do_not_vouch_for_each_other() -> None:
    generator, direction = rng(3), np.ones(400) / 20
    so_far = {site: Agreement() for site in (*SITES, "g", "h", "i")}
    for _ in range(20):
        sent = {site: {"w": generator.normal(size=400) + 5 * direction} for site in so_far}
        sent["a"] = sent["b"] = {"w": -5 * direction + generator.normal(size=400)}
        for site, number in agreements(sent).items():
            so_far[site] += number
    assert against_the_others(so_far).keys() == {"a", "b"}


def scores(**values: float) -> dict[str, Agreement]:
    return {site: Agreement(total=value * 10, count=100) for site, value in values.items()}


def test_one_whose_patients_are_unlike_the_others_stays() -> None:
    assert not against_the_others(scores(a=-6, b=20, c=20, d=20, e=20)), "far less against them than they agree"
    assert not against_the_others(scores(a=-9, b=2, c=2, d=2, e=2)), "the others do not pull together"
    assert not against_the_others(scores(a=-9, b=20)), "of two nobody is against the others"
    assert against_the_others(scores(a=-11, b=20, c=20, d=20, e=20)).keys() == {"a"}


@pytest.mark.parametrize("together", [2, 20])
def test_a_site_comes_back_when_it_pulls_with_the_others_as_much_as_it_pulled_against_them(together: int) -> None:
    # Believed: agreeing at all is enough. True: what all must unlearn, noise above all, makes liars agree a little later
    # on, and two that flipped labels came back after nine rounds.
    def out(score: float) -> bool:
        others = scores(b=together, c=together, d=together)
        return "a" in against_the_others({**others, "a": Agreement(total=score * 10, count=100, out=True)})

    limit = max(CERTAIN, together / 2)
    assert not against_the_others(scores(a=-1, b=2, c=2, d=2)), "it was never out"
    assert out(-1)
    assert out(limit - 0.1)
    assert not out(limit + 0.1)


def test_silent_updates_are_not_compared_nor_are_three() -> None:
    silent = {"w": np.zeros(4, np.float32)}
    loud = {"w": np.ones(4, np.float32)}
    assert not agreements({"a": loud, "b": loud, "c": loud})
    assert not agreements({"a": loud, "b": loud, "c": loud, "d": silent})
    assert agreements({"a": loud, "b": loud, "c": loud, "d": loud, "e": silent}).keys() == {"a", "b", "c", "d"}


def test_one_round_of_agreement_buys_no_later_ones() -> None:
    """A site that knew the others' noise echoed it once, and was believed for twenty rounds of pulling against them."""
    generator, direction = rng(9), np.ones(4000) / np.sqrt(4000)
    so_far, left_out = {site: Agreement() for site in SITES}, 0
    for number in range(20):
        rows = {site: 10 * direction + generator.normal(size=4000) for site in SITES}
        others = np.mean([row for site, row in rows.items() if site != "a"], 0)
        rows["a"] = 50 * others if number == 0 else generator.normal(size=4000) - 15 * direction
        for site, value in agreements({site: {"w": row} for site, row in rows.items()}).items():
            so_far[site] += value
        left_out += "a" in against_the_others(so_far)
    assert left_out > 10
    assert "a" in against_the_others(so_far)


def test_one_site_does_not_have_two_others_left_out() -> None:
    """It agrees with all where many hold a group, and pulls hard against the two with whom it holds a rare one.

    Among three it was half of what each of the two met, so that they seemed to pull against the others.
    """
    generator, direction = rng(5), np.ones(4000) / np.sqrt(4000)
    so_far = {site: Agreement() for site in "abcdefm"}
    for _ in range(20):
        groups = {
            "common": {site: 10 * direction + generator.normal(size=4000) for site in "cdef"},
            "rare": {site: 3 * direction + generator.normal(size=4000) for site in "ab"},
        }
        groups["common"]["m"], groups["rare"]["m"] = 60 * direction, -60 * direction
        for sent in groups.values():
            for site, number in agreements({site: {"w": row} for site, row in sent.items()}).items():
                so_far[site] += number
        assert not against_the_others(so_far)


# The same in rounds.


class Noisy(Pretender):
    """A site that sends noise around a small step, and turns it around when it is told to."""

    def __init__(self, name: str, sign: float = 1.0, quiet: bool = False) -> None:
        super().__init__(name, hello={"plan": PLAN})
        self.generator, self.sign, self.quiet = rng(sum(name.encode())), sign, quiet

    def train(self, number: int, arrays: Arrays) -> Any:
        sd = 0.0 if self.quiet else SD
        update = {
            group: {
                name: self.sign * (0.4 * SD + sd * self.generator.normal(size=value.shape)).astype(np.float32)
                for name, value in part.items()
            }
            for group, part in arrays.items()
        }
        return {"status": "ok", "round": number}, update


def private_study(rounds: int, **aggregation: Any) -> Study:
    return plan_of(
        private=True,
        training={"rounds": rounds, "local_steps": 1, "lr": 0.5},
        aggregation={"deadline_s": 5, **aggregation},
    )


SD = noise_sd(private_study(1), PLAN)


def test_bad_sites_are_left_out_by_name_and_a_resumed_run_remembers(tmp_path: Path) -> None:
    of = private_study(8)
    sites = [*(Noisy(name) for name in "abcde"), Noisy("turns", sign=-1), Noisy("quiet", quiet=True)]
    run = loop(tmp_path, of, Pretence(*sites))
    run.run()
    lines = list(run.directory.rounds())
    reasons = [line["groups"]["encoder/vitals"]["screened"] for line in lines]
    assert all("shorter than the noise" in reason["quiet"] for reason in reasons)
    assert "pulls against the others" in reasons[-1]["turns"]
    assert {site for reason in reasons for site in reason} == {"turns", "quiet"}
    assert lines[-1]["sites"]["turns"]["agreement"] < -CERTAIN < 0 < lines[-1]["sites"]["a"]["agreement"]
    again = loop(tmp_path, of, Pretence())
    assert again.peers["turns"].agreement == run.peers["turns"].agreement != {}
    assert Agreement.read(again.peers["turns"].agreement).score < -CERTAIN
    assert Agreement.read(again.peers["turns"].agreement).out
    kept, whole = History(0.8, again.state.history, again.state.counts), run.history
    assert kept.counts == whole.counts
    assert asdict(again.state)["history"].keys() == whole.sums.keys()


def test_without_noise_nobody_is_judged_by_it(tmp_path: Path) -> None:
    sites = [*(Pretender(name) for name in "abcde"), Pretender("turns", step=-1.0)]
    run = loop(tmp_path, study_of(training={"rounds": 4}, aggregation={"default": "auto"}), Pretence(*sites))
    run.run()
    assert not any(entry["screened"] for line in run.directory.rounds() for entry in line["groups"].values())
    assert not run.history.sums


# Distances, less what noise adds to them.

SDS = (0.7, 1.0, 1.0, 1.0, 1.2, 2.0)
"""Of honest sites: the last has few patients."""


def sent_with(signal: float, liar: np.ndarray, size: int = 3000) -> np.ndarray:
    """Honest updates, and one of little noise that says something else."""
    generator = rng(5)
    honest = [signal + sd * generator.normal(size=size) for sd in SDS]
    return np.stack([*honest, liar + 0.7 * generator.normal(size=size)]).astype(np.float32)


def squares(rows: np.ndarray, sds: tuple[float, ...]) -> list[float]:
    return [sd**2 * rows.shape[1] for sd in sds]


def test_who_says_something_else_is_far_and_not_who_has_few_patients() -> None:
    rows = sent_with(0.3, np.full(3000, -0.5))
    gram = gram_of(rows)
    assert (gram.nearest()[:5, -1] == 5).all(), "without the correction the one with the most noise is farthest"
    gram = gram_of(rows, squares(rows, (*SDS, 0.7)))
    assert (gram.nearest()[:6, -1] == 6).all()
    assert (gram.nearest()[:, 0] == np.arange(7)).all(), "each is nearest to itself, whatever noise does"


@pytest.mark.parametrize("rule", ["nnm+trimmed_mean", "multi_krum"])
def test_a_rule_that_knows_the_noise_is_nearer_to_what_sites_say(rule: str) -> None:
    rows, stages = sent_with(0.3, np.full(3000, -0.5)), resolve(rule)
    with_noise = combine(rows, stages, 1, squares(rows, (*SDS, 0.7)))
    assert with_noise.mean() == pytest.approx(0.3, abs=0.03)
    assert combine(rows, stages, 1).mean() < 0.24
    shuffled = rng(6).permutation(7)
    noise = np.array(squares(rows, (*SDS, 0.7)))[shuffled]
    np.testing.assert_allclose(combine(rows[shuffled], stages, 1, noise), with_noise, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["nnm+trimmed_mean", "multi_krum", "nnm+median"])
def test_whoever_states_much_noise_may_not_lie_as_much(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lie as long as the noise that was stated is not taken for noise, beyond twice the usual."""
    rows = sent_with(0.3, np.full(3000, -10.0))
    stated = squares(rows, (*SDS, 14.0))
    assert combine(rows, resolve(rule), 1, stated).mean() == pytest.approx(0.3, abs=0.05)
    monkeypatch.setattr(aggregators, "BELIEVED", 1e9)
    monkeypatch.setattr(aggregators, "bounded", lambda block, sd: block)
    assert combine(rows, resolve(rule), 1, stated).mean() < -0.5, "the test can fail"
    monkeypatch.undo()
    assert list(believed([1.0, 2.0, 100.0])) == [1.0, 2.0, 8.0]


@pytest.mark.parametrize("rule", ["nnm+trimmed_mean", "multi_krum", "nnm+median", "geometric_median"])
def test_a_lie_of_few_numbers_that_hides_in_the_noise_of_all_moves_them_no_farther_than_noise(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an attacker does that puts all of its length into the biases that saturate an encoder."""
    rows = sent_with(0.3, np.full(3000, 0.3))
    noise = squares(rows, (*SDS, 0.7))
    rows[6] = 0.3
    rows[6, :20] -= math.sqrt(noise[6] / 20)
    found = combine(rows, resolve(rule), 1, noise)
    usual = float(np.median(SDS))
    assert found[:20].mean() > 0.3 - usual
    assert found[20:].mean() == pytest.approx(0.3, abs=0.05)
    monkeypatch.setattr(aggregators, "bounded", lambda block, sd: block)
    assert combine(rows, resolve(rule), 1, noise)[:20].mean() < 0.3 - 1.5 * usual, "the test can fail"


def test_what_sites_differ_in_is_kept_where_it_is_more_than_noise() -> None:
    """Half of them far from the other half: the bound is of noise, and of how far the middle site is from the median."""
    block = np.array([[0.0, 0.0], [0.1, 0.1], [-0.1, -0.1], [5.0, 0.0], [5.1, 0.1], [4.9, -0.1]], np.float32)
    found = bounded(block, 0.05)
    np.testing.assert_allclose(found[:, 0], block[:, 0], atol=1e-6)
    np.testing.assert_allclose(bounded(block, 1.0), block, atol=1e-6)
    np.testing.assert_allclose(
        np.abs(bounded(np.array([[0.0], [0.1], [-0.1], [0.0], [9.0]], np.float32), 0.5)).max(), 1.0
    )


def test_noise_of_which_most_say_nothing_is_not_corrected_for() -> None:
    rows = sent_with(0.3, np.full(3000, -0.5))
    stages = resolve("nnm+trimmed_mean")
    assert np.array_equal(combine(rows, stages, 1, [0.0] * 6 + [9000.0]), combine(rows, stages, 1))


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_a_round_tells_its_rule_how_much_noise_each_site_has(decay: float) -> None:
    """What comes out is what comes out of the rule that is told the noise of means over rounds, and not otherwise."""
    of, history, told = private_study(1, default="nnm+trimmed_mean"), History(decay), History(decay)
    sds, generator, start = (*SDS, 0.7), rng(9), {"fusion": {"w": np.zeros(3000, np.float32)}}
    neither = np.tile([0.6, -0.6], 1500)  # nor against the others, who would leave it out
    for _ in range(4):
        rows = [(neither if at == 6 else 0.3) + sd * generator.normal(size=3000) for at, sd in enumerate(sds)]
        combined = GroupAggregation(of, start, history=history)
        for site, row, sd in zip("abcdefg", rows, sds, strict=True):
            combined.add(site, {"fusion": {"w": row.astype(np.float32)}}, noise_sd=sd)
        found = combined.finish()[0]["fusion"]["w"]
        means = [told.take(str(at), "fusion", {"w": row.astype(np.float32)})["w"] for at, row in enumerate(rows)]
        noise = [3000 * sd**2 * told.noise(str(at), "fusion") for at, sd in enumerate(sds)]
        expected = combine(np.stack(means), resolve("nnm+trimmed_mean"), 1, noise)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert not np.allclose(found, combine(np.stack(means), resolve("nnm+trimmed_mean"), 1), atol=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.8])
def test_what_a_history_leaves_of_the_noise(decay: float) -> None:
    history, generator = History(decay), rng(8)
    for _ in range(7):
        mean = history.take("a", "g", noised(20_000, generator))["w"]
        assert float(np.var(mean)) == pytest.approx(history.noise("a", "g"), rel=0.05)


# Means over rounds.


def test_a_history_is_the_weighted_mean_of_what_a_site_sent() -> None:
    history, sent = History(0.5), [np.float32(value) for value in (4, 8, 2)]
    found = [float(history.take("a", "g", {"w": np.full(2, value)})["w"][0]) for value in sent]
    assert found == pytest.approx([4, (4 / 2 + 8) / 1.5, (4 / 4 + 8 / 2 + 2) / 1.75])
    assert float(history.take("b", "g", {"w": np.full(2, 5.0, np.float32)})["w"][0]) == 5, "each site has its own"


def test_an_attacker_can_be_seen_as_it_likes() -> None:
    history = History(0.8)
    for value in (1.0, -3.0, 2.0):
        history.take("a", "g", {"w": np.array([value], np.float32)})
    mean = {"w": np.array([7.5], np.float32)}
    assert float(history.take("a", "g", wanted(history, "a", "g", mean))["w"][0]) == pytest.approx(7.5, rel=1e-5)


def test_a_lie_within_the_noise_moves_the_result_less_with_a_history() -> None:
    of, generator = private_study(1, default="trimmed_mean"), rng(4)
    start = {"fusion": {"w": np.zeros(300, np.float32)}}

    def drift(decay: float) -> float:
        history, current = History(decay), start
        for _ in range(30):
            combine = GroupAggregation(of, current, history=history)
            for site in SITES:
                lie = np.full(300, -1.5) if site == "a" else generator.normal(size=300)
                combine.add(site, {"fusion": {"w": lie.astype(np.float32)}})
            current, _ = combine.finish()
        return float(current["fusion"]["w"].mean())

    assert drift(0.8) > 0.6 * drift(0.0)
    assert drift(0.0) < -3
