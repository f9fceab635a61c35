"""Book-keeping rules: from a layer's recorded inputs and output gradients to per-patient norms and clipped sums.

A layer that is used S times for a patient (time steps, positions, records, several calls) has the per-patient
gradient G = sum over s of g_s x_s^T. Its norm is taken over all uses together, by the Gram trick
|G|^2 = sum over s, t of (x_s . x_t)(g_s . g_t) where that is cheaper than G itself (Goodfellow 2015, arXiv
1510.01799; Li et al. 2022, arXiv 2110.05679), and in float64: float32 Grams cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Use = tuple[Tensor, Tensor]
"""(recorded input, gradient of the loss in the layer's output), record first."""

Gradients = dict[Tensor, Tensor]
"""By parameter (tensors hash by identity)."""

LARGEST_PATCHES = 2**23
"""Elements of unfolded patches above which convolutions go record by record."""


class Patients:
    """Which of the batch's records belong to which patient.

    Args:
        patient: [R] position of each record's patient.
        patients: P.
    """

    def __init__(self, patient: Tensor, patients: int) -> None:
        self.count = patients
        self._patient = patient
        self.records = len(patient)
        counts = torch.bincount(patient, minlength=patients)
        most = int(counts.max())
        self._slots: Tensor | None = None
        if most == 1 and self.records == patients and bool((patient[1:] > patient[:-1]).all()):
            return
        order = torch.argsort(patient, stable=True)
        start = torch.cumsum(counts, 0) - counts
        within = torch.arange(self.records, device=patient.device) - start[patient[order]]
        self._slots = torch.full((patients, most), self.records, dtype=torch.int64, device=patient.device)
        self._slots[patient[order], within] = order

    def sequence(self, values: Tensor) -> Tensor:
        """[R, S, F] to [P, K S, F]: a patient's records one after the other, zeros where there are fewer than K."""
        if self._slots is None:
            return values
        padded = torch.cat([values, torch.zeros_like(values[:1])])
        return padded[self._slots].flatten(1, 2)

    def total(self, values: Tensor) -> Tensor:
        """[R, D] to [P, D]: the sum over a patient's records."""
        if self._slots is None:
            return values
        result = torch.zeros(self.count, values.shape[1], dtype=values.dtype, device=values.device)
        return result.index_add_(0, self._patient, values)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One layer's share of the per-patient gradients.

    Attributes:
        squares: [P] float64, squared norm of the patient's gradient of this layer.
        scale: [P] float64, sum over s of |g_s| |x_s|: what rounding errors are relative to.
        weighted: (factor [P], keep [P] bool or None) -> gradient by parameter, the sum over patients of factor
            times gradient; patients not kept are left out, not multiplied by zero.
    """

    squares: Tensor
    scale: Tensor
    weighted: Callable[[Tensor, Tensor | None], Gradients]


def instantiated(values: Gradients) -> Part:
    """A part from per-patient gradients [P, numel] of each parameter."""
    rows = list(values.values())
    norms = [torch.linalg.vector_norm(value.double(), dim=1) for value in rows]
    squares = torch.stack([norm.square() for norm in norms]).sum(0)

    def weighted(factor: Tensor, keep: Tensor | None) -> Gradients:
        return {
            parameter: (factor.to(value.dtype) @ _kept(value, keep)).view_as(parameter)
            for parameter, value in values.items()
        }

    return Part(squares=squares, scale=torch.zeros_like(squares), weighted=weighted)


def _kept(values: Tensor, keep: Tensor | None) -> Tensor:
    return values if keep is None else values[keep]


def matrix(weight: Tensor, bias: Tensor | None, inputs: Tensor, gradients: Tensor) -> Part:
    """The rule of y = W x + b used S times.

    Args:
        weight: p x d when flattened from its second axis on.
        bias: [p], or None.
        inputs: [P, S, d].
        gradients: [P, S, p].
    """
    steps, wide, tall = inputs.shape[1], inputs.shape[2], gradients.shape[2]
    if steps > 1 and steps * (wide + tall) > wide * tall:
        values = {weight: torch.bmm(gradients.transpose(1, 2), inputs).flatten(1)}
        if bias is not None:
            values[bias] = gradients.sum(1)
        return instantiated(values)
    offset = 0.0 if bias is None else 1.0
    gram = _gram(inputs) + offset
    heights = _gram(gradients)
    squares = (gram * heights).sum((1, 2)).clamp(min=0)
    scale = (gram.diagonal(dim1=1, dim2=2) * heights.diagonal(dim1=1, dim2=2)).sqrt().sum(1)

    def weighted(factor: Tensor, keep: Tensor | None) -> Gradients:
        each = factor.to(gradients.dtype).view(-1, 1, 1)
        x, g = _kept(inputs, keep), _kept(gradients, keep)
        # The factor goes to the narrower of the two.
        left, right = (g * each, x) if tall <= wide else (g, x * each)
        result = {weight: (left.flatten(0, 1).t() @ right.flatten(0, 1)).view_as(weight)}
        if bias is not None:
            result[bias] = each.flatten() @ g.sum(1)
        return result

    return Part(squares=squares, scale=scale, weighted=weighted)


def _gram(rows: Tensor) -> Tensor:
    """[P, S, d] to [P, S, S] inner products in float64."""
    exact = rows.double()
    return torch.bmm(exact, exact.transpose(1, 2))


def linear(layer: nn.Linear, uses: Sequence[Use], patients: Patients) -> Part:
    """nn.Linear over any number of leading axes after the record's."""
    inputs, gradients = sequences(uses, patients)
    return matrix(layer.weight, layer.bias, inputs, gradients)


def sequences(uses: Sequence[Use], patients: Patients) -> tuple[Tensor, Tensor]:
    """All uses one after the other: [P, S, d] and [P, S, p]."""
    inputs = [patients.sequence(x.reshape(len(x), -1, x.shape[-1])) for x, _ in uses]
    gradients = [patients.sequence(g.reshape(len(g), -1, g.shape[-1])) for _, g in uses]
    if len(uses) == 1:
        return inputs[0], gradients[0]
    return torch.cat(inputs, 1), torch.cat(gradients, 1)


def embedding(layer: nn.Embedding, uses: Sequence[Use], patients: Patients) -> Part:
    """nn.Embedding: gradients of equal tokens add up before the norm."""
    tokens = torch.cat([patients.sequence(x.reshape(len(x), -1, 1) + 1) for x, _ in uses], 1)[:, :, 0] - 1
    gradients = torch.cat([patients.sequence(g.reshape(len(g), -1, g.shape[-1])) for _, g in uses], 1)
    # Rows that only fill up a patient's records have token -1 and no gradient.
    silent = tokens < 0 if layer.padding_idx is None else (tokens < 0) | (tokens == layer.padding_idx)
    gradients = torch.where(silent.unsqueeze(-1), 0.0, gradients)
    tokens = tokens.clamp(min=0)
    exact = gradients.double()
    same = tokens.unsqueeze(1) == tokens.unsqueeze(2)
    squares = torch.where(same, torch.bmm(exact, exact.transpose(1, 2)), 0.0).sum((1, 2)).clamp(min=0)

    def weighted(factor: Tensor, keep: Tensor | None) -> Gradients:
        rows = (_kept(gradients, keep) * factor.to(gradients.dtype).view(-1, 1, 1)).flatten(0, 1)
        total = torch.zeros_like(layer.weight)
        return {layer.weight: total.index_add_(0, _kept(tokens, keep).flatten(), rows)}

    return Part(squares=squares, scale=exact.square().sum(2).sqrt().sum(1), weighted=weighted)


def normalisation(layer: nn.GroupNorm | nn.LayerNorm, uses: Sequence[Use], patients: Patients) -> Part:
    """The affine part of GroupNorm and LayerNorm; their statistics are of one record."""
    weights, biases = [], []
    for x, g in uses:
        if isinstance(layer, nn.GroupNorm):
            normal = functional.group_norm(x, layer.num_groups, eps=layer.eps)
            weights.append((g * normal).flatten(2).sum(2) if x.ndim > 2 else g * normal)
            biases.append(g.flatten(2).sum(2) if x.ndim > 2 else g)
        else:
            shape = layer.normalized_shape
            normal = functional.layer_norm(x, shape, eps=layer.eps)
            numel = layer.weight.numel()
            weights.append((g * normal).reshape(len(x), -1, numel).sum(1))
            biases.append(g.reshape(len(x), -1, numel).sum(1))
    values: Gradients = {layer.weight: patients.total(torch.stack(weights).sum(0))}
    if layer.bias is not None:
        values[layer.bias] = patients.total(torch.stack(biases).sum(0))
    return instantiated(values)


def convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, uses: Sequence[Use], patients: Patients) -> Part:
    """nn.Conv1d, 2d, 3d with zero padding, any stride, dilation and groups."""
    weights = torch.stack([_record_kernels(layer, x, g) for x, g in uses]).sum(0)
    values = {layer.weight: patients.total(weights)}
    if layer.bias is not None:
        values[layer.bias] = patients.total(torch.stack([g.flatten(2).sum(2) for _, g in uses]).sum(0))
    return instantiated(values)


