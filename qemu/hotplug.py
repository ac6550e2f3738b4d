# SPDX-License-Identifier: Apache-2.0
"""Plugging one slot of shared-memory functions (ivshmem-plain, a doorbell) into a running VM, and taking it out again.

The life of a slot: memory backends first (QEMU maps them), then functions 1 to 7, last function 0, upon which the
guest sees all of them at once. Anything that fails on the way is taken back, in the opposite order. To unplug,
function 0 is asked for; the guest lets go of the whole slot or does not answer, and only when every function is gone
can the memory be taken away.

Object ids: function ``SLOT.NAME``, memory ``SLOT.NAME.mem``, a doorbell's character device ``SLOT.NAME.fds``, where
SLOT begins with ``ringbar-``. They alone are the record of what is plugged: :meth:`AsyncVm.plugged` asks QEMU for
them, so nothing has to be remembered.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import socket
import stat
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Callable, TypeVar

from ringbar.errors import Busy, Error, Incompatible, NotFound
from ringbar.qemu import access, libvirt, qmp
from ringbar.qemu import bell as bells
from ringbar.qemu.monitor import CommandError, Monitor
from ringbar.qemu.ready import resume_cure, why_not_ready
from ringbar.qemu.slots import Place, choose, read_topology

#: Every object of ours in a VM has an id that begins so.
PREFIX = "ringbar-"
#: Seconds between two looks at a guest that is waited for, and between two unplug requests.
POLL, REPEAT = 0.2, 6.0
#: Seconds that a rollback waits for functions to leave.
ROLLBACK_TIMEOUT = 15.0

_T = TypeVar("_T")
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Function:
    """One segment as one PCI function of a slot."""

    name: str                       #: "lane0", "pool1": unique within the slot
    size: int                       #: bytes, a power of two
    path: str | None = None         #: memory by path, or
    fd: int | None = None           #: by file descriptor; exactly one of the two
    readonly: bool = False          #: the guest can read only; its stores are discarded
    number: int | None = None       #: 0 to 7 within the slot; None: the lowest that no other asks for. The first is 0
    bell: bells.Bell | None = None   #: it is a doorbell; its memory is by descriptor


@dataclasses.dataclass(frozen=True)
class Plugged:
    """One plugged slot: what it takes to unplug it, from any process."""

    slot: str
    bus: str
    addr: str                       #: the slot in hexadecimal, without the function
    devices: tuple[str, ...]        #: ids, function 0 first
    backends: tuple[str, ...]
    fdsets: tuple[int, ...] = ()    #: sets of descriptors that QEMU still holds open for it
    chardevs: tuple[str, ...] = ()  #: of a doorbell

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plugged:
        """The inverse of :meth:`as_dict`, also after a turn through JSON."""
        return cls(str(data["slot"]), str(data["bus"]), str(data["addr"]), tuple(data["devices"]),
                   tuple(data["backends"]), tuple(data.get("fdsets", ())), tuple(data.get("chardevs", ())))


@dataclasses.dataclass(frozen=True)
class VmInfo:
    """Which VM this is. Pid and start time together name one life of it."""

    name: str | None
    uuid: str | None
    pid: int                        #: 0 when QEMU runs in another pid namespace
    start_time: int | None          #: clock ticks since boot
    machine: str                    #: for example "pc-q35-7.2"
    version: str                    #: QEMU's, for example "7.2.22"
    state: str                      #: QEMU's run state, for example "running"
    accelerator: str                #: "kvm", "tcg" or "other"


def numbers(functions: Sequence[Function]) -> list[int]:
    """The number of each function within the slot.

    :raise Error: ``bad-slot``: two of the same, one that does not exist, or a first one that is not 0.
    """
    asked = [f.number for f in functions if f.number is not None]
    free = (n for n in range(8) if n not in asked)
    found = [next(free, 8) if f.number is None else f.number for f in functions]
    if len(set(found)) != len(found) or found[0] != 0 or not all(0 <= n <= 7 for n in found):
        raise Error(f"functions {', '.join(map(str, found))} do not make up a PCI slot", code="bad-slot")
    return found


def check_functions(slot: str, functions: Sequence[Function]) -> None:
    """Refuses what cannot work before anything is touched.

    :raise Error: ``bad-slot``, ``no-such-file``, ``bad-size``, ``no-permission``.
    """
    if not re.fullmatch(re.escape(PREFIX) + r"[A-Za-z0-9_-]{1,40}", slot):
        raise Error(f"{slot!r} is no name for a slot", code="bad-slot",
                    cure=f"use {PREFIX} followed by letters, digits, '-' or '_'")
    if not 1 <= len(functions) <= 8:
        raise Error(f"a PCI slot holds 1 to 8 functions, not {len(functions)}", code="bad-slot",
                    cure="use fewer lanes or pools per VM")
    numbers(functions)
    names = [f.name for f in functions]
    if len(set(names)) != len(names) or not all(re.fullmatch(r"[A-Za-z0-9_-]{1,40}", n) for n in names):
        raise Error(f"function names must be different words: {', '.join(names)}", code="bad-slot")
    for function in functions:
        if function.size < 4096 or function.size & (function.size - 1):
            raise Error(f"{function.name}: {function.size} bytes is not a power of two of at least 4096",
                        code="bad-size", cure=f"use {max(4096, 1 << (function.size - 1).bit_length())} bytes"
                        if function.size > 0 else None)
        if (function.path is None) == (function.fd is None):
            raise Error(f"{function.name}: give its memory either by path or by file descriptor", code="bad-slot")
        what = function.path if function.path is not None else f"file descriptor {function.fd}"
        try:
            status = os.stat(function.path) if function.path is not None else os.fstat(function.fd or 0)
        except PermissionError:
            raise Error(f"{function.name}: no permission to look at {what}", code="no-permission",
                        cure="run the command as root or as the cluster's owner") from None
        except OSError:
            raise NotFound(f"{function.name}: there is no {what}", code="no-such-file",
                           cure="see whether the cluster still exists: ringbar cluster list") from None
        if not stat.S_ISREG(status.st_mode):
            raise Error(f"{function.name}: {what} is not a regular file", code="no-such-file")
        if status.st_size != function.size:
            raise Error(f"{function.name}: {what} has {status.st_size} bytes, not {function.size}", code="bad-size",
                        cure="destroy the cluster and create it anew")


class AsyncVm:
    """A running VM, for asyncio programs. One operation at a time; :class:`Vm` is the same for everybody else."""

    def __init__(self, connection: Monitor) -> None:
        self._connection = connection
        self._lock = asyncio.Lock()

    @classmethod
    async def connect(cls, address: str, timeout: float = 5.0, *, uri: str | None = None) -> AsyncVm:
        """Connects to a running VM: ``qmp:/path`` or ``/path``, else a name or UUID that libvirt knows.

        :param uri: of libvirt's connection; None: the usual one.
        :raise Error: those of :meth:`ringbar.qemu.qmp.Connection.open` and
            :meth:`ringbar.qemu.libvirt.Connection.open`.
        """
        if uri is None and address.startswith(("qmp:", "/")):
            return cls(await qmp.Connection.open(address, timeout))
        return cls(await libvirt.Connection.open(address, uri, timeout))

    @property
    def via(self) -> str:
        """How QEMU is reached, for people."""
        return self._connection.via

    @property
    def waited(self) -> float:
        """Seconds spent waiting for libvirt, QEMU and the guest."""
        return self._connection.waited

    async def close(self) -> None:
        """Ends the session; what is plugged stays plugged."""
        await self._connection.close()

    async def __aenter__(self) -> AsyncVm:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def info(self) -> VmInfo:
        """Name, process, machine and state of the VM."""
        ask = self._connection.execute
        version = (await ask("query-version"))["qemu"]
        name = (await ask("query-name")).get("name")
        uuid = str((await ask("query-uuid"))["UUID"])
        if (await ask("query-kvm"))["enabled"]:
            accelerator = "kvm"
        else:
            jit = ""
            with contextlib.suppress(CommandError):
                jit = await self._connection.hmp("info jit")
            accelerator = "tcg" if "TB count" in jit or "Translation buffer" in jit else "other"
        machine = str(await self._connection.qom_get("/machine", "type", "unknown"))
        return VmInfo(
            name=name, uuid=None if set(uuid) <= {"0", "-"} else uuid, pid=self._connection.pid,
            start_time=self._connection.start_time, machine=re.sub("-machine$", "", machine),
            version=f"{version['major']}.{version['minor']}.{version['micro']}",
            state=str((await ask("query-status"))["status"]), accelerator=accelerator,
        )

    async def neighbours(self) -> list[str]:
        """Devices in the VM that reach memory past the guest's CPU (vfio-pci, vhost-user): an attached pool is
        mapped for them too. One sentence part each, for example ``vfio-pci hostdev0``."""
        found = []
        for parent in ("/machine/peripheral", "/machine/peripheral-anon"):
            for name, kind in (await self._connection.qom_list(parent)).items():
                driver = re.fullmatch(r"child<(vfio-pci.*|vhost-user-.*)>", kind)
                if driver is not None:
                    found.append(f"{driver[1]} {name if parent.endswith('peripheral') else '(no id)'}")
        for line in (await self._connection.hmp("info network")).splitlines():
            net = re.search(r"^[ \\]*([^:\s]+): .*type=(vhost-user|vhost-vdpa)\b", line)
            if net is not None:
                found.append(f"{net[2]} {net[1]}")
        return found

    async def no_bell(self) -> bells.Refusal | None:
        """Why this VM should have no doorbell; None: it can."""
        return await bells.refusal(self._connection)

    async def bars(self, plugged: Plugged) -> dict[str, int | None]:
        """Where the guest has placed each function's memory: device id -> guest physical address of BAR 2; None
        until the guest has assigned it (on q35 a port's window may be too small: the guest has to rescue it)."""
        found: dict[str, int | None] = dict.fromkeys(plugged.devices)
        todo = [device for bus in await self._connection.execute("query-pci") for device in bus["devices"]]
        while todo:
            device = todo.pop()
            todo += device.get("pci_bridge", {}).get("devices", ())
            if device["qdev_id"] in found:
                for region in device["regions"]:
                    if region["bar"] == 2 and region["address"] not in (-1, 0, 2**64 - 1):
                        found[device["qdev_id"]] = int(region["address"])
        return found

    async def plugged(self) -> list[Plugged]:
        """What of ours is in the VM now, half-plugged remains included."""
        slots: dict[str, tuple[list[tuple[int, str]], list[str]]] = {}
        where: dict[str, tuple[str, str]] = {}
        for name in await self._connection.qom_list("/machine/peripheral"):
            if name.startswith(PREFIX):
                path = f"/machine/peripheral/{name}"
                devfn = int(await self._connection.qom_get(path, "addr", 0))
                bus = str(await self._connection.qom_get(path, "parent_bus", "")).rpartition("/")[2]
                slot = name.partition(".")[0]
                slots.setdefault(slot, ([], []))[0].append((devfn & 7, name))
                where[slot] = (bus, f"{devfn >> 3:x}")
        for name in await self._objects():
            if name.startswith(PREFIX):
                slots.setdefault(name.partition(".")[0], ([], []))[1].append(name)
        chardevs: dict[str, list[str]] = {}
        for name in await bells.chardevs(self._connection, PREFIX):
            slot = name.partition(".")[0]
            chardevs.setdefault(slot, []).append(name)
            slots.setdefault(slot, ([], []))
        fdsets: dict[str, list[int]] = {}
        for entry in await self._connection.execute("query-fdsets"):
            for opened in entry["fds"]:
                if str(opened.get("opaque", "")).startswith(PREFIX):
                    slot = opened["opaque"].partition(".")[0]
                    fdsets.setdefault(slot, []).append(int(entry["fdset-id"]))
                    slots.setdefault(slot, ([], []))
        return [
            Plugged(slot, *where.get(slot, ("", "")), tuple(name for _, name in sorted(devices)),
                    tuple(sorted(backends)), tuple(fdsets.get(slot, ())), tuple(chardevs.get(slot, ())))
            for slot, (devices, backends) in sorted(slots.items())
        ]

    async def plug(
        self, slot: str, functions: Sequence[Function], *, timeout: float = 30, use_last_slot: bool = False,
        progress: Progress | None = None,
    ) -> Plugged:
        """Plugs the functions, the first as function 0, as soon as the guest is ready for it.

        :param slot: ``ringbar-99`` for cluster 99.
        :param timeout: seconds to wait for a guest that is off, paused or booting.
        :param use_last_slot: also take the only free place.
        :param progress: called with what is waited for, each time that changes.
        :raise Busy: ``already-plugged``.
        :raise Error: ``guest-not-ready``, ``no-free-slot``, ``last-slot``, ``no-ivshmem``, ``vm-died``, those of
            :func:`check_functions`, or what QEMU said. Whatever it is, nothing stays behind in the VM.
        """
        async with self._lock:
            check_functions(slot, functions)
            types = await self._connection.execute("qom-list-types", implements="ivshmem-plain")
            if not any(t["name"] == "ivshmem-plain" for t in types):
                raise Incompatible("this QEMU was built without the ivshmem-plain device", code="no-ivshmem",
                                   cure="use a QEMU with ivshmem, such as Debian's qemu-system-x86")
            there = {p.slot: p for p in await self.plugged()}.get(slot)
            if there is not None:
                raise Busy(f"{slot} is already plugged into this VM" if there.devices else
                           f"remains of {slot} are in this VM", holder=slot, code="already-plugged",
                           cure="detach it first: ringbar detach VM")
            place = await self._wait_ready([f.size for f in functions], timeout, use_last_slot, progress)
            if progress is not None:
                progress(f"plugging {len(functions)} functions into {place.bus} slot {place.slot:x}")
            return await self._plug(slot, functions, place)

    async def _wait_ready(
        self, sizes: Sequence[int], timeout: float, use_last_slot: bool, progress: Progress | None
    ) -> Place:
        deadline = time.monotonic() + timeout
        said = None
        while True:
            topology = await read_topology(self._connection)
            place = choose(topology, sizes, use_last_slot=use_last_slot,
                           libvirt_name=self._connection.libvirt_name)
            reason = await why_not_ready(self._connection, topology, place)
            if reason is None:
                return place
            if reason != said and progress is not None:
                progress(f"waiting: {reason}")
            said = reason
            if time.monotonic() >= deadline:
                raise Error(f"nothing was plugged within {timeout:g} s: {reason}", code="guest-not-ready",
                            cure=resume_cure(reason))
            with self._connection.waiting():
                await asyncio.sleep(min(POLL, max(0.0, deadline - time.monotonic())))

    async def _plug(self, slot: str, functions: Sequence[Function], place: Place) -> Plugged:
        devices = [f"{slot}.{f.name}" for f in functions]
        made: list[str] = []
        added: list[str] = []
        fdsets: list[int] = []
        chardevs: list[str] = []
        offered: dict[str, socket.socket] = {}
        try:
            for function, device in zip(functions, devices):
                if function.bell is not None and function.fd is not None:
                    chardevs.append(f"{device}.fds")
                    offered[device] = await bells.offer(self._connection, chardevs[-1], function.bell, function.fd)
                    continue
                memory = function.path
                if function.fd is not None:
                    fdset, number = await self._connection.add_fd(function.fd, device)
                    fdsets.append(fdset)
                    memory = f"/proc/self/fd/{number}"
                made.append(f"{device}.mem")        # before it is known to exist: the answer itself may be lost
                with contextlib.ExitStack() as opened:
                    if function.fd is not None and self._connection.pid:
                        opened.enter_context(
                            access.openable(function.fd, self._connection.pid, function.readonly, function.name))
                    await self._connection.execute(
                        "object-add", qom_type="memory-backend-file", id=f"{device}.mem", mem_path=memory,
                        size=function.size, share=True, readonly=function.readonly)
            # QEMU has mapped the memory by now; its copies of the descriptors have done their work.
            await self._drop_fdsets(fdsets)
            fdsets.clear()
            for number, device in sorted(zip(numbers(functions), devices), reverse=True):
                added.append(device)
                await self._add_device(device, place, number, device in offered, multifunction=len(devices) > 1)
                if device in offered:
                    await bells.taken(offered[device])
        except BaseException as err:
            left = await self._rollback(added, made, fdsets, chardevs)
            if isinstance(err, CommandError):
                raise _refusal(err, self._connection.pid, left) from None
            if left and isinstance(err, Error):
                raise Error(f"{err.message}; could not be taken back yet: {', '.join(left)}", code=err.code,
                            cure="run: ringbar detach VM") from None
            raise
        finally:
            for ours in offered.values():
                ours.close()
        return Plugged(slot, place.bus, f"{place.slot:x}", tuple(devices), tuple(made), chardevs=tuple(chardevs))

    async def _add_device(
        self, device: str, place: Place, number: int, rings: bool, *, multifunction: bool
    ) -> None:
        what: dict[str, Any] = {"driver": "ivshmem-plain", "memdev": f"{device}.mem"}
        if rings:
            what = {"driver": "ivshmem-doorbell", "chardev": f"{device}.fds", "vectors": bells.VECTORS}
        await self._connection.execute(
            "device_add", id=device, bus=place.bus, addr=place.addr(number), multifunction=multifunction, **what)

    async def _drop_fdsets(self, fdsets: Sequence[int]) -> None:
        for fdset in fdsets:
            with contextlib.suppress(CommandError):     # gone already: QEMU drops sets nobody uses
                await self._connection.execute("remove-fd", fdset_id=fdset)

    async def _rollback(
        self, devices: Sequence[str], backends: Sequence[str], fdsets: Sequence[int], chardevs: Sequence[str]
    ) -> list[str]:
        """Takes back what a failed plug has made. :return: ids that would not go; empty when the VM has died."""
        try:
            await self._remove_devices(devices, ROLLBACK_TIMEOUT)
            await self._drop_fdsets(fdsets)
            left = await bells.remove(self._connection, list(chardevs))
            return [*left, *await self._remove_backends(backends)]
        except Error as err:
            if err.code == "vm-died":
                return []
            return [*devices, *backends, *chardevs]

    async def unplug(self, plugged: Plugged, *, timeout: float = 30) -> None:
        """Asks the guest to let go of the slot, waits until it has, then takes the memory away.

        :raise Error: ``unplug-refused``: the guest said no or did not answer within ``timeout`` seconds. The
            request stays; calling again finishes it.
        """
        async with self._lock:
            left, rejected = await self._remove_devices(plugged.devices, timeout)
            if left:
                state = str((await self._connection.execute("query-status"))["status"])
                how = ("the guest refused to let go of" if rejected else
                       f"the VM is in state {state} and cannot let go of" if state != "running" else
                       f"the guest did not answer within {timeout:g} s, it still holds")
                raise Error(
                    f"{how} {plugged.slot} ({', '.join(left)})", code="unplug-refused",
                    cure="run the command again when the guest answers (its kernel needs ACPI or PCI Express "
                    "hot-plug; a paused VM must be resumed), restart the guest, or give --force to detach the "
                    "queues now and leave the device in the VM until it ends",
                )
            await self._drop_fdsets(plugged.fdsets)
            stuck = await self._remove_backends(plugged.backends)
            stuck += await bells.remove(self._connection, list(plugged.chardevs))
            if stuck:
                raise Error(f"QEMU still uses the memory {', '.join(stuck)}", code="unplug-refused",
                            cure="run the command again")

    async def _present(self, devices: Sequence[str]) -> list[str]:
        there = await self._connection.qom_list("/machine/peripheral")
        return [d for d in devices if d in there]

    async def _remove_devices(self, devices: Sequence[str], timeout: float) -> tuple[list[str], bool]:
        """Unplugs and waits. :return: what is still there, and whether the guest said no."""
        deadline = time.monotonic() + timeout
        rejected = False
        with self._connection.events("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR") as events:
            asked = -REPEAT
            left = await self._present(devices)
            while left:
                now = time.monotonic()
                if now - asked >= REPEAT:
                    asked = now
                    await self._request(left)
                try:
                    wait = min(deadline, asked + REPEAT) - time.monotonic()
                    with self._connection.waiting():
                        event = await asyncio.wait_for(events.get(), max(0.01, min(wait, 1.0)))
                    data = event["data"]
                    if event["event"] == "DEVICE_UNPLUG_GUEST_ERROR" and isinstance(data, dict):
                        if data.get("device") in devices:
                            rejected = True
                            break
                except (asyncio.TimeoutError, TimeoutError):
                    if time.monotonic() >= deadline:
                        break
                left = await self._present(devices)
        return await self._present(devices), rejected

    async def _request(self, devices: Sequence[str]) -> None:
        """One unplug request for the slot: function 0's takes all with it, without it each has to be asked for."""
        functions = {d: int(await self._connection.qom_get(f"/machine/peripheral/{d}", "addr", 0)) & 7
                     for d in devices}
        for device in [d for d, n in functions.items() if n == 0] or list(devices):
            # refused: "already in the process of unplug", or its power indicator blinks: the guest was asked before
            with contextlib.suppress(CommandError):
                await self._connection.execute("device_del", id=device)

    async def _remove_backends(self, backends: Sequence[str]) -> list[str]:
        """Deletes memory objects. A device that has just gone may hold its memory for a moment more."""
        deadline = time.monotonic() + 5
        while True:
            there = await self._objects()
            left = [b for b in backends if b in there]
            if not left or time.monotonic() > deadline:
                return left
            for backend in left:
                with contextlib.suppress(CommandError):
                    await self._connection.execute("object-del", id=backend)
            if set(left) & set(await self._objects()):
                await asyncio.sleep(0.05)

    async def _objects(self) -> list[str]:
        """Ids of the VM's objects. QEMU makes their container with the first of them."""
        if "objects" not in await self._connection.qom_list("/"):
            return []
        return list(await self._connection.qom_list("/objects"))


def _refusal(err: CommandError, pid: int, left: Sequence[str]) -> Error:
    """QEMU's refusal in our words, with a cure where the cause is a known one."""
    said = err.message
    code, cure = "plug-failed", None
    if "Operation not permitted" in said:
        code, cure = "no-permission", "the memory is sealed against writing: plug it read-only"
    elif "Permission denied" in said:
        code = "no-permission"
        cure = (f"QEMU runs as {access.user_of(pid)}, which must be able to open the memory; where AppArmor or SELinux "
                "confines it, ringbar doctor VM has the lines to add")
    elif "Cannot allocate memory" in said:
        code, cure = "no-memory", "see free memory and huge pages: ringbar doctor"
    elif "No such file" in said:
        code, cure = "no-such-file", "QEMU does not see the file (a container or chroot): pass it by descriptor"
    if left:
        cure = "run: ringbar detach VM"
        said += f"; could not be taken back yet: {', '.join(left)}"
    return Error(f"QEMU refused the device: {said}", code=code, cure=cure)


class Vm:
    """A running VM for ordinary (synchronous) programs; a context manager. Not for use by two threads at once."""

    def __init__(self, vm: AsyncVm, loop: asyncio.AbstractEventLoop) -> None:
        self._vm = vm
        self._loop = loop

    @classmethod
    def connect(cls, address: str, timeout: float = 5.0, *, uri: str | None = None) -> Vm:
        """See :meth:`AsyncVm.connect`."""
        loop = asyncio.new_event_loop()
        try:
            return cls(_run(loop, AsyncVm.connect(address, timeout, uri=uri)), loop)
        except BaseException:
            loop.close()
            raise

    def close(self) -> None:
        """Ends the session; what is plugged stays plugged."""
        if not self._loop.is_closed():
            _run(self._loop, self._vm.close())
            self._loop.close()

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def via(self) -> str:
        """See :attr:`AsyncVm.via`."""
        return self._vm.via

    @property
    def waited(self) -> float:
        """See :attr:`AsyncVm.waited`."""
        return self._vm.waited

    def info(self) -> VmInfo:
        """See :meth:`AsyncVm.info`."""
        return _run(self._loop, self._vm.info())

    def neighbours(self) -> list[str]:
        """See :meth:`AsyncVm.neighbours`."""
        return _run(self._loop, self._vm.neighbours())

    def no_bell(self) -> bells.Refusal | None:
        """See :meth:`AsyncVm.no_bell`."""
        return _run(self._loop, self._vm.no_bell())

    def bars(self, plugged: Plugged) -> dict[str, int | None]:
        """See :meth:`AsyncVm.bars`."""
        return _run(self._loop, self._vm.bars(plugged))

    def plugged(self) -> list[Plugged]:
        """See :meth:`AsyncVm.plugged`."""
        return _run(self._loop, self._vm.plugged())

    def plug(
        self, slot: str, functions: Sequence[Function], *, timeout: float = 30, use_last_slot: bool = False,
        progress: Progress | None = None,
    ) -> Plugged:
        """See :meth:`AsyncVm.plug`."""
        return _run(self._loop, self._vm.plug(slot, functions, timeout=timeout, use_last_slot=use_last_slot,
                                              progress=progress))

    def unplug(self, plugged: Plugged, *, timeout: float = 30) -> None:
        """See :meth:`AsyncVm.unplug`."""
        _run(self._loop, self._vm.unplug(plugged, timeout=timeout))


def _run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, _T]) -> _T:
    """Runs the work to its end. Ctrl-C cancels it and lets it take back what it has begun."""
    task = loop.create_task(work)
    try:
        return loop.run_until_complete(task)
    except KeyboardInterrupt:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
        raise
