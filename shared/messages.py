"""What a server may ask of a site: one strict form for each message type.

A request holds these keys, of these types, and nothing else. A key that this version does not know is never ignored:
a server that sends `steps` or `n_hat` expects them to matter, and hears that it is not understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from gapweave.shared.config.base import StrictModel
from gapweave.shared.tensorfile import Arrays
from gapweave.shared.wire import ProtocolError


class Request(StrictModel):
    """What all requests carry; numbers and texts are taken as they are, never converted."""

    model_config = ConfigDict(strict=True)

    protocol: int = Field(description="version of the messages; `wire.unpack` has compared it")
    run: str = Field(description="our own id of the run")


class Prepare(Request):
    """The handshake."""

    study: str = Field(description="the whole study, as canonical JSON")
    echo: dict[str, str | int] | None = Field(None, description="the ledger's head that this site sent last")


class Train(Request):
    """One round; the shared groups come beside it, and with SCAFFOLD corrections of some of them."""

    study: str = Field(description="hash of the study that the handshake brought")
    round: int = Field(ge=1, description="from 1")


class Evaluate(Request):
    """How well the final model does, or the one after a round; its shared groups come beside it."""

    study: str = Field(description="hash of the study that the handshake brought")
    round: int = Field(ge=1, description="the last round done")
    look: bool = Field(False, description="on the way, after this round, and not at the end")


class Finish(Request):
    """The last message; the final shared groups come beside it."""

    study: str = Field(description="hash of the study that the handshake brought")
    round: int = Field(ge=1, description="the last round done")


CORRECTION = "correction/"
"""Before the name of a group: what is added to each of the site's steps of it."""


def as_corrections(arrays: Arrays) -> Arrays:
    """Corrections under the names by which they travel beside the groups."""
    return {CORRECTION + group: part for group, part in arrays.items()}


def split_corrections(arrays: Arrays) -> tuple[Arrays, Arrays]:
    """The groups of a message, and the corrections beside them."""
    marked = {group for group in arrays if group.startswith(CORRECTION)}
    groups = {group: part for group, part in arrays.items() if group not in marked}
    return groups, {group.removeprefix(CORRECTION): arrays[group] for group in sorted(marked)}


AnyRequest = TypeVar("AnyRequest", bound=Request)


def read_request(form: type[AnyRequest], header: Mapping[str, Any]) -> AnyRequest:
    """Read a header as a request.

    Raises:
        ProtocolError: for any other form, without a word of what was found.
    """
    try:
        return form.model_validate(dict(header))
    except ValidationError:
        raise ProtocolError("a request of another form", remedy="Both sides must run the same Gapweave") from None
