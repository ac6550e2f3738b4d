# SPDX-License-Identifier: Apache-2.0
"""What the host service tells: plain data, as ``--json`` prints it and as the agent will serve it.

Names of fields are part of the surface: programs read them. Sizes are bytes, times nanoseconds since the epoch
unless the name says otherwise, counts are of packets or buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional


@dataclass
class End:
    """Who holds one end of a queue."""

    pid: int = 0
    """Process on the host, or program in the VM; 0 where there is none."""
    name: str = ""
    """Program."""
    vm: str = ""
    """VM, as named when it was attached; "" for a process."""
    since_ns: int = 0

    def __str__(self) -> str:
        if self.vm:
            shown = self.vm if self.vm.startswith("qmp:") else f"vm:{self.vm}"
            return f"{shown} {self.name}[{self.pid}]" if self.pid else f"{shown} {self.name}".rstrip()
        return f"{self.name or 'a program'} (pid {self.pid})" if self.pid else "nobody"


@dataclass
class Queue:
    """One queue: its settings, and what is in it now."""

    address: str
    id: int
    slots: int
    credit: int
    direct: bool
    paused: bool
    producer: Optional[End]
    consumer: Optional[End]
    waiting: int
    """Packets in the ring, unread."""
    lent: int
    """Buffers lent on it, wherever they are."""
    held: int
    """Of these, in the consumer's hand."""
    granted: int
    """Empty buffers that a sending VM was given to fill."""
    quarantined: int
    """Buffers that a VM could still write to after a forced detach."""
    packets: int
    bytes: int
    copied: int
    foreign: int
    """Descriptors refused, since their sender did not hold the buffer."""
    drops: dict[str, int]
    received_packets: int
    """What a sending VM handed in."""
    received_bytes: int
    stalled: bool
    """The consumer waits until its lender looks at the queue."""
    filter: Optional[str] = None
    """Only packets that match this expression are passed on."""
    server_pid: int = 0
    """The lender: the process that serves it. 0: none, or it is dead, or (in a guest) not to be seen."""
    feeds: Optional[str] = None
    """Made for a program that sends to a VM which another one serves: the queue that is meant."""
    pps: Optional[float] = None
    """Packets per second, where it was sampled."""


@dataclass
class Book:
    """A serving process and the buffers it answers for."""

    id: int
    pid: int
    name: str
    home: int
    free: int
    lent: int
    devices: int
    quiescing: int
    shared: int
    quarantined: int


@dataclass
class Device:
    """An open ``zc:`` device, or a program that is fed with part of what one receives."""

    name: str
    pid: int
    """0: its process is dead, and the kernel may still hold buffers of it."""
    process: str
    mode: str
    """``zero-copy``, ``driver`` or ``generic``; of who is fed: ``fed``, ``waiting`` or ``refused``."""
    clock: str
    """Where timestamps come from."""
    receives: bool
    rule: Optional[str]
    """What it takes from the NIC, ``all`` or an expression; None: it only sends."""
    fed_by: Optional[str] = None
    """The queue by which it is fed."""


@dataclass
class Segment:
    """A pool or a lane: where it is."""

    kind: str
    id: int
    size: int
    path: str
    state: str
    vm: str = ""
    server_pid: int = 0


@dataclass
class Cluster:
    """A cluster: its settings."""

    id: int
    label: str
    lives: str
    """Until when it lives, for people: ``until destroyed`` or ``with pid 812``."""
    persistent: bool
    owner_pid: int
    buffer_size: int
    buffers: int
    free: int
    """Buffers that belong to no serving process."""
    pages: Optional[str]
    pools: int
    lanes: int
    queues: int
    sealed: bool
    guest: bool
    """Seen from inside a VM."""
    generation: int
    created_ns: int
    memory: int = 0
    """Bytes of all its segments."""


@dataclass
class ClusterStatus:
    """A cluster and everything in it."""

    cluster: Cluster
    queues: list[Queue] = field(default_factory=list)
    books: list[Book] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)


@dataclass
class Binding:
    """One queue's end that a VM holds."""

    queue: str
    direction: str
    """``rx`` or ``tx``, as the VM sees it."""
    open: bool = False
    """A program in the VM has it open."""


