"""The key pair by which a hub knows a site."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from gapweave.shared.errors import UsageError
from gapweave.shared.files import write_atomically


def public_file(key: Path) -> Path:
    """Where the public part of a key lies: what the hub gets."""
    return key.with_suffix(".pub")


def make_keys(key: Path) -> Path:
    """Write a new key pair in OpenSSH's format, the private part readable by its owner only.

    Returns:
        The file of the public part.

    Raises:
        UsageError: when there is a key already: the hub knows the site by it.
    """
    if key.exists():
        raise UsageError("there is a key already", where=str(key), remedy="Keep it: the hub knows the site by it")
    secret = ec.generate_private_key(ec.SECP384R1())
    write_atomically(key, secret.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = secret.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_atomically(public_file(key), public + b"\n")
    public_file(key).chmod(0o644)
    return public_file(key)


def check_key(key: Path) -> None:
    """Refuse a private key that is missing, that is something else, or that others can read.

    Raises:
        UsageError: with what to do.
    """
    if not key.exists():
        raise UsageError("there is no private key", where=str(key), remedy="`gapweave site init` makes one")
    try:
        load_ssh_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError(
            "this cannot be read as a private key without a password",
            where=str(key),
            remedy="Name the file without `.pub` that `gapweave site init` wrote, and run as its owner",
        ) from None
    if key.stat().st_mode & 0o077:
        raise UsageError("others can read the private key", where=str(key), remedy=f"chmod 600 {key}")
