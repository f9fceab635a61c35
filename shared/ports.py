"""Ports of this machine: which are free, and whether what listens on one is healthy, and ours."""

from __future__ import annotations

from pathlib import Path


def healthy(port: int, seconds: float = 1.0) -> bool:
    """Whether a process of this machine says that it serves.

    Args:
        port: of its health server, on loopback.
        seconds: to wait for an answer.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def shows(port: int, authority: Path, seconds: float = 2.0) -> bool:
    """Whether what listens on a port of this machine has a certificate for localhost of an authority.

    Args:
        port: on loopback.
        authority: its certificate.
        seconds: to wait for an answer.
    """
    import socket
    import ssl

    context = ssl.create_default_context(cafile=authority)
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=seconds) as plain,
            context.wrap_socket(plain, server_hostname="localhost"),
        ):
            return True
    except OSError:
        return False


def is_free(port: int) -> bool:
    """Whether nothing on this machine listens on a port, on whatever address."""
    import errno
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what was closed just now does not count
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
        return True


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
