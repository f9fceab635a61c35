"""RUN/report.html, built from small hand-written run directories."""

import json
import re
from pathlib import Path

import pytest

from gapweave.shared.config.study import load_study
from gapweave.shared.errors import UsageError
from gapweave.shared.privacy.events import KINDS
from gapweave.shared.report import events, scores
from gapweave.shared.report.figure import spread
from gapweave.shared.report.guarantee import KIND_WORDS, release_words
from gapweave.shared.report.run_report import write_report
from gapweave.shared.rundir import RunDirectory

STUDY = """
version: 1
name: trial
task: {kind: binary, label: died}
modalities:
  labs: {kind: table, columns: {sodium: {low: 100, high: 180}}}
  scan: {kind: image, size: 16}
training: {rounds: 3}
"""
MULTICLASS = STUDY.replace("{kind: binary, label: died}", "{kind: multiclass, label: stage, classes: [a, b, c]}")
PRIVACY = {
    "unit": "patient",
    "epsilon": 7.6543,
    "delta": 1e-5,
    "cap": 10.0,
    "releases": [
        {
            "kind": "noisy_count",
            "noise_multiplier": 2.5,
            "sample_rate": 1.0,
            "max_grad_norm": 1.0,
            "releases": 1,
            "steps": 1,
        },
        {
            "kind": "dp_sgd",
            "noise_multiplier": 1.234,
            "sample_rate": 0.125,
            "max_grad_norm": 1.0,
            "releases": 3,
            "steps": 15,
        },
    ],
}


def metrics(auroc):
    return {"auroc": auroc, "auprc": 0.4321, "brier": 0.1234, "ece": 0.0567}


def site(auroc=0.7111, local=0.6222, **changes):
    return {
        "status": "ok",
        "reason": "",
        "modalities": ["labs"],
        "patients": {"train": 137, "test": 41},
        "rounds": 3,
        "metrics": metrics(auroc),
        "fine_tuned": None,
        "local_only": metrics(local) if local else None,
        "privacy": PRIVACY,
    } | changes


def left_out(status, reason):
    nothing = dict.fromkeys(("metrics", "fine_tuned", "local_only", "privacy"))
    return site(status=status, reason=reason, patients={"train": None, "test": None}, rounds=0, **nothing)


def summary_of(sites, **changes):
    scored = {name: row["metrics"] for name, row in sites.items() if row["metrics"] and row["metrics"]["auroc"]}
    worst = min(scored, key=lambda name: scored[name]["auroc"], default=None)
    return {
        "study": "trial",
        "gapweave_version": "0.1.0",
        "engine": "inline",
        "run": "20260101-000000-aabbccdd",
        "seed": 0,
        "rounds": 3,
        "wall_s": 12.3,
        "bytes_up": 1_234_567,
        "bytes_down": 7_654_321,
        "guarantee": "patient-level (epsilon, delta) differential privacy",
        "metrics_are": "exact (simulation)",
        "sites": sites,
        "mean": metrics(0.7001),
        "worst": {"site": worst, **(scored[worst] if worst else {})},
        "pooled_baseline": None,
        "baselines": {},
    } | changes


def round_line(number, sites, **groups):
    names = [name for name, entry in sites.items() if entry["status"] == "ok"]
    head = {"rule": "auto", "holders": names, "norms": dict.fromkeys(names, 0.1 * number), "screened": {}}
    return {
        "round": number,
        "sites": sites,
        "groups": {"head/labs": head, **groups},
        "seconds": 1.0,
        "bytes_up": 1,
        "bytes_down": 1,
    }


def run_directory(tmp_path, summary, *, rounds=None, curve=None, study=STUDY):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "short.yaml").write_text(study)
    path = tmp_path / "run"
    directory = RunDirectory.create(path, load_study(tmp_path / "short.yaml"))
    directory.write_json("summary.json", summary)
    everyone = {name: {"status": "ok"} for name, row in summary["sites"].items() if row["status"] == "ok"}
    for line in [round_line(number, everyone) for number in (1, 2, 3)] if rounds is None else rounds:
        directory.write_round(line)
    if curve is not None:
        (path / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve))
    return directory


