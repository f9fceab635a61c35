"""How each method does on the demo: `make methods-measured RESULTS=OUT/results.json` writes docs/methods.json.

OUT is a comparison of the demo with `--vary method=late,...`; rows at another missing rate than 0 are left aside. From
docs/methods.json `make docs` takes the remark on methods that fall behind `late` (docs/methods.md).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from gapweave.shared.catalogue import AGAINST, MEASURED, Measured
from gapweave.shared.config.overrides import METHODS
from gapweave.shared.errors import GapweaveError, UsageError

DOCS = Path(__file__).parent.parent / "docs"


def measured(rows: list[dict[str, Any]]) -> dict[str, Measured]:
    """Mean AUROC of each method and its difference from `late`, paired by site and seed.

    Args:
        rows: of a comparison's results.json.

    Raises:
        UsageError: when `late` is not among them, or a method that is none of this version's.
    """
    found: dict[str, dict[tuple[int, str], float]] = {}
    for row in rows:
        cell, auroc = row["cell"], row["metrics"]["auroc"]
        if row["model"] == "federated" and cell.get("missing_rate", 0) == 0 and "method" in cell and auroc is not None:
            found.setdefault(cell["method"], {})[row["seed"], row["site"]] = auroc
    unknown = sorted(found.keys() - METHODS.keys())
    if AGAINST not in found or unknown:
        what = f"there is no method {unknown[0]!r}" if unknown else f"no row of {AGAINST} at missing rate 0"
        raise UsageError(what, where="results.json", remedy=f"Compare the demo with --vary method={AGAINST},...")
    base = found[AGAINST]
    return {name: _against(base, found[name]) for name in METHODS if name in found}


def _against(base: dict[tuple[int, str], float], scores: dict[tuple[int, str], float]) -> Measured:
    pairs = sorted(base.keys() & scores.keys())
    if not pairs:
        raise UsageError(f"no site and seed in common with {AGAINST}", where="results.json", remedy="Run both alike")
    return {
        "auroc": round(fmean(scores[pair] for pair in pairs), 4),
        "difference": round(fmean(scores[pair] - base[pair] for pair in pairs), 4),
        "seeds": len({seed for seed, _ in pairs}),
        "sites": len({site for _, site in pairs}),
    }


def main() -> None:
    """Read, compute, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of a comparison of the demo")
    parser.add_argument("--out", type=Path, default=DOCS / MEASURED, help="file to write")
    arguments = parser.parse_args()
    try:
        found = measured(json.loads(arguments.results.read_text(encoding="utf-8")))
    except GapweaveError as error:
        raise SystemExit(str(error)) from None
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
