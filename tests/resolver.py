"""A name server on loopback that writes down what it is asked, and knows a few names: `resolver.py LOG NAME=ADDRESS`."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys


def question(packet: bytes) -> tuple[str, int, int]:
    """The name that is asked for, its type, and where the question ends."""
    labels, at = [], 12
    while packet[at]:
        labels.append(packet[at + 1 : at + 1 + packet[at]].decode("ascii", "replace"))
        at += 1 + packet[at]
    return ".".join(labels).lower(), struct.unpack(">H", packet[at + 1 : at + 3])[0], at + 5


def answer(packet: bytes, known: dict[str, str]) -> bytes:
    name, kind, end = question(packet)
    address = known.get(name)
    found = address is not None and kind == 1
    flags = 0x8180 if address is not None else 0x8183  # no error, or no such name
    head = packet[:2] + struct.pack(">HHHHH", flags, 1, int(found), 0, 0)
    record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + ipaddress.ip_address(address).packed if found else b""
    return head + packet[12:end] + record


def main() -> None:
    known = dict(word.split("=") for word in sys.argv[2:])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server, open(sys.argv[1], "a", buffering=1) as log:
        server.bind(("127.0.0.1", 53))
        while True:
            packet, sender = server.recvfrom(4096)
            log.write(question(packet)[0] + "\n")
            server.sendto(answer(packet, known), sender)


main()
