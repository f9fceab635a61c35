"""Cost of the aggregation rules: `make bench-aggregation`, one JSON line a cell, one thread.

The limit of a rule is the time to read the updates once (twice where distances are needed) and to write the result, at
the bandwidth of a copy (bytes read and written) measured in the same run. Beside ours: plain numpy,
and Flower's implementation where it has one.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gapweave.server.aggregators import Sum, combine
from gapweave.server.rules import bad_sites, resolve

Rows = NDArray[np.float32]
RULES = ("mean", "median", "trimmed_mean", "multi_krum", "geometric_median", "nnm+trimmed_mean")
READ_ONCE = ("mean", "median", "trimmed_mean")


def best(work: Callable[[], Any], repeats: int) -> float:
    """The shortest of some runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy far larger than any cache."""
    source = np.ones(2**26, np.float32)
    target = np.zeros_like(source)
    return 2 * source.nbytes / best(lambda: np.copyto(target, source), 5)


def numpy_rule(rule: str, rows: Rows, f: int) -> Callable[[], Any] | None:
    """What one would write with numpy in a line, or None for a longer one."""
    n = len(rows)
    return {
        "mean": lambda: rows.mean(axis=0),
        "median": lambda: np.median(rows, axis=0),
        "trimmed_mean": lambda: np.sort(rows, axis=0)[f : n - f].mean(axis=0),
    }.get(rule)


def flower_rule(rule: str, rows: Rows, f: int) -> Callable[[], Any] | None:
    """Flower's function for the same rule, or None where it has none."""
    from flwr.server.strategy import aggregate as flower

    updates = [([row], 1) for row in rows]
    return {
        "mean": lambda: flower.aggregate(updates),
        "median": lambda: flower.aggregate_median(updates),
        "trimmed_mean": lambda: flower.aggregate_trimmed_avg(updates, f / len(rows) + 1e-9),
        "multi_krum": lambda: flower.aggregate_krum(updates, f, len(rows) - f),
    }.get(rule)


def extra_memory(work: Callable[[], Rows]) -> float:
    """Megabytes at the peak beyond inputs and result."""
    tracemalloc.start()
    result = work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (peak - result.nbytes) / 1e6


def stream(rows: Rows) -> Rows:
    """The mean as the server takes it, an update at a time."""
    total = Sum()
    for row in rows:
        total.add({"w": row})
    return total.finish()["w"]


def cell(rule: str, rows: Rows, bandwidth: float, repeats: int, others: bool) -> dict[str, Any]:
    """One line of the output."""
    n, d = rows.shape
    f, stages = bad_sites(n), resolve(rule)
    if n < max(stage.needs(f) for stage in stages):
        return {"rule": rule, "n": n, "d": d, "skipped": "too few sites"}

    def ours() -> Rows:
        return stream(rows) if rule == "mean" else combine(rows, stages, f)

    passes = 1 if rule in READ_ONCE else 2
    limit = (passes * rows.nbytes + 4 * d) / bandwidth
    seconds = best(ours, repeats)
    line = {"rule": rule, "n": n, "d": d, "f": f, "s": round(seconds, 4), "x_limit": round(seconds / limit, 2)}
    line["mb"] = round(extra_memory(ours), 2)
    for name, build in (("numpy", numpy_rule), ("flower", flower_rule)):
        work = build(rule, rows, f) if others else None
        if work is not None:
            line[f"x_{name}"] = round(best(work, 1) / limit, 2)
    return line


def main() -> None:
    """Print a line a cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a hundredth of the size")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for d in (10_000, 100_000) if options.smoke else (1_000_000, 10_000_000):
        for n in (5, 10, 50):
            rows = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
            bandwidth = copy_bandwidth()
            # Flower's rules take minutes at the largest size.
            for rule in RULES:
                line = cell(rule, rows, bandwidth, options.repeats, others=d <= 1_000_000)
                print(json.dumps({**line, "gb_s": round(bandwidth / 1e9, 1)}), flush=True)


if __name__ == "__main__":
    main()
