# SPDX-License-Identifier: Apache-2.0
"""What the host service tells: plain data, as ``--json`` prints it and as the agent will serve it.

Names of fields are part of the surface: programs read them. Sizes are bytes, times nanoseconds since the epoch
unless the name says otherwise, counts are of packets or buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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
    producer: End | None
    consumer: End | None
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
    server_pid: int = 0
    """The lender: the process that serves it. 0: none, or it is dead, or (in a guest) not to be seen."""
    pps: float | None = None
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
    pages: str | None
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
    """``ro`` or ``rw``."""
    sees: str
    """What the VM can see, for people."""
    bindings: list[Binding] = field(default_factory=list)
    where: str = ""
    """The PCI place it was plugged into."""
    lane: int = 0
    identity: str = ""
    """This life of the VM: ``QEMUPID:STARTTIME``."""
    since_ns: int = 0


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

    cluster: Cluster | None = None
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
class Attached(Change):
    """Answer of attach: one attachment a cluster."""

    attachments: list[Attachment] = field(default_factory=list)


@dataclass
class DetachedFrom(Change):
    """Answer of detach."""

    vm: str = ""
    queues: list[str] = field(default_factory=list)
    """What was taken away."""
    kept: list[Attachment] = field(default_factory=list)
    """What the VM still has."""


@dataclass
class Status:
    """Answer of status."""

    clusters: list[ClusterStatus] = field(default_factory=list)
    vms: list[Attachment] = field(default_factory=list)
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
    cure: str | None = None


@dataclass
class Report:
    """Answer of doctor."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Nothing is missing."""
        return all(f.state != "missing" for f in self.findings)
