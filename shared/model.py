"""The multimodal model of one site, and its parameter groups.

inputs -> encoders -> embeddings -> (null tokens, imputer) -> slots -> per-modality heads and fusion -> logits.
Absent rows are blanked before an encoder and replaced after it, so that neither output nor gradient depends on
them; every record goes through every held encoder (mask, never subset), so that nothing depends on who else is
in the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from gapweave.shared.config.modalities import ModalitySpec, PublicScore
from gapweave.shared.config.study import Study
from gapweave.shared.constants import Constants
from gapweave.shared.encoders import TwoStage, build_encoder
from gapweave.shared.features.flat import flat, of_norm
from gapweave.shared.features.flat import width as flat_width
from gapweave.shared.fusion import build_fusion
from gapweave.shared.imputers import build_imputer
from gapweave.shared.schema import Features, modalities


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a forward pass gives; the objective and the explanation read it, nothing reaches into the model.

    Attributes:
        logits: [B, K] of the fusion.
        modality_logits: [B, M, K]; 0 for modalities not used.
        embeddings: [B, M, d] of the encoders; 0 for modalities that the record lacks.
        imputed: [B, M, d], the imputer's estimate of every slot.
        present: [B, M] bool, modalities that the record has.
        used: [B, M] bool, modalities that entered; a subset of present.
        weights: [B, M] shares in the decision, or None.
        joint: [B, K] that training reads in place of `logits`, or None (see `Fused`).
        vote_weights: [B, M, C] of the losses of the modalities' votes, or None (see `Fused`).
        penalty: [B] that imputer and fusion add to the record's loss, or None.
        imputer_weight: of the loss of what was imputed.
    """

    logits: Tensor
    modality_logits: Tensor
    embeddings: Tensor
    imputed: Tensor
    present: Tensor
    used: Tensor
    weights: Tensor | None
    joint: Tensor | None = None
    vote_weights: Tensor | None = None
    penalty: Tensor | None = None
    imputer_weight: float = 1.0


def _head(study: Study, spec: ModalitySpec) -> nn.Module:
    width, outputs = study.model.embedding, study.task.outputs
    if not study.model.linear_path:
        return nn.Linear(width, outputs)
    head = WideHead(width, outputs, flat_width(spec))
    if isinstance(spec, PublicScore):
        with torch.no_grad():  # its features are the scaled score, times the norm, and the observed flag
            head.wide.weight[:, 0] = spec.start / (study.model.feature_norm or 1.0)
    return head


class WideHead(nn.Module):
    """A modality's head that reads its features beside their embedding: W x + V e, with W = 0 at first but for scores.

    What an embedding squashes or forgets a small cohort's best predictor, a linear one, still sees (Cheng et al. 2016,
    arXiv 1606.07792). It belongs to the head, so that the policy `heads` shares it.

    Args:
        embedding: width of e.
        outputs: K.
        features: width of x.
    """

    def __init__(self, embedding: int, outputs: int, features: int) -> None:
        super().__init__()
        self.deep = nn.Linear(embedding, outputs)
        self.wide = nn.Linear(features, outputs, bias=False)
        nn.init.zeros_(self.wide.weight)

    def forward(self, embedded: Tensor, features: Tensor) -> Tensor:
        """[B, d] and [B, F] -> [B, K]."""
        logits: Tensor = self.deep(embedded) + self.wide(features)
        return logits


