"""What rounds.jsonl says: who took part when, and what became of each parameter group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gapweave.shared.config.study import Study

STATUSES = ("ok", "screened", "late", "failed", "refused", "left")
"""What a site can be in a round; `screened`: it answered, but an update of it was not used."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive rounds in which a site had one status.

    Attributes:
        site: its name.
        status: of `STATUSES`.
        reason: why it is not ok.
        first: first round.
        last: last round.
    """

    site: str
    status: str
    reason: str
    first: int
    last: int


def spans(rounds: Iterable[Mapping[str, Any]]) -> list[Span]:
    """The run-length coded participation of all sites; rounds in which a site was not asked are in none."""
    done: list[Span] = []
    open_: dict[str, Span] = {}
    for line in rounds:
        for site, (status, reason) in _statuses(line).items():
            before = open_.get(site)
            same = before is not None and (before.status, before.reason) == (status, reason)
            if before is not None and same and before.last == line["round"] - 1:
                open_[site] = Span(**{**before.__dict__, "last": line["round"]})
                continue
            if before is not None:
                done.append(before)
            open_[site] = Span(site=site, status=status, reason=reason, first=line["round"], last=line["round"])
    return sorted([*done, *open_.values()], key=lambda span: (span.site, span.first))


def _statuses(line: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Status and reason of each site that was asked in one round."""
    screened: dict[str, dict[str, str]] = {}
    for group, entry in line["groups"].items():
        for site, reason in entry.get("screened", {}).items():
            screened.setdefault(site, {})[group] = reason
    asked = {site: (entry["status"], entry.get("reason", "")) for site, entry in line["sites"].items()}
    return asked | {site: ("screened", _why(reasons)) for site, reasons in screened.items()}


def _why(reasons: Mapping[str, str]) -> str:
    """Reasons by group in a few words."""
    where = next(iter(reasons)) if len(reasons) == 1 else f"{len(reasons)} groups"
    return f"{where}: {'; '.join(sorted(set(reasons.values())))}"


@dataclass(frozen=True, kw_only=True)
class Group:
    """One row of the group table.

    Attributes:
        name: of the group.
        share: shared, holders or local.
        rules: aggregation rules that were used, none for a local group.
        holders: sites whose updates were used, with the rounds where that was not in all of them.
        rounds: number of rounds in which it was aggregated.
        events: what was screened or left alone, with how often.
    """

    name: str
    share: str
    rules: tuple[str, ...]
    holders: tuple[str, ...]
    rounds: int
    events: tuple[str, ...]


def group_table(study: Study, rounds: Sequence[Mapping[str, Any]]) -> list[Group]:
    """All groups that travelled, then the encoders that stayed at home."""
    names = sorted({name for line in rounds for name in line["groups"]})
    home = [name for name in map("encoder/{}".format, study.order) if study.sharing.of(name) == "local"]
    travelled = [
        _group(name, study, {line["round"]: line["groups"][name] for line in rounds if name in line["groups"]})
        for name in names
    ]
    stayed = [
        Group(name=name, share="local", rules=(), holders=(), rounds=0, events=()) for name in home if name not in names
    ]
    return travelled + stayed


def _group(name: str, study: Study, by_round: Mapping[int, Mapping[str, Any]]) -> Group:
    events: Counter[str] = Counter()
    lines = list(by_round.values())
    for line in lines:
        events.update(f"{site} screened: {reason}" for site, reason in line.get("screened", {}).items())
        if "left_alone" in line:
            events[f"left alone: {line['left_alone']}"] += 1
    return Group(
        name=name,
        share=study.sharing.of(name),
        rules=tuple(dict.fromkeys(line["rule"] for line in lines)),
        holders=_holders(by_round),
        rounds=sum("left_alone" not in line and bool(line["holders"]) for line in lines),
        events=tuple(f"{text} ({_times(count)})" for text, count in events.most_common()),
    )


def _holders(by_round: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
    held: dict[str, list[int]] = {}
    for number, line in by_round.items():
        for site in line["holders"]:
            held.setdefault(site, []).append(number)
    texts = []
    for site, numbers in sorted(held.items()):
        first, last = numbers[0], numbers[-1]
        if len(numbers) == len(by_round):
            texts.append(site)
        elif len(numbers) == last - first + 1:
            texts.append(f"{site} (round {first})" if first == last else f"{site} (rounds {first} to {last})")
        else:
            texts.append(f"{site} ({len(numbers)} of {len(by_round)} rounds)")
    return tuple(texts)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} rounds"


def lazy_turns(rounds: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Combination of modalities that was trained by itself -> its rounds; none under other schemes than tla."""
    turns: dict[str, list[int]] = {}
    for line in rounds:
        if "lazy" in line:
            turns.setdefault(line["lazy"], []).append(line["round"])
    return dict(sorted(turns.items()))


def norms(rounds: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Norms of the updates: group -> site -> (round, norm)."""
    result: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in rounds:
        for group, entry in line["groups"].items():
            for site, value in entry.get("norms", {}).items():
                result.setdefault(group, {}).setdefault(site, []).append((line["round"], value))
    return result
