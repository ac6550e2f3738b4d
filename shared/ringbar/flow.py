# SPDX-License-Identifier: Apache-2.0
"""Traffic that proves itself: packets with sequence numbers and checksums, by a C thread."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Any, Union

from . import _c
from ._c import NULL, ffi, lib
from .ends import End, Rx, Tx
from .errors import Error
from .workers import Input, Output, Worker

_PERCENTILES = ("min", "median", "p99", "p999", "max")
_MARK = 32  # bytes of our own in each packet

_Ip = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]


def least_size(ipv6: bool = False, vlan: bool = False) -> int:
    """Bytes of the shortest packet, without FCS: its headers and 32 bytes of its own."""
    return 42 + 20 * ipv6 + 4 * vlan + _MARK


def imix(least: int = 74) -> list[int]:
    """Sizes of Simple IMIX without FCS, in the order sent: 7 of ``least``, 4 of 590, 1 of 1514 bytes."""
    return [least, 590, least, least, 590, least, 1514, least, 590, least, 590, least]


class Flow(Worker):
    """Generates packets on one end, and verifies those that arrive on another.

    The packets are Ethernet, IPv4 or IPv6, UDP; the payload begins with a stream number, a sequence number, a time
    and a checksum of every byte. With both ends, what was sent is checked off against what arrives. The ends
    may come from two Cluster objects; both belong to the flow while it runs.
    """

    def __init__(
        self,
        out: Output | None = None,
        into: Input | None = None,
        *,
        size: int | Sequence[int] = 0,
        flows: int | None = None,
        stream: int = 0,
        packets: int | None = None,
        pps: float | None = None,
        bps: float | None = None,
        window: int | None = None,
        port: int | str = 5000,
        src_port: int | str | None = None,
        src_mac: str | None = None,
        dst_mac: str | None = None,
        src_ip: str | None = None,
        dst_ip: str | None = None,
        vlan: int | None = None,
        frames: Iterable[bytes] = (),
        verify: bool = True,
        core: int | None = None,
        idle: str = "adaptive",
        burst: int = 64,
        name: str | None = None,
    ) -> None:
        """The other settings: see :class:`Worker`.

        :param out: where packets are sent: Tx or Queue; None = nothing is generated.
        :param into: where they arrive: Rx or Queue; None = nothing is verified.
        :param size: bytes of each packet, without FCS; several are taken in turn; 0 = the least, 74, 20 more with
            IPv6 and 4 more with a VLAN.
        :param flows: distinct combinations of ports and addresses; None = all that the ranges make.
        :param stream: tells one generator from another.
        :param packets: how many; None = without end.
        :param pps: packets a second; None = as fast as it goes.
        :param bps: bits a second on the wire, with preamble, FCS and gap; None = no limit.
        :param window: with both ends, the most packets on their way; None = no limit.
        :param port: UDP destination, or a range ``"5000-5009"``.
        :param src_port: UDP source, or a range; None = from 1024, as many as ``flows`` needs.
        :param src_mac: like ``"02:00:00:00:00:01"``; None = a locally administered one. dst_mac likewise.
        :param src_ip: an address, a range ``"10.0.0.1-10.0.0.9"`` or a network ``"10.0.0.0/24"``, IPv4 or IPv6;
            None = 192.0.2.1 or 2001:db8::1. dst_ip likewise.
        :param vlan: the packets carry this tag, 0 to 4094.
        :param frames: these are sent in turn, as they are, instead of packets of our own; nothing can verify them.
        :param verify: False: what arrives is only counted.
        """
        super().__init__(core=core, idle=idle, burst=burst, name=name)
        if out is None and into is None:
            raise Error("a flow needs an end to send on or one to receive on", code="bad-value")
        self._out, self._into = out, into
        self._tx: End | None = None
        self._rx: End | None = None
        flow = _c.options("rb_flow_options")
        self._keep: list[Any] = []  # what `flow` points to
        flow.flows = 0 if flows is None else _c.number(flows, 1, 2**32 - 1, "the number of flows")
        flow.stream = _c.number(stream, 0, 2**32 - 1, "a stream's number")
        flow.packets = 0 if packets is None else _c.number(packets, 1, 2**63, "the number of packets")
        flow.pps = _rate(pps, "pps", "packets")
        flow.bps = _rate(bps, "bps", "bits")
        flow.window = 0 if window is None else _c.number(window, 1, 2**31, "the window")
        flow.plain = not verify
        flow.vlan = 0 if vlan is None else _c.number(vlan, 0, 4094, "a VLAN") + 1
        flow.port, flow.dst_ports = _ports(port)
        if src_port is not None:
            flow.src_port, flow.src_ports = _ports(src_port)
        self._addresses(flow, src_ip, dst_ip)
        least = least_size(bool(flow.ipv6), vlan is not None)
        sizes = [size] if isinstance(size, int) else list(size)
        if sizes != [0]:
            if not 1 <= len(sizes) <= 65536:
                raise Error("sizes are a number of bytes, or up to 65,536 of them", code="bad-value")
            most = int(lib.RB_MAX_LENGTH)
            self._keep.append(ffi.new("uint16_t[]", [_c.number(n, least, most, "the size of a packet") for n in sizes]))
            flow.n_sizes, flow.sizes = len(sizes), self._keep[-1]
        self._frames(flow, list(frames))
        if src_mac is not None:
            flow.src_mac = _mac(src_mac)
        if dst_mac is not None:
            flow.dst_mac = _mac(dst_mac)
        self._flow = flow

    @staticmethod
    def _addresses(flow: Any, src_ip: str | None, dst_ip: str | None) -> None:
        given = [_addresses(text) for text in (src_ip, dst_ip) if text is not None]
        versions = {first.version for first, _ in given}
        if len(versions) > 1:
            raise Error(f"{src_ip} and {dst_ip} are not of one IP version", code="bad-value", cure="two of one kind")
        six = versions == {6}
        (source, sources), (target, targets) = (
            _addresses(text or default)
            for text, default in zip(
                (src_ip, dst_ip), ("2001:db8::1", "2001:db8::2") if six else ("192.0.2.1", "192.0.2.2")
            )
        )
        flow.src_ips, flow.dst_ips, flow.ipv6 = sources, targets, six
        if six:
            flow.src_ip6, flow.dst_ip6 = source.packed, target.packed
        else:
            flow.src_ip, flow.dst_ip = int(source), int(target)

    def _frames(self, flow: Any, frames: list[bytes]) -> None:
        if not frames:
            return
        if self._into is not None:
            raise Error("frames sent as they are cannot be verified", code="bad-value", cure="receive elsewhere")
        for frame in frames:
            _c.number(len(frame), 14, int(lib.RB_MAX_LENGTH), "the size of a frame")
        self._keep += [ffi.from_buffer(b"".join(frames)), ffi.new("uint32_t[]", [len(frame) for frame in frames])]
        flow.frames, flow.frame_lengths = ffi.cast("uint8_t *", self._keep[-2]), self._keep[-1]
        flow.n_frames = len(frames)

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

    def finish(self) -> None:
        """Send nothing more. The flow ends once what was sent is back; lost packets never are: :meth:`stop` then."""
        with self._lock:
            self._check_running()
            _c.check(lib.rb_flow_finish(self._ptr))

    def stats(self) -> dict[str, Any]:
        """Counters since the start; after :meth:`stop` the last ones.

        :returns: ``sent``, ``sent_bytes``, ``refused``, ``received``, ``received_bytes``, ``lost``,
            ``reordered``, ``duplicated``, ``corrupted``, ``foreign`` (no packets of this stream), ``late`` (more than
            a million packets behind: too late to tell whether they are duplicates), ``distinct``,
            ``first_sequence``, ``next_sequence``, ``latency_count``, ``latency_ns`` (min, median, p99, p999, max;
            None without any), ``seconds``, ``running``, ``error``, ``message``.
        """
        return super().stats()


def check(**settings: Any) -> None:
    """Check settings of :class:`Flow` before there is an end to send on.

    :raises Error: what is wrong with them.
    """
    anything: Any = object()
    Flow(anything, **settings)


def _rate(value: float | None, name: str, what: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e15:
        raise Error(f"{name} is a number of {what} a second above 0, not {value!r}", code="bad-value")
    return float(value)


def _ports(value: int | str) -> tuple[int, int]:
    """The first port and how many: 5000, ``"5000"``, ``"5000-5009"``."""
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", value) if isinstance(value, str) else None
    if isinstance(value, str) and match is None:
        raise Error(f"{value!r} is no port", code="bad-value", cure="write it like 5000 or 5000-5009")
    first = _c.number(int(match[1]) if match else value, 1, 65535, "a port")
    last = _c.number(int(match[2]), 1, 65535, "a port") if match and match[2] else first
    if last < first:
        raise Error(f"the range {value} runs backwards", code="bad-value", cure=f"write it as {last}-{first}")
    return first, last - first + 1


def _addresses(value: str) -> tuple[_Ip, int]:
    """The first address and how many: one, ``"10.0.0.1-10.0.0.9"``, ``"10.0.0.0/24"``."""
    cure = "write it like 192.0.2.1, 192.0.2.1-192.0.2.9 or 192.0.2.0/24"
    try:
        if "/" in value:
            network = ipaddress.ip_network(value)
            first, count = network.network_address, network.num_addresses
        else:
            begin, dash, end = value.partition("-")
            first = ipaddress.ip_address(begin)
            last = ipaddress.ip_address(end) if dash else first
            count = int(last) - int(first) + 1 if last.version == first.version else 0
    except (ValueError, TypeError):
        raise Error(f"{value!r} is no IP address, range or network", code="bad-value", cure=cure) from None
    if not 1 <= count <= 1 << 24:
        raise Error(f"{value} has {max(count, 0):,} addresses", code="bad-value", cure="a range of 1 to 16,777,216")
    if (int(first) & 0xFFFFFFFF) + count > 1 << 32:
        raise Error(f"the range {value} crosses a 32-bit boundary", code="bad-value", cure="two ranges, two senders")
    return first, count


def _mac(value: str) -> bytes:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", value):
        raise Error(f"{value!r} is no MAC address", code="bad-value", cure="write it like 02:00:00:00:00:01")
    return bytes.fromhex(value.replace(":", ""))