def page_of(tmp_path, summary, **parts):
    directory = run_directory(tmp_path, summary, **parts)
    write_report(directory)
    return directory.report.read_text()


def cells(page):
    """The main table: row name -> text of its cells."""
    table = page[page.index("<table") : page.index("</table>")]
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    plain = [
        [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]
        for row in rows
    ]
    return {row[0]: row[1:] for row in plain}


def two_sites():
    return {"north": site(0.7111, 0.6222), "south": site(0.6891, 0.7333, modalities=["labs", "scan"])}


BASELINES = {
    "local": {"mean": metrics(0.67775), "sites": {"north": metrics(0.6222), "south": metrics(0.7333)}},
    "pooled": {"mean": metrics(0.8181), "sites": {"north": metrics(0.8282), "south": metrics(0.8080)}},
    "lr_local": {"mean": metrics(0.7554), "sites": {"north": metrics(0.7656), "south": metrics(0.7454)}},
}
CURVE = [
    {"round": number, "mean": metrics(0.6 + number / 100), "sites": {"north": metrics(0.61), "south": metrics(0.62)}}
    for number in (1, 2, 3)
]


def test_the_main_table_holds_the_numbers_of_the_summary(tmp_path):
    rows = cells(page_of(tmp_path, summary_of(two_sites(), baselines=BASELINES), curve=CURVE))
    assert rows["site"][:3] == ["labs", "scan", "patients train&nbsp;/&nbsp;test"]
    assert rows["site"][3:8] == [
        "local-only",
        "pooled",
        "logistic regression, local",
        "federated",
        "federated minus local-only",
    ]
    assert rows["north"][2:] == ["137 / 41", "0.622", "0.828", "0.766", "0.711", "+0.089", "7.66 / 10", "ok"]
    assert rows["south"][2:] == ["137 / 41", "0.733", "0.808", "0.745", "0.689", "−0.044", "7.66 / 10", "ok"]  # noqa: RUF001
    assert rows["mean"][3:7] == ["0.678", "0.818", "0.755", "0.700"]


def test_modalities_are_told_without_colour(tmp_path):
    rows = cells(page_of(tmp_path, summary_of(two_sites())))
    assert [cell.endswith("present") for cell in rows["north"][:2]] == [True, False]
    assert rows["north"][1].endswith("absent")


def test_what_was_run_is_said(tmp_path):
    page = page_of(tmp_path, summary_of(two_sites()))
    for text in ("exact (simulation)", "1.2 MB", "7.7 MB", "12.3 s", "3 of 3", "20260101-000000-aabbccdd", "inline"):
        assert text in page, text
    assert "epsilon at most 7.66 (delta 1e-5)" in page


def test_a_loss_against_alone_and_against_logistic_regression_is_said(tmp_path):
    page = page_of(tmp_path, summary_of(two_sites(), baselines=BASELINES))
    assert "Joining does not pay at 1 of 2 sites in this run." in page
    assert "beats the federated model at 2 of 2 sites" in page
    assert "Better off than alone: <strong>1 of 2</strong>" in page
    assert "Worst site: <strong>south</strong>" in page


def test_the_finding_counts_only_sites_where_both_are_defined():
    sites = {
        "both": site(0.8, 0.7),
        "not alone": site(0.6, None),
        "undefined": site(None, 0.9),
        "left out": left_out("failed", "x"),
    }
    found = scores.models(summary_of(sites))
    assert [text for _, text, _ in scores.verdicts(found)] == ["Joining pays at 1 of 1 sites in this run."]


def test_equal_scores_are_neither_a_gain_nor_a_loss():
    found = scores.models(summary_of({"a": site(0.7, 0.7), "b": site(0.8, 0.7)}))
    assert scores.verdicts(found)[0][1] == "Joining pays at 1 of 2 sites in this run."
    assert "even at the others" in scores.verdicts(found)[0][2]


