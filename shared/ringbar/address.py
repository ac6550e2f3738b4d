# SPDX-License-Identifier: Apache-2.0
"""Addresses of queues, devices and VMs: what people type, read and written in one place.

.. code-block:: ebnf

    devices = device , { "," , device } ;             (* a pcap: path runs to the end of the argument *)
    device  = [ "zc:" ] , queues | nic | "stack:" , ifname | "pcap:" , path | ifname ;
    queue   = cluster , "@" , number ;
    queues  = queue , [ "-" , number ] ;              (* 99@0-3, where several are allowed *)
    nic     = "zc:" , ifname , [ "@" , number , [ "-" , number ] ] ;
    cluster = digit , { digit } ;
    ifname  = 1 to 15 bytes without "/" ":" "@" "," or space, not all digits ;
    vm      = "qmp:" , path | uuid | domain-name ;

``str()`` of an address is its canonical form; parsing that gives the same address again. Everything here
raises
:class:`~ringbar.errors.BadAddress` for text it cannot read, and touches neither files nor interfaces.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Union

from .errors import BadAddress

MAX_CLUSTER = 65535  #: the largest number of a cluster
MAX_QUEUE = 2047  #: the largest number of a queue in its cluster
MAX_NIC_QUEUE = 65535  #: the largest number of a queue of a network card
_IFNAME_BYTES = 15  # IFNAMSIZ without its terminating zero

_QUEUES = re.compile(r"(?P<cluster>[0-9]+)@(?P<range>.*)", re.DOTALL)
_RANGE = re.compile(r"(?P<first>[0-9]+)(?:-(?P<last>[0-9]+))?")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True, order=True)
class QueueAddress:
    """One queue of a cluster: ``99@0``."""

    cluster: int
    queue: int

    def __str__(self) -> str:
        return f"{self.cluster}@{self.queue}"


@dataclass(frozen=True)
class NicAddress:
    """A network card through AF_XDP: ``zc:eth1``, or one of its queues, ``zc:eth1@2``.

    :ivar interface: the interface's name.
    :ivar queue: number of the card's queue; None = all of them.
    """

    interface: str
    queue: int | None = None
    last: int | None = None
    """Of several queues, from ``queue`` on, that are one device."""

    def __str__(self) -> str:
        where = "" if self.queue is None else f"@{self.queue}" if self.last is None else f"@{self.queue}-{self.last}"
        return f"zc:{self.interface}{where}"


@dataclass(frozen=True)
class InterfaceAddress:
    """Any network interface, one copy per packet: ``eth1``."""

    interface: str

    def __str__(self) -> str:
        return self.interface


@dataclass(frozen=True)
class StackAddress:
    """The kernel's own side of an interface: ``stack:eth1``."""

    interface: str

    def __str__(self) -> str:
        return f"stack:{self.interface}"


@dataclass(frozen=True)
class FileAddress:
    """A capture file: ``pcap:/tmp/a.pcap``."""

    path: str

    def __str__(self) -> str:
        return f"pcap:{self.path}"


DeviceAddress = Union[QueueAddress, NicAddress, InterfaceAddress, StackAddress, FileAddress]


@dataclass(frozen=True)
class VmAddress:
    """A virtual machine.

    :ivar kind: ``"qmp"`` (the value is the path of a monitor socket), ``"uuid"`` or ``"name"`` (libvirt's).
    """

    kind: str
    value: str

    def __str__(self) -> str:
        return f"qmp:{self.value}" if self.kind == "qmp" else self.value


def _bad(message: str, cure: str | None = None) -> BadAddress:
    return BadAddress(message, cure=cure)


def _number(digits: str, most: int, what: str, text: str) -> int:
    # Compared by length first: a million digits are refused, not converted.
    stripped = digits.lstrip("0") or "0"
    if len(stripped) > len(str(most)) or int(stripped) > most:
        raise _bad(f"{_quoted(text)}: {what} goes from 0 to {most}")
    return int(stripped)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _range(text: str, whole: str, most: int, what: str) -> range:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise _bad(f"{_quoted(whole)}: after '@' comes a number or a range", "write it like 99@0 or 99@0-3")
    first = _number(match["first"], most, what, whole)
    if match["last"] is None:
        return range(first, first + 1)
    last = _number(match["last"], most, what, whole)
    if last < first:
        raise _bad(f"{_quoted(whole)}: the range runs backwards", f"write it as {last}-{first}")
    return range(first, last + 1)


