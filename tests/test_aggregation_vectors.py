"""Aggregation rules against implementations that share nothing with ours."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from flwr.server.strategy import aggregate as flower

from gapweave.server.aggregators import combine
from gapweave.server.rules import bad_sites, resolve

FILE = Path(__file__).parent / "vectors" / "aggregation.json"
SHA256 = "b47972c834ea965e3062a7da349c001d584ecf0d88bc6e60cd577c3533bce640"
"""Of the file as `vectors/make_aggregation.py` made it."""
CONTENT = FILE.read_bytes()
CASES = json.loads(CONTENT)["cases"]


def test_the_vectors_are_those_that_the_script_made() -> None:
    assert hashlib.sha256(CONTENT).hexdigest() == SHA256


@pytest.mark.parametrize("rule", list(CASES[0]["results"]))
def test_a_rule_agrees_with_another_library(rule: str) -> None:
    for case in CASES:
        rows = np.array(case["rows"], np.float32)
        assert case["f"] == bad_sites(case["n"])
        found = combine(rows, resolve(rule), case["f"])
        scale = max(1.0, float(np.abs(case["results"][rule]).max()))
        np.testing.assert_allclose(found, case["results"][rule], rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("n", [5, 6, 9, 11, 20])
def test_multi_krum_agrees_with_flower(n: int) -> None:
    """Flower's keeps n - f - 2 neighbours as ours; where its clamp does not bite."""
    f = bad_sites(n)
    for seed in range(5):
        rows = np.random.default_rng([n, seed]).normal(size=(n, 31)).astype(np.float32)
        rows[0] *= 50
        (expected,) = flower.aggregate_krum([([row], 1) for row in rows], f, n - f)
        np.testing.assert_allclose(combine(rows, resolve("multi_krum"), f), expected, rtol=0, atol=1e-6)