def test_fine_tuned_has_its_column_and_its_finding(tmp_path):
    sites = {"a": site(0.6, 0.7, fine_tuned=metrics(0.8765)), "b": site(0.6, 0.7, fine_tuned=metrics(0.8543))}
    page = page_of(tmp_path, summary_of(sites))
    rows = cells(page)
    assert "0.876" in rows["a"]
    assert "0.865" in rows["mean"]
    assert "Joining and then fine-tuning pays at 2 of 2 sites" in page


def test_without_baselines_there_is_nothing_to_compare_with(tmp_path):
    page = page_of(tmp_path, summary_of({"a": site(0.6, None), "b": site(0.7, None)}))
    assert "federated minus" not in page
    assert "Joining" not in page


def test_refused_and_failed_sites_stand_in_the_table_with_their_reason(tmp_path):
    sites = {
        "good": site(),
        "poor": left_out("refused", "the site's cap leaves no room for this study"),
        "torn": left_out("failed", "column missing"),
    }
    rows = cells(page_of(tmp_path, summary_of(sites)))
    assert (rows["poor"][-1], rows["torn"][-1]) == ("refused", "failed")
    assert "refused: the site&#39;s cap leaves no room for this study" in rows
    assert "failed: column missing" in rows
    assert rows["torn"][2] == rows["torn"][3] == "–"  # noqa: RUF001


def test_a_deployment_without_curve_and_without_metrics_has_a_report(tmp_path):
    """A deployment has no exact metrics, no baselines and no curve; numbers of patients may be unknown."""
    sites = {
        "a": site(metrics=None, local_only=None, patients={"train": 120, "test": None}),
        "b": site(metrics=None, local_only=None, patients=None),
    }
    page = page_of(
        tmp_path,
        {
            key: value
            for key, value in summary_of(
                sites, engine="deployed", mean=None, metrics_are=None, worst={"site": None}
            ).items()
            if key not in ("baselines", "pooled_baseline", "run")
        },
    )
    assert "exact (simulation)" not in page
    assert "Scores are <strong>not available</strong>" in page
    assert cells(page)["a"][2] == "120 / –"  # noqa: RUF001
    assert "AUROC over rounds" not in page


def test_noised_metrics_are_shown_with_their_interval(tmp_path):
    noised = {"auroc": 0.71, "auroc_interval": [0.65, 0.77], "auprc": None, "brier": None, "ece": None}
    page = page_of(
        tmp_path, summary_of({"a": site(metrics=noised, local_only=None)}, metrics_are="noised count tables")
    )
    assert cells(page)["a"][3] == "0.7100.65 to 0.77"
    assert "carry no noise" not in page


def scores_of(auroc, reach=0.05):
    found = {}
    for name in ("auroc", "auprc", "brier", "ece"):
        found |= {name: auroc, f"{name}_interval": [auroc - reach, auroc + reach]}
    return found


def test_a_simulation_shows_what_a_deployment_would_have_shown(tmp_path):
    given = {"metrics": scores_of(0.69), "reason": "", "table": [[[1]]], "noise_scale": 2.0}
    none = {"metrics": None, "reason": "too few patients for this privacy level", "table": None, "noise_scale": None}
    sites = {"a": site(released=given), "b": site(released=none), "c": site(released=None)}
    page = page_of(tmp_path, summary_of(sites, released={"pooled": scores_of(0.705)}))
    _, _, part = page.partition("What left the sites about these scores")
    part, _, _ = part.partition("</details>")
    assert "as a deployment would have shown it" in part
    assert "0.64 to 0.74" in part
    assert "nothing: too few patients for this privacy level" in part
    assert ">c<" not in part
    assert "0.705" in part
    assert "What left the sites about these scores" not in page_of(tmp_path / "old", summary_of({"a": site()}))