def _record_kernels(layer: Any, x: Tensor, g: Tensor) -> Tensor:
    """[R, numel of weight]: the kernel's gradient of each record."""
    kernel = layer.weight.shape[2:]
    patches = x.numel() * int(torch.tensor(kernel).prod()) // int(torch.tensor(layer.stride).prod())
    if x.ndim <= 4 and layer.groups == 1 and patches <= LARGEST_PATCHES:
        return _by_patches(layer, x, g)
    one = torch.ops.aten.convolution_backward
    settings = (layer.stride, layer.padding, layer.dilation, False, [0] * len(kernel), layer.groups)
    rows = [
        one(g[[at]], x[[at]], layer.weight, None, *settings, (False, True, False))[1].flatten() for at in range(len(x))
    ]
    return torch.stack(rows)


def _by_patches(layer: Any, x: Tensor, g: Tensor) -> Tensor:
    """All records at once: a convolution is a matrix over patches."""
    if x.ndim == 3:
        x, kernel = x.unsqueeze(2), (1, *layer.kernel_size)
        settings = {"stride": (1, *layer.stride), "padding": (0, *layer.padding), "dilation": (1, *layer.dilation)}
    else:
        kernel = layer.kernel_size
        settings = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    patches = functional.unfold(x, kernel, **settings)
    return torch.bmm(g.flatten(2), patches.transpose(1, 2)).flatten(1)


RULES: dict[type[nn.Module], Callable[[Any, Sequence[Use], Patients], Part]] = {
    nn.Linear: linear,
    nn.Embedding: embedding,
    nn.GroupNorm: normalisation,
    nn.LayerNorm: normalisation,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
}
"""Rule of each layer type that the engine knows."""
