"""Do the ways of fusing differ? `make bench-methods` runs it.

It writes that section of docs/results.md, its plots, and docs/methods.json, from which docs/methods.md says which
methods fall behind `late`.

Panels are comparisons, as `gapweave compare` makes them; imputation.py looks into imputers. Resumable: run it again.
Nothing was chosen for this page: each method has its defaults, and each cohort the training of its own study file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from imputation import Cohort, look_inside
from methods_measured import measured
from page import write_section

from gapweave.shared.config.overrides import METHODS

DOCS = Path(__file__).parent.parent / "docs"
EICU = Path(__file__).parent.parent / "sites" / "eicu_demo" / "study.yaml"
SEEDS = (0, 1, 2)

COMPARED = (
    "late", "concat", "sum", "se_gate", "medfuse", "dwfuse", "g_blend", "ogm_ge", "pmr", "modality_dropout",
    "omnifuse",
)  # fmt: skip
"""What the OmniFuse paper compares, and the default: first in the table, before the others of the catalogue."""
PARTS = {
    "omnifuse_no_imputer": "imputer",
    "omnifuse_no_backward": "way back of the imputer",
    "omnifuse_no_dwfuse": "Dynamic Weighted Fuse",
    "omnifuse_no_tla": "Traceable Laziness Activation",
    "omnifuse_no_dropout": "modalities hidden in training, and with them the imputer",
}
"""OmniFuse without a part -> that part."""
REST = tuple(name for name in METHODS if name not in COMPARED and name not in PARTS)
CURVES = ("late", "concat", "dwfuse", "omnifuse")
RATES = (0.3, 0.6, 0.9)
SERIES = ("ts_bp", "ts_resp", "ts_io", "ts_infusion", "ts_exam")
NETWORKS: dict[str, Any] = {
    "model.embedding": 16,
    "model.linear_path": False,
    **{f"modalities.{name}.encoder": None for name in ("static", "labs", "severity", "note", *SERIES)},
    "modalities.severity.start": 0,
    "scheme.settings": {},
    "training.schedule": "fedavg",
    "training.local_steps": 5,
    "training.lr": 0.3,
    "training.ridge": 0,
    "aggregation.server_optimizer": "none",
    "aggregation.server_lr": 1.0,
    "aggregation.average_last": 0,
    "aggregation.shrink": False,
}
"""The eICU study as networks with encoders, trained as the demo is: its own file is a linear model without fusion."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One comparison.

    Attributes:
        title: for people.
        study: file, or None for the demo.
        vary: key -> values.
        overrides: what is the same in all cells.
        seeds: of training and split.
    """

    title: str
    study: Path | None = None
    vary: dict[str, list[Any]]
    overrides: dict[str, Any] = field(default_factory=lambda: {"privacy.enabled": False})
    seeds: tuple[int, ...] = SEEDS


PANELS = {
    "demo": Panel(title="demo, no privacy", vary={"method": [*COMPARED, *REST, *PARTS]}),
    "eicu": Panel(
        title="eICU stay, no privacy",
        study=EICU,
        vary={"method": ["late", "concat", "g_blend", "ogm_ge", "dwfuse", "omnifuse"]},
        overrides={"privacy.enabled": False, **NETWORKS},
    ),
    "demo-missing": Panel(
        title="demo, modalities hidden at random", vary={"method": [*CURVES], "missing_rate": [*RATES]}
    ),
    "demo-private": Panel(
        title="demo, epsilon 8", vary={"method": [*CURVES]}, overrides={"privacy.epsilon": 8, "training.rounds": 20}
    ),
    "demo-mnar": Panel(
        title="demo, hidden more often for positives",
        vary={"method": ["late", "omnifuse"], "missing_rate": [*RATES]},
        overrides={"privacy.enabled": False, "simulation.missing": "mnar"},
        seeds=(0, 1),
    ),
    "eicu-missing": Panel(
        title="eICU stay, modalities hidden at random",
        study=EICU,
        vary={"method": [*CURVES], "missing_rate": [*RATES]},
        overrides={"privacy.enabled": False, **NETWORKS},
    ),
}
MISSING = {
    "demo": {"demo-missing": "", "demo-mnar": ", more often for positives"},
    "eicu": {"eicu-missing": ""},
}
"""Panel at rate 0 -> panels that hide modalities, and how."""


def data_folder() -> Path | None:
    """The data sets, where there are any."""
    given = os.environ.get("GAPWEAVE_DATA")
    return Path(given).resolve() if given else None


def run_panel(name: str, out: Path, smoke: bool) -> str:
    """Run what is left of one panel, in a process of its own."""
    from gapweave.shared.errors import GapweaveError
    from gapweave.sites.simulate.commands import one_thread
    from gapweave.sites.simulate.compare import compare
    from gapweave.sites.simulate.compare_plan import Request

    one_thread()
    panel = PANELS[name]
    request = Request(
        study=panel.study,
        overrides=panel.overrides,
        vary=panel.vary,
        seeds=panel.seeds,
        folds=None,
        baselines=(),
        smoke=smoke,
        sites=None,
        data=data_folder(),
        out=out / name,
        continue_without=False,
    )
    try:
        compare(request)
    except GapweaveError as error:
        return f"{name}: {error}"
    return f"{name}: done"


Key = tuple[str, float]
"""Method and missing rate."""
Scores = dict[tuple[int, str], float]
"""(seed, site) -> AUROC."""
Panels = dict[str, dict[Key, Scores]]
"""Panel -> its scores."""


def scores_of(rows: list[dict[str, Any]]) -> dict[Key, Scores]:
    """AUROCs of the federated model, from the rows of a results.json."""
    found: dict[Key, Scores] = {}
    for row in rows:
        if row["model"] == "federated" and row["metrics"]["auroc"] is not None:
            key = row["cell"]["method"], float(row["cell"].get("missing_rate", 0.0))
            found.setdefault(key, {})[row["seed"], row["site"]] = row["metrics"]["auroc"]
    return found


def by_seed(scores: Scores) -> list[float]:
    """Mean over sites, seed by seed."""
    seeds = sorted({seed for seed, _ in scores})
    return [fmean(value for (at, _), value in scores.items() if at == seed) for seed in seeds]


def gain(ours: Scores, other: Scores) -> tuple[float, float]:
    """Mean difference over sites and seeds, and the half-width of its 95 % interval over pairs (Student's t)."""
    from scipy.stats import t

    pairs = [ours[key] - other[key] for key in sorted(ours) if key in other]
    if len(pairs) < 2:
        return fmean(pairs) if pairs else math.nan, math.nan
    return fmean(pairs), float(t.ppf(0.975, len(pairs) - 1)) * stdev(pairs) / math.sqrt(len(pairs))


def _mean(scores: Scores) -> str:
    values = by_seed(scores)
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _gain(ours: Scores, other: Scores) -> str:
    mean, half = gain(ours, other)
    return f"{mean:+.3f} ± {half:.3f}"


def comparison(panels: Panels) -> str:
    """Table 3's form: a row a method, a column a panel; in brackets the difference to `late`."""
    names = [name for name in ("demo", "demo-private", "eicu") if name in panels]
    lines = [["method", *(PANELS[name].title for name in names)], ["---", *["--:"] * len(names)]]
    for method in (*COMPARED, *REST):
        cells = []
        for name in names:
            found = panels[name]
            mine, late = found.get((method, 0.0)), found.get(("late", 0.0))
            beside = "" if mine is None or late is None or method == "late" else f" ({_gain(mine, late)})"
            cells.append("-" if mine is None else _mean(mine) + beside)
        if any(cell != "-" for cell in cells):
            lines.append([f"`{method}`", *cells])
    return _table(lines)


def ablation(found: dict[Key, Scores]) -> str:
    """Table 4's form: what each part of OmniFuse adds."""
    whole = found.get(("omnifuse", 0.0))
    lines = [["OmniFuse without", "AUROC", "what the part adds"], ["---", "--:", "--:"]]
    if whole is not None:
        lines.append(["nothing: the whole", _mean(whole), ""])
        lines += [
            [part, _mean(found[name, 0.0]), _gain(whole, found[name, 0.0])]
            for name, part in PARTS.items()
            if (name, 0.0) in found
        ]
    return _table(lines)


def _table(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PAPER = 0.04
"""What the paper reports that its parts add, at least."""


def verdicts(found: dict[Key, Scores]) -> str:
    """Which of the paper's gains appear, by the intervals."""
    whole, lines = found.get(("omnifuse", 0.0)), []
    for name, part in PARTS.items():
        if whole is None or (name, 0.0) not in found:
            continue
        mean, half = gain(whole, found[name, 0.0])
        known = "" if math.isnan(half) else f" (95 % interval {mean - half:+.3f} to {mean + half:+.3f})"
        if mean - half > 0:
            word = "adds, as the paper says" if mean + half >= PAPER else "adds, less than the paper's"
        elif mean + half < 0:
            word = "costs"
        else:
            word = "adds nothing that can be told from 0"
        short = "" if math.isnan(half) or mean + half >= PAPER else f"; the paper's {PAPER:+.2f} is outside"
        lines.append(f"- {part[0].upper()}{part[1:]}: {word}: {mean:+.3f}{known}{short}.")
    return "\n".join(lines)


def plot_missing(panels: Panels, start: str, file: Path) -> None:
    """Figs 4-6's form: AUROC against the share of modalities hidden, in training and test."""
    from gapweave.sites.simulate.compare_plots import COLOURS, figure_axes

    with figure_axes(file, rows=13) as axes:
        for at, method in enumerate(CURVES):
            for (name, how), style in zip(MISSING[start].items(), ("-", "--"), strict=False):
                rates = [rate for rate in (0.0, *RATES) if _at(panels, start, name, method, rate)]
                if len(rates) < 2:
                    continue
                values = [by_seed(_at(panels, start, name, method, rate)) for rate in rates]
                mean = [fmean(of) for of in values]
                sd = [stdev(of) if len(of) > 1 else 0.0 for of in values]
                axes.plot(rates, mean, style, marker="o", color=COLOURS[2 * at], label=method + how)
                low, high = ([m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
                axes.fill_between(rates, low, high, color=COLOURS[2 * at], alpha=0.12, linewidth=0)
        axes.set_xlabel("share of present modalities hidden, in training and in test")
        axes.set_ylabel("AUROC, mean over sites (band: ± sd over seeds)")
        axes.legend(fontsize="small")


def _at(panels: Panels, start: str, name: str, method: str, rate: float) -> Scores:
    """At rate 0 nothing is hidden, by whatever mechanism."""
    return panels.get(start if rate == 0 else name, {}).get((method, rate), {})


def missing_table(panels: Panels, start: str) -> str:
    """The figures of the plot; in brackets the difference to `late`."""
    lines = [["method", *(f"{rate:.0%} hidden" for rate in (0.0, *RATES))], ["---", *["--:"] * (1 + len(RATES))]]
    for name, how in MISSING[start].items():
        for method in CURVES:
            cells = [_at(panels, start, name, method, rate) for rate in (0.0, *RATES)]
            late = [_at(panels, start, name, "late", rate) for rate in (0.0, *RATES)]
            if any(cells[1:]):
                lines.append([f"`{method}`{how}", *map(_beside, cells, late)])
    return _table(lines)


def _beside(ours: Scores, late: Scores) -> str:
    """A mean, and the difference to `late` where there is one."""
    if not ours:
        return "-"
    return _mean(ours) + (f" ({_gain(ours, late)})" if late and ours != late else "")


def missing_section(panels: Panels, start: str, folder: Path) -> str:
    """Table and plot of one cohort; empty where it did not run."""
    if not any(panels.get(name) for name in MISSING[start]):
        return ""
    plot_missing(panels, start, folder / f"results-missing-{start}.svg")
    table = missing_table(panels, start)
    picture = f"![AUROC by share of modalities hidden](results-missing-{start}.svg)"
    return f"#### {PANELS[start].title}\n{table}\n\n{picture}"


PAGE = """## Do the ways of fusing differ?

By `make bench-methods` (resumable). AUROC on held-out patients, mean over sites, then over {seeds} seeds of training
and split (± sd over seeds); differences are paired by site and seed, ± half of their 95 % interval over pairs
(Student's t; pairs of one site are not independent, so the intervals are rather too narrow). Every method has its
defaults and the training of the cohort's study; nothing was tuned for any of them. eICU: a network a modality, not the
linear model of its study file.

{comparison}

### What the parts of OmniFuse add
The paper reports +.04 to +.06 for its parts. On the demo, without privacy, nothing hidden:

{ablation}

{verdicts}

### Modalities missing
{missing}

Where modalities are hidden more often for positives, what is missing is itself a sign of the outcome: fusions that read
the pattern use it, `late` does not. That is no merit of an imputation.

### Inside the imputer
{inside}
"""


def cohorts_inside(out: Path, smoke: bool) -> list[Cohort]:
    """Whose imputers are looked into; the real patients only where their data are."""
    from gapweave.sites.demo import write_demo

    folder, data = out / "demo" / "cohort", data_folder()
    study = folder / "study.yaml" if (folder / "study.yaml").exists() else write_demo(folder)
    demo = Cohort(name="demo", title="Demo", study=study, overrides={})
    eicu = Cohort(name="eicu", title="eICU stay", study=EICU, overrides=NETWORKS, data=data, seeds=SEEDS[:2])
    return [demo] if data is None or smoke else [demo, eicu]


def main() -> None:
    """Run the panels, two at a time, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-methods"))
    parser.add_argument("--panels", default=",".join(PANELS))
    parser.add_argument("--smoke", action="store_true", help="2 rounds, 1 seed, 2 methods; leaves docs alone")
    options = parser.parse_args()
    out, names = options.out.resolve(), options.panels.split(",")
    folder = out if options.smoke else DOCS
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        looks = [
            pool.submit(look_inside, cohort, out / "inside" / cohort.name, folder, smoke=options.smoke)
            for cohort in cohorts_inside(out / "inside", options.smoke)
        ]
        for line in pool.map(run_panel, names, [out] * len(names), [options.smoke] * len(names)):
            print(line, flush=True)
        inside = [look.result() for look in looks]
    files = {name: out / name / "results.json" for name in names}
    rows = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}
    panels: Panels = {name: scores_of(found) for name, found in rows.items()}
    demo = panels.get("demo", {})
    text = PAGE.format(
        seeds=len(SEEDS),
        comparison=comparison(panels),
        ablation=ablation(demo),
        verdicts=verdicts(demo),
        missing="\n\n".join(filter(None, (missing_section(panels, start, folder) for start in MISSING))),
        inside="\n\n".join(inside),
    )
    write_section("methods", text, folder / "results.md")
    if "demo" in rows:
        (folder / "methods.json").write_text(json.dumps(measured(rows["demo"]), indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