def test_a_deployments_page_speaks_of_its_own_run_and_not_of_the_ledger(tmp_path):
    given = {"metrics": scores_of(0.69), "reason": "", "table": [[[1]]], "noise_scale": 2.0}
    page = page_of(
        tmp_path,
        summary_of(
            {"a": site(metrics=scores_of(0.69), local_only=None, released=given)},
            engine="deployed",
            metrics_are="from noised count tables",
            pooled=scores_of(0.705),
        ),
    )
    assert "What this run charged at each site" in page
    assert "over what this run released; a site&#39;s own ledger says" in page
    assert "one index record a patient" in page
    assert "over everything that the site&#39;s ledger records" not in page


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("dp_sgd", "training with noise, once"),
        ("noisy_count", "number of patients with noise, once"),
        ("count_table", "tables of counts with noise, once"),
        ("noisy_statistic", "means and spreads with noise, once"),
        ("noisy_max", "choice of the largest score with noise, once"),
        ("unnoised", "release WITHOUT NOISE, once"),
        ("of_a_later_version", "release of the kind of_a_later_version, once"),
    ],
)
def test_every_kind_of_release_has_true_words(kind, words):
    assert release_words({"kind": kind, "releases": 1}) == words
    assert set(KINDS) == set(KIND_WORDS)


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x>', "a & b", "$x_1$ {{ 7 * 7 }}", "日本"])
def test_names_cannot_break_the_page(tmp_path, evil):
    sites = {evil: site(reason=evil, status="failed"), "b": site()}
    lines = [round_line(1, {evil: {"status": "failed", "reason": evil}, "b": {"status": "ok"}})]
    page = page_of(
        tmp_path,
        summary_of(sites, study=evil, run=evil),
        rounds=lines,
        curve=[{"round": 1, "mean": metrics(0.5), "sites": {evil: metrics(0.5)}}],
    )
    assert "<script" not in page
    assert "<img" not in page
    assert "49" not in re.sub(r"<svg.*?</svg>|<code>.*?</code>", "", page, flags=re.DOTALL)
    assert page.count("<h1>") == 1


def test_nothing_is_fetched_from_elsewhere(tmp_path):
    page = page_of(tmp_path, summary_of(two_sites(), baselines=BASELINES), curve=CURVE)
    assert page.count("<svg ") == 4
    assert not re.findall(r"""(?:src|href|action|data)\s*=\s*["'](?!#)""", page)
    assert not re.findall(r"@import|url\((?!#)|<(?:script|link|iframe|object|embed|img)\b", page)


def test_ids_are_unique_and_every_plot_has_words(tmp_path):
    page = page_of(tmp_path, summary_of(two_sites(), baselines=BASELINES), curve=CURVE)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {name for name in re.findall(r'(?:href="|url\()#([^")]+)', page)} <= set(ids)
    assert page.count("<svg role=") == page.count('aria-label="') == page.count("<figcaption>")


def test_header_cells_say_what_they_head(tmp_path):
    page = page_of(tmp_path, summary_of(two_sites(), baselines=BASELINES))
    assert all("scope=" in cell for cell in re.findall(r"<th\b[^>]*>", page))
    assert page.count("<table") == page.count("<caption>")


def test_equal_files_give_an_equal_page(tmp_path):
    summary = summary_of(two_sites(), baselines=BASELINES)
    for name in "xy":
        (tmp_path / name).mkdir()
    assert page_of(tmp_path / "x", summary, curve=CURVE) == page_of(tmp_path / "y", summary, curve=CURVE)


def test_a_curve_with_a_torn_line_and_a_round_seen_twice(tmp_path):
    directory = run_directory(tmp_path, summary_of(two_sites()), curve=[*CURVE, CURVE[-1]])
    with (directory.path / "curve.jsonl").open("a") as file:
        file.write('{"round": 4, "me')
    write_report(directory)
    assert "AUROC over rounds" in directory.report.read_text()