@dataclass
class Attachment:
    """A VM that has ends of queues of one cluster plugged in."""

    vm: str
    cluster: int
    state: str
    """``plugging``, ``plugged``, ``ready`` (a program in the VM opened a queue), ``closing`` (the guest was asked
    to let go), ``quarantined`` (taken away by force)."""
    pool: str
    """``ro``, ``rw``, or ``own``: it reads all and writes only a pool of its own."""
    sees: str
    """What the VM can see, for people."""
    bindings: list[Binding] = field(default_factory=list)
    where: str = ""
    """The PCI place it was plugged into."""
    via: str = ""
    """How it was plugged: ``QMP``, or ``libvirt's monitor commands``."""
    uuid: str = ""
    """libvirt's of the VM; empty where the VM is known by its monitor socket."""
    uri: str = ""
    """Of libvirt's connection."""
    lane: int = 0
    identity: str = ""
    """This life of the VM: ``QEMUPID:STARTTIME``."""
    since_ns: int = 0
    interrupts: bool = False
    """Both sides sleep until the other rings, as far as a doorbell service runs in the VM; else they poll."""
    polls: str = ""
    """Why there are no interrupts: both sides poll."""


@dataclass
class Change:
    """What a control command did."""

    changed: bool
    """False: it was so already."""
    notes: list[str] = field(default_factory=list)
    """What else happened, for people: a dead VM reclaimed, a size computed."""
    warnings: list[str] = field(default_factory=list)


@dataclass
class ClusterCreated(Change):
    """Answer of create_cluster."""

    cluster: Optional[Cluster] = None
    queues: list[str] = field(default_factory=list)
    sizing: str = ""
    """How the number of buffers came about."""


@dataclass
class ClusterDestroyed(Change):
    """Answer of destroy_cluster."""

    id: int = 0


@dataclass
class QueuesChanged(Change):
    """Answer of create_queues, set_queue and destroy_queue."""

    queues: list[str] = field(default_factory=list)


@dataclass
class Took:
    """Where the time of an attach went, in milliseconds: from having the VM to itself until it is plugged in."""

    total: float
    waiting: float
    """For libvirt, QEMU and the guest."""
    own: float
    """The rest: what ringbar itself did."""


@dataclass
class Attached(Change):
    """Answer of attach: one attachment a cluster."""

    attachments: list[Attachment] = field(default_factory=list)
    took: Optional[Took] = None
    """None where nothing was asked of the VM: it is off."""


@dataclass
class DetachedFrom(Change):
    """Answer of detach."""

    vm: str = ""
    queues: list[str] = field(default_factory=list)
    """What was taken away."""
    kept: list[Attachment] = field(default_factory=list)
    """What the VM still has."""


@dataclass
class Migrated(Change):
    """Answer of migrate."""

    vm: str = ""
    to: str = ""
    attachments: list[Attachment] = field(default_factory=list)
    """What it has there, where that is this host."""


@dataclass
class Step:
    """One step of a plan."""

    do: str
    subject: str
    text: str


@dataclass
class Planned(Change):
    """Answer of plan and apply; ``changed`` says whether there is anything to do, or was."""

    name: str = ""
    """The topology's."""
    steps: list[Step] = field(default_factory=list)


@dataclass
class Port:
    """An input or an output of a worker."""

    address: str
    state: str
    """``open``, ``ended`` or ``failed``."""
    packets: int
    bytes: int
    drops: dict[str, int]
    """By reason."""
    group: int = 0
    """Of an output: which application it belongs to."""


@dataclass
class Worker:
    """A worker that has a name, by its counters in shared memory."""

    name: str
    kind: str
    state: str
    """``running``, ``paused``, ``ended`` or ``dead``."""
    pid: int
    policy: Optional[str]
    core: Optional[int]
    since_ns: int
    packets: int
    bytes: int
    dropped: int
    drops: dict[str, int]
    bursts: int
    cycles_busy: int
    """Of turns that moved something."""
    cycles_total: int
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)


@dataclass
class Status:
    """Answer of status."""

    clusters: list[ClusterStatus] = field(default_factory=list)
    vms: list[Attachment] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    """Where no cluster, queue or VM was asked for."""
    notes: list[str] = field(default_factory=list)
    sampled_seconds: float = 0.0
    """Over how long the rates were taken."""


@dataclass
class Finding:
    """One line of doctor."""

    check: str
    state: str
    """``ok``, ``warning``, ``missing``."""
    detail: str
    cure: Optional[str] = None


@dataclass
class Report:
    """Answer of doctor."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Nothing is missing."""
        return all(f.state != "missing" for f in self.findings)
