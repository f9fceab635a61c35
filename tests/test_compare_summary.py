"""What a comparison says: statistics by hand, summary.md that repeats them, plots that are the same every time."""

import itertools
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
from test_compare_intervals import scores_of

from gapweave.sites.simulate.compare_intervals import Draws
from gapweave.sites.simulate.compare_plan import Plan, Trial, Unit, read_seeds, read_variations
from gapweave.sites.simulate.compare_plots import plot_auroc, plot_paired
from gapweave.sites.simulate.compare_statistics import statistics_of
from gapweave.sites.simulate.compare_summary import markdown

AUROC = {
    ("federated", 1): {("a", 0): 0.6, ("a", 1): 0.7, ("b", 0): 0.8, ("b", 1): 0.9, ("c", 0): None, ("c", 1): None},
    ("pooled", 1): {("a", 0): 0.8, ("a", 1): 0.8, ("b", 0): 0.7, ("b", 1): 0.8, ("c", 0): 0.9, ("c", 1): 0.9},
    ("federated", 8): {("a", 0): 0.9, ("a", 1): 0.9, ("b", 0): 0.9, ("b", 1): 0.9, ("c", 0): 0.5, ("c", 1): 0.5},
    ("pooled", 8): {("a", 0): 0.8, ("a", 1): 0.8, ("b", 0): 0.7, ("b", 1): 0.8, ("c", 0): 0.9, ("c", 1): 0.9},
}
VARY = {"epsilon": [1, 8]}
SIZES = [("north", 60), ("tiny", 8)]


def rows_of(table, key="epsilon"):
    return [
        {
            "cell": {key: value}, "model": model, "seed": seed, "fold": None, "site": site, "n_test": 20, "positives": 5,
            "metrics": {"auroc": auroc, "auprc": 0.5, "brier": 0.25, "ece": 0.125},
            "epsilon": value if model == "federated" else None,
        }
        for (model, value), entries in table.items()
        for (site, seed), auroc in entries.items()
    ]  # fmt: skip


def plan_of(**changes):
    units = [Unit.__new__(Unit) for _ in range(4)]
    for at, unit in enumerate(units):
        object.__setattr__(unit, "name", str(at))
    trials = tuple(
        Trial(cell={"epsilon": value}, seed=seed, units=(unit,))
        for (value, seed), unit in zip(itertools.product((1, 8), (0, 1)), units, strict=True)
    )
    given = {"study": "trial", "vary": VARY, "seeds": (0, 1), "folds": None, "baselines": ("pooled",), "trials": trials}
    return Plan(**{**given, **changes})


@pytest.fixture(scope="module")
def statistics():
    return statistics_of(rows_of(AUROC), VARY)


def test_means_are_over_sites_then_seeds(statistics):
    first = statistics.means[0]
    assert (first.cell, first.model, first.sites) == ({"epsilon": 1}, "federated", 3)
    assert first.mean("auroc") == pytest.approx(fmean([0.7, 0.8]))
    assert first.sd("auroc") == pytest.approx(stdev([0.7, 0.8]))
    assert (first.worst_site, first.worst) == ("a", pytest.approx(0.65))
    assert first.epsilon == 1


def test_differences_are_paired_by_site_and_seed(statistics):
    low, high = statistics.against_models
    differences = [-0.2, -0.1, 0.1, 0.1]
    assert (low.pairs, low.better, low.worse) == (4, 1, 1)
    assert low.mean == pytest.approx(fmean(differences))
    assert low.sd == pytest.approx(stdev(differences))
    assert (high.pairs, high.better, high.worse) == (6, 2, 1)


def test_sites_without_an_auroc_are_not_counted_in_its_mean(statistics):
    first, second = statistics.means[:2]
    assert (first.sites, first.judged, second.judged) == (3, 2, 3)
    lines = markdown(plan_of(), statistics, seconds=75, failures=[]).splitlines()
    assert [line.split(" | ")[2] for line in lines if line.startswith("| epsilon=1 |")][:2] == ["2 of 3", "3"]


def test_a_difference_is_of_the_sites_that_its_interval_is_of():
    """Of two sites one is too small to be judged: what chance makes of it is in neither."""
    draws = Draws("binary")
    pooled = {site: scores_of(at, patients, federated=2.0, pooled=1.0) for at, (site, patients) in enumerate(SIZES)}
    draws.add({"epsilon": 1}, 0, pooled)
    table = {
        ("federated", 1): {("north", 0): 0.9, ("tiny", 0): 1.0},
        ("pooled", 1): {("north", 0): 0.8, ("tiny", 0): 0.0},
    }
    (entry,) = statistics_of(rows_of(table), {}, draws).against_models
    observed = draws.difference({"epsilon": 1}, "federated", {"epsilon": 1}, "pooled").sites["north"][0]
    assert set(entry.by_site) == {"north"}
    assert entry.mean == pytest.approx(observed)
    assert entry.interval[0] <= entry.mean <= entry.interval[1]


