"""The table of docs/aggregation.md, from the registry; a test keeps the page current."""

from __future__ import annotations

import inspect

from gapweave.server.aggregators import AGGREGATORS, Mixer, Stage

PROMISES = ("equal", "permutation", "translation", "breakdown")


def table() -> str:
    """A row a registered stage: what it promises, and how many sites it needs for f bad ones."""
    heads = ["stage", "what it is", "parameters", *PROMISES, "sites for f = 1, 2, 3"]
    lines = [heads, ["---"] * len(heads)]
    for name in AGGREGATORS:
        stage = AGGREGATORS[name]
        what = (inspect.getdoc(type(stage)) or "").splitlines()[0]
        kind = "before a rule" if isinstance(stage, Mixer) else "rule"
        marks = ["yes" if promise in stage.properties else "-" for promise in PROMISES]
        sites = ", ".join(str(max(1, stage.needs(f))) for f in (1, 2, 3))
        lines.append([f"`{name}`", f"{kind}: {what}", _parameters(stage), *marks, sites])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _parameters(stage: Stage) -> str:
    fields = stage.Parameters.model_fields.items()
    shown = (f"`{key}`" if field.default is None else f"`{key}: {field.default}`" for key, field in fields)
    return ", ".join(shown) or "none"


if __name__ == "__main__":
    print(table())
