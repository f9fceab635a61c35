"""The reverse proxy before the SuperLink, which has one port for everything and no authentication on its control side.

Only the calls that a site makes go through; to register or to start a run one must be on the hub itself.
"""

from __future__ import annotations

import shutil
import socket

from gapweave.shared import PROTOCOL_VERSION, __version__
from gapweave.shared.errors import UsageError

CALLS = (
    *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages"),
    *("get-run", "get-fab", "push-object", "pull-object", "confirm-message-received"),
)
"""What a site asks of the SuperLink, Flower 1.41; register-node and unregister-node are not among it."""
ABOUT = "/v1/gapweave"
"""Where the hub tells its version; the answer's date tells its clock."""

TEMPLATE = """# Written by `gapweave server start` from hub.yaml.
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    server_tokens off;
    default_type application/octet-stream;
    client_body_temp_path service/nginx-body;
    proxy_temp_path service/nginx-proxy;
    fastcgi_temp_path service/nginx-fastcgi;
    uwsgi_temp_path service/nginx-uwsgi;
    scgi_temp_path service/nginx-scgi;
    upstream superlink {{
        server 127.0.0.1:{control_port};
        keepalive 32;
    }}
    server {{
        {listen}
        # Files lie beside this one.
        ssl_certificate server.crt;
        ssl_certificate_key server.key;
        ssl_protocols TLSv1.2 TLSv1.3;
        # Models are larger than the default of 1 MB.
        client_max_body_size 0;
        location = {about} {{
            default_type application/json;
            return 200 '{{"gapweave": "{version}", "protocol": {protocol}}}';
        }}
        location ~ ^/v1/fleet/({calls})$ {{
            proxy_pass https://superlink;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_ssl_trusted_certificate ca.crt;
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_request_buffering off;
            proxy_buffering off;
            proxy_read_timeout 300s;
        }}
        location / {{ return 404; }}
    }}
}}
"""


def proxy_configuration(*, port: int, control_port: int) -> str:
    """nginx.conf of a hub; it names no folder, whose name might need quotes.

    Args:
        port: to listen on.
        control_port: of the SuperLink, on loopback.
    """
    return TEMPLATE.format(
        listen=" ".join(f"listen {place}{port} ssl;" for place in ("", *(["[::]:"] if _has_ipv6() else []))),
        control_port=control_port,
        about=ABOUT,
        calls="|".join(CALLS),
        version=__version__,
        protocol=PROTOCOL_VERSION,
    )


def _has_ipv6() -> bool:
    """Whether anything can listen on this machine's IPv6 addresses: nginx does not start where it cannot."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def nginx() -> str:
    """Path of the program.

    Raises:
        UsageError: when it is not installed.
    """
    found = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")
    if found is None:
        raise UsageError(
            "nginx is not installed",
            where="PATH",
            remedy="Install it (apt install nginx-light), or use --no-proxy and your own proxy, as HUB/nginx.conf does",
        )
    return found
