"""Random records of all kinds of data, and the studies and models that read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from cohorts import study
from torch import Tensor

from gapweave.shared.config.study import Study
from gapweave.shared.fusion import FUSIONS
from gapweave.shared.imputers import IMPUTERS
from gapweave.shared.model import MultimodalModel
from gapweave.shared.schema import Batch, modalities

LABS = {
    "kind": "table",
    "columns": {"sodium": {"low": 100, "high": 180}, "lactate": {"low": 0, "high": 20}, "sex": {"categories": [0, 1]}},
}
VITALS = {"kind": "series", "hours": 6, "columns": {"bp": {"low": 30, "high": 280}, "pulse": {"low": 10, "high": 300}}}
NOTE = {"kind": "text", "buckets": 16}
CXR = {"kind": "image", "size": 16, "channels": 1}
EVERY_KIND = {"cxr": CXR, "labs": LABS, "note": NOTE, "vitals": VITALS}

TASKS: dict[str, dict[str, Any]] = {
    "binary": {"kind": "binary", "label": "y"},
    "multiclass": {"kind": "multiclass", "label": "y", "classes": ["a", "b", "c"]},
    "multilabel": {"kind": "multilabel", "label": ["x", "y", "z"]},
}

LINEAR = "late+linear_path"
PAIRS = [
    *dict.fromkeys([*((fusion, "cra") for fusion in FUSIONS), *(("concat", name) for name in IMPUTERS)]),
    (LINEAR, "none"),
]
"""Every fusion and every imputer, once at least: all pairs would be too many, and neither knows the other. And one model
whose heads have a linear path."""


def tasks_of(fusion: str) -> list[str]:
    """Tasks that a fusion can do."""
    return [task for task in TASKS if task != "multilabel" or FUSIONS[fusion].instead is None]


TRIPLES = [
    (*pair, task) for pair in PAIRS for task in (tasks_of(pair[0]) if pair[0] in ("concat", "late") else ["binary"])
]
"""The pairs for a binary task, and the two oldest fusions for every task."""


def four_kinds(fusion: str = "late", imputer: str = "cra", task: str = "binary", **keys: Any) -> Study:
    """A study of one modality of each kind, with a small embedding."""
    return study(EVERY_KIND, model={"embedding": 4, **model_keys(fusion, imputer)}, task=TASKS[task], **keys)


def model_keys(fusion: str, imputer: str) -> dict[str, Any]:
    """A pair as a study's keys of the model."""
    name, _, path = fusion.partition("+")
    return {"fusion": name, "imputer": imputer, "linear_path": bool(path)}


def wake(model: MultimodalModel, seed: int = 5) -> MultimodalModel:
    """Move every parameter, so that no test passes because something starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def random_model(of: Study, held: Iterable[str] | None = None) -> MultimodalModel:
    return wake(MultimodalModel(of, of.order if held is None else list(held)))


def random_batch(
    of: Study,
    records: Sequence[int] = (1,) * 6,
    *,
    held: Sequence[str] | None = None,
    present: Tensor | None = None,
    seed: int = 0,
) -> Batch:
    """Records with random inputs, random gaps and random targets.

    Args:
        of: the study.
        records: number of records of each patient.
        held: modalities of the site; all by default.
        present: [R, M]; by default a random pattern with at least one modality a record.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    held = of.order if held is None else held
    total = sum(records)
    inputs = {
        modality.name: torch.randn(total, *modality.shape, generator=generator)
        for modality in modalities(of)
        if modality.name in held
    }
    for name, values in inputs.items():
        if of.modalities[name].kind == "series":
            flags = values.shape[-1] // 2
            values[..., flags:] = (values[..., flags:] > 0).float()
            values[..., :flags] *= values[..., flags:]
    columns = torch.tensor([name in held for name in of.order])
    if present is None:
        present = torch.rand(total, len(of.order), generator=generator) < 0.6
        position = int(columns.nonzero()[0, 0])
        present[~(present & columns).any(1), position] = True
    present = present & columns
    draw = torch.randint(0, max(2, of.task.outputs), (total,), generator=generator)
    if of.task.kind == "multiclass":
        target = torch.nn.functional.one_hot(draw, of.task.outputs).float()
    else:
        target = torch.randint(0, 2, (total, of.task.outputs), generator=generator).float()
    counts = torch.tensor(records)
    return Batch(
        inputs=inputs,
        present=present,
        target=target,
        label_mask=torch.ones_like(target, dtype=torch.bool),
        patient=torch.repeat_interleave(torch.arange(len(records)), counts),
        weight=torch.repeat_interleave(1 / counts.float(), counts),
        patients=len(records),
    )


def blank(batch: Batch, order: Sequence[str], fill: float | str, seed: int = 9) -> Batch:
    """The batch with other content in the rows of absent modalities: a number, or "random"."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, values in batch.inputs.items():
        content = torch.randn(values.shape, generator=generator) if fill == "random" else torch.full_like(values, fill)
        here = batch.present[:, order.index(name)].view(-1, *[1] * (values.ndim - 1))
        inputs[name] = torch.where(here, values, content)
    return replace(batch, inputs=inputs)


def patterns(order: Sequence[str]) -> Tensor:
    """[2^M - 1, M]: every non-empty set of modalities."""
    width = len(order)
    return torch.tensor([[bool(code >> at & 1) for at in range(width)] for code in range(1, 2**width)])


def flat(gradient: dict[str, Tensor]) -> Tensor:
    """All tensors of a gradient in one vector, float64."""
    return torch.cat([gradient[name].double().flatten() for name in sorted(gradient)])


def length(vector: Tensor) -> float:
    return float(vector.double().norm())
