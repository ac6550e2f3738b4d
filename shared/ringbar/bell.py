# SPDX-License-Identifier: Apache-2.0
"""In a VM with a doorbell: event descriptors for an open end, so that waiting costs nothing. Elsewhere nothing."""

from __future__ import annotations

import importlib
import os
import time
from typing import TYPE_CHECKING, Any

from ._c import NULL, ffi, lib, text
from .errors import Error

if TYPE_CHECKING:
    from .end import End

_AGAIN = 2.0  # seconds until a service that had no bell is asked again

NEVER = float("inf")


def join(end: End) -> float:
    """Get the end its bell, if it has none, from the doorbell service of this VM; without one it polls.

    Not with the handle's lock held.

    :returns: when to try again, on the monotonic clock.
    """
    handle = end.handle
    if not handle.belled:
        return NEVER
    lane, entry = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    info = ffi.new("rb_cluster_info *")
    stats = ffi.new("rb_stats *")
    with handle.lock:
        if end.ptr == NULL or handle.refuse is not None or lib.rb_bell_place(end.ptr, lane, entry) < 0:
            return NEVER  # a direct queue
        if lib.rb_stats_get(end.ptr, stats) == 0 and text(stats.waits) == "bell":
            return time.monotonic() + _AGAIN
        lib.rb_cluster_get_info(handle.ptr, info)
    bells: Any = importlib.import_module(".guest.bells", __package__)
    try:
        fds = bells.ask(int(info.id), int(info.generation), lane[0], entry[0])
    except Error:
        return time.monotonic() + _AGAIN
    with handle.lock:
        if end.ptr != NULL and handle.refuse is None and lib.rb_bell_give(end.ptr, *fds) == 0:
            return time.monotonic() + _AGAIN
    for fd in fds:
        os.close(fd)
    return NEVER
