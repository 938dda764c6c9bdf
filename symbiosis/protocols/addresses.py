"""Addresses on a network, `host:port`, as people write them."""

from __future__ import annotations

import re

from symbiosis.errors import ConfigurationError

MAX_ADDRESS_CHARS = 300
"""A DNS name has at most 253 characters (RFC 1035 section 2.3.4)."""

_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")


def split_address(address: str) -> tuple[str, int]:
    """Return the host, without the brackets of an IPv6 address, and the port of `host:port`.

    Raises:
        ConfigurationError: it is not written like that, or the port is not 1 to 65535.
    """
    host, _, port = address.rpartition(":")
    number = int(port) if re.fullmatch(r"[0-9]{1,5}", port) else 0
    if len(address) > MAX_ADDRESS_CHARS or not _HOST.fullmatch(host) or not 0 < number < 65536:
        message = f"{address[:MAX_ADDRESS_CHARS]!r} is not an address"
        raise ConfigurationError(message, "Write it as host:port, for example 10.0.0.7:8443")
    return host.strip("[]"), number
