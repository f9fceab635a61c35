"""What the server makes of the sites' tables and numbers of patients: who is asked, what is said, what is weighed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cohorts import Hospital
from hospitals import Wire, build, plan_of, publish
from test_evaluation import (
    RUN,
    study_of,
)

from gapweave.client.app import FIXED_TEXTS
from gapweave.client.predict import load_site_model, predict
from gapweave.server.aggregation import GroupAggregation, initial_groups
from gapweave.server.app import run_study
from gapweave.server.evaluation import Released, ask_tables, mean_metrics, pooled_metrics, worst_site
from gapweave.server.peers import Peer
from gapweave.shared import wire
from gapweave.shared.config.sharing import Aggregation
from gapweave.shared.config.study import Study
from gapweave.shared.errors import RefusedError
from gapweave.shared.metrics import exact_metrics
from gapweave.shared.privacy.ledger import read_ledger
from gapweave.shared.privacy.once import NOT_ALLOWED, TOO_FEW
from gapweave.shared.rundir import RunDirectory
from gapweave.shared.tables import BINS, ScoreTable
from gapweave.sites.simulate.run import Setup, simulate

pytestmark = pytest.mark.usefixtures("fresh_sites")


SPREAD = {"rounds": 8, "local_steps": 1, "batch": 10_000, "lr": 2.0}
"""Training after which scores are in many bins."""


def hospital_of(folder: Path, name: str, patients: int) -> Hospital:
    """A hospital whose labels one laboratory value tells with an AUROC of about 0.9."""
    return build(folder / name, name, ["labs"], patients)


def deployed(folder: Path, of: Study, patients: int = 1400, **policy: Any) -> tuple[Wire, dict[str, Any]]:
    hospitals = []
    for name in ("east", "north"):
        hospital = hospital_of(folder, name, patients)
        hospital.update("policy", studies=[of.sha256], **{"epsilon": 30.0, **policy})
        hospitals.append(hospital)
    grid = Wire(hospitals, simulation=False)
    run_study(grid, of, RunDirectory.create(folder / "run", of), RUN)
    return grid, json.loads((folder / "run" / "summary.json").read_text())


def test_a_deployment_writes_metrics_from_tables_with_intervals_and_nothing_else(tmp_path: Path) -> None:
    grid, summary = deployed(tmp_path, study_of(training=SPREAD))
    assert [kind for kind, *_ in grid.log][-4:] == ["query.evaluate"] * 2 + ["train.finish"] * 2
    assert summary["metrics_are"] == "from noised count tables"
    assert summary["engine"] == "deployed"
    assert summary["guarantee"].startswith("patient-level")
    for row in [*summary["sites"].values(), {"metrics": summary["mean"]}, {"metrics": summary["pooled"]}]:
        for name in ("auroc", "auprc", "brier", "ece"):
            low, high = row["metrics"][f"{name}_interval"]
            assert 0 <= low <= row["metrics"][name] <= high <= 1
    assert summary["worst"]["auroc"] == min(row["metrics"]["auroc"] for row in summary["sites"].values())
    for row in summary["sites"].values():
        assert row["local_only"] is row["fine_tuned"] is None
        assert abs(row["patients"]["train"] - 700) < 80
        assert abs(row["patients"]["test"] - 700) < 80
        assert row["privacy"]["epsilon"] <= 8
        assert [line["kind"] for line in row["privacy"]["releases"]] == ["noisy_count", "dp_sgd", "count_table"]
        assert "records" not in row
    assert "from noised count tables" in (tmp_path / "run" / "report.html").read_text()


def test_a_released_table_gives_about_the_exact_metrics(tmp_path: Path) -> None:
    """Twice the interval's reach: six true 95 % intervals all hold but for 1 run in 2000."""
    of = study_of(training=SPREAD)
    _, summary = deployed(tmp_path, of)
    for name in ("east", "north"):
        kept = load_site_model(tmp_path / name / "state" / "runs" / RUN / "model.safetensors")
        test = hospital_of(tmp_path / "again", name, 1400).load(of).testing()
        exact = exact_metrics(
            predict(kept.model, test, of, [0.5]).probabilities,
            test.target.double().numpy(),
            test.label_mask.numpy(),
            "binary",
        )
        found = summary["sites"][name]["metrics"]
        for metric in ("auroc", "auprc", "brier"):
            low, high = found[f"{metric}_interval"]
            assert exact[metric] == pytest.approx(found[metric], abs=high - low)
            assert high - low < 0.12


def test_sites_with_too_few_patients_are_not_asked_and_the_summary_says_why(tmp_path: Path) -> None:
    grid, summary = deployed(tmp_path, study_of(evaluation={"test_fraction": 0.5, "epsilon": 0.5}), patients=60)
    assert "query.evaluate" not in {kind for kind, *_ in grid.log}
    assert summary["mean"] is summary["pooled"] is None
    assert summary["worst"] == {"site": None}
    for row in summary["sites"].values():
        assert row["metrics"] is None
        assert row["released"] == {"metrics": None, "reason": TOO_FEW, "table": None, "noise_scale": None}
        assert row["patients"]["test"] is None


