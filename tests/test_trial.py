"""Parts of a model that do not fit, or couple patients, are found before a site pays for a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cohorts import LABS, NOTE, study
from hospitals import build, participant, plan_of
from pretence import Pretence, Pretender, loop, study_of
from torch import Tensor, nn

from gapweave.client.trial import try_model
from gapweave.server.aggregators import AGGREGATORS, Columnwise
from gapweave.shared.encoders import ENCODERS
from gapweave.shared.errors import UsageError
from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.privacy.ledger import read_ledger


class Foreign(Fusion):
    """The votes' sum, less the batch's mean."""

    def __init__(self, shape: Shape, settings: Any = None) -> None:
        super().__init__(shape)
        self.outputs = shape.outputs

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        return Fused(logits=self.of(modality_logits.sum(1)), weights=None)

    def of(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(0)


class Narrow(Foreign):
    def of(self, logits: Tensor) -> Tensor:
        return logits.expand(-1, 7)


class Raising(Foreign):
    def of(self, logits: Tensor) -> Tensor:
        raise RuntimeError("two\nlines")


class Unknown(Foreign):
    def __init__(self, shape: Shape, settings: Any = None) -> None:
        super().__init__(shape)
        self.layer = nn.BatchNorm1d(shape.outputs)

    def of(self, logits: Tensor) -> Tensor:
        return self.layer(logits)


PARTS = {
    "couples": (Foreign, "one patient's values change another's loss"),
    "narrow": (Narrow, "a step on synthetic patients fails: .*Mend fusion 'theirs'"),
    "raises": (Raising, "fails: RuntimeError: two lines. Mend fusion 'theirs'"),
    "batch norm": (Unknown, "BatchNorm1d at `fusion.layer` mixes patients"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_foreign_part_that_cannot_be_trained_is_named_and_costs_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, text = PARTS[name]
    list(FUSIONS)
    monkeypatch.setitem(FUSIONS._entries, "theirs", part)
    of = study({"labs": LABS, "note": NOTE}, model={"fusion": "theirs", "imputer": "none"})
    with pytest.raises(UsageError, match=text) as caught:
        try_model(of, of.order)
    assert "\n" not in str(caught.value)
    private = plan_of(private=True, model={"fusion": "theirs", "imputer": "none"})
    site = participant(build(tmp_path / "alder", "alder", ["labs", "note", "vitals"]), private)
    site._simulation = False
    policy = site.site.policy.model_copy(update={"studies": [private.sha256]})
    site.site = site.site.model_copy(update={"policy": policy})
    with pytest.raises(UsageError):
        site.prepare("run")
    assert not site.state.exists() or not read_ledger(site.state).events()


def test_an_error_of_our_own_parts_is_an_internal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError

    list(ENCODERS)
    monkeypatch.setattr("gapweave.shared.encoders.widedeep.WideDeep.forward", broken)
    of = study({"labs": LABS})
    with pytest.raises(RuntimeError):
        try_model(of, of.order)


@pytest.mark.parametrize("bad", ["nan", "shape"])
def test_a_rule_that_gives_what_it_must_not_is_named(tmp_path: Path, bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sites were sent it, refused it, and were said to have no policy that allows it."""

    class Theirs(Columnwise):
        def combine(self, block: Any, f: int) -> Any:
            result = block.mean(0)
            return result * np.nan if bad == "nan" else np.concatenate([result, result, result])

    list(AGGREGATORS)
    monkeypatch.setitem(AGGREGATORS._entries, "theirs", Theirs())
    of = study_of(aggregation={"default": "theirs"}, training={"rounds": 2})
    run = loop(tmp_path, of, Pretence(*map(Pretender, "abcde")))
    with pytest.raises(UsageError, match=r"the rule theirs of '.*' (gave|fails)") as caught:
        run.run()
    assert "another rule" in caught.value.remedy
    assert torch.isfinite(
        torch.tensor([float(value.max()) for part in run.state.groups.values() for value in part.values()])
    ).all()
