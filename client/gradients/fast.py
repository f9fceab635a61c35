"""The book-keeping engine: one forward, one backward that computes activation gradients only.

Each use of each layer is recorded with its input; the loss is differentiated once with respect to the recorded
outputs; norms and the weighted sum follow from both (`layers.py`). After Bu et al. 2023, "Differentially Private
Optimization on Large Model at Small Cost" (arXiv 2210.00038).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gapweave.client.gradients import Gradient, plain_objective
from gapweave.client.gradients.clipping import Grouping, clip_factors, grouped, together
from gapweave.client.gradients.composite import COMPOSITES, Product
from gapweave.client.gradients.layers import RULES, Gradients, Part, Single, Use, singles
from gapweave.client.gradients.padding import align, padded
from gapweave.client.gradients.patients import Factors, Patients
from gapweave.client.gradients.probe import probe_independence, synthetic
from gapweave.shared.errors import UsageError
from gapweave.shared.model import MultimodalModel
from gapweave.shared.objective import TaskKind
from gapweave.shared.schema import Batch
from gapweave.shared.schemes import Objective

Uses = dict[nn.Module | Product, list[Use]]
"""Of each layer, or product inside a layer."""

ROUNDING = 256
"""Rounding errors of a sum are taken as at most this many units of the sum of magnitudes (see `FastEngine`)."""
SLACK = 5e-4
"""Share by which rounding can exceed the clipping bound under that assumption; part of the declared sensitivity."""
ACTIVATIONS = 2**30
"""Bytes that a forward pass may keep for its backward; a larger batch is worked on in parts. A constant, not a share of
the memory that is free: parts differ in their last bits, and a run should not depend on what else the machine does."""

MOST_AT_ONCE = 1024
"""Records whose clipped gradients are summed in float32; sums of parts add up in float64. One of 4,000 patients changed
a float32 sum by up to 1.0004 times the bound, one of 64,000 by 1.0012."""


class FastEngine:
    """Per-patient clipping by book-keeping.

    Guarantee: as the package's, with sensitivity bound (1 + `SLACK`): the clip uses sqrt(n^2 + e^2) of each group of
    parameters, n the norm in float64 and e a bound of what float32 products can lose to cancellation.

    Args:
        model: updated in place by the caller between calls; its parameters are taken out of autograd.
        kind: of the task.
        bound: clipping bound of one patient's gradient over all parameters.
        grouping: which parameters are clipped together.

    Raises:
        UsageError: naming a layer that the engine does not know, with the ways out.
    """

    def __init__(self, model: MultimodalModel, kind: TaskKind, bound: float, grouping: Grouping = together) -> None:
        self.model, self.bound, self._plain = model, bound, plain_objective(kind)
        self.sensitivity = bound * (1 + SLACK)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._groups = [set(names) for names in grouped(self._names.values(), grouping)]
        self._tape: Recording | None = None
        align(model)
        for layer in _known_layers(model):
            (self._replace_forward if type(layer) in COMPOSITES else self._record)(layer)
        for parameter in self._names:
            parameter.requires_grad_(False)
        self._at_once: int | None = None

    def sum(self, batch: Batch, used: Tensor, objective: Objective | None = None) -> Gradient:
        """The sum of clipped per-patient gradients."""
        objective = objective or self._plain
        if len(batch) == 0:
            return {name: torch.zeros_like(parameter) for parameter, name in self._names.items()}
        if self._at_once is None:
            probe_independence(self.model, objective, batch)
            probe = synthetic(self.model, batch)
            fits = ACTIVATIONS * len(probe) // self._kept_for_backward(probe, objective)
            self._at_once = min(max(1, fits), MOST_AT_ONCE)
        if len(batch) <= self._at_once:
            return self._clipped_sum(batch, used, objective)
        total = {name: torch.zeros_like(parameter, dtype=torch.float64) for parameter, name in self._names.items()}
        for chosen in parts_of(batch, self._at_once):
            rows = torch.isin(batch.patient, chosen)
            for name, value in self._clipped_sum(batch.of_patients(chosen), used[rows], objective).items():
                total[name] += value
        return total

    def _clipped_sum(self, batch: Batch, used: Tensor, objective: Objective) -> Gradient:
        batch, used = padded(batch, used)
        patients = Patients(batch.patient, batch.patients)
        with torch.enable_grad(), self._recording() as tape, _naming_edits():
            losses = objective(self.model, batch, used)
            uses = tape.differentiate((torch.where(batch.weight > 0, losses, 0.0) * batch.weight).sum())
        with torch.no_grad():
            return self._combine([_parts(found, patients) for found in self._by_group(uses)], patients)

    def _kept_for_backward(self, probe: Batch, objective: Objective) -> int:
        """Bytes of all different tensors that a forward pass keeps, less parameters; at least 1."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._names}
        sizes: dict[int, int] = {}

        def note(kept: Tensor) -> Tensor:
            storage = kept.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return kept.detach()

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept)
        with torch.enable_grad(), self._recording(), _naming_edits(), hooks:
            losses = objective(self.model, probe, probe.present)
        del losses
        return max(1, sum(sizes.values()))

    @contextmanager
    def _recording(self) -> Iterator[Recording]:
        self._tape = Recording()
        try:
            yield self._tape
        finally:
            # Nodes of the graph hold the tape: what it holds of the graph would never be freed.
            self._tape.clear()
            self._tape = None

    def _record(self, layer: nn.Module) -> None:
        """While recording, a layer with a rule notes its uses."""
        plain = layer.forward

        def either(inputs: Tensor) -> Tensor:
            output = plain(inputs)
            return output if self._tape is None else self._tape.use(layer, inputs, output)

        layer.forward = either

    def _replace_forward(self, layer: nn.Module) -> None:
        """While recording, a composite layer runs as products that can be recorded."""
        prepare, forward = COMPOSITES[type(layer)]
        products, plain = prepare(layer), layer.forward

        def either(*arguments: Any, **keywords: Any) -> Any:
            if self._tape is None:
                return plain(*arguments, **keywords)
            return forward(layer, self._tape, products, *arguments, **keywords)

        layer.forward = either

    def _by_group(self, uses: Uses) -> list[Uses]:
        """The uses of each group; a layer's parameters are all of one."""
        owner = {key: self._names[cast(Tensor, key.weight)] for key in uses}
        return [{key: found for key, found in uses.items() if owner[key] in group} for group in self._groups]

    def _combine(self, groups: list[list[Part]], patients: Patients) -> Gradient:
        kind = next(iter(self._names))
        norms = torch.stack([_norms(parts, patients.count, kind) for parts in groups])
        each, keep = clip_factors(norms, self.bound)
        found: Gradients = {}
        for parts, factor in zip(groups, each.to(kind.dtype), strict=True):
            factors = Factors(factor, keep, patients)
            for part in parts:
                found |= part.weighted(factors)
        return {
            name: found[parameter] if parameter in found else torch.zeros_like(parameter)
            for parameter, name in self._names.items()
        }


