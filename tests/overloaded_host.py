"""A host in a process of its own, so that its memory can be measured: `python overloaded_host.py STATE TENANT_BYTES`.

Prints its address. For every line on standard input it prints its peak of resident memory so far (bytes), and the bytes
that are in flight; it ends with its standard input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from oracles import frozen_llama

from symbiosis.protocols.authority import Authority
from symbiosis.server.admission import AdmissionConfig
from symbiosis.server.base import host_model
from symbiosis.server.host import Host
from symbiosis.server.service import Service


def say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def peak_bytes() -> int:
    """Most memory that this program was resident with. `getrusage` would count the process that started it, too."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main(state: Path, tenant_bytes: int) -> None:
    torch.set_num_threads(1)
    admission = AdmissionConfig(
        max_tenant_bytes=tenant_bytes, max_tenant_rows=1 << 30, max_tenant_sessions=64, max_wait_s=0.0
    )
    credentials = Authority.load(state).issue_host(["127.0.0.1"])
    with (
        Host(host_model(frozen_llama(), name="overloaded"), admission=admission) as host,
        Service(host, credentials) as service,
    ):
        say(address=service.address)
        for _ in sys.stdin:
            say(peak_bytes=peak_bytes(), in_flight_bytes=host.in_flight_bytes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
