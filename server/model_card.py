"""RUN/model: the shared groups and what a reader has to know of them."""

from __future__ import annotations

from gapweave.server.peers import Peer
from gapweave.shared import __version__, tensorfile
from gapweave.shared.config.study import Study
from gapweave.shared.rundir import RunDirectory
from gapweave.shared.tensorfile import Arrays


def save_model(directory: RunDirectory, study: Study, groups: Arrays, peers: dict[str, Peer]) -> None:
    """Write the final shared groups (safetensors, never pickle), a card and the study."""
    directory.model.mkdir(exist_ok=True)
    note = {"study": study.sha256, "gapweave_version": __version__}
    (directory.model / "shared.safetensors").write_bytes(tensorfile.dump(groups, note))
    (directory.model / "study.yaml").write_text(study.to_yaml(), encoding="utf-8")
    (directory.model / "README.md").write_text(_card(study, groups, peers), encoding="utf-8")


def _card(study: Study, groups: Arrays, peers: dict[str, Peer]) -> str:
    held = "\n".join(
        f"- {name}: {', '.join(peer.modalities)}" for name, peer in sorted(peers.items()) if peer.last_round
    )
    sizes = "\n".join(
        f"- `{name}`: {sum(value.size for value in part.values())}" for name, part in sorted(groups.items())
    )
    privacy = (
        f"Patient-level differential privacy, target epsilon {study.privacy.epsilon:g} at each site."
        if study.privacy.enabled
        else "Trained WITHOUT privacy: do not distribute."
    )
    return f"""# {study.name}

Predicts {", ".join(study.task.labels)} ({study.task.kind}) from {", ".join(study.order)}.
{privacy}
Written by Gapweave {__version__}; study hash {study.sha256}.
This folder holds the shared parameter groups only. Each site keeps its whole model under its own state folder.
Not a medical device: judge it on your own patients before any use.

## Sites
{held}

## Parameters
{sizes}
"""
