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

from gapweave.client.gradients.padding import LINE
from gapweave.client.gradients.patients import Factors, Patients

Use = tuple[Tensor, Tensor]
"""(recorded input, gradient of the loss in the layer's output), record first."""

Gradients = dict[Tensor, Tensor]
"""By parameter (tensors hash by identity)."""

BLOCK = 2**17
"""Numbers that are converted to float64 at a time: a megabyte stays in the cache, and no large copy is made."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One layer's share of the per-patient gradients.

    Attributes:
        squares: [P] float64, squared norm of the patient's gradient of this layer.
        scale: [P] float64, sum over s of |g_s| |x_s|: what rounding errors are relative to; None where the norm is
            that of the very numbers that are summed.
        weighted: gradient by parameter, the sum over patients of factor times gradient.
    """

    squares: Tensor
    scale: Tensor | None
    weighted: Callable[[Factors], Gradients]


@dataclass(frozen=True, kw_only=True)
class Single:
    """A matrix that is used once a record: y = W x + b for inputs [R, d] and output gradients [R, p]."""

    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    gradients: Tensor


def singles(layers: Sequence[Single], patients: Patients) -> Part:
    """All matrices that are used once a record, together: most layers of a model, and many read or feed the same."""
    tensors = dict.fromkeys(value for layer in layers for value in (layer.inputs, layer.gradients))
    biased = torch.tensor([layer.bias is not None for layer in layers], device=layers[0].inputs.device)

    def products(of: dict[Tensor, Tensor]) -> Tensor:
        """[L, ...]: those of inputs, plus 1 for a bias, times those of output gradients."""
        inputs = torch.stack([of[layer.inputs] for layer in layers])
        inputs += biased.view(-1, *[1] * (inputs.ndim - 1))
        return inputs.mul_(torch.stack([of[layer.gradients] for layer in layers]))

    each = products({value: _squares(value) for value in tensors})
    squares = patients.total(each.sum(0))
    if not patients.simple:
        rows = patients.several()
        squares += patients.crossed(products({value: _gram(value[rows]) for value in tensors}).sum(0))

    def weighted(factors: Factors) -> Gradients:
        kept = {value: factors.kept_records(value) for value in tensors}
        gradients = {layer.gradients: kept[layer.gradients] * factors.records.unsqueeze(1) for layer in layers}
        result = {layer.weight: gradients[layer.gradients].t() @ kept[layer.inputs] for layer in layers}
        return result | {layer.bias: gradients[layer.gradients].sum(0) for layer in layers if layer.bias is not None}

    return Part(squares=squares.clamp_(min=0), scale=patients.total(each.sqrt_().sum(0)), weighted=weighted)


def instantiated(values: Gradients) -> Part:
    """A part from per-patient gradients [P, numel] of each parameter."""

    def weighted(factors: Factors) -> Gradients:
        return {
            parameter: (factors.patients @ factors.kept(value)).view_as(parameter)
            for parameter, value in values.items()
        }

    squares = torch.stack([_squares(value) for value in values.values()]).sum(0)
    return Part(squares=squares, scale=None, weighted=weighted)


