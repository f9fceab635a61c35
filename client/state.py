"""What a site keeps of a run: private parameters, optimiser state, and the bytes of its last reply.

All of it is one safetensors file per round, replaced in one rename: after a crash the site stands either before
the round or after it with the reply ready to be sent again, never between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gapweave.shared import tensorfile
from gapweave.shared.errors import GapweaveError, RefusedError
from gapweave.shared.files import intact, private_folder, write_atomically
from gapweave.shared.privacy.head import Head
from gapweave.shared.tensorfile import Arrays

if TYPE_CHECKING:  # who asks a site for its status need not wait for torch
    from torch import Tensor

Groups = dict[str, dict[str, "Tensor"]]
"""Parameter groups: group -> name -> tensor."""


def to_arrays(groups: Mapping[str, Mapping[str, Tensor]]) -> Arrays:
    """Copy tensors to float32 arrays."""
    return {
        group: {name: tensor.detach().cpu().numpy().copy() for name, tensor in part.items()}
        for group, part in groups.items()
    }


def to_tensors(arrays: Mapping[str, Mapping[str, Any]]) -> Groups:
    """Copy arrays to tensors."""
    import torch

    return {
        group: {name: torch.from_numpy(value.copy()) for name, value in part.items()} for group, part in arrays.items()
    }


@dataclass(frozen=True, kw_only=True)
class RoundState:
    """A site after one round.

    Attributes:
        round: number of the last round done; 0 before the first.
        request: hash of that round's request.
        event: the privacy event that covers the reply.
        ledger: where the ledger stood when the reply was made; it goes with the reply.
        private: parameter groups that stay at the site.
        momentum: optimiser state by parameter group.
        reply: noised updates of the shared groups, as sent; empty where the same request gives them again.
    """

    round: int = 0
    request: str = ""
    event: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    private: Arrays = field(default_factory=dict)
    momentum: Arrays = field(default_factory=dict)
    reply: Arrays = field(default_factory=dict)


class RunFolder:
    """STATE/runs/<run>: a site's files of one run.

    Args:
        state: the site's state folder.
        run: our own id of the run.
        durable: whether what is written must survive a power cut: not what a simulation can compute again.

    Raises:
        RefusedError: for an id that is no plain name: it comes in a message, and must not lead out of the folder.
    """

    def __init__(self, state: Path, run: str, *, durable: bool = True) -> None:
        self._durable = durable
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", run):
            raise RefusedError("the id of the run is no plain name", remedy="Use letters, digits, '_', '.' and '-'")
        self.path = state / "runs" / run
        self._round = self.path / "round.safetensors"

    def load(self) -> RoundState:
        """The state after the last round done."""
        if not self._round.exists():
            return RoundState()
        with intact(self._round):
            arrays, note = tensorfile.parse(self._round.read_bytes())
            parts: dict[str, Arrays] = {"private": {}, "momentum": {}, "reply": {}}
            for key, tensors in arrays.items():
                part, _, group = key.partition(":")
                parts[part][group] = tensors
            return RoundState(
                round=note["round"], request=note["request"], event=note["event"], ledger=note["ledger"], **parts
            )

    def save(self, state: RoundState) -> None:
        """Replace the state in one durable rename."""
        parts = {"private": state.private, "momentum": state.momentum, "reply": state.reply}
        arrays = {f"{part}:{group}": tensors for part, groups in parts.items() for group, tensors in groups.items()}
        note = {"round": state.round, "request": state.request, "event": state.event, "ledger": state.ledger}
        self._write(self._round, tensorfile.dump(arrays, note))

    def _write(self, file: Path, content: bytes) -> None:
        """Write a file; a run gets its folder with its first one, so that refused runs leave nothing.

        Raises:
            GapweaveError: when the disk does not take it; the file is then as it was.
        """
        try:
            if not self.path.is_dir():
                private_folder(self.path, durable=self._durable)
            write_atomically(file, content, durable=self._durable)
        except OSError as error:
            raise GapweaveError(
                f"the site's state cannot be written ({error.strerror or error})",
                where=str(file),
                remedy="Check the disk; nothing was released",
            ) from None

    def save_model(self, name: str, groups: Mapping[str, Mapping[str, Tensor]], card: Mapping[str, Any]) -> None:
        """Keep the whole model for prediction.

        Args:
            name: "model", or "finetuned" for the copy that never leaves.
            groups: all parameter groups.
            card: what `predict` needs beside them.
        """
        self._write(self.path / f"{name}.safetensors", tensorfile.dump(to_arrays(groups), card))

    def save_own(self, name: str, content: bytes) -> None:
        """Keep what only the site's own people read: models trained alone, the joining check."""
        self._write(self.path / name, content)

    def keep_study(self, canonical: str) -> None:
        """Remember the study that the handshake brought: later messages carry only its hash."""
        self._write(self.path / "study.json", canonical.encode())

    def check_study(self, canonical: str) -> None:
        """Refuse a second study under the id of a run: it would go on with the private parameters of the first.

        Raises:
            RefusedError: when the run began with another study.
        """
        if self.study() not in (None, canonical):
            raise RefusedError("this run began with another study", remedy="Start another run")

    def study(self) -> str | None:
        """The study of the handshake as JSON, if there was one."""
        file = self.path / "study.json"
        return file.read_text(encoding="utf-8") if file.exists() else None


def kept_heads(state: Path) -> list[Head]:
    """Where the ledger stood at the last round of each run that the state folder holds; a damaged file says nothing."""
    heads = []
    for file in sorted(state.glob("runs/*/round.safetensors")):
        with suppress(OSError, ValueError, KeyError, OverflowError, MemoryError):
            heads.append(Head.from_dict(tensorfile.read_note(file)["ledger"]))
    return [head for head in heads if head is not None]


def read_model(file: Path) -> tuple[Groups, dict[str, Any]]:
    """A kept model: its parameter groups and its card.

    Raises:
        GapweaveError: when there is none.
    """
    if not file.exists():
        raise GapweaveError(
            f"this run left no {file.stem} at this site",
            where=str(file.parent),
            remedy="Finish it with `gapweave resume`",
        )
    with intact(file):
        arrays, card = tensorfile.parse(file.read_bytes())
    return to_tensors(arrays), card
