"""A series' input: per hour and variable the scaled value and an observed flag; and its summary statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapweave.shared.config.modalities import Range
from gapweave.shared.features.ranges import clip, hinges, scale

STATISTICS = ("last", "mean", "min", "max", "slope", "count", "since", "observed")
"""Summary statistics of one variable, in their order."""
SHARES = ("count", "since", "observed")
"""Those within [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Events:
    """Measurements of one variable.

    Attributes:
        record: [E] int64, row of the record.
        hour: [E] float64, hours since the record's index time.
        value: [E] float64, in the study's unit.
    """

    record: NDArray[np.int64]
    hour: NDArray[np.float64]
    value: NDArray[np.float64]


def channels(columns: Mapping[str, Range]) -> int:
    """Width of an hour: V values, then V observed flags."""
    return 2 * len(columns)


def encode(
    columns: Mapping[str, Range], hours: int, events: Mapping[str, Events], records: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Place events into hours; several of one hour are averaged after scaling.

    An event before hour 0 or at or after the window's end is never read.

    Args:
        columns: the study's variables.
        hours: length T of the window.
        events: per variable that the site has.
        records: R.

    Returns:
        inputs [R, T, 2V], 0 where missing; present [R]: any event inside the window.
    """
    order = sorted(columns)
    total = np.zeros((records, hours, len(order)))
    count = np.zeros((records, hours, len(order)))
    for at, name in enumerate(order):
        if name not in events:
            continue
        event = events[name]
        scaled = scale(event.value, columns[name])
        inside = (event.hour >= 0) & (event.hour < hours) & ~np.isnan(scaled)
        where = (event.record[inside], np.floor(event.hour[inside]).astype(np.int64))
        np.add.at(total[:, :, at], where, scaled[inside])
        np.add.at(count[:, :, at], where, 1.0)
    inputs = np.concatenate([total / np.maximum(count, 1), count > 0], axis=2).astype(np.float32)
    present: NDArray[np.bool_] = np.asarray(count.any(axis=(1, 2)))
    return inputs, present


def statistic(
    event: Events, card: Range, hours: int, which: Literal["last", "mean", "min", "max"], records: int
) -> NDArray[np.float64]:
    """One statistic of a variable's values in the window, in the study's unit.

    Args:
        event: its measurements.
        card: values are clipped to this range.
        hours: length of the window.
        which: the last of several at one time is the one that comes last in the file.
        records: R.

    Returns:
        [R], NaN without a value.
    """
    value = clip(event.value, card)
    inside = np.flatnonzero((event.hour >= 0) & (event.hour < hours) & ~np.isnan(value))
    # numpy keeps the last of several assignments to one place.
    keys = {"last": event.hour, "mean": event.hour, "min": -value, "max": value}
    order = inside[np.argsort(keys[which][inside], kind="stable")]
    record, value = event.record[order], value[order]
    result = np.full(records, np.nan)
    if which == "mean":
        count = np.bincount(record, minlength=records)
        total = np.bincount(record, value, minlength=records)
        result[count > 0] = total[count > 0] / count[count > 0]
    else:
        result[record] = value
    return result


def summary_width(columns: Mapping[str, Range]) -> int:
    """Number of summary statistics: 8 a variable, and 6 more with a reference interval."""
    return len(summary_names(columns))


def summary_names(columns: Mapping[str, Range]) -> list[tuple[str, str]]:
    """(variable, statistic) of each number of `summary`, in their order; the statistic of a hinge is `hinges`."""
    order = sorted(columns)
    limited = [order[at] for at in _limits(columns)[0]]
    plain = [(name, statistic) for statistic in STATISTICS for name in order]
    return [*plain, *((name, "hinges") for _ in range(6) for name in limited)]


def _limits(columns: Mapping[str, Range]) -> tuple[list[int], list[float], list[float]]:
    """Positions of the variables with a reference interval, and its ends among scaled values."""
    found = [(at, hinges(columns[name])) for at, name in enumerate(sorted(columns))]
    given = [(at, *limits) for at, limits in found if limits is not None]
    return [at for at, _, _ in given], [low for _, low, _ in given], [high for _, _, high in given]


def summary(inputs: Tensor, columns: Mapping[str, Range]) -> Tensor:
    """Summary statistics of each variable over the window.

    Args:
        inputs: [R, T, 2V] as `encode` gives it.
        columns: the study's variables.

    Returns:
        [R, 8V + 6H]: last, mean, min, max, slope a window, share of hours observed, time since the last value as a
        share of the window, and whether any value was observed; all 0 for a variable never observed, time
        since: 1. Then, for the H variables with a reference interval, how far the last value, the mean and the maximum
        lie above it, and the last value, the mean and the minimum below it; 0 inside and where missing.
    """
    value, flag = inputs.chunk(2, dim=-1)
    seen = (flag > 0).to(inputs.dtype)
    hours = value.shape[1]
    time = torch.linspace(0, 1, hours, device=inputs.device, dtype=inputs.dtype).view(1, hours, 1)
    count = seen.sum(1)
    some = (count > 0).to(inputs.dtype)
    divisor = count.clamp(min=1)
    mean = (value * seen).sum(1) / divisor
    huge = torch.finfo(inputs.dtype).max
    low = torch.where(seen > 0, value, huge).amin(1) * some
    high = torch.where(seen > 0, value, -huge).amax(1) * some
    centred = (time - (time * seen).sum(1, keepdim=True) / divisor.unsqueeze(1)) * seen
    spread = centred.square().sum(1)
    slope = (centred * value).sum(1) / spread.clamp(min=1 / hours)
    latest = (seen * (1 + torch.arange(hours, device=inputs.device, dtype=inputs.dtype).view(1, hours, 1))).amax(1)
    position = (latest - 1).clamp(min=0).long().unsqueeze(1)
    last = value.gather(1, position).squeeze(1) * some
    statistics = [last, mean, low, high, slope, count / hours, 1 - latest / hours, some]
    return torch.cat([*statistics, *_hinges(last, mean, low, high, some, columns)], dim=-1)


def _hinges(
    last: Tensor, mean: Tensor, low: Tensor, high: Tensor, some: Tensor, columns: Mapping[str, Range]
) -> list[Tensor]:
    at, begins, ends = _limits(columns)
    if not at:
        return []
    begin, end, seen = last.new_tensor(begins), last.new_tensor(ends), some[:, at]
    above = [(value[:, at] - end).clamp(min=0) * seen for value in (last, mean, high)]
    below = [(begin - value[:, at]).clamp(min=0) * seen for value in (last, mean, low)]
    return [*above, *below]
