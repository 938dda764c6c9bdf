"""A tenant's certificate request: what it says when we make it, and all that we accept when we read one.

A request is hostile input. Reading one keeps two things, the public key and the tenant's name, and refuses:

1. more than `MAX_PEM_BYTES`, before anything is parsed;
2. a key other than ECDSA on P-256 or P-384;
3. a signature that the request's own key did not make (proof of possession, RFC 2986 section 3);
4. any requested extension but alternative names, and any alternative name but one tenant URI.

What is left (subject, other attributes) is ignored: the authority writes all of a certificate itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from symbiosis.errors import EnrolmentError
from symbiosis.protocols.identity import tenant_in, tenant_uri
from symbiosis.protocols.keyfiles import MAX_PEM_BYTES, PARSE_ERRORS

_NEXT = "Make the request with `symbiosis join`"


@dataclass(frozen=True, kw_only=True, slots=True)
class SigningRequest:
    """All that is taken from a certificate request.

    Attributes:
        name: the tenant's name.
        public_key: the key whose owner signed the request.
    """

    name: str
    public_key: ec.EllipticCurvePublicKey


def build_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Return a PEM request for the tenant `name`, signed by `key`; the key itself is not in it.

    Raises:
        EnrolmentError: `name` is not a tenant name.
    """
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(tenant_uri(name))])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_request(csr_pem: bytes) -> SigningRequest:
    """Read a request from anybody.

    Raises:
        EnrolmentError: it breaks one of the rules above.
    """
    if len(csr_pem) > MAX_PEM_BYTES:
        raise EnrolmentError(f"the request is longer than the {MAX_PEM_BYTES} bytes that are read", _NEXT)
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        public_key = _checked_key(request)
        if not request.is_signature_valid:
            raise EnrolmentError("the request is not signed by the key it carries", _NEXT)
        return SigningRequest(name=tenant_in(_only_names(request)), public_key=public_key)
    except PARSE_ERRORS as error:
        raise EnrolmentError("the request is not a well-formed PEM certificate request", _NEXT) from error


def _checked_key(request: x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        raise EnrolmentError("the request's key is not ECDSA on P-256 or P-384", _NEXT)
    return key


def _only_names(request: x509.CertificateSigningRequest) -> x509.SubjectAlternativeName:
    extensions = list(request.extensions)
    if len(extensions) != 1 or not isinstance(names := extensions[0].value, x509.SubjectAlternativeName):
        raise EnrolmentError("the request must ask for alternative names and no other extension", _NEXT)
    if len(names) != 1:
        raise EnrolmentError("the request must ask for one alternative name", _NEXT)
    return names
