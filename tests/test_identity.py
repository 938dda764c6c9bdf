"""The small PKI: what is granted, what is refused, and that a real handshake agrees."""

import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiosis.errors import CertificateError, ConfigurationError, EnrolmentError
from symbiosis.protocols.authority import Authority
from symbiosis.protocols.identity import Credentials, check_tenant_name, expiry_of, summary, tenant_of
from symbiosis.protocols.identity_directory import create_request, install_certificate, load_credentials
from symbiosis.protocols.signing_request import build_request, read_request

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
PEM = serialization.Encoding.PEM


def at(moment: datetime) -> Callable[[], datetime]:
    return lambda: moment


def uri(text: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(text)


@pytest.fixture
def authority() -> Authority:
    return Authority.create(now=at(NOW))


def enrol(directory: Path, authority: Authority, name: str = "acme", **lifetime: timedelta) -> Path:
    certificate = authority.sign_tenant(create_request(directory, name), **lifetime)
    # Well before the expiry that some tests want: what cannot be loaded cannot be installed either.
    moment = summary(certificate).not_before + timedelta(minutes=5)
    install_certificate(directory, certificate_pem=certificate, ca_pem=authority.certificate_pem, now=at(moment))
    return directory


def forge_request(
    names: list[x509.GeneralName] | None = None,
    *,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | None = None,
    extensions: tuple[x509.ExtensionType, ...] = (),
) -> bytes:
    """A request as nobody's client of ours would make it."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "globex")])
    )
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    key = key or ec.generate_private_key(ec.SECP256R1())
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(PEM)


ACME = uri("spiffe://symbiosis/tenant/acme")


# --- names


@pytest.mark.parametrize("name", ["a", "7", "acme", "acme-2", "a" * 63, "0-0"])
def test_tenant_names(name: str) -> None:
    assert check_tenant_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "-acme", "acme-", "Acme", "a" * 64, "a b", "a/b", "a.b", "acme\n", "ácme", "..", "a\0", "٣"]
)
def test_what_is_no_tenant_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(EnrolmentError, match="tenant name"):
        check_tenant_name(name)
    with pytest.raises(EnrolmentError, match="tenant name"):
        create_request(tmp_path / "new", name)
    assert not (tmp_path / "new").exists()


# --- what the authority issues


def test_a_tenant_enrols(tmp_path: Path, authority: Authority) -> None:
    directory = enrol(tmp_path / "acme", authority)
    credentials = load_credentials(str(directory), now=at(NOW))
    assert tenant_of(credentials.certificate_pem) == "acme"
    assert expiry_of(credentials.certificate_pem) == NOW + timedelta(hours=24)
    told = summary(credentials.certificate_pem)
    assert (told.tenant, told.not_before) == ("acme", NOW - timedelta(minutes=5))
    assert credentials.ca_pem == authority.certificate_pem
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "tenant.key").stat().st_mode & 0o777 == 0o600
    assert sorted(file.name for file in directory.iterdir()) == ["ca.pem", "tenant.csr", "tenant.key", "tenant.pem"]


def test_the_key_stays_at_home(tmp_path: Path, authority: Authority) -> None:
    request = create_request(tmp_path, "acme")
    key = serialization.load_pem_private_key((tmp_path / "tenant.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    secret = key.private_numbers().private_value.to_bytes(32, "big")
    assert secret not in x509.load_pem_x509_csr(request).public_bytes(serialization.Encoding.DER)
    assert b"PRIVATE" not in request
    enrol(tmp_path, authority)
    for name in ("tenant.csr", "tenant.pem", "ca.pem"):
        assert b"PRIVATE" not in (tmp_path / name).read_bytes()
    assert "PRIVATE" not in repr(load_credentials(tmp_path, now=at(NOW)))


def test_certificates_serve_one_purpose(authority: Authority) -> None:
    host = x509.load_pem_x509_certificate(authority.issue_host(["Host.example", "10.0.0.7", "::1"]).certificate_pem)
    tenant = x509.load_pem_x509_certificate(authority.sign_tenant(forge_request([ACME])))
    root = x509.load_pem_x509_certificate(authority.certificate_pem)
    purposes = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
    for certificate, purpose in zip((host, tenant), purposes, strict=True):
        certificate.verify_directly_issued_by(root)
        by_class = certificate.extensions.get_extension_for_class
        assert list(by_class(x509.ExtendedKeyUsage).value) == [purpose]
        constraints, usage = by_class(x509.BasicConstraints), by_class(x509.KeyUsage)
        assert (constraints.critical, constraints.value.ca) == (True, False)
        assert (usage.critical, usage.value.digital_signature, usage.value.key_cert_sign) == (True, True, False)
        identifier = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.key_identifier
        assert by_class(x509.AuthorityKeyIdentifier).value.key_identifier == identifier
        assert by_class(x509.SubjectKeyIdentifier).value.key_identifier != identifier
    names = host.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["host.example", "10.0.0.7", "::1"]
    constraints = root.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    usage = root.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.crl_sign) == (True, True, True)
    assert host.serial_number != tenant.serial_number
    assert summary(authority.certificate_pem).fingerprint == authority.fingerprint
    assert summary(authority.certificate_pem).tenant is None


def test_an_authority_is_kept(tmp_path: Path, authority: Authority) -> None:
    authority.save(tmp_path / "ca")
    assert (tmp_path / "ca" / "ca.key").stat().st_mode & 0o777 == 0o600
    again = Authority.load(tmp_path / "ca", now=at(NOW))
    assert again.fingerprint == authority.fingerprint
    enrol(tmp_path / "acme", again)
    for other in (again, Authority.create()):
        with pytest.raises(CertificateError, match="exists already"):
            other.save(tmp_path / "ca")
    assert Authority.load(tmp_path / "ca").fingerprint == authority.fingerprint


def test_an_authority_that_cannot_be_loaded(tmp_path: Path, authority: Authority) -> None:
    with pytest.raises(CertificateError, match=r"ca\.key does not exist.*symbiosis host init"):
        Authority.load(tmp_path / "missing")
    authority.save(tmp_path / "one")
    Authority.create().save(tmp_path / "two")
    (tmp_path / "one" / "ca.pem").write_bytes((tmp_path / "two" / "ca.pem").read_bytes())
    with pytest.raises(CertificateError, match="does not belong to its key"):
        Authority.load(tmp_path / "one")
    host = authority.issue_host()
    (tmp_path / "one" / "ca.key").write_bytes(host.key_pem)
    (tmp_path / "one" / "ca.pem").write_bytes(host.certificate_pem)
    with pytest.raises(CertificateError, match="not that of an authority"):
        Authority.load(tmp_path / "one")


def test_a_leaf_never_outlives_its_authority() -> None:
    root = Authority.create(lifetime=timedelta(hours=2), now=at(NOW))
    assert expiry_of(root.issue_host().certificate_pem) == NOW + timedelta(hours=2)
    times = iter([NOW, NOW + timedelta(hours=3)])
    expired = Authority.create(lifetime=timedelta(hours=2), now=lambda: next(times))
    with pytest.raises(CertificateError, match="the authority expired"):
        expired.issue_host()


@pytest.mark.parametrize("names", [[], "localhost", ["*.example"], ["host:8443"], [""], ["a..b"], ["hö"], ["a" * 300]])
def test_host_names_that_are_none(authority: Authority, names: list[str]) -> None:
    with pytest.raises(ConfigurationError):
        authority.issue_host(names)


@pytest.mark.parametrize("lifetime", [timedelta(0), timedelta(hours=-1)])
def test_lifetimes_that_are_none(authority: Authority, lifetime: timedelta) -> None:
    with pytest.raises(ConfigurationError, match="lifetime"):
        authority.issue_host(["localhost"], lifetime)
    with pytest.raises(ConfigurationError, match="lifetime"):
        authority.sign_tenant(forge_request([ACME]), lifetime=lifetime)


def test_an_authority_that_cannot_be_made() -> None:
    for name in ("", "x" * 65):
        with pytest.raises(ConfigurationError, match="common name"):
            Authority.create(common_name=name)
    with pytest.raises(ConfigurationError, match="that long"):
        Authority.create(lifetime=timedelta(days=10_000 * 366))


# --- abuse of requests


@pytest.mark.parametrize(
    "names",
    [
        None,
        [],
        [x509.DNSName("acme")],
        [uri("spiffe://elsewhere/tenant/acme")],
        [uri("spiffe://symbiosis/tenant/")],
        [uri("spiffe://symbiosis/tenant/acme/admin")],
        [uri("spiffe://symbiosis/tenant/ACME")],
        [uri("spiffe://symbiosis/tenant/acme%00")],
        [uri("spiffe://symbiosis/tenant/" + "a" * 64)],
        [ACME, uri("spiffe://symbiosis/tenant/globex")],
        [ACME, x509.DNSName("localhost")],
        [ACME, x509.RFC822Name("a@b.c")],
        [x509.DNSName("localhost"), ACME],
    ],
)
def test_foreign_names_are_refused(authority: Authority, names: list[x509.GeneralName] | None) -> None:
    with pytest.raises(EnrolmentError):
        authority.sign_tenant(forge_request(names))


@pytest.mark.parametrize(
    "extension",
    [
        x509.BasicConstraints(ca=True, path_length=None),
        x509.BasicConstraints(ca=False, path_length=None),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"),
    ],
)
def test_other_requested_extensions_are_refused(authority: Authority, extension: x509.ExtensionType) -> None:
    with pytest.raises(EnrolmentError, match="no other extension"):
        authority.sign_tenant(forge_request([ACME], extensions=(extension,)))
    with pytest.raises(EnrolmentError, match="no other extension"):
        authority.sign_tenant(forge_request(extensions=(extension,)))


def test_the_subject_of_a_request_is_ignored(authority: Authority) -> None:
    certificate = authority.sign_tenant(forge_request([ACME]))  # whose subject says globex
    assert tenant_of(certificate) == "acme"
    assert x509.load_pem_x509_certificate(certificate).subject.rfc4514_string() == "CN=acme"


def test_an_invitation_is_for_one_name(authority: Authority) -> None:
    assert tenant_of(authority.sign_tenant(forge_request([ACME]), expected_name="acme")) == "acme"
    with pytest.raises(EnrolmentError, match="asks for the name 'acme', not for 'globex'"):
        authority.sign_tenant(forge_request([ACME]), expected_name="globex")


def test_keys_of_other_kinds_are_refused(authority: Authority) -> None:
    for key in (
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP521R1()),
        ec.generate_private_key(ec.SECP256K1()),
    ):
        with pytest.raises(EnrolmentError, match="P-256 or P-384"):
            authority.sign_tenant(forge_request([ACME], key=key))
    assert tenant_of(authority.sign_tenant(forge_request([ACME], key=ec.generate_private_key(ec.SECP384R1()))))


@pytest.mark.parametrize(
    "request_pem",
    [
        b"",
        b"garbage",
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        b"-----BEGIN CERTIFICATE REQUEST-----\n" + b"A" * 20_000,
        forge_request([ACME]) + b"\n" * 16_384,
        forge_request([ACME], extensions=(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), b"x" * 20_000),)),
    ],
    ids=["empty", "garbage", "no request", "cut", "padded", "huge"],
)
def test_what_is_no_request(authority: Authority, request_pem: bytes) -> None:
    with pytest.raises(EnrolmentError, match=r"well-formed|longer"):
        authority.sign_tenant(request_pem)


def to_pem(der: bytes) -> bytes:
    return ssl.DER_cert_to_PEM_cert(der).replace("CERTIFICATE-", "CERTIFICATE REQUEST-").encode()


def test_a_tampered_request_is_refused(authority: Authority) -> None:
    der = x509.load_pem_x509_csr(forge_request([ACME])).public_bytes(serialization.Encoding.DER)
    renamed = der.replace(b"tenant/acme", b"tenant/evil")
    assert renamed != der
    with pytest.raises(EnrolmentError, match="not signed by the key"):
        authority.sign_tenant(to_pem(renamed))


CERTIFICATE_DER = ssl.PEM_cert_to_DER_cert(Authority.create().sign_tenant(forge_request([ACME])).decode())
REQUEST_DER = x509.load_pem_x509_csr(forge_request([ACME])).public_bytes(serialization.Encoding.DER)


@settings(max_examples=500, deadline=None)
@given(position=st.integers(0, len(REQUEST_DER) - 1), byte=st.integers(0, 255))
def test_a_mutated_request_is_refused_in_our_words(position: int, byte: int) -> None:
    mutated = REQUEST_DER[:position] + bytes([byte]) + REQUEST_DER[position + 1 :]
    try:
        read = read_request(to_pem(mutated))
    except EnrolmentError:
        return
    # The unused bits of the outer bit string are signed by nobody and mean nothing.
    assert (read.name, read.public_key) == ("acme", x509.load_der_x509_csr(REQUEST_DER).public_key())


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # of the library, about a mutated one
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_a_mutated_certificate_is_read_or_refused_in_our_words(data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(CERTIFICATE_DER) - 1))
    byte = data.draw(st.integers(0, 255))
    pem = ssl.DER_cert_to_PEM_cert(CERTIFICATE_DER[:position] + bytes([byte]) + CERTIFICATE_DER[position + 1 :])
    for read in (tenant_of, expiry_of, summary):
        with suppress(CertificateError):
            read(pem.encode())


@given(st.binary(max_size=200))
def test_noise_is_refused_in_our_words(noise: bytes) -> None:
    with pytest.raises(EnrolmentError):
        read_request(noise)
    with pytest.raises(CertificateError):
        tenant_of(noise)
    for read in (expiry_of, summary):
        with pytest.raises(CertificateError):
            read(noise)


# --- reading a peer's certificate


def self_signed(*names: x509.GeneralName) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "acme")])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(PEM)


@pytest.mark.parametrize(
    "names",
    [
        (),
        (x509.DNSName("acme"),),
        (ACME, uri("spiffe://symbiosis/tenant/globex")),
        (uri("https://symbiosis/tenant/acme"),),
        (uri("spiffe://symbiosis/tenant/Acme"),),
    ],
)
def test_the_common_name_names_nobody(names: tuple[x509.GeneralName, ...]) -> None:
    with pytest.raises(CertificateError, match="exactly one tenant"):
        tenant_of(self_signed(*names))
    assert summary(self_signed(*names)).tenant is None


def test_a_host_is_no_tenant(authority: Authority) -> None:
    with pytest.raises(CertificateError, match="exactly one tenant"):
        tenant_of(authority.issue_host().certificate_pem)


def test_two_certificates_in_one_file_are_refused(tmp_path: Path, authority: Authority) -> None:
    with pytest.raises(CertificateError, match="2 certificates instead of one"):
        tenant_of(self_signed(ACME) * 2)
    directory = enrol(tmp_path, authority)
    with (directory / "ca.pem").open("ab") as file:
        file.write(Authority.create().certificate_pem)  # a second root that TLS libraries would trust as well
    with pytest.raises(CertificateError, match=r"ca\.pem holds 2 certificates"):
        load_credentials(directory, now=at(NOW))


# --- the identity directory


def test_asking_again_keeps_the_key(tmp_path: Path, authority: Authority) -> None:
    enrol(tmp_path, authority)
    key = (tmp_path / "tenant.key").read_bytes()
    later = Authority.load(save(authority, tmp_path / "ca"), now=at(NOW + timedelta(hours=16)))
    renewed = later.sign_tenant(create_request(tmp_path, "acme"))
    install_certificate(
        tmp_path, certificate_pem=renewed, ca_pem=later.certificate_pem, now=at(NOW + timedelta(hours=16))
    )
    assert (tmp_path / "tenant.key").read_bytes() == key
    assert load_credentials(tmp_path, now=at(NOW + timedelta(hours=30))).certificate_pem == renewed


def save(authority: Authority, directory: Path) -> Path:
    authority.save(directory)
    return directory


@pytest.mark.parametrize("lost", [(), ("tenant.csr",)])
def test_another_name_needs_another_directory(tmp_path: Path, authority: Authority, lost: tuple[str, ...]) -> None:
    enrol(tmp_path, authority)
    for name in lost:
        (tmp_path / name).unlink()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(EnrolmentError, match="holds the key of the tenant 'acme'"):
        create_request(tmp_path, "globex")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_spoilt_request_binds_nobody_else(tmp_path: Path) -> None:
    create_request(tmp_path, "acme")
    (tmp_path / "tenant.csr").write_bytes(b"spoilt")
    with pytest.raises(CertificateError, match=r"tenant\.csr cannot be used"):
        create_request(tmp_path, "acme")


def test_an_answer_to_somebody_else_is_not_installed(tmp_path: Path, authority: Authority) -> None:
    create_request(tmp_path / "acme", "acme")
    foreign = Authority.create(now=at(NOW))
    key = serialization.load_pem_private_key((tmp_path / "acme" / "tenant.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    cases = {
        "does not belong to the key": authority.sign_tenant(forge_request([ACME])),
        "was not signed by": foreign.sign_tenant((tmp_path / "acme" / "tenant.csr").read_bytes()),
        "'acme' was asked for": authority.sign_tenant(build_request(key, "globex")),
        "not a PEM certificate": b"garbage",
    }
    for problem, certificate in cases.items():
        with pytest.raises(CertificateError, match=problem):
            install_certificate(
                tmp_path / "acme", certificate_pem=certificate, ca_pem=authority.certificate_pem, now=at(NOW)
            )
    assert not (tmp_path / "acme" / "tenant.pem").exists()
    assert not (tmp_path / "acme" / "ca.pem").exists()


def test_a_certificate_without_a_request_is_not_installed(tmp_path: Path, authority: Authority) -> None:
    certificate = authority.sign_tenant(create_request(tmp_path, "acme"))
    (tmp_path / "tenant.csr").unlink()
    with pytest.raises(CertificateError, match="nothing was asked for"):
        install_certificate(tmp_path, certificate_pem=certificate, ca_pem=authority.certificate_pem, now=at(NOW))


def test_the_authority_does_not_change_silently(tmp_path: Path, authority: Authority) -> None:
    directory = enrol(tmp_path, authority)
    foreign = Authority.create(now=at(NOW))
    certificate = foreign.sign_tenant(create_request(directory, "acme"))
    with pytest.raises(CertificateError, match=r"another authority than .*ca\.pem"):
        install_certificate(directory, certificate_pem=certificate, ca_pem=foreign.certificate_pem, now=at(NOW))
    assert load_credentials(directory, now=at(NOW)).ca_pem == authority.certificate_pem


def sign_oddly(directory: Path, purpose: x509.ObjectIdentifier | None) -> tuple[bytes, bytes]:
    """A tenant's certificate as our authority would not make it, and its root."""
    root_key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")])
    request = x509.load_pem_x509_csr(create_request(directory, "acme"))
    pems = []
    for subject, key in ((request.subject, request.public_key()), (issuer, root_key.public_key())):
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
        builder = builder.serial_number(1).not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
        if subject != issuer:
            builder = builder.add_extension(x509.SubjectAlternativeName([ACME]), critical=False)
            if purpose is not None:
                builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        pems.append(builder.sign(root_key, hashes.SHA256()).public_bytes(PEM))
    return pems[0], pems[1]


@pytest.mark.parametrize(
    ("purpose", "problem"),
    [
        (None, "not a client's certificate"),
        (ExtendedKeyUsageOID.SERVER_AUTH, "not a client's certificate"),
        (ExtendedKeyUsageOID.CLIENT_AUTH, "does not verify"),  # its root is no authority
    ],
)
def test_certificates_of_the_wrong_make(tmp_path: Path, purpose: x509.ObjectIdentifier | None, problem: str) -> None:
    certificate, root = sign_oddly(tmp_path, purpose)
    with pytest.raises(CertificateError, match=problem):
        install_certificate(tmp_path, certificate_pem=certificate, ca_pem=root, now=at(NOW))


def spoil(directory: Path, name: str, data: bytes | None) -> None:
    (directory / name).unlink()
    if data is not None:
        (directory / name).write_bytes(data)


RSA_KEY = rsa.generate_private_key(65537, 2048).private_bytes(
    PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
LOCKED_KEY = ec.generate_private_key(ec.SECP256R1()).private_bytes(
    PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
)


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("tenant.key", None, r"tenant\.key does not exist"),
        ("tenant.pem", None, r"tenant\.pem does not exist.*symbiosis join"),
        ("ca.pem", None, r"ca\.pem does not exist"),
        ("tenant.key", b"garbage", r"tenant\.key is not an unencrypted PEM private key"),
        ("tenant.key", LOCKED_KEY, r"tenant\.key is not an unencrypted PEM private key"),
        ("tenant.key", RSA_KEY, r"tenant\.key is not an elliptic-curve key"),
        ("tenant.pem", b"garbage", r"tenant\.pem is not a PEM certificate"),
        ("ca.pem", b"", r"ca\.pem is not a PEM certificate"),
        ("ca.pem", b"x" * 20_000, r"ca\.pem is longer"),
        ("tenant.pem", self_signed(ACME), r"tenant\.pem does not belong to the key tenant\.key"),
        ("ca.pem", self_signed(), r"tenant\.pem was not signed by the authority .*ca\.pem"),
    ],
)
def test_spoilt_directories_are_named(
    tmp_path: Path, authority: Authority, name: str, data: bytes | None, problem: str
) -> None:
    directory = enrol(tmp_path, authority)
    spoil(directory, name, data)
    with pytest.raises(CertificateError, match=problem):
        load_credentials(directory, now=at(NOW))


