"""The one thing that a site tells of how well a model does: a noised table of counts, for a released model only.

Guarantee: a patient is in at most one cell of each table, whatever the records hold; every cell has discrete Laplace
noise. The model is public or came out of the ledger, so that a table says nothing of the training patients that was
not paid for: neither by its parameters, nor by a prior of the training labels, nor by who else is in the batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
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

BLOCK = 16
"""Records that are scored together: more would leave most places empty where patients are few."""


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

    def scores(self, records: Batch) -> Tensor:
        """[R, K] probabilities, of class 1 for binary, else of each class or label."""
        with torch.no_grad():
            logits = self._model(records.inputs, records.present, records.present).logits
        found = probabilities(logits, self.study.task.kind)
        return found[:, 1:] if self.study.task.kind == "binary" else found


def score_table(model: ReleasedModel, test: Batch) -> NDArray[np.int64]:
    """Count patients by label and score bin; not yet noised.

    A patient's index record is the first one with any modality, in the order of the site's file; its labels do not
    choose it. A score depends on its record alone, to the last bit (`_blocks`).

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
    for block in _blocks(test, first_records(test, test.present.any(1)).tolist()):
        filled = block >= 0
        rows = torch.where(filled, block, block.max())  # what stands in an empty place is not looked at
        bins = bin_of(model.scores(test.rows(rows)).double().numpy())[filled.numpy()]
        known, truth = test.label_mask[block[filled]].numpy(), (test.target[block[filled]] > 0.5).long().numpy()
        problem = np.broadcast_to(np.arange(len(counts)), known.shape)
        np.add.at(counts, (problem[known], truth[known], bins[known]), 1)
    return counts


def _blocks(test: Batch, rows: Sequence[int]) -> Iterator[Tensor]:
    """The rows in blocks of so many places, each at the place that its content gives it; -1 where nobody is.

    A row of a matrix product may be rounded differently beside more or fewer others, or at another place among them;
    a score at a bin's edge would then depend on who else is there. What the others hold changes no bit of it.
    """
    places: list[list[int]] = [[] for _ in range(BLOCK)]
    for row in rows:
        places[_digest(test, row) % BLOCK].append(row)
    for there in zip_longest(*places, fillvalue=-1):
        yield torch.tensor(there)


def _digest(test: Batch, row: int) -> int:
    """A number that follows from what a model reads of a record."""
    digest = zlib.crc32(test.present[row].numpy().tobytes())
    for values in test.inputs.values():
        digest = zlib.crc32(values[row].numpy().tobytes(), digest)
    return digest


def table_answer(event: PrivacyEvent, value: list[float] | None) -> Mapping[str, Any]:
    """What is sent: the cells as whole numbers, [K, 2, BINS], and the event that paid for them."""
    cells = np.array(value).astype(np.int64).reshape(event.steps, 2, BINS)
    return {"table": cells.tolist(), "event": event.to_dict()}
