"""The one thing that a site tells of how well a model does: a noised table of counts, for a released model only.

Guarantee: a patient is in at most one cell of each table, whatever the records hold; every cell has discrete Laplace
noise. The model is public or came out of the ledger, so that a table says nothing of the training patients that was
not paid for: neither by its parameters, nor by a prior of the training labels, nor by who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapweave.client.ledger import Ledger
from gapweave.client.preparation import first_records
from gapweave.client.state import Groups, RoundState, to_tensors
from gapweave.shared.config import Study
from gapweave.shared.constants import Constants
from gapweave.shared.errors import RefusedError
from gapweave.shared.model import MultimodalModel, load_groups
from gapweave.shared.objective import probabilities
from gapweave.shared.privacy.events import PrivacyEvent
from gapweave.shared.privacy.once import problems
from gapweave.shared.schema import Batch
from gapweave.shared.tables import BINS, bin_of
from gapweave.shared.tensorfile import Arrays


class ReleasedModel:
    """A model whose every parameter and constant is public or came out of the ledger.

    It is the only type of model that `score_table` takes. Local, fine-tuned and baseline models are of other types:
    there is no way from them to this one.

    Args:
        study: what all sites agree on.
        initial: the public initial parameters of the site's groups.
        trained: the site after its last round, whose noised steps the ledger holds.
        received: the final shared groups, from the server.
        constants: released by `Preparation`, or public.
        ledger: that must hold the charge of the last round.

    Raises:
        RefusedError: when it does not.
    """

    def __init__(
        self,
        study: Study,
        *,
        initial: Groups,
        trained: RoundState,
        received: Arrays,
        constants: Constants,
        ledger: Ledger,
    ) -> None:
        if not ledger.view.charged(trained.request):
            raise RefusedError(
                "the ledger does not hold the training of this model", remedy="Evaluate a run of this ledger only"
            )
        self.study = study
        held = [group.removeprefix("encoder/") for group in initial if group.startswith("encoder/")]
        self._model = MultimodalModel(study, held, constants)
        load_groups(self._model, {**initial, **to_tensors(trained.private), **to_tensors(received)})

    def scores(self, record: Batch) -> Tensor:
        """[K] probabilities of one record, of class 1 for binary, else of each class or label."""
        with torch.no_grad():
            logits = self._model(record.inputs, record.present, record.present).logits
        found = probabilities(logits, self.study.task.kind)[0]
        return found[1:] if self.study.task.kind == "binary" else found


def score_table(model: ReleasedModel, test: Batch) -> NDArray[np.int64]:
    """Count patients by label and score bin; not yet noised.

    A patient's index record is the first one with any modality, in the order of the site's file; its labels do not
    choose it. Each record is scored alone: a row of a matrix product may be rounded differently beside others, and a
    score at a bin's edge would then depend on who else is there.

    Args:
        model: to be scored; a released one.
        test: the test patients.

    Returns:
        [K, 2, BINS]: K two-class problems; a patient is in at most one cell of each.

    Raises:
        TypeError: for any other type of model.
    """
    if not isinstance(model, ReleasedModel):
        raise TypeError(f"only a released model may be scored for release, not a {type(model).__name__}")
    counts = np.zeros((problems(model.study), 2, BINS), np.int64)
    for row in first_records(test, test.present.any(1)).tolist():
        record = test.rows(torch.tensor([row]))
        bins = bin_of(model.scores(record).double().numpy())
        for at, place in enumerate(bins):
            if record.label_mask[0, at]:
                counts[at, int(record.target[0, at] > 0.5), place] += 1
    return counts


def table_answer(event: PrivacyEvent, value: list[float] | None) -> Mapping[str, Any]:
    """What is sent: the cells as whole numbers, [K, 2, BINS], and the event that paid for them."""
    cells = np.array(value).astype(np.int64).reshape(event.steps, 2, BINS)
    return {"table": cells.tolist(), "event": event.to_dict()}
