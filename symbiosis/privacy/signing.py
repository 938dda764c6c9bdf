"""Signatures by a tenant's key: ECDSA on P-256 with SHA-256, the key that its certificate is for."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from symbiosis.errors import CertificateError
from symbiosis.protocols.identity import Credentials, key_digest, parse_certificate
from symbiosis.protocols.keyfiles import PARSE_ERRORS


class Signer:
    """Signs with the private key of an identity.

    Args:
        credentials: the identity; its authority is not used.

    Raises:
        CertificateError: the key is none of P-256, or not the certificate's.
    """

    def __init__(self, credentials: Credentials) -> None:
        try:
            key = serialization.load_pem_private_key(credentials.key_pem, password=None)
        except PARSE_ERRORS as error:
            raise CertificateError("the tenant's key cannot be read", "Join again") from error
        certificate = parse_certificate(credentials.certificate_pem)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise CertificateError("the tenant's key is not that of its certificate", "Join again")
        self._key = key
        self.certificate_pem = credentials.certificate_pem
        """Says whose signature it is."""
        self.key_id = key_digest(certificate.public_key())
        """SHA-256 of the public key, 64 hexadecimal digits."""

    def sign(self, data: bytes) -> bytes:
        """The signature, DER."""
        return self._key.sign(data, ec.ECDSA(hashes.SHA256()))


def is_signed_by(certificate_pem: bytes, data: bytes, signature: bytes) -> bool:
    """Whether the key of a certificate signed `data`.

    Raises:
        CertificateError: the certificate cannot be read.
    """
    public = parse_certificate(certificate_pem).public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        return False
    try:
        public.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True
