# SPDX-License-Identifier: Apache-2.0
"""Programs, guests, QEMU and the host's server end at the worst moment: nothing is lost, nothing is wedged."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
from vmtools import Program, Raised, Shell, Tool, in_guest, monitor, until, vm

import ringbar
from ringbar.host.service import Host
from ringbar.qemu.launch import Guest

pytestmark = pytest.mark.vm

HELD = 100
OPEN = "zc = ringbar.Cluster.attach(99, timeout=10); rx = zc.open_queue(0, 'rx')"
HOLD = f"held = [rx.recv({HELD}, timeout=10)]; answer = len(held[0])"
BURSTS = """
try:
    for burst in rx.bursts(timeout=30):
        assert len(burst), "30 seconds without a packet"
except ringbar.Detached as gone:
    answer = [type(gone).__name__, gone.message]
"""

Start = Callable[[Guest], Program]


@pytest.fixture
def mortal(start_guest: Callable[..., Guest]) -> Iterator[Guest]:
    """A VM of this test alone."""
    with start_guest("mortal", memory="384M") as guest:
        guest.wait_up()
        yield guest


class serving:
    """Somebody who looks after what is lent, while this program waits for something else."""

    def __init__(self, zc: ringbar.Cluster) -> None:
        self.zc = zc
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self.over.wait(0.01):
            self.zc.service()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        self.thread.join()


def send(tx: ringbar.Tx, n: int, first: int = 0) -> None:
    """Packets with their number in them."""
    packets = [number.to_bytes(4, "big") * 16 for number in range(first, first + n)]
    assert tx.write(packets) == n


def has_moved(shell: Shell, queue: str, packets: int) -> None:
    """Wait until so many more packets have gone through the queue."""
    enough = shell.queue(queue)["packets"] + packets
    until(lambda: int(shell.queue(queue)["packets"]), lambda n: n >= enough, "no traffic")


def numbers(program: Program, n: int) -> list[int]:
    """The numbers of the next n packets that the program in the guest receives."""
    program.do("got = []")
    until(
        lambda: program.do(
            f"burst = rx.recv({n} - len(got), timeout=1)\n"
            "got += [int.from_bytes(bytes(p[:4]), 'big') for p in burst]; burst.release(); answer = len(got)"
        ),
        lambda seen: int(seen) >= n,
        f"not {n} packets",
    )
    found: list[int] = program.do("answer = got")
    return found


@pytest.mark.parametrize("how", [{"hard": True}, {"crash": True}], ids=["reset", "its kernel crashed"])
def test_a_rebooted_guest_attaches_again_and_held_nothing(
    shell: Shell, guest_pc: Guest, program: Start, how: dict[str, bool]
) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    with ringbar.Cluster.attach(99) as zc, zc.open_queue(0, "tx") as tx:
        first = program(guest_pc)
        with serving(zc):
            first.do(OPEN)
            send(tx, 2 * HELD)
            assert first.do(HOLD) == HELD
        assert shell.queue("99@0")["held"] == HELD
        guest_pc.reboot(**how)
        first.close()
        send(tx, HELD, 2 * HELD)  # the rings are there while nobody reads them
        assert shell.json("status")["vms"][0]["cluster"] == 99  # the attachment outlives the reboot
        second = program(guest_pc)
        second.do(OPEN)
        with serving(zc):
            found = numbers(second, 2 * HELD)
            until(lambda: int(shell.queue("99@0")["lent"]), lambda lent: lent == 0, "still lent")
        assert found == list(range(HELD, 3 * HELD))  # what was unread stayed; what was held is lost to nobody
        second.do("tx = zc.open_queue(1, 'tx')")
        second.close()
    shell.detach(guest_pc)
    shell.comes_home()


def test_a_program_killed_in_a_living_guest_is_replaced(shell: Shell, guest_pc: Guest, program: Start) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    with ringbar.Cluster.attach(99) as zc, zc.open_queue(0, "tx") as tx, serving(zc):
        for turn in range(2):
            one = program(guest_pc)
            one.do(OPEN)
            send(tx, 2 * HELD, turn * HELD * 2)
            assert one.do(HOLD) == HELD
            one.kill()
            two = program(guest_pc)
            two.do(OPEN)
            assert numbers(two, HELD) == list(range(turn * 2 * HELD + HELD, turn * 2 * HELD + 2 * HELD))
            until(lambda: shell.queue("99@0"), lambda q: q["lent"] == q["held"] == 0, "still lent")
            two.close()
    shell.detach(guest_pc)
    shell.comes_home()


def test_a_sender_killed_in_a_living_guest_is_replaced(shell: Shell, guest_pc: Guest, program: Start) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    with ringbar.Cluster.attach(99) as zc, zc.open_queue(1, "rx") as rx:
        for _ in range(2):
            sender = program(guest_pc)
            with serving(zc):
                sender.do(
                    "import time; zc = ringbar.Cluster.attach(99); tx = zc.open_queue(1, 'tx')\n"
                    "end = time.monotonic() + 20; out = []\n"
                    "while len(out) < 64 and time.monotonic() < end: out = tx.alloc(64)\n"
                    "for i in range(64): out[i][:60] = bytes([i]) * 60; out.lengths[i] = 60\n"
                    "assert len(out) == 64\n"
                    f"tx.send(out.select([i < {HELD // 2} for i in range(64)]), timeout=5)"
                )
            sender.kill()
            got = 0
            while got < HELD // 2:
                with rx.recv(64, timeout=10) as burst:
                    assert len(burst), f"{got} of {HELD // 2} packets came"
                    assert [p[0] for p in burst] == list(range(got, got + len(burst)))
                    got += len(burst)
            assert shell.queue("99@1")["foreign"] == 0
    shell("detach", vm(guest_pc))  # the dead cannot answer, so it waits its two seconds for them
    shell.comes_home()


def test_detach_in_the_middle_of_a_burst_is_an_exception(shell: Shell, guest_pc: Guest, program: Start) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    one = program(guest_pc)
    sender = shell.start("send", "-o", "99@0", "--seconds", "60", "--json")
    one.do(OPEN)
    assert numbers(one, 1000)
    one.do("burst = rx.recv(64, timeout=10); view = burst[0]; before = bytes(view)")
    one.tell(BURSTS)
    shell("detach", vm(guest_pc))  # a view is held, so the program cannot let go in time
    kind, message = one.answer()
    assert kind == "Detached" and "99@0" in message
    assert one.do("answer = len(bytes(view))") > 0  # a view that is still held reads, it does not kill
    assert one.process.poll() is None
    shell.finish(sender, ask=True)
    one.do("view.release(); burst.release(); rx.close(); zc.close()")
    shell.comes_home()
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")  # and the same program comes back
    one.do(OPEN)


def test_a_program_follows_a_detach_with_reopen(shell: Shell, guest_wide: Guest, program: Start) -> None:
    shell.cluster()
    shell("attach", vm(guest_wide), "99@0")
    one = program(guest_wide)
    one.do(OPEN)
    one.tell(BURSTS + "\nrx.close()")
    shell.detach(guest_wide)
    assert one.answer()[0] == "Detached"
    one.tell("rx.reopen(timeout=20)")
    shell("attach", vm(guest_wide), "99@0")
    one.answer()
    with ringbar.Cluster.attach(99) as zc, zc.open_queue(0, "tx") as tx, serving(zc):
        send(tx, HELD)
        assert numbers(one, HELD) == list(range(HELD))


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "burst"])
def test_an_unannounced_unplug_is_an_exception(shell: Shell, guest_pc: Guest, program: Start, busy: bool) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    one = program(guest_pc)
    sender = shell.start("send", "-o", "99@0", "--seconds", "60", "--json") if busy else None
    one.do(OPEN)
    if busy:
        numbers(one, 1000)
    one.tell(BURSTS)
    devices = monitor(guest_pc, "qom-list", path="/machine/peripheral")
    ours = sorted(d["name"] for d in devices if d["type"].startswith("child<ivshmem"))
    monitor(guest_pc, "device_del", id=next(name for name in ours if "lane" in name))
    kind, message = one.answer()
    assert kind == "Detached" and message
    assert one.process.poll() is None
    if sender is not None:
        shell.finish(sender, ask=True)
    until(lambda: guest_pc.ssh("lspci -n -d 1af4:1110").stdout, lambda text: not text, "still plugged")
    shell("detach", vm(guest_pc))
    shell.comes_home()


def test_a_guest_that_ignores_the_unplug_keeps_its_state(shell: Shell, guest_pc: Guest) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    monitor(guest_pc, "stop")
    try:
        said = shell.json("detach", vm(guest_pc), "--timeout", "4", status=4)
        assert said["error"]["code"] == "not-finished"
        assert "--force" in said["error"]["cure"] and "did not let go" in said["error"]["message"]
        assert [a["state"] for a in shell.json("status")["vms"]] == ["closing"]
    finally:
        monitor(guest_pc, "cont")
    assert shell.json("detach", vm(guest_pc))["result"] == "changed"
    assert shell.json("status")["vms"] == []
    shell.comes_home()
    shell("attach", vm(guest_pc), "99@0")


def test_a_paused_vm_keeps_what_it_holds_and_goes_on_where_it_was(
    shell: Shell, guest_pc: Guest, program: Start
) -> None:
    """For how long makes no difference: nothing looks at the clock."""
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0")
    with ringbar.Cluster.attach(99) as zc, zc.open_queue(0, "tx") as tx:
        one = program(guest_pc)
        with serving(zc):
            one.do(OPEN)
            send(tx, HELD)
            assert one.do(HOLD) == HELD
        monitor(guest_pc, "stop")
        try:
            packets = [number.to_bytes(4, "big") * 16 for number in range(HELD, HELD + 2000)]
            fitted = tx.write(packets)  # as many as the ring has slots, or the queue credit
            assert fitted < 2000 and shell.queue("99@0")["waiting"] == fitted
            assert tx.write(packets[:1]) == 0
            zc.service()
            assert shell.queue("99@0")["held"] == HELD  # by a command that takes home what the dead left
            assert shell.json("status")["vms"][0]["state"] == "ready"
        finally:
            monitor(guest_pc, "cont")
        with serving(zc):
            assert numbers(one, fitted) == list(range(HELD, HELD + fitted))
            one.do("held[0].release()")
            until(lambda: shell.queue("99@0")["lent"], lambda lent: lent == 0, "not all came back")
        one.close()
    shell.detach(guest_pc)
    shell.comes_home()


def test_forced_detach_quarantines_until_the_vm_ends(shell: Shell, mortal: Guest, program: Start) -> None:
    shell.cluster()
    shell("attach", vm(mortal), "99@0", "--tx", "99@1")
    with ringbar.Cluster.attach(99) as zc, zc.open_queue(0, "tx") as tx:
        one = program(mortal)
        with serving(zc):
            one.do(OPEN)
            send(tx, HELD)
            assert one.do(HOLD) == HELD
        monitor(mortal, "stop")
        said = shell.json("detach", vm(mortal), "--timeout", "3", "--force")
        assert any("quarantined until the VM ends" in warning for warning in said["warnings"])
        zc.service()
        assert sum(book["quarantined"] for book in shell.status()["books"]) >= HELD
        mortal.kill()
        status = shell("status")
        assert "has ended" in status and "taken home" in status
        zc.service()
        assert shell.out() == {}


def test_qemu_killed_while_attached_is_reclaimed_by_the_next_status(
    shell: Shell, mortal: Guest, program: Start
) -> None:
    shell.cluster()
    shell("attach", vm(mortal), "99@0", "--tx", "99@1")
    with ringbar.Cluster.attach(99) as zc, zc.open_queue(0, "tx") as tx:
        one = program(mortal)
        with serving(zc):
            one.do(OPEN)
            one.do("tx = zc.open_queue(1, 'tx')")
            send(tx, 2 * HELD)
            assert one.do(HOLD) == HELD
        mortal.kill()
        zc.service()
    said = shell("status")
    assert f"{vm(mortal)} has ended" in said and "taken home" in said
    assert shell.json("status")["vms"] == []
    with ringbar.Cluster.attach(99) as zc, zc.open_queue(0, "rx") as rx:
        with rx.recv(256, timeout=5) as burst:  # the unread ones are still right
            assert [int.from_bytes(bytes(p[:4]), "big") for p in burst] == list(range(HELD, 2 * HELD))
    shell.comes_home()


def test_the_hosts_server_is_killed_and_traffic_goes_on(shell: Shell, guest_pc: Guest) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    with Tool(guest_pc, "bridge", "-i", "99@0", "-o", "99@1"):
        for stream in "34":
            server = shell.start("send", "-o", "99@0", "-i", "99@1", "--window", "512", "--stream", stream)
            has_moved(shell, "99@0", 2000)
            server.send_signal(signal.SIGKILL)
            server.wait()
        # A stream of its own: what the dead one left in the rings arrives too, and is not of it.
        said = shell.json(
            "send", "-o", "99@0", "-i", "99@1", "--window", "512", "--packets", "20000", "--stream", "7",
        )  # fmt: skip
        assert said["received"]["packets"] == 20000
        assert said["verify"]["lost"] == said["verify"]["corrupted"] == said["verify"]["reordered"] == 0
        shell.comes_home(granted=False)
    shell.detach(guest_pc)
    shell.comes_home()


@pytest.mark.parametrize("name", ["HUP", "TERM"])
def test_a_tool_that_is_told_to_end_closes_its_ends(shell: Shell, guest_pc: Guest, name: str) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0", "--tx", "99@1")
    tool = Tool(guest_pc, "bridge", "-i", "99@0", "-o", "99@1")
    tool.kill(name)
    tool.end(status=0, ask=False)
    shell.detach(guest_pc)  # asserts that it need not wait for anybody


def test_a_cluster_in_use_by_a_vm_is_destroyed_by_force_only(shell: Shell, guest_pc: Guest, program: Start) -> None:
    shell.cluster()
    shell("attach", vm(guest_pc), "99@0")
    said = shell.json("cluster", "destroy", "99", status=1)
    assert said["error"]["code"] == "busy" and vm(guest_pc) in said["error"]["message"]
    one = program(guest_pc)
    one.do(OPEN)
    one.tell(BURSTS)
    shell("cluster", "destroy", "99", "--force")
    assert one.answer()[0] == "Detached"
    with pytest.raises(Raised) as caught:
        one.do("rx.recv(1)")
    assert caught.value.type in ("Detached", "Error")
    shell("detach", vm(guest_pc))
    assert in_guest(guest_pc, "doctor", status=None)["good"] is not None


def test_doctor_in_a_vm_with_nothing_plugged_in_takes_it_for_a_guest(guest_pc: Guest) -> None:
    found = {f["check"]: f for f in in_guest(guest_pc, "doctor", status=0)["findings"]}
    assert "nothing is plugged into this VM" in found["devices"]["detail"]
    assert "ringbar attach" in found["devices"]["cure"]
    assert not {"QEMU", "KVM", "libvirt"} & set(found)


def test_attach_and_detach_again_and_again_leaves_nothing(shell: Shell, guest_pc: Guest) -> None:
    """Descriptors of QEMU stay what they were."""
    shell.cluster()
    host = Host()

    def files() -> int:
        return len(os.listdir(f"/proc/{guest_pc.pid}/fd"))

    before = files()
    for _ in range(10):
        host.attach(vm(guest_pc), ["99@0"], ["99@1"], pool="rw")
        assert host.detach(vm(guest_pc), []).changed
    until(files, lambda now: now <= before, f"more than {before} files open in QEMU")
    shell.comes_home()