def test_undefined_scores_leave_gaps_not_zeros(tmp_path):
    undefined = dict.fromkeys(("auroc", "auprc", "brier", "ece"))
    page = page_of(
        tmp_path,
        summary_of({"a": site(metrics=undefined, local=None)}, mean=undefined, worst={"site": None}),
        curve=[{"round": 1, "mean": undefined, "sites": {"a": undefined}}],
    )
    assert cells(page)["a"][3] == "–"  # noqa: RUF001
    assert "AUROC over rounds" not in page


def test_multiclass_says_which_mean_its_auroc_is(tmp_path):
    page = page_of(tmp_path, summary_of(two_sites()), study=MULTICLASS)
    assert "mean of one class against the rest" in page


def test_classes_and_subgroups_have_rows_of_their_own(tmp_path):
    positives = {"a": 7, "b": 11, "c": 23}
    outputs = {code: {"records": 41, "positives": n, **metrics(0.6 + n / 100)} for code, n in positives.items()}
    subgroups = {"sex": {"F": {"records": 19, **metrics(0.71)}, "M": {"records": 22, **metrics(0.69)}}}
    sites = {"a": site(outputs=outputs, subgroups=subgroups), "b": left_out("failed", "no data")}
    page = page_of(tmp_path, summary_of(sites), study=MULTICLASS)
    part = page[page.index("<summary>By class and subgroup") :]
    rows = [
        re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", part[: part.index("</details>")])
    ]
    assert [row[1:5] for row in rows[1:4]] == [
        ["a", "41", "7", "0.670"],
        ["b", "41", "11", "0.710"],
        ["c", "41", "23", "0.830"],
    ]
    assert rows[4][:6] == ["a", "sex:", "F", "19", "–", "0.710"]  # noqa: RUF001
    assert "By class" not in page_of(tmp_path / "one", summary_of(two_sites())), "binary, no subgroup: nothing to add"


def test_missing_patterns_have_rows_of_their_own(tmp_path):
    patterns = {"labs+note": {"records": 61, **metrics(0.75)}, "others": {"records": 7, **metrics(0.5)}}
    page = page_of(tmp_path, summary_of({"a": site(subgroups={}, patterns=patterns)}))
    part = page[page.index("<summary>By missing pattern") :]
    assert "records with labs+note" in part
    assert "records with others" in part


def test_no_guarantee_is_said_at_the_top(tmp_path):
    unnoised = {
        **PRIVACY,
        "epsilon": None,
        "releases": [{**PRIVACY["releases"][1], "kind": "unnoised", "noise_multiplier": 0.0}],
    }
    page = page_of(tmp_path, summary_of({"a": site(privacy=unnoised)}, guarantee="none"))
    assert "None: nothing in this run was noised" in page
    assert cells(page)["a"][-2] == "no guarantee / 10"
    assert "What it means" not in page


def test_one_unnoised_ledger_ends_the_promise_for_all(tmp_path):
    page = page_of(tmp_path, summary_of({"a": site(privacy={**PRIVACY, "epsilon": None}), "b": site()}))
    assert "None at every site" in page


def test_the_privacy_table_is_enough_to_recompute(tmp_path):
    page = page_of(tmp_path, summary_of({"a": site()}))
    for text in (
        "training with noise, 3 times",
        "1.234",
        "0.125",
        '<td class="num">15</td>',
        "number of patients with noise, once",
    ):
        assert text in page, text
    assert "It adds up over all rounds" in page
    assert "(2,110 here)" in page


def test_participation_is_listed_by_runs_of_rounds(tmp_path):
    late, ok = {"status": "late", "reason": "no answer before the deadline"}, {"status": "ok"}
    lines = [round_line(1, {"a": ok, "b": ok}), *[round_line(n, {"a": ok, "b": late}) for n in (2, 3)]]
    assert [(span.site, span.status, span.first, span.last) for span in events.spans(lines)] == [
        ("a", "ok", 1, 3),
        ("b", "ok", 1, 1),
        ("b", "late", 2, 3),
    ]
    page = page_of(tmp_path, summary_of(two_sites()), rounds=lines)
    assert "<td>2 to 3</td><td>late</td><td>no answer before the deadline</td>" in page