class MultimodalModel(nn.Module):
    """The model of a site that holds some of a study's modalities.

    Args:
        study: what all sites agree on.
        held: names of the modalities that the site holds; it has encoders and heads for these only.
        constants: the site's prior and scaling; may be set later, before the first use.
    """

    def __init__(self, study: Study, held: Collection[str], constants: Constants | None = None) -> None:
        super().__init__()
        self.constants = constants or Constants()
        self.order = study.order
        self.held = tuple(name for name in study.order if name in held)
        width, outputs = study.model.embedding, study.task.outputs
        by_name = {modality.name: modality for modality in modalities(study)}
        self.embedding, self.outputs = width, outputs
        self._linear_paths = dict(study.modalities) if study.model.linear_path else {}
        self._feature_norm = study.model.feature_norm
        self.encoders = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        for name in self.held:
            with _seeded(study.seed, f"encoder/{name}"):
                self.encoders[name] = build_encoder(by_name[name], width)
            with _seeded(study.seed, f"head/{name}"):
                self.heads[name] = _head(study, by_name[name].spec)
        with _seeded(study.seed, "imputer"):
            self.imputer = build_imputer(study)
        with _seeded(study.seed, "fusion"):
            self.fusion = build_fusion(study)

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor, used: Tensor) -> Outputs:
        """Predict.

        Args:
            inputs: [B, ...] by held modality.
            present: [B, M] bool; False for modalities not held.
            used: [B, M] bool, a subset of present: what may inform the prediction.

        Returns:
            The outputs; `logits` depend on the modalities used only.
        """
        ready = self.ready(inputs, present)
        embeddings = self.embed(ready, present)
        return self.decide(embeddings, present, used, self.votes(embeddings, ready))

    def decide(self, embeddings: Tensor, present: Tensor, used: Tensor, votes: Tensor) -> Outputs:
        """Predict from embeddings and votes.

        Args:
            embeddings: [B, M, d], as `embed` gives them.
            present: [B, M] bool.
            used: [B, M] bool, a subset of present.
            votes: [B, M, K], as `votes` gives them.
        """
        visible = used.unsqueeze(-1)
        votes = torch.where(visible, votes, 0.0)
        imputed = self._imputed(embeddings, used)
        fused = self.fusion(self._slots(embeddings, imputed, used), used, votes)
        return Outputs(
            logits=self.constants.logits(fused.logits),
            modality_logits=self._with_prior(votes, visible),
            embeddings=embeddings,
            imputed=imputed,
            present=present,
            used=used,
            weights=fused.weights,
            joint=None if fused.joint is None else self.constants.logits(fused.joint),
            vote_weights=fused.vote_weights,
            penalty=_sum_of(fused.penalty, self.imputer.cycle(embeddings, imputed, used)),
            imputer_weight=self.imputer.weight,
        )

    def _with_prior(self, votes: Tensor, visible: Tensor) -> Tensor:
        return torch.where(visible, self.constants.logits(votes), votes) if self.constants.offset else votes

    def joint(self, embeddings: Tensor, used: Tensor, votes: Tensor) -> Tensor:
        """[B, K]: only what training reads of the fusion, for other modalities than those of the prediction.

        Args:
            embeddings: [B, M, d].
            used: [B, M] bool; a row without any has some finite answer.
            votes: [B, M, K], of the modalities used at least.
        """
        imputed = self._imputed(embeddings, used) if self.fusion.reads_slots else embeddings
        slots = self._slots(embeddings, imputed, used)
        fused = self.fusion(slots, used, torch.where(used.unsqueeze(-1), votes, 0.0))
        logits = fused.logits if fused.joint is None else fused.joint
        if fused.penalty is not None:
            # Per-patient gradients from hooks pair each use of a layer with a backward through it.
            logits = logits + 0 * fused.penalty.unsqueeze(1)
        return self.constants.logits(logits)

    def _imputed(self, embeddings: Tensor, used: Tensor) -> Tensor:
        tokens = self.imputer.tokens(len(used))
        imputed: Tensor = self.imputer(_either(used, embeddings, tokens), used)
        return imputed

    def _slots(self, embeddings: Tensor, imputed: Tensor, used: Tensor) -> Tensor:
        return _either(used, embeddings, imputed) if self.fusion.reads_slots else embeddings

    @cached_property
    def named(self) -> dict[str, nn.Parameter]:
        """All parameters by name: walking the modules at every step would take a third of a small step."""
        return dict(self.named_parameters())

    @cached_property
    def grouped(self) -> dict[str, dict[str, nn.Parameter]]:
        """All parameters by group and name within it."""
        result: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in self.named.items():
            group, key = group_of(name)
            result.setdefault(group, {})[key] = parameter
        return result

    def features(self, inputs: Mapping[str, Tensor], present: Tensor) -> Features:
        """What encoders read: absent rows blanked, the site's constants applied, parameter-free features taken.

        Nothing of it changes in training, so a site does it once for all its records.

        Args:
            inputs: [B, ...] by held modality.
            present: [B, M] bool.
        """
        result = Features()
        for position, name in enumerate(self.order):
            if name not in self.encoders:
                continue
            rows = present[:, position].view(-1, *[1] * (inputs[name].ndim - 1))
            values = self.constants.inputs(name, torch.where(rows, inputs[name], 0.0))
            encoder = self.encoders[name]
            result[name] = encoder.features(values) if isinstance(encoder, TwoStage) else values
            if name in self._linear_paths:
                result[_path(name)] = self._beside(self._linear_paths[name], values)
        return result

    def _beside(self, spec: ModalitySpec, values: Tensor) -> Tensor:
        features = flat(spec, values)
        return features if self._feature_norm is None else of_norm(spec, features, self._feature_norm)

    def ready(self, inputs: Mapping[str, Tensor], present: Tensor) -> Features:
        """The features of a batch, taken now if they were not before."""
        return inputs if isinstance(inputs, Features) else self.features(inputs, present)

    def embed(self, ready: Features, present: Tensor) -> Tensor:
        """[B, M, d]: what the encoders say; 0 for modalities that a record lacks."""
        columns = []
        for name in self.order:
            if name not in self.encoders:
                columns.append(torch.zeros(len(present), self.embedding, device=present.device))
                continue
            encoder = self.encoders[name]
            columns.append(encoder.embed(ready[name]) if isinstance(encoder, TwoStage) else encoder(ready[name]))
        return torch.stack(columns, dim=1) * present.unsqueeze(-1)

    def votes(self, embeddings: Tensor, ready: Features) -> Tensor:
        """[B, M, K]: logits of the modalities' own heads, without the site's prior; of those not used, to be masked."""
        votes = []
        for at, name in enumerate(self.order):
            if name not in self.heads:
                votes.append(embeddings.new_zeros(len(embeddings), self.outputs))
                continue
            beside = (ready[_path(name)],) if name in self._linear_paths else ()
            votes.append(self.heads[name](embeddings[:, at], *beside))
        return torch.stack(votes, dim=1)


