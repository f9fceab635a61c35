"""What an imputer puts into a hidden modality's slot, beside what its encoder would have said: Figs 7 and 8's form.

Models are trained without privacy for several numbers of rounds; each held-out record that has two modalities or
more has one hidden at a time. Used by methods.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ROUNDS = (1, 5, 20, 60)
SEEDS = (0, 1, 2)
TENFOLD = "dwfuse-x10"
METHODS: dict[str, dict[str, Any]] = {
    "dwfuse": {"method": "dwfuse"},
    "omnifuse": {"method": "omnifuse"},
    TENFOLD: {"method": "dwfuse", "model.imputer_settings.weight": 10},
}
"""What is trained, and how the study says so."""
WEIGHED = "dwfuse"
"""Method whose embeddings and weights are drawn."""
PROJECTED = 4
"""Modalities in a projection: those with the most records, for more cannot be told apart."""
COMMONEST = 12
"""Patterns of modalities in the plot of weights."""


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Whose imputers are looked into.

    Attributes:
        name: in the plots' names.
        title: for people.
        study: its file.
        overrides: of the study, beside the method, rounds and seed.
        data: folder of data sets, where the site files need one.
        seeds: of training and split.
    """

    name: str
    title: str
    study: Path
    overrides: dict[str, Any]
    data: Path | None = None
    seeds: tuple[int, ...] = SEEDS


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Slots of one modality at one site.

    Attributes:
        true: [N, d], what the encoder says.
        imputed: [N, d], what the imputer says without having seen it.
        linear: [N, d], what ridge regression says that learnt from the site's own training records.
    """

    true: Array
    imputed: Array
    linear: Array

    def r2(self) -> float:
        """Explained variance over all d numbers; 0 for a constant at the mean, below it worse."""
        return _explained(self.imputed, self.true)

    def linear_r2(self) -> float:
        """The same of ridge regression: how much there is to say at all."""
        return _explained(self.linear, self.true)

    def similarity(self) -> float:
        """Mean cosine of what is left of each when the mean true embedding is taken away."""
        true, imputed = self.true - self.true.mean(0), self.imputed - self.true.mean(0)
        norms = np.linalg.norm(true, axis=1) * np.linalg.norm(imputed, axis=1)
        return float(((true * imputed).sum(1) / np.maximum(norms, 1e-12)).mean())


def _explained(said: Array, true: Array) -> float:
    return 1 - float(((true - said) ** 2).sum() / ((true - true.mean(0)) ** 2).sum())


def hidden_slots(model: Any, training: Any, test: Any) -> dict[str, Slots]:
    """Each held modality hidden from the test records that have another one too."""
    import torch
    from sklearn.linear_model import RidgeCV

    found = {}
    with torch.no_grad():
        for at, name in enumerate(model.order):
            learn, judge = (batch.rows(_both(batch, at)) for batch in (training, test))
            if name not in model.held or min(len(learn), len(judge)) < 2:
                continue
            (seen, known, _), (asked, true, imputed) = (_hidden(model, part, at) for part in (learn, judge))
            linear = RidgeCV(alphas=(1, 10, 100, 1000)).fit(seen, known).predict(asked)
            found[name] = Slots(true=true, imputed=imputed, linear=linear)
    return found


def _both(batch: Any, at: int) -> Any:
    """Rows with this modality and another one."""
    return (batch.present[:, at] & (batch.present.sum(1) > 1)).nonzero()[:, 0]


def _hidden(model: Any, part: Any, at: int) -> tuple[Array, Array, Array]:
    """What is seen of the others ([N, (M - 1) d + M - 1], zero where absent), and true and imputed slots [N, d]."""
    import torch

    used = part.present.clone()
    used[:, at] = False
    outputs = model(part.inputs, part.present, used)
    others = [other for other in range(used.shape[1]) if other != at]
    slots = torch.where(used.unsqueeze(-1), outputs.embeddings, 0.0)[:, others].flatten(1)
    seen = torch.cat([slots, used[:, others].to(slots.dtype)], 1)
    true, imputed = outputs.embeddings[:, at], outputs.imputed[:, at]
    return seen.double().numpy(), true.double().numpy(), imputed.double().numpy()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A trained federation.

    Attributes:
        auroc: mean over sites.
        slots: (site, modality) -> slots.
        weights: pattern of modalities -> [N, M] shares, NaN where a modality is absent.
        order: names of the M modalities.
    """

    auroc: float
    slots: dict[tuple[str, str], Slots]
    weights: dict[tuple[str, ...], Array]
    order: tuple[str, ...]


