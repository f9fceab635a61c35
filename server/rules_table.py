"""The table of docs/aggregation.md, from the registry; a test keeps the page current."""

from __future__ import annotations

import inspect

from gapweave.server.aggregators import AGGREGATORS, Mixer

PROMISES = ("equal", "permutation", "translation", "breakdown")


def table() -> str:
    """A row a registered stage: what it promises, and how many sites it needs for f bad ones."""
    heads = ["stage", "what it is", *PROMISES, "sites for f = 1, 2, 3"]
    lines = [heads, ["---"] * len(heads)]
    for name in AGGREGATORS:
        stage = AGGREGATORS[name]
        what = (inspect.getdoc(type(stage)) or "").splitlines()[0]
        kind = "before a rule" if isinstance(stage, Mixer) else "rule"
        marks = ["yes" if promise in stage.properties else "-" for promise in PROMISES]
        sites = ", ".join(str(max(1, stage.needs(f))) for f in (1, 2, 3))
        lines.append([f"`{name}`", f"{kind}: {what}", *marks, sites])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table())