def _squares(rows: Tensor) -> Tensor:
    """[N, D] to [N] squared norms in float64."""
    if rows.numel() <= BLOCK:
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return norms.square_()
    blocks = rows.split(max(1, BLOCK // len(rows)), dim=1)
    return (
        torch.stack([torch.linalg.vector_norm(block, dim=1, dtype=torch.float64) for block in blocks]).square_().sum(0)
    )


def matrix(weight: Tensor, bias: Tensor | None, inputs: Tensor, gradients: Tensor, most: int) -> Part:
    """The rule of y = W x + b used S times.

    Which of its two forms is taken follows from the uses a record, which are the study's: the two differ where uses
    cancel, and the records of one patient must not decide how all others are clipped.

    Args:
        weight: [p, d].
        bias: [p], or None.
        inputs: [P, S, d].
        gradients: [P, S, p].
        most: records of the patient who has most; S is so many times the uses a record.
    """
    steps, wide, tall = inputs.shape[1], inputs.shape[2], gradients.shape[2]
    if steps // most * (wide + tall) > wide * tall:
        values = {weight: _products(gradients, inputs).flatten(1)}
        if bias is not None:
            values[bias] = gradients.sum(1)
        return instantiated(values)
    at_once = max(1, BLOCK // (steps * (wide + tall)))
    pieces = [
        _ghost_norms(x, g, bias is not None)
        for x, g in zip(inputs.split(at_once), gradients.split(at_once), strict=True)
    ]
    squares, scale = (torch.cat(column) for column in zip(*pieces, strict=True))

    def weighted(factors: Factors) -> Gradients:
        return _weighted_product(weight, bias, factors.kept(inputs), factors.kept(gradients), factors)

    return Part(squares=squares, scale=scale, weighted=weighted)


def _products(gradients: Tensor, inputs: Tensor) -> Tensor:
    """[P, p, d]: each patient's own matrix, of rows that are whole lines of memory (see `padding`)."""
    tall, wide = gradients.shape[2], inputs.shape[2]
    filled = (functional.pad(values, (0, -values.shape[2] % LINE)) for values in (gradients, inputs))
    left, right = (values.contiguous() for values in filled)
    return torch.bmm(left.transpose(1, 2), right)[:, :tall, :wide]


def _ghost_norms(inputs: Tensor, gradients: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Squared norms and scales, both [P], by the Gram trick."""
    products = _gram(inputs).add_(bias).mul_(_gram(gradients))
    return products.sum((1, 2)).clamp_(min=0), products.diagonal(dim1=1, dim2=2).sqrt().sum(1)


def _gram(rows: Tensor) -> Tensor:
    """[P, S, d] to [P, S, S] inner products in float64."""
    exact = rows.to(torch.float64, memory_format=torch.contiguous_format)
    return torch.bmm(exact, exact.transpose(1, 2))


def _weighted_product(
    weight: Tensor, bias: Tensor | None, inputs: Tensor, gradients: Tensor, factors: Factors
) -> Gradients:
    """The weighted sum over patients of G, as one product over all patients and steps."""
    each = factors.patients.view(-1, 1, 1)
    if gradients.stride(0) < gradients.stride(1):
        # A recurrence keeps time first: rows are joined in the order in which they lie.
        inputs, gradients, each = (values.transpose(0, 1) for values in (inputs, gradients, each))
    # The factor goes to the narrower of the two.
    narrow = inputs.shape[2] < gradients.shape[2]
    left, right = (gradients, inputs * each) if narrow else (gradients * each, inputs)
    joined = left.flatten(0, 1)
    result = {weight: joined.t() @ right.flatten(0, 1)}
    if bias is not None:
        result[bias] = joined.t() @ each.expand_as(gradients[:, :, :1]).flatten() if narrow else joined.sum(0)
    return result


def linear(layer: nn.Linear, uses: Sequence[Use], patients: Patients) -> Part:
    """nn.Linear over any number of leading axes after the record's."""
    inputs, gradients = sequences(uses, patients)
    return matrix(layer.weight, layer.bias, inputs, gradients, patients.most)


def sequences(uses: Sequence[Use], patients: Patients) -> tuple[Tensor, Tensor]:
    """All uses one after the other: [P, S, d] and [P, S, p]."""
    inputs = [patients.sequence(_steps(x)) for x, _ in uses]
    gradients = [patients.sequence(_steps(g)) for _, g in uses]
    return _joined(inputs), _joined(gradients)


def _steps(values: Tensor) -> Tensor:
    """[R, ..., F] to [R, S, F]."""
    return values if values.ndim == 3 else values.reshape(len(values), -1, values.shape[-1])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def embedding(layer: nn.Embedding, uses: Sequence[Use], patients: Patients) -> Part:
    """nn.Embedding: gradients of equal tokens add up before the norm."""
    tokens = _joined([x.reshape(len(x), -1) for x, _ in uses])
    gradients = _joined([_steps(g) for _, g in uses])
    if layer.padding_idx is not None:
        gradients = torch.where((tokens == layer.padding_idx).unsqueeze(2), 0.0, gradients)
    if len(layer.weight) <= 2 * tokens.shape[1]:
        return _small_embedding(layer, tokens, gradients, patients)
    # Rows that only fill up a patient's records have token -1 and no gradient.
    tokens = patients.sequence(tokens.unsqueeze(2) + 1)[:, :, 0] - 1
    gradients = patients.sequence(gradients)
    same = tokens.unsqueeze(1) == tokens.unsqueeze(2)
    products = torch.where(same, _gram(gradients), 0.0)

    def weighted(factors: Factors) -> Gradients:
        rows = factors.kept(gradients) * factors.patients.view(-1, 1, 1)
        total = torch.zeros_like(layer.weight)
        return {layer.weight: total.index_add_(0, tokens.clamp(min=0).flatten(), rows.flatten(0, 1))}

    scale = products.diagonal(dim1=1, dim2=2).sqrt().sum(1)
    return Part(squares=products.sum((1, 2)).clamp_(min=0), scale=scale, weighted=weighted)


def _small_embedding(layer: nn.Embedding, tokens: Tensor, gradients: Tensor, patients: Patients) -> Part:
    """The rule for a table that is not larger than what one patient reads of it: its gradient itself."""
    rows, width = layer.weight.shape
    start = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * rows
    values = torch.zeros(len(tokens) * rows, width, dtype=gradients.dtype, device=gradients.device)
    values.index_add_(0, (start + tokens).flatten(), gradients.flatten(0, 1))
    return instantiated({layer.weight: patients.total(values.view(len(tokens), -1))})


def normalisation(layer: nn.GroupNorm | nn.LayerNorm, uses: Sequence[Use], patients: Patients) -> Part:
    """The affine part of GroupNorm and LayerNorm; their statistics are of one record."""
    kinds = [_group_norm(layer, *use) if isinstance(layer, nn.GroupNorm) else _layer_norm(layer, *use) for use in uses]
    values: Gradients = {layer.weight: patients.total(_added([weight for weight, _ in kinds]))}
    if layer.bias is not None:
        values[layer.bias] = patients.total(_added([bias for _, bias in kinds]))
    return instantiated(values)


def _added(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _group_norm(layer: nn.GroupNorm, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in weight and bias, [R, C] each."""
    normal = functional.group_norm(x, layer.num_groups, eps=layer.eps)
    if x.ndim == 2:
        return g * normal, g
    return (g * normal).flatten(2).sum(2), g.flatten(2).sum(2)


def _layer_norm(layer: nn.LayerNorm, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in weight and bias, [R, numel] each."""
    normal = functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    shape = (len(x), -1, layer.weight.numel())
    return (g * normal).reshape(shape).sum(1), g.reshape(shape).sum(1)


def convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, uses: Sequence[Use], patients: Patients) -> Part:
    """nn.Conv1d, 2d, 3d with zero padding, any stride, dilation and groups."""
    values = {layer.weight: patients.total(_added([_record_kernels(layer, x, g) for x, g in uses]))}
    if layer.bias is not None:
        values[layer.bias] = patients.total(_added([g.flatten(2).sum(2) for _, g in uses]))
    return instantiated(values)


def _record_kernels(layer: Any, x: Tensor, g: Tensor) -> Tensor:
    """[R, numel of weight]: the kernel's gradient of each record."""
    if x.ndim == 3 and layer.groups == 1:
        return _by_windows(layer, x, g)
    # As if the records were groups of channels of one record: faster than patches or a loop over records.
    records, none = len(x), [0] * len(layer.stride)
    weight = layer.weight.repeat(records, *[1] * (layer.weight.ndim - 1))
    settings = (layer.stride, layer.padding, layer.dilation, False, none, records * layer.groups)
    inputs, gradients = (values.flatten(0, 1).unsqueeze(0) for values in (x, g))
    one = torch.ops.aten.convolution_backward
    kernels: Tensor = one(gradients, inputs, weight, None, *settings, (False, True, False))[1]
    return kernels.view(records, -1)


def _by_windows(layer: nn.Conv1d, x: Tensor, g: Tensor) -> Tensor:
    """A convolution over time is a matrix over windows, which are few enough to be copied."""
    padded = functional.pad(x, (layer.padding[0],) * 2).contiguous()  # type: ignore[arg-type]
    record, channel, _ = padded.stride()
    size = (len(x), g.shape[2], x.shape[1], layer.kernel_size[0])
    windows = padded.as_strided(size, (record, layer.stride[0], channel, layer.dilation[0]))
    return torch.bmm(g, windows.flatten(2)).flatten(1)


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
