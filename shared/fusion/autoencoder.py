"""Early fusions: all that is there through one code, from which it can be rebuilt."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from gapweave.shared.fusion import FUSIONS, Fused, Fusion, Shape
from gapweave.shared.fusion.concat import joined
from gapweave.shared.fusion.parts import Head, HiddenSettings, mean_used, present_only


class AutoencoderSettings(HiddenSettings):
    """The code, and how much rebuilding counts."""

    code: int = Field(8, ge=1, le=1024, description="width of the code")
    strength: float = Field(0.5, ge=0, le=100, description="weight of the error of rebuilding")


@FUSIONS.register("autoencoder")
class AutoencoderFusion(Fusion):
    """The decision is made from a code of everything that is there.

    Reference: Ngiam et al. 2011, "Multimodal Deep Learning" (ICML), bimodal deep autoencoder
    Form: z = tanh(E [v of all used, mask]), g(z); + strength times the mean over used m of |(D z)^m - v^m|^2 / d, v^m
        detached, so that embeddings do not shrink to what is easily rebuilt
    Couples: nothing; the paper trains the code before the decision, here both are trained in one private step
    """

    Settings = AutoencoderSettings
    stage = "early"
    reads_slots = False

    def __init__(self, shape: Shape, settings: AutoencoderSettings | None = None) -> None:
        super().__init__(shape)
        settings = settings or AutoencoderSettings()
        slots = shape.modalities * shape.embedding
        self.strength = settings.strength
        self.encode = nn.Linear(slots + shape.modalities, settings.code)
        self.decode = nn.Linear(settings.code, slots)
        self.head = Head(settings.code, shape.outputs, settings.hidden)

    def forward(self, slots: Tensor, used: Tensor, modality_logits: Tensor) -> Fused:
        """Encode and decide."""
        clean = present_only(slots, used)
        code = self.code(clean, used)
        penalty = self.strength * self.error(clean, used, code)
        return Fused(logits=self.head(code), weights=None, penalty=penalty)

    def code(self, clean: Tensor, used: Tensor) -> Tensor:
        """[B, M, d], 0 for modalities not used, to [B, code]."""
        return torch.tanh(self.encode(joined(clean, used)))

    def error(self, clean: Tensor, used: Tensor, code: Tensor) -> Tensor:
        """[B]: how badly the code rebuilds what was used."""
        rebuilt = self.decode(code).view_as(clean)
        return mean_used((rebuilt - clean.detach()).square().mean(-1), used)


@FUSIONS.register("denoising_autoencoder")
class DenoisingAutoencoderFusion(AutoencoderFusion):
    """The code has to rebuild a modality also when it does not see it.

    Reference: Vincent et al. 2008, "Extracting and Composing Robust Features with Denoising Autoencoders" (ICML)
    Form: as autoencoder, the error being the mean over used m of that of a code that does not see m: the corruption is
        a modality that is missing, and its mean is taken instead of a draw
    Couples: nothing
    """

    def error(self, clean: Tensor, used: Tensor, code: Tensor) -> Tensor:
        """The mean over what is hidden."""
        modalities = used.shape[1]
        errors = []
        for at in range(modalities):
            rest = used & (torch.arange(modalities, device=used.device) != at)
            errors.append(super().error(clean, used, self.code(present_only(clean, rest), rest)))
        return mean_used(torch.stack(errors, 1), used)


class VariationalSettings(AutoencoderSettings):
    """The prior's weight."""

    prior: float = Field(0.1, ge=0, le=100, description="weight of the divergence from the prior")


@FUSIONS.register("variational_autoencoder")
class VariationalAutoencoderFusion(AutoencoderFusion):
    """The code is a normal distribution; the decision is made from its mean.

    Reference: Kingma and Welling 2014, "Auto-Encoding Variational Bayes" (ICLR); of several modalities: Wu and Goodman
        2018, "Multimodal Generative Models for Scalable Weakly-Supervised Learning" (NeurIPS)
    Form: z normal with mean tanh(E [v of all used, mask]) and variance s^2 = sigmoid(S [..]), g(mean); + strength times
        (error of rebuilding + prior KL(z || standard normal)). D is linear, so that the error's mean over z is exact,
        |D mean - v|^2 + sum over k of s_k^2 |D_k|^2, and nothing is drawn
    Couples: nothing
    """

    Settings = VariationalSettings

    def __init__(self, shape: Shape, settings: VariationalSettings | None = None) -> None:
        settings = settings or VariationalSettings()
        super().__init__(shape, settings)
        self.prior = settings.prior
        self.spread = nn.Linear(self.encode.in_features, settings.code)

    def error(self, clean: Tensor, used: Tensor, code: Tensor) -> Tensor:
        """The expected error of rebuilding, and the divergence from the prior."""
        variance = torch.sigmoid(self.spread(joined(clean, used)))
        none = torch.zeros_like(code).unsqueeze(1)
        # Rows: no component of the code, then one spread after the other; the first is the bias.
        moved = self.decode(torch.cat([none, torch.diag_embed(variance.sqrt())], 1))
        columns = (moved[:, 1:] - moved[:, :1]).square().sum(1).view_as(clean)
        divergence = (code.square() + variance - 1 - variance.log()).sum(-1) / 2
        return super().error(clean, used, code) + mean_used(columns.mean(-1), used) + self.prior * divergence
