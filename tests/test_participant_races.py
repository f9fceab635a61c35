"""A site asked twice at once, asked by another process, or with a mixing first stage of an encoder."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hospitals import build, participant, plan_of
from test_participant import RUN, as_bytes, groups_for, kinds, train
from torch import Tensor

from gapweave.client.gradients import clipping
from gapweave.client.predict import load_site_model
from gapweave.client.state import RunFolder
from gapweave.shared.encoders.series import SeriesEncoder
from gapweave.shared.errors import UsageError
from gapweave.shared.privacy.ledger import read_ledger

pytestmark = pytest.mark.usefixtures("fresh_sites")


def test_the_same_request_by_two_processes_at_once_has_one_answer(tmp_path: Path) -> None:
    """Believed: the ledger's lock is enough. True: what the second one knew of the run was older than its lock."""
    hospital = build(tmp_path / "a", "north")
    sites = [participant(hospital, plan_of(private=True)) for _ in range(2)]
    sites[0].prepare(RUN)
    answers: list[Any] = []
    asked = [threading.Thread(target=lambda site=site: answers.append(train(site, request="same"))) for site in sites]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join()
    assert as_bytes(answers[0].reply) == as_bytes(answers[1].reply)
    assert "recompute" not in kinds(sites[0])
    assert kinds(sites[0]).count("charge") == 2, "n_hat and the round"


def test_without_privacy_the_number_of_patients_is_in_the_ledger_before_it_leaves(tmp_path: Path) -> None:
    site = participant(build(tmp_path / "a", "north"), plan_of(private=False))
    assert site.prepare(RUN).plan["n_hat"] == site.training.patients
    assert read_ledger(site.state).summary()["epsilon"] is None


def test_the_last_message_in_a_process_of_its_own_keeps_the_models_constants(tmp_path: Path) -> None:
    """Each message has a new process at a hospital: nothing may live in the participant alone."""
    of = plan_of(private=True, preparation={"class_balance": "noisy"})
    hospital = build(tmp_path / "a", "north")
    first = participant(hospital, of)
    first.prepare(RUN)
    train(first)
    offset = first.learner.constants.offset
    assert offset
    participant(hospital, of).finish(RUN, groups_for(first))
    kept = load_site_model(RunFolder(first.state, RUN).path / "model.safetensors")
    assert kept.model.constants.offset == pytest.approx(offset)


def test_an_encoders_first_stage_that_mixes_patients_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs once for all training patients, sampled or not: nothing that it mixed would ever be seen later."""
    plain = SeriesEncoder.features

    def mixed(self: SeriesEncoder, inputs: Tensor) -> Tensor:
        found = plain(self, inputs)
        return found - found.mean(0)

    monkeypatch.setattr(SeriesEncoder, "features", mixed)
    site = participant(build(tmp_path / "a", "north"), plan_of(private=True))
    site.prepare(RUN)
    with pytest.raises(UsageError, match="change another's loss"):
        train(site)


@pytest.mark.parametrize("norm", [1e31, 1e37, 1e44, 1e200])
def test_a_huge_gradient_is_left_out_and_never_too_long(norm: float) -> None:
    """Its factor would be a denormal float32 number: rounded up, it made a contribution of nearly twice the bound."""
    norms = torch.tensor([[norm, 3.0]], dtype=torch.float64)
    factors, keep = clipping.clip_factors(norms, 1.0)
    assert keep is not None
    assert keep.tolist() == [False, True]
    assert float(factors[0, 0]) == 0


@pytest.mark.parametrize("norm", [1e-20, 1.0, 1e10, 1e29])
def test_a_factor_in_single_precision_keeps_the_bound(norm: float) -> None:
    factors, _ = clipping.clip_factors(torch.tensor([[norm]], dtype=torch.float64), 1.0)
    assert float(factors.float().double()[0, 0]) * norm <= 1 + 1e-6