class _Nobody:
    """A watcher who does not watch."""

    def prepared(self, sites: int, rounds: int, done: int) -> None: ...

    def replied(self, number: int, site: str) -> None: ...

    def round_done(self, number: int, auroc: float | None) -> None: ...

    def baseline(self, name: str) -> None: ...


def test_a_simulation_shows_beside_its_exact_metrics_what_would_have_left(tmp_path: Path) -> None:
    of = study_of(training=SPREAD)
    files = []
    for name, patients in (("east", 1400), ("north", 60)):
        hospital = hospital_of(tmp_path / name, name, patients)
        hospital.update("policy", epsilon=30.0)
        files.append(publish(hospital))
    setup = Setup(sites=tuple(files), data=None, state=tmp_path / "state")
    summary = simulate(of, setup, RunDirectory.create(tmp_path / "run", of), _Nobody())
    assert summary["metrics_are"] == "exact (simulation)"
    assert summary["released"]["metrics_are"] == "from noised count tables"
    exact, found = (summary["sites"]["east"][key] for key in ("metrics", "released"))
    low, high = found["metrics"]["auroc_interval"]
    assert exact["auroc"] == pytest.approx(found["metrics"]["auroc"], abs=high - low)
    assert exact["auroc"] != found["metrics"]["auroc"]
    assert np.shape(found["table"]) == (1, 2, BINS)
    assert summary["sites"]["north"]["released"]["reason"] == TOO_FEW
    assert summary["released"]["pooled"] == found["metrics"], "one table is all tables"
    assert summary["released"]["mean"]["auroc"] == found["metrics"]["auroc"]
    assert summary["released"]["worst"]["site"] == "east"


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        ({"n_hat": 10**9}, "failed", "a request of another form. Both sides must run the same Gapweave"),
        ({"round": True}, "failed", "a request of another form. Both sides must run the same Gapweave"),
        ({"run": "never-prepared"}, "refused", FIXED_TEXTS[RefusedError]),
        ({"study": "0" * 64}, "refused", FIXED_TEXTS[RefusedError]),
        ({"groups": {}}, "refused", FIXED_TEXTS[RefusedError]),
    ],
    ids=str,
)
def test_a_hostile_request_for_a_table_learns_one_fixed_text(
    tmp_path: Path, change: dict[str, Any], status: str, text: str
) -> None:
    of = study_of()
    hospital = build(tmp_path / "a", "north", patients=60)
    hospital.update("policy", studies=[of.sha256], epsilon=30.0)
    hospital.update("patients", declared=600)
    grid, start = Wire([hospital], simulation=False), initial_groups(of)
    grid.ask(wire.PREPARE, wire.pack({"run": RUN, "study": of.canonical()}, {}))
    header = {"run": RUN, "study": of.sha256, "round": 1}
    grid.ask(wire.TRAIN, wire.pack(header, start))
    before = [entry.kind for entry in read_ledger(hospital.folder / "state").entries]
    groups = change.pop("groups", start)
    answer, arrays = wire.unpack(grid.ask(wire.EVALUATE, wire.pack({**header, **change}, groups)).content)
    assert (answer["status"], answer["text"], arrays) == (status, text, {})
    assert [entry.kind for entry in read_ledger(hospital.folder / "state").entries] == before
    asked, _ = wire.unpack(grid.ask(wire.EVALUATE, wire.pack(header, start)).content)
    assert set(asked) == {"protocol", "status", "table", "event"}


def test_a_declared_number_of_patients_is_no_count(tmp_path: Path) -> None:
    of = study_of()
    hospital = build(tmp_path / "north", "north", patients=60)
    hospital.update("policy", studies=[of.sha256], epsilon=30.0, releases=["update"])
    hospital.update("patients", declared=60)
    run_study(Wire([hospital], simulation=False), of, RunDirectory.create(tmp_path / "run", of), RUN)
    row = json.loads((tmp_path / "run" / "summary.json").read_text())["sites"]["north"]
    assert row["patients"] == {"train": None, "test": None}
    assert row["released"]["reason"] == NOT_ALLOWED


class _Answers:
    """A grid on which every site answers with one header."""

    def __init__(self, header: dict[str, Any]) -> None:
        self.header, self.asked = header, []

    def push_messages(self, messages: Any) -> list[str]:
        self.asked = [message.metadata.dst_node_id for message in messages]
        return [str(node) for node in self.asked]

    def pull_messages(self, ids: Any) -> list[Any]:
        return [_Reply(self.header, identity) for identity in ids]


