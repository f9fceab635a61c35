"""What the privacy report says of a ledger, against what really ran."""

from __future__ import annotations

from pathlib import Path

from hospitals import build, participant, plan_of
from test_participant import RUN, train

from gapweave.client.setting import policy_hash
from gapweave.shared import __version__
from gapweave.shared.privacy.ledger import read_ledger


def test_the_ledger_says_what_left_what_stayed_and_under_which_limits(tmp_path: Path) -> None:
    site = participant(build(tmp_path / "a", "north", ["labs", "note"]), plan_of(private=True))
    site.prepare(RUN)
    reply, trained = train(site).reply, site.initial
    setting = next(entry.body["setting"] for entry in read_ledger(site.state).entries if entry.kind == "reserve")
    assert setting["modalities"] == ["labs", "note"]
    assert sorted(setting["shared"]) == sorted(reply)
    assert sorted(setting["kept"] + setting["shared"]) == sorted(trained)
    assert setting["parameters_shared"] == sum(value.size for part in reply.values() for value in part.values())
    assert setting["parameters"] == sum(value.numel() for part in trained.values() for value in part.values())
    assert setting["gapweave_version"] == __version__


def test_another_limit_is_another_policy_hash(tmp_path: Path) -> None:
    site = build(tmp_path / "a", "north").site
    others = [
        site.model_copy(update={"policy": site.policy.model_copy(update={"epsilon": 3.0})}),
        site.model_copy(update={"patients": site.patients.model_copy(update={"max_records": 2})}),
    ]
    assert len({policy_hash(each) for each in (site, *others)}) == 3
    assert policy_hash(site) == policy_hash(site.model_copy(update={"cohort": "another"}))
