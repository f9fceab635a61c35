"""The hub's own certificate authority, and the certificate by which sites know the hub."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gapweave.shared.files import write_atomically

CA_DAYS, SERVER_DAYS = 3650, 398
RENEW_DAYS = 30
"""The server's certificate is made anew at a start within so many days of its end."""
LOOPBACK = ("localhost", "127.0.0.1")
"""The hub's own parts speak TLS with each other, too."""


def make_authority(certificate: Path, key: Path, name: str) -> None:
    """Write a new certificate authority; its key never leaves the hub."""
    secret = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} (Gapweave hub)")])
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    signed = (
        _builder(subject, subject, secret.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(secret.public_key()), critical=False)
        .sign(secret, hashes.SHA384())
    )
    _write_key(key, secret)
    write_atomically(certificate, signed.public_bytes(serialization.Encoding.PEM))


def make_server_certificate(
    ca: Path, ca_key: Path, hosts: Sequence[str], certificate: Path, key: Path, days: int = SERVER_DAYS
) -> None:
    """Write a certificate for a hub's names and addresses, signed by its authority, with a new key."""
    authority = x509.load_pem_x509_certificate(ca.read_bytes())
    signer = serialization.load_pem_private_key(ca_key.read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    secret = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    names = x509.SubjectAlternativeName([_name(host) for host in dict.fromkeys([*hosts, *LOOPBACK])])
    signed = (
        _builder(subject, authority.subject, secret.public_key(), days)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    _write_key(key, secret)
    write_atomically(certificate, signed.public_bytes(serialization.Encoding.PEM))


def days_left(certificate: Path) -> float:
    """Days until a certificate ends; negative when it has."""
    end = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
    return (end - datetime.now(UTC)) / timedelta(days=1)


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        # Clocks of sites may be behind.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=days))
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_key(path: Path, secret: ec.EllipticCurvePrivateKey) -> None:
    pem = secret.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomically(path, pem)