def _norms(parts: list[Part], patients: int, kind: Tensor) -> Tensor:
    """[P] upper bounds of the norms of all parts' gradients together, float64; `kind` has the gradients' type."""
    squares = torch.zeros(patients, dtype=torch.float64, device=kind.device)
    scale = torch.zeros_like(squares)
    for part in parts:
        squares += part.squares
        if part.scale is not None:
            scale += part.scale
    lost = ROUNDING * torch.finfo(kind.dtype).eps * scale
    return (squares + lost.square()).sqrt()


class Recording:
    """The uses of one forward pass, and their output gradients."""

    def __init__(self) -> None:
        self._open: list[tuple[nn.Module | Product, Tensor, int, Tensor, int]] = []
        self._done: Uses = {}
        self.anchor = torch.empty(0, requires_grad=True)

    def use(self, key: nn.Module | Product, inputs: Tensor, output: Tensor) -> Tensor:
        """Remember one use; outputs of the first layers are made differentiable."""
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)
        self._open.append((key, inputs, inputs._version, output, output._version))
        return output

    def product(self, key: Product, inputs: Tensor) -> Tensor:
        """W x + b inside a composite layer, recorded."""
        return self.use(key, inputs, key(inputs))

    def past(self, key: Product, inputs: Tensor, gradients: Tensor) -> None:
        """A use that a composite layer differentiated itself."""
        self._done.setdefault(key, []).append((inputs, gradients))

    def differentiate(self, loss: Tensor) -> Uses:
        """Gradients of the loss in every recorded output; a use that does not reach the loss has none.

        Raises:
            UsageError: when a recorded tensor was changed in place, so that its record is wrong.
        """
        outputs = [self.anchor, *(use[3] for use in self._open)]
        _, *gradients = torch.autograd.grad(loss, outputs, allow_unused=True)
        for (key, kept, before, output, after), gradient in zip(self._open, gradients, strict=True):
            if kept._version != before or output._version != after:
                raise _edited(type(key).__name__)
            if gradient is not None:
                self._done.setdefault(key, []).append((kept, gradient))
        return self._done

    def clear(self) -> None:
        """Let go of all."""
        self._open, self._done = [], {}


