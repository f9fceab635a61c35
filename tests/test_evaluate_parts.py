"""Scores of a simulation by missing pattern: who is counted where."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from batches import four_kinds, random_batch

from gapweave.sites.simulate.evaluate import FEWEST, FEWEST_EVENTS, OTHERS, _patterns


def test_each_record_is_in_one_pattern_and_rare_ones_are_joined() -> None:
    """120 records with all, 60 that lack one, 49 that lack another and 3 odd ones; one has too few events."""
    of = four_kinds()
    width = len(of.order)
    full, less, few, odd = ([True] * width for _ in range(4))
    less[0], few[1], odd[2] = False, False, False
    patterns = [full] * 120 + [less] * 60 + [few] * (FEWEST - 1) + [odd] * 80
    batch = random_batch(of, [1] * len(patterns), present=torch.tensor(patterns))
    events = torch.zeros(len(batch), 1)
    events[:30], events[120:150], events[180:200], events[229 : 229 + FEWEST_EVENTS - 1] = 1, 1, 1, 1
    found = _patterns(replace(batch, target=events, label_mask=torch.ones_like(events, dtype=torch.bool)), of)
    names = ["+".join(of.order), "+".join(of.order[1:]), OTHERS]
    assert {name: int(rows.sum()) for name, rows in found.items()} == dict(zip(names, (120, 60, 129), strict=True))
    assert (np.sum([*found.values()], axis=0) == 1).all()
