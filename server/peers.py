"""What the server knows of the sites."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gapweave.shared.privacy.head import Head

NO_NODE = 0
"""Node of a site that has not answered this process of the server."""


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

    @property
    def patients(self) -> int:
        """The public number of training patients that the site stated; 1 for anything else."""
        stated = self.plan.get("n_hat")
        return stated if type(stated) is int and stated >= 1 else 1

    def remember(self, ledger: Any) -> None:
        """Keep where the site's ledger stands; anything of another form is no memory."""
        if Head.from_dict(ledger) is not None:
            self.ledger = ledger
