"""Test vectors of aggregation rules, by a library that shares nothing with ours.

In an environment of its own, since the library wants another torch than ours:

    python -m venv vectors && vectors/bin/pip install torch==2.13.0 numpy==2.4.6 scipy==1.17.1
    vectors/bin/pip install --no-deps byzfl==0.0.11
    vectors/bin/python tests/vectors/make_aggregation.py tests/vectors/aggregation.json

Only its aggregators are imported: the rest of the package wants torchvision. The test knows the file's SHA-256.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np

found = importlib.util.find_spec("byzfl")
package = types.ModuleType("byzfl")
package.__path__ = list(found.submodule_search_locations)
sys.modules["byzfl"] = package

from byzfl.aggregators import NNM, Average, GeometricMedian, Median, TrMean  # noqa: E402

RULES = {
    "mean": lambda f: Average(),
    "median": lambda f: Median(),
    "trimmed_mean": lambda f: TrMean(f),
    "geometric_median": lambda f: GeometricMedian(nu=1e-12, T=20_000),
    "nnm+trimmed_mean": lambda f: lambda rows: TrMean(f)(NNM(f)(rows)),
    "nnm+median": lambda f: lambda rows: Median()(NNM(f)(rows)),
}

cases = []
for n in (3, 5, 6, 9, 13):
    for seed in range(3):
        rows = np.random.default_rng([n, seed]).normal(size=(n, 23)).astype(np.float32).astype(np.float64)
        rows[0] *= (1, 10, 1000)[seed]
        f = max(1, (n - 1) // 4)
        results = {name: np.asarray(make(f)(rows)).tolist() for name, make in RULES.items()}
        cases.append({"n": n, "f": f, "rows": rows.tolist(), "results": results})
Path(sys.argv[1]).write_text(json.dumps({"library": "byzfl 0.0.11", "cases": cases}) + "\n", encoding="utf-8")