def train(cohort: Cohort, out: Path, method: str, rounds: int, seed: int) -> Seen:
    """Simulate, or read what was simulated, and look at every site's model."""
    from gapweave.client.data import load_cohort
    from gapweave.client.predict import load_site_model, predict
    from gapweave.shared.config import load_site
    from gapweave.shared.rundir import RunDirectory
    from gapweave.sites.simulate import commands

    overrides = {
        **cohort.overrides,
        **METHODS[method],
        **{"training.rounds": rounds, "seed": seed, "evaluation.split_seed": seed},
        "privacy.enabled": False,
    }
    if not (out / "summary.json").exists():
        from gapweave.shared.config.overrides import expand

        paths = {path: value for key, given in overrides.items() for path, value in expand(key, given).items()}
        places = commands.Places(sites=None, data=cohort.data, out=out, state=None)
        commands.start(cohort.study, paths, places, baselines=(), continue_without=False)
    directory = RunDirectory.open(out)
    trained, summary = directory.study(), directory.read_json("summary.json")
    slots: dict[tuple[str, str], Slots] = {}
    weights: dict[tuple[str, ...], list[Array]] = {}
    for name in sorted(summary["sites"]):
        file = cohort.study.parent / "sites" / f"{name}.yaml"
        records = load_cohort(trained, load_site(file), site_file=file, data_dir=cohort.data)
        training, test = records.training(), records.testing()
        (kept,) = (directory.sites / name / "runs").glob("*/model.safetensors")
        model = load_site_model(kept).model
        slots |= {(name, modality): found for modality, found in hidden_slots(model, training, test).items()}
        shares = predict(model, test, trained, training.prevalence()).weights
        if shares is not None:
            present = test.present.numpy()
            for pattern in np.unique(present, axis=0):
                held = tuple(modality for modality, has in zip(trained.order, pattern, strict=True) if has)
                rows = shares[(present == pattern).all(1)]
                weights.setdefault(held, []).append(np.where(pattern, rows, np.nan))
    return Seen(
        auroc=fmean(row["metrics"]["auroc"] for row in summary["sites"].values()),
        slots=slots,
        weights={held: np.concatenate(rows) for held, rows in weights.items()},
        order=tuple(trained.order),
    )


def look_inside(cohort: Cohort, out: Path, folder: Path, *, smoke: bool) -> str:
    """Train, draw the plots into the folder, and say what they show.

    Args:
        cohort: whose.
        out: where runs are kept.
        folder: for the plots.
        smoke: two numbers of rounds, one seed, one method.
    """
    rounds, seeds, methods = (ROUNDS[:2], SEEDS[:1], [WEIGHED]) if smoke else (ROUNDS, cohort.seeds, [*METHODS])
    seen = {
        (method, number, seed): train(cohort, out / f"{method}-{number}-{seed}", method, number, seed)
        for method in methods
        for number in rounds
        for seed in seeds
    }
    _draw_similarity(seen, folder / f"results-similarity-{cohort.name}.svg")
    last = seen[WEIGHED, rounds[-1], seeds[0]]
    _draw_projection(last, folder / f"results-projection-{cohort.name}.svg")
    _draw_weights(last, folder / f"results-weights-{cohort.name}.svg")
    return f"#### {cohort.title}\n{_table(seen, rounds[-1])}\n\n{_plots(cohort.name)}"


def _plots(name: str) -> str:
    """The plots, as a page shows them."""
    titles = {
        "similarity": "Similarity of imputed and true embeddings over training",
        "projection": "True and imputed embeddings in two dimensions",
        "weights": "Shares of the modalities in the decision",
    }
    return "\n\n".join(f"![{title}](results-{plot}-{name}.svg)" for plot, title in titles.items())


Found = dict[tuple[str, int, int], Seen]