def test_paths_that_are_no_directory(tmp_path: Path, authority: Authority) -> None:
    with pytest.raises(CertificateError, match=r"no identity directory .*missing\. Enrol with `symbiosis join`"):
        load_credentials(tmp_path / "missing")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CertificateError, match="cannot be made"):
        create_request(tmp_path / "file", "acme")
    directory = enrol(tmp_path / "acme", authority)
    (directory / "tenant.pem").unlink()
    (directory / "tenant.pem").mkdir()
    with pytest.raises(CertificateError, match=r"tenant\.pem cannot be read"):
        load_credentials(directory)
    with pytest.raises(CertificateError, match=r"tenant\.pem cannot be written"):
        install_certificate(
            directory,
            certificate_pem=authority.sign_tenant(create_request(directory, "acme")),
            ca_pem=authority.certificate_pem,
            now=at(NOW),
        )
    assert not [file for file in directory.iterdir() if file.name.startswith(".")]  # no temporary file is left


@pytest.mark.parametrize(
    ("moment", "problem"),
    [
        (NOW + timedelta(hours=2), r"tenant\.pem expired at 2026-11-23T13:00:00\+00:00.*symbiosis join"),
        (NOW - timedelta(minutes=6), r"not valid before 2026-11-23T11:55:00\+00:00, and the clock here shows"),
        (NOW + timedelta(days=4000), r"ca\.pem expired"),
    ],
)
def test_times_that_do_not_fit(tmp_path: Path, authority: Authority, moment: datetime, problem: str) -> None:
    directory = enrol(tmp_path, authority, lifetime=timedelta(hours=1))
    for fits in (NOW - timedelta(minutes=4), NOW + timedelta(minutes=59)):
        load_credentials(directory, now=at(fits))
    with pytest.raises(CertificateError, match=problem):
        load_credentials(directory, now=at(moment))


