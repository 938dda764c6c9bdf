"""How many bytes a session puts on its TCP connection, tenant to host, computed from what the ledger says.

The ledger counts application bytes: chunks, as they are handed to gRPC. On the connection they are wrapped, and each
layer's price is known. Per exchange (one entry of the ledger: a message of one or more chunks, and its reply):

1. gRPC puts 5 bytes before every chunk (flag and length: "Length-Prefixed-Message" of gRPC over HTTP/2).
2. HTTP/2 puts a frame header of 9 bytes before every chunk (RFC 9113 section 4.1). gRPC's two sides allow frames of
   4 MiB (SETTINGS_MAX_FRAME_SIZE, section 6.5.2), so that a chunk, at most 1 MiB, is one DATA frame unless flow
   control cuts it.
3. The reply used up window, which the tenant gives back in two WINDOW_UPDATE frames of 13 bytes, one for the stream and
   one for the connection (RFC 9113 sections 6.9 and 6.9.1). gRPC sends them with the next message.
4. TLS 1.3 adds 22 bytes to every record: a header of 5, the inner content type, and a tag of 16 (RFC 8446 section 5.2;
   the tag is that of AES-GCM and ChaCha20-Poly1305). gRPC writes an exchange in one go and fills records up to 16,284
   bytes: the 16 KiB of section 5.1 less the 100 that its TLS layer sets aside for every record
   (`TSI_SSL_MAX_PROTECTION_OVERHEAD`).

Per connection, once: `CONNECTION_BYTES`.

What is left out, because the ledger does not know it:

- PING frames and their answers (RFC 9113 section 6.7), 17 bytes, 39 with a record of their own. Both sides probe the
  path's bandwidth with them: 10 a second when a connection begins, fewer and fewer until one in 10 seconds.
- WINDOW_UPDATE frames during a long reply: 13 to 26 bytes for every MiB that is fetched.
- DATA frames cut by flow control, 9 bytes each, and records that are not full because of them.
- the length of the tenant's certificate and of the host's name, which change `CONNECTION_BYTES` by some hundred bytes.

All of these together stay within 1 % of the bytes (`TOLERANCE`) and 4 KiB per connection (`PER_CONNECTION_BYTES`), up
to some 100 MiB fetched in a connection that sends little else; `tests/test_wire_bytes.py` holds the estimate against a
proxy that counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

TOLERANCE: Final = 0.01
"""Share of the bytes on a connection that the estimate may be wrong by."""
PER_CONNECTION_BYTES: Final = 4096
"""What it may be wrong by besides, for every connection."""

GRPC_PREFIX_BYTES: Final = 5
FRAME_HEADER_BYTES: Final = 9
WINDOW_UPDATES_BYTES: Final = 2 * (FRAME_HEADER_BYTES + 4)
RECORD_OVERHEAD_BYTES: Final = 5 + 1 + 16
RECORD_PAYLOAD_BYTES: Final = 16 * 1024 - 100

CONNECTION_BYTES: Final = (
    1445  # ClientHello, of which 1,216 are the key share X25519MLKEM768 (RFC 8446 section 4.1.2)
    + 6  # change_cipher_spec, for old middle boxes (RFC 8446 appendix D.4)
    + 636  # Certificate on P-256, CertificateVerify and Finished, in one record (RFC 8446 section 4.4)
    + (24 + (FRAME_HEADER_BYTES + 36) + (FRAME_HEADER_BYTES + 4) + RECORD_OVERHEAD_BYTES)
    # connection preface, SETTINGS of six entries, WINDOW_UPDATE (RFC 9113 sections 3.4, 6.5 and 6.9)
    + (FRAME_HEADER_BYTES + RECORD_OVERHEAD_BYTES)  # SETTINGS acknowledgement (RFC 9113 section 6.5.3)
    + (FRAME_HEADER_BYTES + 216)  # HEADERS of the one stream (RFC 9113 section 6.2), in the greeting's record
    + (FRAME_HEADER_BYTES + 4 + RECORD_OVERHEAD_BYTES)  # RST_STREAM at the end (RFC 9113 section 6.4)
)
"""What a connection costs before and after its messages: TLS handshake, HTTP/2's beginning, gRPC's headers, the end."""


def exchange_wire_bytes(application_bytes: int, messages: int) -> int:
    """Bytes on the connection for one exchange.

    Args:
        application_bytes: bytes of all its chunks, as the ledger's `bytes`.
        messages: number of chunks, as the ledger's `messages`.
    """
    framed = application_bytes + messages * (GRPC_PREFIX_BYTES + FRAME_HEADER_BYTES) + WINDOW_UPDATES_BYTES
    records = -(-framed // RECORD_PAYLOAD_BYTES)
    return framed + records * RECORD_OVERHEAD_BYTES


def wire_bytes(exchanges: Iterable[tuple[int, int]], *, connections: int) -> int:
    """Bytes on TCP connections from tenant to host, without TCP's and IP's own headers and without retransmissions.

    Args:
        exchanges: application bytes and messages of every exchange: the ledger's entries for that destination.
        connections: how many there were: the ledger's entries of kind `hello`.
    """
    return connections * CONNECTION_BYTES + sum(exchange_wire_bytes(*exchange) for exchange in exchanges)
