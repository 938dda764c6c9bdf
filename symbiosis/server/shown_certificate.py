"""What a host's port shows at handshakes, through `grpc.dynamic_ssl_server_credentials`.

gRPC asks at every handshake, on that handshake's thread, and makes the object that handshakes come from anew whenever
the answer is a configuration: also while another thread, which has just been answered, is about to use the old one.
With a configuration at every handshake, tenants who connect and hang up end the whole process with a segmentation fault
within seconds (grpcio 1.85.1; `tests/test_shown_certificate.py`). So the answer is "no change" unless there is one, and
a change is made when no other handshake is between its answer and its use:

1. whoever finds a change waits before it answers, so that those who were answered before are done with the old object;
2. whoever asks meanwhile waits for that, and then as long again, so that the new one is in its place.
"""

from __future__ import annotations

import threading
import time

import grpc

from symbiosis.protocols.identity import Credentials
from symbiosis.server.host_identity import CredentialsSource

_PAUSE_S = 0.25
"""Longer than the step from an answer to its use by far (seconds): it takes microseconds on a thread that runs."""


class ShownCertificate:
    """Answers gRPC's question at handshakes. Thread-safe.

    Args:
        credentials: what the host has to show now.
        pause_s: how long handshakes stand still before and after a change (seconds).
    """

    def __init__(self, credentials: CredentialsSource, *, pause_s: float = _PAUSE_S) -> None:
        self._source = credentials
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._shown = credentials()
        self._settled_s = float("-inf")

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a port: shows the present certificate, and asks tenants for theirs."""
        first = _configuration(self._shown)
        # The stub leaves out `None`, which gRPC's documentation has for "no change".
        return grpc.dynamic_ssl_server_credentials(first, self, require_client_authentication=True)  # type: ignore[arg-type]

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """The configuration to change to; `None` for no change."""
        with self._lock:
            time.sleep(max(0.0, self._settled_s - time.monotonic()))  # rule 2
            found = self._source()
            if found == self._shown:
                return None
            time.sleep(self._pause_s)  # rule 1
            self._shown, self._settled_s = found, time.monotonic() + self._pause_s
            return _configuration(found)


def _configuration(mine: Credentials) -> grpc.ServerCertificateConfiguration:
    pairs = [(mine.key_pem, mine.certificate_pem)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=mine.ca_pem)