# --- real handshakes


def tls_context(side: int, credentials: Credentials, directory: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=credentials.ca_pem.decode())
    directory.mkdir(mode=0o700)
    (directory / "both.pem").write_bytes(credentials.key_pem + credentials.certificate_pem)
    context.load_cert_chain(directory / "both.pem")
    return context


def serve_once(context: ssl.SSLContext, raw: socket.socket) -> str:
    with raw, context.wrap_socket(raw, server_side=True) as stream:
        certificate = stream.getpeercert(binary_form=True)
        assert certificate is not None
        stream.sendall(b"welcome")
        assert stream.version() == "TLSv1.3"
        return tenant_of(ssl.DER_cert_to_PEM_cert(certificate).encode())


@contextmanager
def handshake(
    tmp_path: Path, host: Credentials, tenant: Credentials, server_name: str = "localhost"
) -> Iterator[tuple[Future[str], Callable[[], bytes]]]:
    """A host in another thread, and the tenant's half as a function."""
    server = tls_context(ssl.PROTOCOL_TLS_SERVER, host, tmp_path / "host-tls")
    client = tls_context(ssl.PROTOCOL_TLS_CLIENT, tenant, tmp_path / "tenant-tls")
    here, there = socket.socketpair()

    def connect() -> bytes:
        with here, client.wrap_socket(here, server_hostname=server_name) as stream:
            return stream.recv(100)

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(serve_once, server, there), connect


