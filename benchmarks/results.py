"""Is it worth joining? `make results` runs it and writes that section of docs/results.md, and docs/results-joining.svg.

Each panel is a comparison: a cohort, a recipe, budgets (recipes.py). Every model is judged out of fold, five folds by
patient; differences are paired by patient and split, with the same resamples for all models of a cohort. Resumable:
run it again.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from left_out import left_out
from page import write_section
from planted import planted, told_lines
from recipes import ASIDE, BUDGETS, COHORTS, PANELS, PLANTED, SEEDS, WORLDS, Panel

if TYPE_CHECKING:
    from gapweave.sites.simulate.compare_intervals import Draws
    from gapweave.sites.simulate.compare_plan import Request

DOCS = Path(__file__).parent.parent / "docs"
FOLDS = 5


def study_of(panel: Panel, out: Path) -> Path:
    """The panel's study file; panels of one cohort that is written share a folder."""
    folder = out / "cohorts" / (panel.cohort if panel.world is None else f"{panel.cohort}-{panel.world}")
    return folder / "study.yaml" if (folder / "study.yaml").exists() else panel.study(folder)


def data_folder() -> Path | None:
    """Folder of data sets, if there is one."""
    data = os.environ.get("GAPWEAVE_DATA")
    return Path(data).resolve() if data else None


def request_of(name: str, out: Path, seeds: tuple[int, ...], smoke: bool) -> Request:
    """The panel as `gapweave compare` would be asked for it."""
    from gapweave.sites.simulate.compare_plan import Request

    panel = PANELS[name]
    study = study_of(panel, out)
    return Request(
        study=study,
        overrides=panel.overrides,
        vary={"privacy.epsilon": list(panel.budgets)} if panel.budgets else {},
        seeds=panel.seeds or seeds,
        folds=FOLDS,
        baselines=panel.baselines,
        joining=panel.joining,
        smoke=smoke,
        sites=study.parent / panel.sites,
        data=data_folder(),
        out=out / name,
        continue_without=False,
    )


def run_panel(name: str, out: Path, seeds: tuple[int, ...], smoke: bool) -> str:
    """Run what is left of one panel, in a process of its own."""
    from gapweave.shared.errors import GapweaveError
    from gapweave.sites.simulate.commands import one_thread
    from gapweave.sites.simulate.compare import compare

    one_thread()
    try:
        result = compare(request_of(name, out, seeds, smoke))
    except GapweaveError as error:
        return f"{name}: {error}"
    return "\n".join([f"{name}: {failure.unit}: {failure.error}" for failure in result.failures] or [f"{name}: done"])


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A model of a cohort, judged.

    Attributes:
        recipe: of its panel.
        budget: epsilon, or None.
        model: its name in results.json.
        auroc: mean over judged sites; of each split, or of each world's splits.
    """

    recipe: str
    budget: float | None
    model: str
    auroc: tuple[float, ...]

    @property
    def cell(self) -> dict[str, Any]:
        """Under which `Draws` knows it."""
        return {"recipe": self.recipe, "budget": self.budget}

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.auroc)

    @property
    def sd(self) -> float | None:
        """Over seeds."""
        return stdev(self.auroc) if len(self.auroc) > 1 else None


def judge(cohort: str, out: Path, seeds: tuple[int, ...], smoke: bool) -> tuple[list[Judged], Draws] | None:
    """All models of a cohort's finished panels, with the resamples of its patients; None if nothing is finished."""
    from gapweave.sites.simulate.compare import finished, out_of_fold_scores
    from gapweave.sites.simulate.compare_intervals import Draws
    from gapweave.sites.simulate.compare_plan import make_plan

    found: dict[tuple[str, float | None, str], dict[int, list[float]]] = {}
    draws = Draws("binary")
    for name in [name for name, panel in PANELS.items() if panel.cohort == cohort and (out / name).exists()]:
        panel, request = PANELS[name], request_of(name, out, seeds, smoke)
        world = "" if panel.world is None else f"{panel.world}/"  # other patients
        for trial in make_plan(request, study_of(panel, out)).trials:
            if not finished(trial, out / name):
                continue
            budget = trial.cell.get("privacy.epsilon")
            pooled = {f"{world}{site}": of for site, of in out_of_fold_scores(trial, out / name).items()}
            for model, auroc in draws.add({"recipe": panel.recipe, "budget": budget}, trial.seed, pooled).items():
                of_model = found.setdefault((panel.recipe, budget, model), {})
                of_model.setdefault(trial.seed if panel.world is None else panel.world, []).append(auroc)
    models = [
        Judged(recipe=recipe, budget=budget, model=model, auroc=tuple(map(fmean, values.values())))
        for (recipe, budget, model), values in found.items()
    ]
    return (models, draws) if models else None


