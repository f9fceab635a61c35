"""The same noise in paired runs: what differs between two simulations of a seed is then what is varied, not luck.

Under noise a run's AUROC moves by .02 for no other reason than its noise; a difference of two runs with noise of their
own would need hundreds of pairs to be known to .005. Here a site samples the same patients and draws the same noise in
a round of all runs of a seed (common random numbers): each run is as private, and as noisy, as any.

Only for processes of a benchmark, which release nothing: the product has no such switch.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
from flwr.app import Message

from gapweave.shared import wire
from gapweave.shared.privacy import draws, noise
from gapweave.sites.simulate import run
from gapweave.sites.simulate.attacks import HostileGrid


class PairedGrid(HostileGrid):
    """Sites whose secret bits follow from the study's seed, the site, the request and the round."""

    def _answer(self, message: Message) -> Message:
        metadata = message.metadata
        number = wire.unpack(message.content)[0].get("round")
        key = f"{self._study.seed}/{metadata.dst_node_id}/{metadata.message_type}/{number}"
        digest = hashlib.sha256(key.encode()).digest()
        bits = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
        noise.os = draws.os = SimpleNamespace(urandom=bits.bytes)  # type: ignore[attr-defined]
        return super()._answer(message)


def pair() -> None:
    """Let every simulation with bad sites in this process draw so."""
    run.HostileGrid = PairedGrid  # type: ignore[attr-defined]
