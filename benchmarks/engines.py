"""Other people's ways to clip per record, for comparison: one record a patient, no noise."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from gapweave.client.gradients import Gradient
from gapweave.shared.errors import UsageError
from gapweave.shared.model import MultimodalModel
from gapweave.shared.objective import record_losses
from gapweave.shared.schema import Batch

BOUND = 1.0


def with_twins(model: MultimodalModel) -> MultimodalModel:
    """A copy with GRU, LSTM and attention replaced by those that a user of Opacus has to take; other layers stay."""
    from opacus.validators import ModuleValidator

    fixed = ModuleValidator.fix(model)
    assert isinstance(fixed, MultimodalModel)
    return fixed


class GhostEngine:
    """Opacus' ghost clipping: norms from one backward, the clipped sum from a second."""

    sensitivity = BOUND

    def __init__(self, model: MultimodalModel) -> None:
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
            GradSampleModuleFastGradientClipping,
        )
        from opacus.validators import ModuleValidator

        if ModuleValidator.validate(model, strict=False):
            raise UsageError("Opacus refuses a layer", where="bench", remedy="none")
        self.names = dict(model.named_parameters())
        self.module = GradSampleModuleFastGradientClipping(
            model, batch_first=True, loss_reduction="sum", max_grad_norm=BOUND, use_ghost_clipping=True
        )

    def sum(self, batch: Batch, used: Tensor, objective: object = None) -> Gradient:
        """The clipped sum, of the plain loss."""
        self.module.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses = record_losses(
                self.module(batch.inputs, batch.present, used), batch.target, batch.label_mask, "binary"
            )
            self.module.enable_hooks()
            losses.sum().backward(retain_graph=True)
            factor = self.module.get_clipping_coef().detach()
            self.module.disable_hooks()
            self.module.zero_grad(set_to_none=True)
            (factor * losses).sum().backward()
        self.module.enable_hooks()
        return {name: parameter.grad for name, parameter in self.names.items() if parameter.grad is not None}


class VmapEngine:
    """torch.func: vmap over records of the gradient of one record's loss."""

    sensitivity = BOUND

    def __init__(self, model: MultimodalModel) -> None:
        self.model = model
        self.names = {name: parameter.detach() for name, parameter in model.named_parameters()}
        each = torch.func.vmap(torch.func.grad(self._loss), in_dims=(None, 0, 0, 0, 0, 0), randomness="error")
        self.each = each

    def _loss(
        self, parameters: Gradient, inputs: Gradient, present: Tensor, used: Tensor, target: Tensor, mask: Tensor
    ) -> Tensor:
        one = {name: values.unsqueeze(0) for name, values in inputs.items()}
        outputs = torch.func.functional_call(self.model, parameters, (one, present.unsqueeze(0), used.unsqueeze(0)))
        return record_losses(outputs, target.unsqueeze(0), mask.unsqueeze(0), "binary")[0]

    def sum(self, batch: Batch, used: Tensor, objective: object = None) -> Gradient:
        """The clipped sum, of the plain loss."""
        with warnings.catch_warnings():
            # Where vmap falls back to a loop over records: the times show it.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found = self.each(self.names, dict(batch.inputs), batch.present, used, batch.target, batch.label_mask)
        norms = torch.stack([value.flatten(1).norm(dim=1) for value in found.values()]).norm(dim=0)
        factor = (BOUND / norms.clamp(min=1e-12)).clamp(max=1.0)
        return {name: (factor @ value.flatten(1)).view(value.shape[1:]) for name, value in found.items()}
