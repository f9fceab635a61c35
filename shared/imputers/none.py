"""No imputation: the null token stays in the slot."""

from __future__ import annotations

from torch import Tensor

from gapweave.shared.imputers import IMPUTERS, Imputer


@IMPUTERS.register("none")
class NullToken(Imputer):
    """Leaves the learned null token where a modality is missing."""

    def forward(self, embeddings: Tensor, used: Tensor) -> Tensor:
        """Return the embeddings as they are."""
        return embeddings
