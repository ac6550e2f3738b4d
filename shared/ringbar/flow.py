# SPDX-License-Identifier: Apache-2.0
"""Traffic that proves itself: packets with sequence numbers and checksums, by a C thread."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from . import _c
from ._c import NULL, ffi, lib
from .ends import End, Rx, Tx
from .errors import Error
from .workers import Input, Output, Worker

_PERCENTILES = ("min", "median", "p99", "p999", "max")


class Flow(Worker):
    """Generates packets on one end, and verifies those that arrive on another.

    The packets are Ethernet, IPv4, UDP; the payload begins with a stream number, a sequence number, a time
    and a checksum of every byte. With both ends, what was sent is checked off against what arrives. The ends
    may come from two Cluster objects; both belong to the flow while it runs.
    """

    def __init__(
        self,
        out: Output | None = None,
        into: Input | None = None,
        *,
        size: int = 74,
        flows: int = 1,
        stream: int = 0,
        packets: int | None = None,
        pps: float | None = None,
        window: int | None = None,
        port: int = 5000,
        src_mac: str | None = None,
        dst_mac: str | None = None,
        src_ip: str = "192.0.2.1",
        dst_ip: str = "192.0.2.2",
        core: int | None = None,
        idle: str = "adaptive",
        burst: int = 64,
    ) -> None:
        """The other settings: see :class:`Worker`.

        :param out: where packets are sent: Tx or Queue; None = nothing is generated.
        :param into: where they arrive: Rx or Queue; None = nothing is verified.
        :param size: bytes of each packet, without FCS, from 74.
        :param flows: distinct UDP source ports.
        :param stream: tells one generator from another.
        :param packets: how many; None = without end.
        :param pps: packets a second; None = as fast as it goes.
        :param window: with both ends, the most packets on their way; None = no limit.
        :param port: UDP destination.
        :param src_mac: like ``"02:00:00:00:00:01"``; None = a locally administered one. dst_mac likewise.
        :param src_ip: IPv4 address. dst_ip likewise.
        """
        super().__init__(core=core, idle=idle, burst=burst)
        if out is None and into is None:
            raise Error("a flow needs an end to send on or one to receive on", code="bad-value")
        self._out, self._into = out, into
        self._tx: End | None = None
        self._rx: End | None = None
        flow = _c.options("rb_flow_options")
        flow.size = _c.number(size, 74, int(lib.RB_MAX_LENGTH), "the size of a packet")
        flow.flows = _c.number(flows, 1, 65535, "the number of flows")
        flow.stream = _c.number(stream, 0, 2**32 - 1, "a stream's number")
        flow.packets = 0 if packets is None else _c.number(packets, 1, 2**63, "the number of packets")
        if pps is not None and not (isinstance(pps, (int, float)) and 0 < pps < 1e12):
            raise Error(f"pps is a number of packets a second above 0, not {pps!r}", code="bad-value")
        flow.pps = 0.0 if pps is None else float(pps)
        flow.window = 0 if window is None else _c.number(window, 1, 2**31, "the window")
        flow.port = _c.number(port, 1, 65535, "a port")
        flow.src_ip, flow.dst_ip = _ip(src_ip), _ip(dst_ip)
        if src_mac is not None:
            flow.src_mac = _mac(src_mac)
        if dst_mac is not None:
            flow.dst_mac = _mac(dst_mac)
        self._flow = flow

    def _ends(self) -> list[End]:
        try:
            self._tx = None if self._out is None else self._open(self._out, Tx)
            self._rx = None if self._into is None else self._open(self._into, Rx)
        except BaseException:
            for end in self._opened:
                end.close()
            self._opened.clear()
            raise
        return [end for end in (self._tx, self._rx) if end is not None]

    def _launch(self, out: Any) -> int:
        tx = NULL if self._tx is None else self._tx.ptr
        rx = NULL if self._rx is None else self._rx.ptr
        return int(lib.rb_flow_start(out, tx, rx, self._flow, self._options))

    def _read(self, ptr: Any) -> dict[str, Any]:
        stats = ffi.new("rb_flow_stats *")
        _c.check(lib.rb_flow_stats_get(ptr, stats))
        found = _c.as_dict(stats[0])
        found["latency_ns"] = dict(zip(_PERCENTILES, found["latency_ns"])) if found["latency_count"] else None
        return found

    def stats(self) -> dict[str, Any]:
        """Counters since the start; after :meth:`stop` the last ones.

        :returns: ``sent``, ``sent_bytes``, ``refused``, ``received``, ``received_bytes``, ``lost``,
            ``reordered``, ``duplicated``, ``corrupted``, ``foreign`` (no packets of this stream),
            ``next_sequence``, ``latency_count``, ``latency_ns`` (min, median, p99, p999, max; None without
            any), ``seconds``, ``running``, ``error``, ``message``.
        """
        return super().stats()


def _ip(value: str) -> int:
    try:
        return int(ipaddress.IPv4Address(value))
    except (ipaddress.AddressValueError, TypeError):
        raise Error(f"{value!r} is no IPv4 address", code="bad-value", cure="write it like 192.0.2.1") from None


def _mac(value: str) -> bytes:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", value):
        raise Error(f"{value!r} is no MAC address", code="bad-value", cure="write it like 02:00:00:00:00:01")
    return bytes.fromhex(value.replace(":", ""))
