"""Ports of this machine: a free one, and whether the Flower process behind one is healthy, by gRPC's protocol."""

from __future__ import annotations


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


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