def _either(used: Tensor, embeddings: Tensor, others: Tensor) -> Tensor:
    """[B, M, d]: embeddings of the modalities used, elsewhere the others, exactly.

    As a product, whose backward costs half of a choice's; so both have to be finite, and they are: the inputs of absent
    modalities were blanked before an encoder read them.
    """
    return torch.lerp(others, embeddings, used.unsqueeze(-1).to(embeddings.dtype))


def _path(modality: str) -> str:
    """Where `Features` hold what the linear path of a modality reads; no modality has a slash in its name."""
    return f"{modality}/flat"


def _sum_of(*parts: Tensor | None) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.stack(found).sum(0) if found else None


@contextmanager
def _seeded(seed: int, group: str) -> Iterator[None]:
    """Initialise one group from the study's seed and the group's name.

    So a group starts the same at every site, whichever other groups the site holds.
    """
    digest = hashlib.sha256(f"{seed}/{group}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also queue a call, with a traceback, for every kind of accelerator.
        torch.default_generator.manual_seed(int.from_bytes(digest[:7], "big"))
        yield


def group_of(parameter: str) -> tuple[str, str]:
    """The parameter group of a tensor, and its name within the group.

    >>> group_of("encoders.labs.wide.weight"), group_of("imputer.null.weight")
    (('encoder/labs', 'wide.weight'), ('imputer', 'null.weight'))
    """
    part, _, rest = parameter.partition(".")
    if part in ("encoders", "heads"):
        modality, _, rest = rest.partition(".")
        return f"{part.removesuffix('s')}/{modality}", rest
    return part, rest


def groups(model: MultimodalModel) -> dict[str, dict[str, Tensor]]:
    """Parameters by group: `encoder/<m>`, `head/<m>`, `imputer`, `fusion`; each tensor is in exactly one."""
    return {group: {key: value.detach() for key, value in part.items()} for group, part in model.grouped.items()}


def load_groups(model: MultimodalModel, values: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Overwrite the given groups.

    Raises:
        KeyError: for a group or tensor that the model does not have.
    """
    with torch.no_grad():
        for group, tensors in values.items():
            for key, value in tensors.items():
                model.grouped[group][key].copy_(value)


def shared_groups(study: Study, names: Collection[str]) -> list[str]:
    """Those of the named groups that leave a site under the study's policy, sorted."""
    return sorted(name for name in names if study.sharing.of(name) != "local")
