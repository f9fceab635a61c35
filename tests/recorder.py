"""A proxy before a hub that writes down all that crosses it once TLS has ended: `recorder.py HUB PORT UPSTREAM FILE`."""

from __future__ import annotations

import asyncio
import ssl
import sys
from pathlib import Path


async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, log: object) -> None:
    try:
        while content := await source.read(1 << 16):
            log.write(content)  # type: ignore[attr-defined]
            target.write(content)
            await target.drain()
    except (ConnectionError, ssl.SSLError):
        pass
    finally:
        target.close()


async def serve(hub: Path, port: int, upstream: int, folder: Path) -> None:
    inside = ssl.create_default_context(cafile=str(hub / "ca.crt"))
    outside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    outside.load_cert_chain(hub / "server.crt", hub / "server.key")
    count = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        hub_reader, hub_writer = await asyncio.open_connection(
            "127.0.0.1", upstream, ssl=inside, server_hostname="localhost"
        )
        # A file for each direction of each connection: nothing is torn apart.
        with (folder / f"{count}.up").open("wb") as up, (folder / f"{count}.down").open("wb") as down:
            await asyncio.gather(copy(reader, hub_writer, up), copy(hub_reader, writer, down))

    server = await asyncio.start_server(handle, "0.0.0.0", port, ssl=outside)
    async with server:
        await server.serve_forever()


asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