def test_a_round_in_which_a_site_was_not_asked_breaks_its_strip():
    ok = {"status": "ok"}
    lines = [round_line(1, {"a": ok}), round_line(2, {}), round_line(3, {"a": ok})]
    assert [(span.first, span.last) for span in events.spans(lines)] == [(1, 1), (3, 3)]


def test_screened_updates_and_groups_left_alone_are_named(tmp_path):
    ok = {"status": "ok"}
    fusion = {
        "rule": "median",
        "holders": ["a"],
        "norms": {"a": 1.0},
        "screened": {"b": "w is not finite"},
        "left_alone": "1 holders",
    }
    lines = [round_line(n, {"a": ok, "b": ok}, fusion=fusion) for n in (1, 2)]
    page = page_of(tmp_path, summary_of(two_sites()), rounds=lines)
    assert "b screened: w is not finite (2 rounds)<br>left alone: 1 holders (2 rounds)" in page
    assert "<td>screened</td><td>fusion: w is not finite</td>" in page
    assert '<th scope="row">encoder/labs</th><td>stays at the site</td>' in page


def test_a_groups_history_says_who_joined_left_and_was_away(tmp_path):
    def entry(*holders):
        return {"rule": "mean", "holders": list(holders), "norms": {}, "screened": {}}

    ok = {"status": "ok"}
    held = [["a", "b", "c"], ["a", "b"], ["a", "b", "d"], ["a", "c", "d"], ["a", "d"]]
    lines = [round_line(n, {"a": ok}, fusion=entry(*sites)) for n, sites in enumerate(held, 1)]
    page = page_of(tmp_path, summary_of(two_sites()), rounds=lines)
    assert "a, b (rounds 1 to 3), c (2 of 5 rounds), d (rounds 3 to 5)" in page


def test_a_site_that_is_screened_in_many_groups_is_told_once_with_the_reason(tmp_path):
    ok, reason = {"status": "ok"}, "it is shorter than the noise that its plan says"
    bad = {"rule": "median", "holders": ["a"], "norms": {}, "screened": {"b": reason}}
    lines = [{**round_line(n, {"a": ok, "b": ok}), "groups": {"fusion": bad, "head/labs": bad}} for n in (1, 2)]
    (span,) = [span for span in events.spans(lines) if span.status != "ok"]
    assert (span.reason, span.first, span.last) == (f"2 groups: {reason}", 1, 2)
    assert f"b screened: {reason} (2 rounds)" in page_of(tmp_path, summary_of(two_sites()), rounds=lines)


def test_a_study_that_was_edited_after_the_run_is_pointed_out(tmp_path):
    assert "was changed after the run" in page_of(tmp_path, summary_of(two_sites(), study_sha256="0" * 64))


def test_an_unfinished_run_is_refused_with_a_remedy(tmp_path):
    directory = run_directory(tmp_path, summary_of(two_sites()))
    Path(directory.path / "summary.json").unlink()
    with pytest.raises(UsageError, match="gapweave resume"):
        write_report(directory)


def test_a_run_without_any_finished_round(tmp_path):
    assert "No round was finished" in page_of(
        tmp_path, summary_of({"a": left_out("failed", "x")}, mean={}, rounds=0), rounds=[]
    )


def test_many_sites_and_many_rounds_stay_a_small_page(tmp_path):
    """A cell a site and round would be 20,000 shapes; runs of equal rounds are one."""
    sites = {f"site_{number:02}": site() for number in range(20)}
    lines = [round_line(number, {name: {"status": "ok"} for name in sites}) for number in range(1, 1001)]
    assert len(page_of(tmp_path, summary_of(sites, rounds=1000), rounds=lines)) < 1_500_000


def test_labels_are_moved_apart_and_keep_their_order():
    assert spread([0.5, 0.1, 0.5], 0.2) == pytest.approx([0.4, 0.1, 0.6])
    assert spread([], 1.0) == []
