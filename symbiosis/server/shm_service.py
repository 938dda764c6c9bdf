"""The host for tenants in other processes of the same machine: a Unix socket, mutual TLS, then shared memory.

A session is served by these rules, numbered where they are enforced (here, in `shm_session` and in `answering`). The
first five are those of `service`:

1. TLS 1.3 at least. Before the handshake has succeeded nothing is shared and nothing is read.
2. The tenant's name comes from the certificate alone, and the certificate is looked at again for every message: one
   that expires or is revoked ends the session.
3. The first message is a `Hello`; nothing else is answered before one that was welcome.
4. A refused message is answered with a `Refusal` and the session goes on; one that cannot be read (`FrameError` and its
   like) ends it after the refusal.
5. No error text of the host's own accidents reaches a tenant.
6. One request at a time, and the bell rings once for it: a tenant who rings otherwise is hung up on.
7. The socket lies in a directory that only its owner can enter, and its peers run as the same user, or as root.
8. A host that drains takes no new sessions, and ends each open one between two messages (`drain`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from symbiosis.errors import (
    CertificateError,
    ConfigurationError,
    HostUnavailableError,
    OverloadedError,
    ProtocolError,
    SymbiosisError,
)
from symbiosis.protocols.encoding import encode_reply
from symbiosis.protocols.identity import Credentials
from symbiosis.protocols.limits import MAX_MESSAGE_BYTES
from symbiosis.protocols.shm import SCHEME, is_trusted_user, peer_user, require_shared_memory, socket_path
from symbiosis.protocols.shm_control import ControlChannel
from symbiosis.protocols.status import refusal_of
from symbiosis.protocols.tls import host_context
from symbiosis.protocols.transport import Handler
from symbiosis.server.acceptor import Acceptor
from symbiosis.server.access import Access, Peer
from symbiosis.server.answering import peer_of
from symbiosis.server.bells import Bells
from symbiosis.server.drain import Drain
from symbiosis.server.host_identity import Contexts, CredentialsSource, source_of
from symbiosis.server.metrics import Metrics
from symbiosis.server.shm_session import ShmSession

_log = logging.getLogger(__name__)

_WORKERS = 4
_BACKLOG = 64
_FAREWELL_S = 1.0
"""How long the last words of sessions that have ended may take to leave (seconds)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShmConfig:
    """How a host listens for tenants on its machine."""

    path: str | Path
    """The socket, absolute; its directory is made with mode 0700, or must have it."""
    max_sessions: int = 128
    """Sessions open at once; one more is refused. A session costs a waiting thread, and memory as its calls need it."""
    max_handshakes: int = 16
    """Handshakes under way at once; further connections wait in the socket's queue."""
    handshake_s: float = 10.0
    """How long a handshake may take (seconds)."""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    """Longest payload of a call or an answer (bytes); a session's memory is at most some two of them."""

    def __post_init__(self) -> None:
        socket_path(f"{SCHEME}{self.path}")
        if min(self.max_sessions, self.max_handshakes) < 1 or self.handshake_s <= 0:
            raise ConfigurationError("a host needs at least one session, one handshake and time for it", "Raise them")
        if not 1 <= self.max_message_bytes <= MAX_MESSAGE_BYTES:
            message = f"max_message_bytes is {self.max_message_bytes}"
            raise ConfigurationError(message, f"Choose it between 1 and {MAX_MESSAGE_BYTES}")