class _Reply:
    def __init__(self, header: dict[str, Any], identity: str) -> None:
        self.content = wire.pack(header, {})
        self.metadata = type("Metadata", (), {"reply_to_message_id": identity})

    def has_error(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"status": "refused", "text": "the site's privacy budget does not allow it"}, "the site's privacy budget"),
        ({"status": "ok"}, "something else than a table"),
        ({"status": "ok", "table": [[[0.5] * BINS] * 2]}, "something else than a table"),
        ({"status": "ok", "table": None, "reason": TOO_FEW}, "something else than a table"),
        ({"status": "ok", "table": [[[0] * 9 + [10**9], [1] * BINS]]}, "more patients than it has"),
        ({"status": "ok", "table": [[[0] * 8 + [-(10**9), 10**9], [1] * BINS]]}, "more patients than it has"),
        ({"status": "ok", "table": [[[1] * BINS] * 2]}, ""),
    ],
    ids=str,
)
def test_what_a_site_sends_in_place_of_a_table_is_said(header: dict[str, Any], reason: str) -> None:
    of = study_of()
    peers = [
        Peer(site="able", node=7, groups=["fusion"], last_round=1, plan={"table": {}, "no_table": ""}),
        Peer(site="announced", node=8, groups=["fusion"], last_round=1, plan={"table": {"kind": "x"}, "n_hat": 400}),
        Peer(site="few", node=9, groups=["fusion"], last_round=1, plan={"table": None, "no_table": TOO_FEW}),
        Peer(site="absent", node=10, groups=["fusion"], last_round=0, plan={"table": {"kind": "x"}}),
        Peer(site="gone", node=0, groups=["fusion"], last_round=2, plan={"table": {"kind": "x"}}),
    ]
    grid = _Answers(header)
    found = ask_tables(grid, of, peers, {"run": RUN}, initial_groups(of), 5.0)
    assert grid.asked == [8]
    assert found["announced"].reason.startswith(reason) or reason in found["announced"].reason
    assert bool(found["announced"].tables) == (reason == "")
    assert found["few"].reason == TOO_FEW
    assert found["absent"].reason == "the site took part in no round"
    assert found["gone"].reason == "the site did not answer"


def test_mean_worst_and_pooled_come_from_the_sites_that_gave_a_table() -> None:
    generator = np.random.default_rng(0)
    rows = np.linspace(10, 100, BINS)

    def site(apart: float) -> Released:
        counts = np.stack([rows[::-1], rows[::-1] + apart * (rows - rows[::-1])])
        return Released(tables=(ScoreTable(counts=counts + generator.integers(-2, 3, counts.shape), scale=1.0),))

    good, bad, none = site(1.0), site(0.3), Released(reason=TOO_FEW)
    found = {"good": good, "bad": bad, "none": none}
    one, other = good.metrics(), bad.metrics()
    assert one is not None
    assert other is not None
    assert worst_site(found)["site"] == "bad"
    mean, pooled = mean_metrics(found.values()), pooled_metrics(found.values())
    assert mean is not None
    assert pooled is not None
    assert mean["auroc"] == pytest.approx((one["auroc"] + other["auroc"]) / 2)
    width, widths = np.diff(mean["auroc_interval"]), [np.diff(each["auroc_interval"]) for each in (one, other)]
    assert width == pytest.approx(np.hypot(*widths) / 2, rel=0.1), "sites are independent"
    assert other["auroc"] < pooled["auroc"] < one["auroc"]
    assert mean_metrics([none]) is pooled_metrics([none]) is None


# Weights.


@pytest.mark.parametrize(("weights", "expected"), [("uniform", 2.0), ("patients", 1.5)])
def test_the_mean_weighs_sites_as_the_study_says(weights: str, expected: float) -> None:
    of = plan_of(private=True, aggregation={"weights": weights})
    start = initial_groups(of)
    combine = GroupAggregation(of, start)
    for name, value, patients in [("one", 1.0, 300), ("two", 3.0, 100)]:
        update = {
            group: {key: np.full_like(part, value) for key, part in parts.items()} for group, parts in start.items()
        }
        combine.add(name, update, patients)
    after, _ = combine.finish()
    np.testing.assert_allclose(after["imputer"]["null.weight"] - start["imputer"]["null.weight"], expected, rtol=1e-5)


@pytest.mark.parametrize(("stated", "counts"), [(640, 640), (0, 1), (-5, 1), (True, 1), (3.5, 1), ("9", 1), (None, 1)])
def test_a_number_of_patients_that_is_none_counts_as_one(stated: Any, counts: int) -> None:
    assert Peer(site="a", plan={"n_hat": stated}).patients == counts


def test_weights_go_with_the_mean_only() -> None:
    assert Aggregation.model_validate({"weights": "patients", "encoder/*": "mean"}).weights == "patients"
    for rules in ({"default": "median"}, {"encoder/*": "trimmed_mean"}):
        with pytest.raises(ValueError, match="needs the rule mean"):
            Aggregation.model_validate({"weights": "patients", **rules})
