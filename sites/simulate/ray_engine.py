"""Many sites on a Ray cluster, through Flower's own simulation runtime: `--engine ray`.

Flower's `run_simulation` is used and not `flwr run`: it needs no bundle, no SuperLink and no process beside Ray's, and
starts in a third of the time (docs/decisions/0013). The round loop runs in its ServerApp thread, each message in a Ray
worker. A cluster that is there is found by `RAY_ADDRESS`; one that was started here is stopped at the end.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from gapweave.shared.errors import UsageError

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Nothing is told to anybody's servers, and a worker sees the accelerators that this process sees."""


def require_ray() -> None:
    """Refuse the engine where Ray is not installed.

    Raises:
        UsageError: naming the extra.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("Ray is not installed", where="--engine ray", remedy="pip install 'gapweave[simulation]'")


class SitesApp(ClientApp):  # type: ignore[misc]
    """The ClientApp, which a partition's number tells which site it is.

    Args:
        node_configs: Flower's node configuration of each site, in the order of partitions.
    """

    def __init__(self, node_configs: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self._configs = [dict(config) for config in node_configs]

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message as the site of its partition."""
        import torch

        from gapweave.client import app

        torch.set_num_threads(1)
        context.node_config.update(self._configs[int(context.node_config["partition-id"])])
        return app.app(message, context)


def on_ray(node_configs: Sequence[Mapping[str, Any]], work: Callable[[Grid], None]) -> None:
    """Run a round loop with sites on Ray; Ctrl-C ends it when the requests that are out have been answered.

    Args:
        node_configs: one mapping a site.
        work: is given the grid.

    Raises:
        Exception: what `work` raised.
        KeyboardInterrupt: after Ctrl-C, once all is stopped.
    """
    require_ray()
    os.environ.update(QUIET)
    import ray
    from flwr.simulation import run_simulation

    raised: list[BaseException] = []
    stopped = threading.Event()
    server = ServerApp()

    @server.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        push = grid.push_messages

        def unless_stopped(messages: Iterable[Message]) -> Any:
            if stopped.is_set():
                raise KeyboardInterrupt
            return push(messages)

        grid.push_messages = unless_stopped
        try:
            work(grid)
        except BaseException as error:
            raised.append(error)

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    ours = not ray.is_initialized() and "RAY_ADDRESS" not in os.environ
    backend = {
        "init_args": {"logging_level": "ERROR", "log_to_driver": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    # Flower's main thread would wait for the round loop's thread, which nothing stops: every further round was charged.
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        run_simulation(server, SitesApp(node_configs), len(node_configs), backend_config=backend)
    finally:
        signal.signal(signal.SIGINT, before)
        if ours:
            ray.shutdown()
    if raised:
        raise raised[0]