class ShmService:
    """A listening socket around a `Handler`. Started on construction, ended by `close`; a context manager.

    Args:
        handler: the host.
        credentials: the host's key and certificate (which must name 127.0.0.1), and the authority that signs tenants;
            a function is asked at every handshake.
        config: where to listen, and bounds.
        metrics: told what the handler does not see.
        access: who is let in, and for how long; by default whoever has a certificate, until it expires.
        drain: shared by services that end together; by default this one's own.

    Raises:
        UnsupportedError: this system has no such memory.
        ConfigurationError: the socket cannot be made.
    """

    def __init__(
        self,
        handler: Handler,
        credentials: Credentials | CredentialsSource,
        config: ShmConfig,
        *,
        metrics: Metrics | None = None,
        access: Access | None = None,
        drain: Drain | None = None,
    ) -> None:
        require_shared_memory()
        self._metrics = metrics or Metrics()
        self._access = access or Access()
        self._drain = drain or Drain(self._metrics)
        self._handler = handler
        # A tenant asks for the same few groups again and again, and what a base holds does not change.
        self._expected_width = lru_cache(maxsize=256)(handler.expected_width)
        self._config = config
        self._contexts = Contexts(source_of(credentials), host_context)
        self._path = Path(config.path)
        listener = _listen(self._path)
        self._inode = os.stat(self._path).st_ino
        self.address = f"{SCHEME}{self._path}"
        self._bells = Bells()
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="symbiosis-shm-rows")
        self._changed = threading.Condition()
        self._channels: dict[ControlChannel, threading.Thread] = {}
        self._sessions = 0
        self._closing = False
        self._closed = threading.Event()
        self._handshakes = Acceptor(
            listener, places=config.max_handshakes, receive=self._receive, name="symbiosis-shm-accept"
        )
        self._handshakes.start()

    def wait(self) -> None:
        """Block until the service ends."""
        self._closed.wait()

    def close(self, *, grace_s: float = 1.0) -> None:
        """Drain for at most `grace_s` seconds, then end what is left."""
        self._drain.begin()
        drained = self._drain.wait(grace_s)
        with self._changed:
            if self._closing:
                return
            self._closing = True
        self._handshakes.close()
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        with self._changed:
            self._changed.wait_for(lambda: not self._channels, _FAREWELL_S if drained else 0.0)
            left = dict(self._channels)
        for channel, thread in left.items():
            channel.hang_up()
            thread.join()
        self._workers.shutdown()
        self._bells.close()
        self._closed.set()

    def __enter__(self) -> ShmService:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def _receive(self, connection: socket.socket, _: object) -> None:
        """Meet a connection on a thread of its own, which gives the handshake's place back."""
        user = peer_user(connection)
        if not is_trusted_user(user, own=os.geteuid()):
            _log.warning("user %d was not let in", user)  # rule 7
            connection.close()
            self._handshakes.release()
            return
        channel = ControlChannel(connection, self._contexts.current(), server_name=None)
        thread = threading.Thread(target=self._meet, args=(channel,), name="symbiosis-shm-session", daemon=True)
        with self._changed:
            thread.start()
            self._channels[channel] = thread

    def _meet(self, channel: ControlChannel) -> None:
        try:
            peer = self._authenticate(channel)
            if peer is None:
                return
            problem = self._access.turned_away(peer) or self._drain.turned_away()
            if problem is not None:
                self._turn_away(channel, peer, problem)  # rules 2 and 8
            else:
                self._serve(channel, peer)
        except Exception:
            _log.exception("a session failed")
        finally:
            channel.close()
            with self._changed:
                del self._channels[channel]
                self._changed.notify_all()

    def _authenticate(self, channel: ControlChannel) -> Peer | None:
        """Who is at the other end, by rules 1 and 2; `None` for somebody who cannot show it."""
        try:
            channel.set_deadline(self._config.handshake_s)
            channel.shake_hands()
            peer = peer_of(channel.peer_certificate)
            channel.set_deadline(None)
        except (OSError, CertificateError) as error:  # `ssl.SSLError` is an OSError
            _log.warning("a handshake failed: %s", error)
            return None
        finally:
            self._handshakes.release()
        return peer

    def _serve(self, channel: ControlChannel, peer: Peer) -> None:
        with self._changed:
            full = self._sessions >= self._config.max_sessions
            self._sessions += not full
        if full:
            error = HostUnavailableError(
                f"{self._config.max_sessions} sessions are open, and the host takes no more",
                "Connect again when one is closed",
            )
            self._turn_away(channel, peer, error)
            return
        try:
            with self._handler.open_session(peer.tenant):
                session = ShmSession(
                    channel,
                    peer,
                    self._handler,
                    expected_width=self._expected_width,
                    bells=self._bells,
                    workers=self._workers,
                    payload_bytes=self._config.max_message_bytes,
                    metrics=self._metrics,
                    access=self._access,
                    drain=self._drain,
                )
                with self._access.watch(peer, session.dismiss):
                    session.serve()
        except OverloadedError as error:
            self._turn_away(channel, peer, error)
        finally:
            with self._changed:
                self._sessions -= 1

    def _turn_away(self, channel: ControlChannel, peer: Peer, error: SymbiosisError) -> None:
        """Answer the first message, whatever it is, with a refusal."""
        self._metrics.refused(tenant=peer.tenant, code=error.code)
        _log.warning("no session for tenant %s: %s", peer.tenant, error.code)
        with contextlib.suppress(OSError, ProtocolError):
            channel.set_deadline(self._config.handshake_s)
            channel.receive_chunk()
            channel.send(encode_reply(refusal_of(error, number=0)))


def _listen(path: Path) -> socket.socket:
    """A listening socket that only this user, and root, can reach (rule 7).

    Raises:
        ConfigurationError: the directory is open to others, or the path is taken or cannot be used.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_private(path.parent)
        _remove_stale(path)
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        message = f"cannot listen on {path}: {error.strerror}"
        raise ConfigurationError(message, "Choose another path for the socket") from error
    except BaseException:
        listener.close()
        raise
    return listener


def _make_private(directory: Path) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        message = f"{directory} is not a directory that only this user can enter"
        raise ConfigurationError(message, "Give the socket a directory of its own, with mode 0700")


def _remove_stale(path: Path) -> None:
    """Remove the socket of a host that is gone."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.setblocking(False)  # a host whose queue is full is there, too
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)
                return
        except BlockingIOError:
            pass
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