@contextmanager
def _naming_edits() -> Iterator[None]:
    """Turn torch's own complaint about an edit in place into ours."""
    try:
        yield
    except RuntimeError as error:
        if "in-place" in str(error) or "inplace" in str(error):
            raise _edited("a layer") from None
        raise


def _edited(layer: str) -> UsageError:
    return UsageError(
        f"an input or output of {layer} is changed in place",
        where="study:model",
        remedy="Use the form that returns a new tensor, or privacy.engine: opacus",
    )


def _parts(uses: Uses, patients: Patients) -> list[Part]:
    """The rules of all layers; those that are used once a record share one."""
    parts, single = [], []
    for key, found in uses.items():
        if isinstance(key, Product):
            parts.append(key.part(found, patients))
        elif isinstance(key, nn.Linear) and len(found) == 1 and found[0][0].ndim == 2:
            inputs, gradients = found[0]
            single.append(Single(weight=key.weight, bias=key.bias, inputs=inputs, gradients=gradients))
        else:
            parts.append(RULES[type(key)](key, found, patients))
    return [*parts, singles(single, patients)] if single else parts


def _known_layers(model: nn.Module) -> list[nn.Module]:
    """Layers with parameters of their own, each of a type that has a rule.

    Raises:
        UsageError: for another layer, a tied parameter, or padding other than zeros.
    """
    layers: list[nn.Module] = []
    owners: dict[Tensor, nn.Module] = {}
    inside = {child for module in model.modules() if type(module) in COMPOSITES for child in module.children()}
    for name, module in model.named_modules():
        if module in inside:
            continue
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.modules.batchnorm._NormBase):
            raise _unknown(name, module, "mixes patients", "Use GroupNorm or LayerNorm")
        if not own:
            continue
        if type(module) not in RULES and type(module) not in COMPOSITES:
            raise _unknown(
                name, module, "has no book-keeping rule", "Use layers that it knows, or privacy.engine: opacus"
            )
        if getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(getattr(module, "padding", 0), str):
            raise _unknown(name, module, "pads other than by a number of zeros", "Pad before the layer")
        for parameter in own:
            if owners.setdefault(parameter, module) is not module:
                raise _unknown(name, module, "shares a parameter with another layer", "Use one layer twice instead")
        layers.append(module)
    return layers


def _unknown(name: str, module: nn.Module, why: str, remedy: str) -> UsageError:
    return UsageError(f"{type(module).__name__} at `{name}` {why}", where="study:model", remedy=remedy)


def parts_of(batch: Batch, records: int) -> list[Tensor]:
    """Positions of the patients of each part, in order: about that many records a part, no patient in two."""
    last = torch.cumsum(torch.bincount(batch.patient, minlength=batch.patients), 0)
    part = (last - 1).clamp(min=0) // records
    return [(part == number).nonzero()[:, 0] for number in part.unique()]
