"""Flower's Grid inside one process. The only file here that uses undocumented Flower names.

Messages go through Flower's own Message and RecordDict types; each is answered by the unmodified ClientApp when
its reply is pulled, one at a time, so that the server streams replies and none is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

APP_RAISED = 2
"""Flower's error code for an exception in a ClientApp."""
SERVER_NODE = 1
FIRST_NODE = 1000


class InlineGrid(Grid):  # type: ignore[misc]
    """A grid whose nodes are node configurations.

    Args:
        client_app: answers every message.
        node_configs: one mapping a site.
    """

    def __init__(self, client_app: ClientApp, node_configs: Iterable[Mapping[str, Any]]) -> None:
        self._app = client_app
        self._run = Run.create_empty(run_id=1)
        self._contexts = {
            FIRST_NODE + at: Context(
                run_id=1, node_id=FIRST_NODE + at, node_config=dict(config), state=RecordDict(), run_config={}
            )
            for at, config in enumerate(node_configs)
        }
        self._queue: dict[str, Message] = {}
        self._ids = itertools.count(1)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SERVER_NODE

    @property
    def run(self) -> Run:
        """Flower's record of the run; only its id means anything here."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Replace the record."""
        self._run = run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages; a node works when its reply is pulled."""
        ids = []
        for message in messages:
            identity = str(next(self._ids))
            message.metadata.__dict__["_message_id"] = identity
            self._queue[identity] = message
            ids.append(identity)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answer the first of the given messages that is still queued."""
        identity = next((identity for identity in message_ids if identity in self._queue), None)
        return [] if identity is None else [self._answer(self._queue.pop(identity))]

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._app(message, context)
        except Exception as error:
            return Message(Error(code=APP_RAISED, reason=type(error).__name__), reply_to=message)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push and pull until all are answered."""
        return [reply for identity in self.push_messages(messages) for reply in self.pull_messages([identity])]