def test_cells_are_compared_with_the_first_value_of_their_key(statistics):
    (entry,) = statistics.against_first
    assert (entry.cell, entry.other_cell, entry.model) == ({"epsilon": 8}, {"epsilon": 1}, "federated")
    assert entry.mean == pytest.approx(fmean([0.3, 0.2, 0.1, 0.0]))
    assert entry.better == 2


def test_the_summary_says_plainly_that_federated_loses(statistics):
    text = markdown(plan_of(), statistics, seconds=75, failures=[])
    assert "- epsilon=1: federated was below pooled (-0.025, better at 1 of 2 sites, worse at 1)." in text
    assert "2 cells x 2 seeds: 4 simulations in 1 min 15 s" in text


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        (None, "federated was below pooled (-0.025"),
        ((-0.04, -0.01), "federated loses to pooled (-0.025"),
        ((-0.06, 0.01), "federated is not told apart from pooled (-0.025"),
        ((0.005, 0.035), "federated is ahead of pooled (-0.025"),  # of sites that are large enough to be judged
    ],
)
def test_a_difference_that_chance_may_make_is_called_that(statistics, interval, said):
    low, high = statistics.against_models
    entries = replace(statistics, against_models=[replace(low, interval=interval), high])
    assert f"- epsilon=1: {said}" in markdown(plan_of(), entries, seconds=1, failures=[])


def test_the_summary_repeats_the_statistics(statistics):
    text = markdown(plan_of(), statistics, seconds=1, failures=["epsilon=8 seed 1: refused"])
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    for entry in statistics.means:
        found = [
            line for line in lines if line[:2] == [f"epsilon={entry.cell['epsilon']}", entry.model] and len(line) == 9
        ]
        ((*_, auroc, worst, auprc, brier, ece, _),) = found
        assert auroc == f"{entry.mean('auroc'):.3f} ± {entry.sd('auroc'):.3f}"
        assert worst == f"{entry.worst_site} {entry.worst:.3f}"
        assert (auprc, brier, ece) == ("0.500", "0.250", "0.125")
    assert "- epsilon=8 seed 1: refused" in text


def test_one_seed_has_no_spread():
    rows = [row for row in rows_of(AUROC) if row["seed"] == 0 and row["site"] == "a" and row["cell"]["epsilon"] == 1]
    statistics = statistics_of(rows, {"epsilon": [1]})
    assert statistics.means[0].sd("auroc") is None
    assert statistics.against_models[0].sd is None
    assert "| 0.600 |" in markdown(plan_of(), statistics, seconds=1, failures=[])


def test_without_other_models_the_summary_says_how_to_get_them():
    rows = [row for row in rows_of(AUROC) if row["model"] == "federated"]
    assert "give `--baselines" in markdown(plan_of(), statistics_of(rows, VARY), seconds=1, failures=[])


@pytest.mark.parametrize("key", ["epsilon", "fusion"])
def test_plots_are_the_same_every_time(tmp_path, key):
    table = {(model, value if key == "epsilon" else f"f{value}"): of for (model, value), of in AUROC.items()}
    vary = {key: list(dict.fromkeys(value for _, value in table))}
    statistics = statistics_of(rows_of(table, key), vary)
    for name in ("one.svg", "two.svg"):
        plot_auroc(statistics, vary, tmp_path / name)
        plot_paired(statistics, tmp_path / f"paired-{name}")
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    assert (tmp_path / "paired-one.svg").read_bytes() == (tmp_path / "paired-two.svg").read_bytes()
    assert ("AUROC, mean over sites (band" in text) == (key == "epsilon")
    assert ">pooled<" in text or "pooled</text>" in text


def test_plots_of_nothing_say_so(tmp_path):
    statistics = statistics_of([], {})
    plot_auroc(statistics, {}, tmp_path / "auroc.svg")
    plot_paired(statistics, tmp_path / "paired.svg")
    assert "nothing to compare" in (tmp_path / "paired.svg").read_text()


def test_values_are_read_as_yaml_and_numbers():
    assert read_variations(["a=1,2.5,1e-3,x,true"]) == {"a": [1, 2.5, 0.001, "x", True]}
    assert read_seeds("3") == (3,)


def test_the_command_module_is_light():
    source = Path(__file__).parent.parent / "sites" / "simulate" / "compare_cli.py"
    top = [line for line in source.read_text().splitlines() if line.startswith(("import ", "from "))]
    allowed = ("__future__", "json", "pathlib", "typing", "typer", "gapweave.sites.simulate.options")
    assert all(line.split()[1] in allowed for line in top), top