@pytest.fixture
def live() -> Authority:
    """An authority by the real clock, for libraries that read it themselves."""
    return Authority.create(lifetime=timedelta(hours=1))


def credentials_for(directory: Path, authority: Authority) -> Credentials:
    certificate = authority.sign_tenant(create_request(directory, "acme"))
    install_certificate(directory, certificate_pem=certificate, ca_pem=authority.certificate_pem)
    return load_credentials(directory)


@pytest.mark.parametrize("server_name", ["localhost", "127.0.0.1"])
def test_host_and_tenant_shake_hands(tmp_path: Path, live: Authority, server_name: str) -> None:
    tenant = credentials_for(tmp_path / "acme", live)
    with handshake(tmp_path, live.issue_host(), tenant, server_name) as (served, connect):
        assert connect() == b"welcome"
        assert served.result() == "acme"


def test_a_foreign_authority_with_the_same_names_is_refused(tmp_path: Path, live: Authority) -> None:
    foreign = Authority.create(lifetime=timedelta(hours=1))
    stranger = credentials_for(tmp_path / "acme", foreign)
    stranger = Credentials(
        key_pem=stranger.key_pem, certificate_pem=stranger.certificate_pem, ca_pem=live.certificate_pem
    )
    with handshake(tmp_path, live.issue_host(), stranger) as (served, connect):
        with pytest.raises(ssl.SSLError, match=r"(?i)unknown ca|decrypt error"):
            connect()
        with pytest.raises(ssl.SSLCertVerificationError):
            served.result()


def test_a_foreign_host_is_refused(tmp_path: Path, live: Authority) -> None:
    foreign = Authority.create(lifetime=timedelta(hours=1))
    with handshake(tmp_path, foreign.issue_host(), credentials_for(tmp_path / "acme", live)) as (served, connect):
        with pytest.raises(ssl.SSLCertVerificationError):
            connect()
        with pytest.raises(ssl.SSLError):
            served.result()


def test_a_host_by_another_name_is_refused(tmp_path: Path, live: Authority) -> None:
    host = live.issue_host(["host.example"])
    with handshake(tmp_path, host, credentials_for(tmp_path / "acme", live)) as (served, connect):
        with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
            connect()
        with pytest.raises(ssl.SSLError):
            served.result()


def test_neither_can_play_the_other(tmp_path: Path, live: Authority) -> None:
    tenant = credentials_for(tmp_path / "acme", live)
    with handshake(tmp_path, live.issue_host(), live.issue_host()) as (served, connect):
        with pytest.raises(ssl.SSLError):
            connect()
        with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
            served.result()
    (tmp_path / "again").mkdir()
    with handshake(tmp_path / "again", tenant, tenant) as (served, connect):
        with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
            connect()
        with pytest.raises(ssl.SSLError):
            served.result()


def whoami(request: bytes, context: grpc.ServicerContext) -> bytes:
    return tenant_of(context.auth_context()["x509_pem_cert"][0]).encode()


def test_grpc_takes_the_same_credentials(tmp_path: Path, live: Authority) -> None:
    host, tenant = live.issue_host(), credentials_for(tmp_path / "acme", live)
    service = grpc.method_handlers_generic_handler("test", {"whoami": grpc.unary_unary_rpc_method_handler(whoami)})
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, handlers=[service])
        pair = [(host.key_pem, host.certificate_pem)]
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair, host.ca_pem, True))
        server.start()
        try:
            own = grpc.ssl_channel_credentials(tenant.ca_pem, tenant.key_pem, tenant.certificate_pem)
            with grpc.secure_channel(f"127.0.0.1:{port}", own) as channel:
                assert channel.unary_unary("/test/whoami")(b"", timeout=30) == b"acme"
        finally:
            server.stop(None).wait()
