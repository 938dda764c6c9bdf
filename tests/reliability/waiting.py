"""Waiting for what happens elsewhere. Loads nothing, so that the zygote can use it."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(true: Callable[[], bool], *, timeout_s: float = 30.0) -> float:
    """Wait for something that happens elsewhere; how long it took (seconds).

    Raises:
        TimeoutError: it did not happen.
    """
    begun_s = time.monotonic()
    while not true():
        if time.monotonic() - begun_s > timeout_s:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.005)
    return time.monotonic() - begun_s