def check_interface(name: str, whole: str | None = None) -> str:
    """Is this the name of an interface that can be told from every other address?

    :param name: the name alone, without ``zc:`` or ``stack:``.
    :param whole: what was typed, for the message.
    :returns: the name.
    :raises BadAddress: with the cure, where a name is impossible or looks like another kind of address.
    """
    shown = _quoted(name if whole is None else whole)
    if not name:
        raise _bad(f"{shown}: the name of an interface is missing", "`ip link` lists the interfaces")
    if len(name.encode("utf-8", "surrogateescape")) > _IFNAME_BYTES:
        raise _bad(
            f"{shown}: names of interfaces have at most {_IFNAME_BYTES} bytes",
            "`ip link` lists the interfaces",
        )
    rename = f"rename it: `ip link set dev {name} name NEWNAME`"
    if re.fullmatch(r"[0-9]+", name):
        raise _bad(f"{shown}: an interface whose name is a number looks like a cluster", f"{rename}; a queue is 99@0")
    for sign in "@,":
        if sign in name:
            raise _bad(f"{shown}: a name with {sign!r} looks like another address", rename)
    if ":" in name:
        raise _bad(
            f"{shown}: no kind of device begins with {name.split(':', 1)[0]!r}",
            "the kinds are zc:, stack: and pcap:; an alias like eth0:1 is named by its interface, eth0",
        )
    if "/" in name or any(c.isspace() or not c.isprintable() for c in name) or name in (".", ".."):
        raise _bad(
            f"{shown}: no interface can have this name",
            "a capture file is pcap:PATH; `ip link` lists interfaces",
        )
    return name


def _queues(text: str) -> list[QueueAddress] | None:
    """Queues, when it looks like queues: digits before an '@'."""
    match = _QUEUES.fullmatch(text)
    if match is None:
        return None
    cluster = _number(match["cluster"], MAX_CLUSTER, "a cluster's number", text)
    return [QueueAddress(cluster, n) for n in _range(match["range"], text, MAX_QUEUE, "a queue's number")]


def _device(text: str) -> list[DeviceAddress]:
    if text.startswith("pcap:"):
        if len(text) == 5 or "\0" in text:
            raise _bad(f"{_quoted(text)}: the file's path is missing", "write it like pcap:/tmp/a.pcap")
        return [FileAddress(text[5:])]
    if text.startswith("stack:"):
        return [StackAddress(check_interface(text[6:], text))]
    zc = text.startswith("zc:")
    rest = text[3:] if zc else text
    queues = _queues(rest)
    if queues is not None:
        return list(queues)
    if not zc:
        if "@" in rest and ":" not in rest:
            raise _bad(
                f"{_quoted(text)}: one queue of an interface needs AF_XDP, and a cluster is a number",
                f"write zc:{rest}, or 99@0 for a queue of cluster 99",
            )
        return [InterfaceAddress(check_interface(rest, text))]
    name, at, numbers = rest.partition("@")
    check_interface(name, text)
    if not at:
        return [NicAddress(name)]
    of_nic = _range(numbers, text, MAX_NIC_QUEUE, "a queue's number")
    return [NicAddress(name, of_nic[0], of_nic[-1] if len(of_nic) > 1 else None)]


def _items(text: str) -> Iterable[str]:
    """Split at commas; a pcap: path runs to the end."""
    while not text.startswith("pcap:"):
        item, comma, text = text.partition(",")
        yield item
        if not comma:
            return
    yield text


def _text(text: str) -> str:
    if not isinstance(text, str):
        raise _bad(f"an address is text, not {type(text).__name__}", 'write it like "99@0" or "zc:eth1"')
    if not text:
        raise _bad("the address is empty", "write it like 99@0, zc:eth1 or eth1")
    return text


