"""No imputation: the null token stays in the slot."""

from __future__ import annotations

from torch import Tensor

from gapweave.shared.imputers import IMPUTERS, Imputer


@IMPUTERS.register("none")
class NullToken(Imputer):
    """Leaves the learned null token where a modality is missing.

    Reference: none
    Form: one learned vector a modality, the same for every record
    Couples: nothing; the mean of a site's records, which others put there, would
    """

    def forward(self, embeddings: Tensor, used: Tensor) -> Tensor:
        """Return the embeddings as they are."""
        return embeddings