NAMES = {
    "lr_local": "logistic regression, local only",
    "gbm_local": "gradient boosting, local only",
    "local": "the network, local only",
    "score_local": "public score with the best local model",
    "own": "what each site would choose of its own",
    "lr_pooled": "logistic regression, all data in one place",
    "gbm_pooled": "gradient boosting, all data in one place",
    "pooled": "the network, all data in one place",
    "federated": "federated",
    "federated_finetuned": "federated, fine-tuned",
    "best": "what `predict` would take: federated, own, or a blend",
}
"""For people, in the order of tables."""
ALONE = ("lr_local", "gbm_local", "local", "score_local", "own")
OURS = ("federated", "federated_finetuned", "best")


def strongest(models: list[Judged]) -> Judged:
    """The local model of the highest mean AUROC on the held-out patients: hindsight, in favour of staying alone."""
    return max((entry for entry in models if entry.model in ALONE), key=_standing)


def find(models: list[Judged], model: str, budget: float | None = None) -> Judged | None:
    """The model with this budget; of baselines the best of its recipes."""
    named = [
        entry
        for entry in models
        if entry.model == model and entry.recipe not in ASIDE and (model not in OURS or entry.budget == budget)
    ]
    return max(named, key=_standing, default=None)


def _standing(entry: Judged) -> tuple[int, float]:
    """A recipe whose splits are all done comes before one of which some are left."""
    return len(entry.auroc), entry.mean


def margin(draws: Draws, ours: Judged, other: Judged) -> tuple[float, tuple[float, float]]:
    """Difference of mean AUROC and its 95 % interval.

    A demo under noise has three splits, of which its other panels have one.
    """
    found = draws.difference(ours.cell, ours.model, other.cell, other.model, all_seeds=True)
    return ours.mean - other.mean, (found and found.interval) or (float("nan"), float("nan"))


def sites_apart(draws: Draws, ours: Judged, other: Judged) -> tuple[int, int, int]:
    """Sites where ours is ahead; where the other is better beyond the interval; all."""
    found = draws.difference(ours.cell, ours.model, other.cell, other.model, all_seeds=True)
    sites = [] if found is None else [*found.sites.values()]
    harmed = sum(interval is not None and interval[1] < 0 for _, interval in sites)
    return sum(mean > 0 for mean, _ in sites), harmed, len(sites)


