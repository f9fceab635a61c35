"""What the server knows of the sites."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gapweave.shared.errors import DataError
from gapweave.shared.privacy.head import Head

NO_NODE = 0
"""Node of a site that has not answered this process of the server."""
INTERNAL = "InternalError"
"""What a site calls an error that is none of ours: a graphics card without memory, say."""
PATIENCE = 3
"""Rounds without a break in which a site may have one."""


@dataclass(kw_only=True)
class Peer:
    """What the server knows of one site.

    Attributes:
        site: its name.
        node: Flower's id of it, in this process of the server.
        status: ok, refused, failed or late.
        reason: the site's fixed text, when it is not ok.
        modalities: that it declares.
        groups: that it sends.
        rounds: that its cap allows.
        plan: its noise, sampling rate and n_hat.
        last_round: the last round that it took part in.
        ledger: where its ledger stood when it was last heard; told to it at the next handshake.
        agreement: how its updates agreed with the others' so far.
        failures: rounds without a break in which it failed at its own work.
    """

    site: str
    node: int = NO_NODE
    status: str = "ok"
    reason: str = ""
    modalities: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    rounds: int = 0
    plan: dict[str, Any] = field(default_factory=dict)
    last_round: int = 0
    ledger: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, Any] = field(default_factory=dict)
    failures: int = 0

    @property
    def patients(self) -> int:
        """The public number of training patients that the site stated; 1 for anything else."""
        stated = self.plan.get("n_hat")
        return stated if type(stated) is int and stated >= 1 else 1

    def gives_up(self, error: object) -> bool:
        """Whether a site that failed is asked no more: each round that fails at its own work may cost it budget.

        Args:
            error: the class of it that the site told; None for one of the transport.
        """
        if error != INTERNAL:
            return error == DataError.__name__
        self.failures += 1
        return self.failures >= PATIENCE

    def remember(self, ledger: Any) -> None:
        """Keep where the site's ledger stands; anything of another form is no memory."""
        if Head.from_dict(ledger) is not None:
            self.ledger = ledger