def _table(seen: Found, rounds: int) -> str:
    """R2 and similarity by modality, at the end."""
    names = sorted({modality for one in seen.values() for _, modality in one.slots})
    lines = [
        "| method | hidden modality | R2 | R2 of ridge regression | similarity |",
        "| --- | --- | --: | --: | --: |",
    ]
    for method in dict.fromkeys(method for method, _, _ in seen):
        ends = [one for (at, number, _), one in seen.items() if at == method and number == rounds]
        for name in names:
            by_seed = [[slots for (_, at), slots in one.slots.items() if at == name] for one in ends]
            measures = (Slots.r2, Slots.linear_r2, Slots.similarity)
            cells = [_spread([fmean(measure(slots) for slots in one) for one in by_seed]) for measure in measures]
            lines.append(f"| `{method}` | {name} | {' | '.join(cells)} |")
    note = (
        f"After {rounds} rounds, held-out records, mean over sites (± sd over seeds): R2 of the imputed embedding, 0\n"
        "for the site's mean embedding, below 0 worse than that; the same of a ridge regression that the site fits to\n"
        "the other modalities' embeddings, which says how much they tell at all; the cosine with the true one, the\n"
        f"mean taken away. `{TENFOLD}`: the imputation's loss counts ten times (`model.imputer_settings.weight: 10`)."
    )
    return note + "\n\n" + "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{fmean(values):+.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _draw_similarity(seen: Found, file: Path) -> None:
    """Fig 7: similarity of imputed and true embeddings over training, beside AUROC."""
    from gapweave.sites.simulate.compare_plots import COLOURS, figure_axes

    with figure_axes(file, rows=13) as axes:
        for at, method in enumerate(dict.fromkeys(method for method, _, _ in seen)):
            numbers = sorted({number for name, number, _ in seen if name == method})
            for what, style in (("similarity", "-"), ("AUROC", "--")):
                values = [
                    [
                        one.auroc if what == "AUROC" else fmean(slots.similarity() for slots in one.slots.values())
                        for (name, number, _), one in seen.items()
                        if (name, number) == (method, rounds)
                    ]
                    for rounds in numbers
                ]
                sd = [stdev(of) if len(of) > 1 else 0.0 for of in values]
                axes.errorbar(
                    numbers, [fmean(of) for of in values], yerr=sd, fmt=style, marker="o", capsize=3,
                    color=COLOURS[5 * at], label=f"{method}: {what}",
                )  # fmt: skip
        axes.set_xscale("log")
        ticks = sorted({number for _, number, _ in seen})
        axes.set_xticks(ticks, [f"{number}" for number in ticks])
        axes.minorticks_off()
        axes.set_xlabel("rounds of training")
        axes.set_ylabel("cosine of imputed and true embedding; AUROC")
        axes.legend(fontsize="small")


def _colours() -> tuple[str, ...]:
    """Of modalities: those that differ most first."""
    from gapweave.sites.simulate.compare_plots import COLOURS

    return COLOURS[::2] + COLOURS[1::2]


def _draw_projection(one: Seen, file: Path) -> None:
    """Fig 8: true and imputed embeddings on the first two principal components of the true ones."""
    from gapweave.sites.simulate.compare_plots import figure_axes

    colours = _colours()
    site = max({at for at, _ in one.slots}, key=lambda at: sum(name == at for name, _ in one.slots))
    held = {name: found for (at, name), found in one.slots.items() if at == site}
    commonest = sorted(held, key=lambda name: -len(held[name].true))[:PROJECTED]
    slots = {name: found for name, found in held.items() if name in commonest}
    true = np.concatenate([found.true for found in slots.values()])
    _, _, axes_of = np.linalg.svd(true - true.mean(0), full_matrices=False)
    with figure_axes(file, rows=16) as axes:
        for at, (name, found) in enumerate(slots.items()):
            for values, marker, word in ((found.true, "o", "true"), (found.imputed, "x", "imputed")):
                x, y = ((values - true.mean(0)) @ axes_of[:2].T).T
                axes.scatter(x, y, s=14, marker=marker, color=colours[at], alpha=0.6, label=f"{name}, {word}")
        axes.set_xlabel(f"first principal component of the true embeddings (held-out records of {site})")
        axes.set_ylabel("second")
        axes.legend(fontsize="small")


def _pattern(held: tuple[str, ...], one: Seen) -> str:
    """A pattern by what it has, or by what it lacks where that is shorter, and its number of records."""
    lacks = [name for name in one.order if name not in held]
    if len(lacks) < len(held) and len(one.order) > PROJECTED:
        words = f"all but {', '.join(lacks)}" if lacks else "all"
    else:
        words = ", ".join(held)
    return f"{words} ({len(one.weights[held])})"


def _draw_weights(one: Seen, file: Path) -> None:
    """Mean share of each modality, by the modalities that a record has."""
    from gapweave.sites.simulate.compare_plots import figure_axes

    colours = _colours()
    commonest = sorted(one.weights, key=lambda held: (-len(one.weights[held]), held))[:COMMONEST]
    patterns = sorted(commonest, key=lambda held: (-len(held), held))
    with figure_axes(file, rows=len(patterns) + 2) as axes:
        for row, held in enumerate(patterns):
            start = 0.0
            for at, name in enumerate(one.order):
                if name in held:
                    share = float(one.weights[held][:, at].mean())
                    axes.barh(row, share, left=start, color=colours[at], label=name)
                    start += share
        axes.set_yticks(range(len(patterns)), [_pattern(held, one) for held in patterns])
        axes.invert_yaxis()
        axes.set_xlabel(f"mean share in the decision ({WEIGHED}; modalities that a record has, number of records)")
        handles, labels = axes.get_legend_handles_labels()
        first = {label: handle for handle, label in reversed(list(zip(handles, labels, strict=True)))}
        names = [name for name in one.order if name in first]
        axes.legend(
            [first[name] for name in names],
            names,
            ncols=min(5, len(names)),
            loc="lower center",
            bbox_to_anchor=(0.5, 1),
        )