def parse_devices(text: str) -> list[DeviceAddress]:
    """Read a list of devices, ranges expanded: ``99@0-1,zc:eth1`` are three. A range of a NIC's queues is one device.

    :param text: the argument as typed.
    :returns: at least one address, in the order written, the same one at most once.
    :raises BadAddress: for anything outside the grammar above, with the cure.
    """
    found: list[DeviceAddress] = []
    for item in _items(_text(text)):
        if not item:
            raise _bad(f"{_quoted(text)}: a device is missing beside a comma", "write devices like zc:eth1,zc:eth2")
        found.extend(_device(item))
    for i, address in enumerate(found):
        if address in found[:i]:
            raise _bad(f"{_quoted(text)}: {address} is named twice", "name it once")
    return found


def parse_device(text: str) -> DeviceAddress:
    """Read exactly one device.

    :raises BadAddress: also for a list or a range of several.
    """
    found = parse_devices(text)
    if len(found) != 1:
        raise _bad(f"{_quoted(text)}: {len(found)} devices where one is wanted", f"name one, for example {found[0]}")
    return found[0]


def parse_queues(text: str) -> list[QueueAddress]:
    """Read a list of queues, ranges expanded: ``99@0-3,99@7``. ``zc:99@0`` is accepted as the same as
    ``99@0``.

    :raises BadAddress: also where a device that is no queue is among them.
    """
    queues = []
    for address in parse_devices(text):
        if not isinstance(address, QueueAddress):
            raise _bad(f"{_quoted(text)}: {address} is not a queue", "a queue is CLUSTER@NUMBER, for example 99@0")
        queues.append(address)
    return queues


def parse_queue(text: str) -> QueueAddress:
    """Read exactly one queue, ``99@0``.

    :raises BadAddress: where it is none, or several.
    """
    queues = parse_queues(text)
    if len(queues) != 1:
        raise _bad(f"{_quoted(text)}: {len(queues)} queues where one is wanted", f"name one, for example {queues[0]}")
    return queues[0]


def parse_cluster(text: str) -> int:
    """Read the number of a cluster.

    :raises BadAddress: where it is no number from 0 to 65535.
    """
    if not re.fullmatch(r"[0-9]+", _text(text)):
        raise _bad(
            f"{_quoted(text)}: a cluster is a number",
            "`ringbar cluster list` lists them; a label is for people's eyes",
        )
    return _number(text, MAX_CLUSTER, "a cluster's number", text)


def parse_vm(text: str) -> VmAddress:
    """Read a VM: ``qmp:PATH``, a UUID, or the name of a libvirt domain.

    :raises BadAddress: for libvirt's running number, which changes with every start, and what can be no name.
    """
    if _text(text).startswith("qmp:"):
        if len(text) == 4 or "\0" in text:
            raise _bad(
                f"{_quoted(text)}: the path of the monitor socket is missing",
                "write it like qmp:/run/vm/a.qmp",
            )
        return VmAddress("qmp", text[4:])
    if _UUID.fullmatch(text):
        return VmAddress("uuid", str(uuid.UUID(text)))
    if re.fullmatch(r"[0-9]+", text):
        raise _bad(
            f"{_quoted(text)}: libvirt's running number of a VM changes with every start",
            "use its name or UUID: `virsh list --all --name`, `virsh domuuid NAME`",
        )
    if "/" in text or "\n" in text or "\0" in text:
        raise _bad(f"{_quoted(text)}: no VM can have this name", "a monitor socket is qmp:PATH")
    return VmAddress("name", text)


def format_queues(queues: Iterable[QueueAddress]) -> str:
    """Write queues as short as can be read back: ``99@0-3,99@7``, sorted."""
    parts: list[str] = []
    run: list[QueueAddress] = []
    for queue in [*sorted(set(queues)), None]:
        if run and queue is not None and (queue.cluster, queue.queue) == (run[-1].cluster, run[-1].queue + 1):
            run.append(queue)
            continue
        if run:
            parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1].queue}")
        run = [] if queue is None else [queue]
    return ",".join(parts)
