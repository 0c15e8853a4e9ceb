"""Certificates for servers of tests, signed by authorities that are made on the spot."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["CertificateAuthority"]

_DAY = timedelta(days=1)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


@dataclass
class CertificateAuthority:
    """Signs certificates for servers. Whoever trusts `pem` trusts them."""

    folder: Path
    name: str = "tests"
    _key: ec.EllipticCurvePrivateKey = field(init=False, repr=False)
    pem: Path = field(init=False)

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        own = self._begun(self.name, self._key, timedelta())
        own = own.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        uses = dict.fromkeys(
            (
                "digital_signature",
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "crl_sign",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        own = own.add_extension(x509.KeyUsage(key_cert_sign=True, **uses), critical=True)
        self.pem = self.folder / f"{self.name}-ca.pem"
        self.pem.write_bytes(own.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def server(self, host: str = "127.0.0.1", *, ended: bool = False) -> ssl.SSLContext:
        """How a server shows a new certificate for `host`, one whose time is over if it has `ended`."""
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            meant: x509.GeneralName = x509.IPAddress(ip_address(host))
        except ValueError:
            meant = x509.DNSName(host)
        certificate = self._begun(host, key, -2 * _DAY if ended else timedelta())
        certificate = certificate.add_extension(x509.SubjectAlternativeName([meant]), critical=False)
        file = self.folder / f"{self.name}-server.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def _begun(self, name: str, key: ec.EllipticCurvePrivateKey, shift: timedelta) -> x509.CertificateBuilder:
        """A certificate for `key` that holds from yesterday until tomorrow, or so much later."""
        now = datetime.now(UTC) + shift
        return (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(self.name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )
