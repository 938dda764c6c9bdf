"""What `symbiosis doctor` finds out about the base that a host serves, and about a helper beside it."""

from __future__ import annotations

from pathlib import Path

from symbiosis.clients.helper import check_apart, check_same_base
from symbiosis.clients.known_weights import KnownWeights
from symbiosis.clients.local_copy import LocalCopy
from symbiosis.clients.session import Session
from symbiosis.errors import ProtocolError, UnknownBaseError
from symbiosis.protocols.checkup import Check, failed, ok, warning
from symbiosis.protocols.manifest import Manifest, Publish, Storage
from symbiosis.protocols.tensors import tensor_digest

_NAMED = 3
"""Tensors of another base that are named, at most."""


def manifest_check(name: str, session: Session, *, digest: str | None) -> Check:
    """Whether the manifest is the one that the host greeted with, and the one that was expected.

    Args:
        name: of the check.
        session: an open session.
        digest: what was expected, or its beginning.
    """
    manifest, greeted = manifest_of(session), session.greeting.welcome.manifest_digest
    figures = {"digest": greeted, "expected": digest}
    if manifest.digest != greeted:
        # The session has compared the bytes; read and written again they are others: there is more in them.
        told = f"the manifest {greeted[:16]} has more in it than this release reads"
        return warning(name, told, "Install the host's release", **figures)
    if digest is not None and not greeted.startswith(digest):
        told = f"the host's manifest has the digest {greeted[:16]}, and {digest[:16]} was expected"
        action = "Ask the operator what changed: the base, its name, how it is held, or what is published of it"
        return failed(name, told, action, **figures)
    as_expected = ", as expected" if digest is not None else ""
    return ok(name, f"its digest begins with {greeted[:16]}, as the host announced it{as_expected}", **figures)


def model_check(name: str, manifest: Manifest, *, copied: bool) -> Check:
    """What is served, and whether it can be loaded here.

    Args:
        name: of the check.
        manifest: the host's.
        copied: whether the tenant has a copy of the base.
    """
    import transformers  # noqa: PLC0415 - slow

    figures = {
        "base": manifest.base,
        "architecture": manifest.architecture,
        "layers": len(manifest.layers),
        "storage": manifest.storage.value,
        "publish": manifest.publish.value,
    }
    told = (
        f"{manifest.base}: {manifest.architecture}, {len(manifest.layers)} hosted layers held as "
        f"{manifest.storage.value}, published: {manifest.publish.value}"
    )
    if not hasattr(transformers, manifest.architecture):
        told += f"; transformers {transformers.__version__} here has no {manifest.architecture}"
        return failed(name, told, "Install the host's release of transformers", **figures)
    if manifest.publish is Publish.NOTHING and not copied:
        action = "Get a copy of the base, and give it: connect(..., base=DIR), and `symbiosis doctor --base DIR`"
        return warning(name, f"{told}, so the tenant's half has to be here already", action, **figures)
    return ok(name, told, **figures)


def copy_check(name: str, session: Session, folder: Path) -> Check:
    """Whether a directory holds the host's base, tensor by tensor."""
    manifest, copy = manifest_of(session), LocalCopy(folder, hosted=True)
    tensors = copy.tensors(manifest)
    known = KnownWeights(manifest, fetch=session.fetch, facts=session.facts, local=copy)
    others = []
    for position, layer in enumerate(manifest.layers):
        try:
            known.weight(position)
        except UnknownBaseError:
            others.append(layer.name)
    for entry in manifest.tensors:
        if entry.name not in tensors or tensor_digest(tensors[entry.name]) != entry.digest:
            others.append(entry.name)
    count = len(manifest.layers) + len(manifest.tensors)
    figures = {"tensors": count, "others": others}
    if others:
        named = ", ".join(others[:_NAMED]) + (" and others" if len(others) > _NAMED else "")
        told = f"{len(others)} of {count} tensors in {folder} are not the host's: {named}"
        return failed(
            name, told, "Give the directory of the very same base, or ask the operator which it is", **figures
        )
    return ok(name, f"all {count} tensors in {folder} are the host's", **figures)


def apart_check(name: str, session: Session, helper: Session) -> Check:
    """Whether the helper is another host than the host."""
    check_apart(session, helper)
    return ok(name, f"{helper.address} shows another key than {session.address}")


def same_base_check(name: str, session: Session, helper: Session) -> Check:
    """Whether the helper holds the host's base."""
    check_same_base(session, helper)
    return ok(name, "the helper holds the host's base, in the same storage")


def pad_check(name: str, session: Session) -> Check:
    """Whether rows can be hidden by one-time pads, which is what a helper is for."""
    storage = manifest_of(session).storage
    if storage is Storage.FLOAT:
        told = "the base is held in floating point, and `pad` works with integers alone"
        return warning(name, told, "Ask both operators to serve it with `--weights int8`", storage=storage.value)
    return ok(name, f"the base is held as {storage.value}, as `pad` needs it", storage=storage.value)


def manifest_of(session: Session) -> Manifest:
    """The manifest of an open session.

    Raises:
        ProtocolError: it is not open.
    """
    if session.manifest is None:
        raise ProtocolError("the session is not open yet", "Open it first")
    return session.manifest