def table(models: list[Judged], draws: Draws) -> str:
    """A row a model: AUROC, and what it is ahead of the strongest local and of the pooled linear model."""
    alone, linear = strongest(models), find(models, "lr_pooled")
    titles = ["model", "epsilon", "AUROC", "minus strongest local", "minus pooled linear", "sites ahead of local"]
    lines = [titles, ["---", *["--:"] * 5]]
    rows = [
        (title, entry)
        for model, title in NAMES.items()
        for budget in ([None, *BUDGETS] if model in OURS else [None])
        if (entry := find(models, model, budget))
    ]
    rows += [(ASIDE[entry.recipe], entry) for entry in models if entry.recipe in ASIDE and entry.model == "federated"]
    for title, entry in rows:
        ahead, _, sites = sites_apart(draws, entry, alone)
        spread = "" if entry.sd is None else f" ± {entry.sd:.3f}"
        lines.append(
            [
                f"**{title}**" if entry == alone else title,
                "-" if entry.model not in OURS or entry.budget is None else f"{entry.budget:g}",
                f"{entry.mean:.3f}{spread}",
                "" if entry == alone else _margin(draws, entry, alone),
                "" if linear is None or entry == linear else _margin(draws, entry, linear),
                "" if entry == alone else f"{ahead} of {sites}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _margin(draws: Draws, ours: Judged, other: Judged) -> str:
    difference, (low, high) = margin(draws, ours, other)
    return f"{difference:+.3f} ({low:+.3f} to {high:+.3f})"


def gates(models: list[Judged], draws: Draws) -> str:
    """What was to be shown, and whether the intervals show it."""
    alone, linear, score = strongest(models), find(models, "lr_pooled"), find(models, "score_local")
    lines = []
    for budget in (None, *BUDGETS):
        ours, chosen = find(models, "federated", budget), find(models, "best", budget)
        if ours is None or chosen is None:
            continue
        others = [
            ("the strongest local model", alone),
            ("the pooled linear model", linear),
            ("public score + local", score),
        ]
        for name, entry in (("federated", ours), ("`predict`", chosen)):
            said = [f"{_word(draws, entry, other)} {what}" for what, other in others if other is not None]
            lines.append(f"- {_budget(budget)}: {name} is {', '.join(said)}.")
        own = find(models, "own")
        if own is not None:
            _, harmed, sites = sites_apart(draws, chosen, own)
            lines.append(
                f"- {_budget(budget)}: at {harmed} of {sites} sites what `predict` takes is worse than their own."
            )
    return "\n".join(lines)


def foretold(cohort: str, out: Path) -> str:
    """What `study check` says of joining before a run, from the sites' sizes alone; empty for a cohort of worlds."""
    from gapweave.shared.config import load_study
    from gapweave.shared.outlook import outlooks

    lines = []
    for name, panel in PANELS.items():
        file = out / name / "results.json"
        if panel.cohort != cohort or not panel.budgets or panel.world is not None or not file.exists():
            continue
        judged = {row["site"]: row["n_test"] for row in json.loads(file.read_text(encoding="utf-8"))}
        sizes = {site: max(1, number * (FOLDS - 1) // FOLDS) for site, number in judged.items()}
        for budget in panel.budgets:
            study = load_study(study_of(panel, out), {**panel.overrides, "privacy.epsilon": budget})
            helped = sum(outlook.helps for outlook in outlooks(study, sizes))
            said = f"joining can be expected to help {helped} of {len(sizes)} sites"
            lines.append(f"- {_budget(budget)}, foretold from the sites' sizes: {said}.")
    return "\n".join(lines)


def _budget(budget: float | None) -> str:
    return "No privacy" if budget is None else f"Epsilon {budget:g}"


def _word(draws: Draws, ours: Judged, other: Judged) -> str:
    difference, (low, high) = margin(draws, ours, other)
    if low > 0:
        return f"better ({difference:+.3f}) than"
    if high < 0:
        return f"worse ({difference:+.3f}) than"
    return f"not told apart ({difference:+.3f}) from"


def plot(found: dict[str, tuple[list[Judged], Draws]], file: Path) -> None:
    """What joining adds to the strongest local model, with intervals."""
    from gapweave.sites.simulate.compare_plots import COLOURS, figure_axes

    short = {"lr_pooled": "pooled linear", "federated": "federated", "best": "predict"}
    rows = []
    for at, (cohort, (models, draws)) in enumerate(found.items()):
        alone = strongest(models)
        for model, word in short.items():
            for budget in (None, *BUDGETS) if model in OURS else (None,):
                if entry := find(models, model, budget):
                    label = f"{cohort}: {word}" + (f", epsilon {budget:g}" if budget else "")
                    rows.append((label, margin(draws, entry, alone), COLOURS[2 * at]))
    with figure_axes(file, rows=len(rows)) as axes:
        axes.axvline(0, color="black", linewidth=0.8)
        for at, (_, (difference, (low, high)), colour) in enumerate(rows):
            axes.plot([low, high], [at, at], color=colour)
            axes.plot([difference], [at], "o", color=colour)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axes.invert_yaxis()
        axes.set_xlabel("AUROC minus that of the strongest local model (line: 95 %, of patients and splits)")


PAGE = """## Is it worth joining?

By `make results` (resumable). Every figure is out of fold, five folds by patient, patients of one fold ranked among
each other ([why](decisions/0025-within-folds.md)): mean over the sites with 8 patients or more of each class, mean over
splits with seeds {seeds} (± sd over splits; the demo: over worlds with generator seeds {worlds}). Differences with the
95 % interval of 1,000 resamples of each site's patients, the same for all models, and of what three splits may change
(Student's t); splits have noise of their own, so that it is in the intervals. The demo has three splits a world where
there is noise, one elsewhere. Local and pooled models train without privacy, as nobody would spend a budget on them;
federated ones at the epsilon that stands beside them, for each patient, delta 1e-5, noise added at each site.
*Strongest local* is the one of the highest mean in this very table: hindsight that favours staying alone. Of a
baseline that the recipes with and without privacy train each in their own way, the better one stands here. Recipes
and how they were chosen, before these numbers: [benchmarks/recipes.py](../benchmarks/recipes.py). A site chooses what
`predict` takes on its training patients.

Until lately all folds' patients were ranked in one list, which makes models of one site look worse than they are: this
page said then that joining pays under privacy on the eICU stay, by +.044. Recipes were chosen by that measure, on other
splits; federated models have the same AUROC by both within .01. All of this section was run anew since.

Seven more things were changed after figures of these splits had been seen, and what they touch was measured again.
Distances between updates are corrected for noise, because of what attacks cost on synthetic hospitals
([0014](decisions/0014-noised-rounds.md)). The noise that shrinkage expects was mended, and what it keeps
([0022](decisions/0022-shrinkage.md); more again in 0024).
The recipe without privacy has another ridge, chosen on the stay with the
development splits alone ([0021](decisions/0021-small-cohorts.md)). The recipe under noise was chosen anew, on the
development splits of the stay and the development worlds of the demo ([0024](decisions/0024-one-length.md)).
Fine-tuning of the demo takes a quarter of the steps and keeps what its noise does not explain, chosen on development
worlds ([0022](decisions/0022-shrinkage.md)).
The useless and the tiny site were measured in one world at first; two more were added, because its interval was too
wide to tell.
A network alone is clipped only where it diverges without, as sites choose it so of their own
([0019](decisions/0019-joining.md)): the demo's hospitals have better models of their own by it, and joining them at
epsilon 3, which seemed to pay by +.013, does not beyond doubt. Under noise robust rules bound each number by its
median over the sites, because of attacks on synthetic hospitals
([0026](decisions/0026-what-noise-still-hides.md)); figures of here moved by it no further than by fresh noise,
up and down (mean -.001 over 16 of them). All was run anew with both.

![What joining adds](results-joining.svg)

{parts}"""


def page(found: dict[str, tuple[list[Judged], Draws]], out: Path, seeds: tuple[int, ...], smoke: bool) -> str:
    """The section of docs/results.md."""
    parts = []
    for name, (models, draws) in found.items():
        cohort, done = COHORTS[name], {len(entry.auroc) for entry in models}
        left = f" **Not finished: {min(done)} of {len(seeds)} splits at least.**" if min(done) < len(seeds) else ""
        said = "\n".join(filter(None, [gates(models, draws), foretold(name, out)]))
        parts += [f"### {cohort.title}", cohort.note + left, table(models, draws), said]
    if left := [cohort.title for name, cohort in COHORTS.items() if name not in found]:
        parts.append(f"**Not run for this page yet:** {'; '.join(left)}.")
    panel = PANELS[f"planted-{PLANTED[0]}"]
    models, draws = judge("planted", out, seeds, smoke) or ([], None)
    told = partial(told_lines, out / "planted-told", study_of(panel, out), panel.overrides, smoke)
    parts += ["### A useless and a tiny site", planted(models, draws, told)]
    if "stay" in found:
        how = "Trained without privacy on all patients of the nine others; AUROC on all of the site that was left out."
        parts += ["### A hospital that took no part (eICU stay)", how, left_out(out, data_folder(), smoke=smoke)]
    words = [", ".join(map(str, values)) for values in (seeds, WORLDS)]
    return PAGE.format(seeds=words[0], worlds=words[1], parts="\n\n".join(parts))


def main() -> None:
    """Run the panels, two at a time, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--panels", default=",".join(PANELS))
    parser.add_argument(
        "--seeds", default=",".join(map(str, SEEDS)), help="of splits; others than the page's leave docs alone"
    )
    parser.add_argument("--smoke", action="store_true", help="2 rounds, 1 seed, 2 folds, 2 budgets; leaves docs alone")
    options = parser.parse_args()
    out, names = options.out.resolve(), options.panels.split(",")
    seeds = tuple(int(seed) for seed in options.seeds.split(","))
    for name in names:
        study_of(PANELS[name], out)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:  # this process has threads already
        for line in pool.map(run_panel, names, *([value] * len(names) for value in (out, seeds, options.smoke))):
            print(line, flush=True)
    found = {cohort: known for cohort in COHORTS if (known := judge(cohort, out, seeds, options.smoke))}
    folder = DOCS if seeds == SEEDS and not options.smoke else out
    text = page(found, out, seeds, options.smoke)
    plot(found, folder / "results-joining.svg")
    write_section("joining", text, folder / "results.md")
    print(text)


if __name__ == "__main__":
    main()
