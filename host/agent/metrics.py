# SPDX-License-Identifier: Apache-2.0
"""What Prometheus reads at /metrics: the numbers of ``ringbar status``, under Prometheus's naming conventions."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ringbar.host import model
from ringbar.host.service import Host


class _Status:
    """One look at everything, as families of metrics."""

    def __init__(self, now: model.Status) -> None:
        self._now = now

    def collect(self) -> Iterator[Metric]:
        """The families, in a fixed order."""
        yield from families(self._now)


def families(now: model.Status) -> Iterator[Metric]:
    """All metrics, each family whether it has a sample or not."""
    for part in (_clusters, _queues, _devices, _vms, _workers):
        yield from part(now)


def _clusters(now: model.Status) -> Iterator[Metric]:
    buffers = GaugeMetricFamily("ringbar_cluster_buffers", "Packet buffers of the cluster.", labels=["cluster"])
    size = GaugeMetricFamily("ringbar_cluster_buffer_size_bytes", "Bytes of one packet buffer.", labels=["cluster"])
    memory = GaugeMetricFamily(
        "ringbar_cluster_memory_bytes", "Memory of all segments of the cluster.", labels=["cluster"]
    )
    unclaimed = GaugeMetricFamily(
        "ringbar_cluster_unclaimed_buffers", "Buffers that belong to no serving process.", labels=["cluster"]
    )
    books = GaugeMetricFamily(
        "ringbar_book_buffers",
        "Buffers that a serving process answers for, by what became of them.",
        labels=["cluster", "book", "process", "state"],
    )
    for status in now.clusters:
        cluster = str(status.cluster.id)
        buffers.add_metric([cluster], status.cluster.buffers)
        size.add_metric([cluster], status.cluster.buffer_size)
        memory.add_metric([cluster], status.cluster.memory)
        unclaimed.add_metric([cluster], status.cluster.free)
        for book in status.books:
            for state in ("free", "lent", "devices", "quiescing", "shared", "quarantined"):
                books.add_metric([cluster, str(book.id), book.name, state], getattr(book, state))
    yield from (buffers, size, memory, unclaimed, books)


_COUNTERS = {
    "packets": ("ringbar_queue_packets", "Packets put into the queue for its consumer."),
    "bytes": ("ringbar_queue_bytes", "Bytes of these packets, as in their buffers (no preamble, FCS or gap)."),
    "received_packets": ("ringbar_queue_received_packets", "Packets that a sending VM handed in."),
    "received_bytes": ("ringbar_queue_received_bytes", "Bytes of the packets that a sending VM handed in."),
    "copied": ("ringbar_queue_copied_packets", "Packets that had to be copied."),
    "foreign": ("ringbar_queue_refused_descriptors", "Descriptors refused: their sender did not hold the buffer."),
}
_GAUGES = {
    "slots": ("ringbar_queue_slots", "Packets that the queue has room for."),
    "credit": ("ringbar_queue_credit_buffers", "Most buffers that may be lent at once on the queue."),
    "waiting": ("ringbar_queue_waiting_packets", "Packets in the queue, unread."),
    "lent": ("ringbar_queue_lent_buffers", "Buffers lent on the queue, wherever they are."),
    "held": ("ringbar_queue_held_buffers", "Buffers in the hand of the queue's consumer."),
    "granted": ("ringbar_queue_granted_buffers", "Empty buffers that a sending VM was given to fill."),
    "quarantined": ("ringbar_queue_quarantined_buffers", "Buffers that a VM could write to after a forced detach."),
    "paused": ("ringbar_queue_paused", "1 while the queue is paused."),
    "stalled": ("ringbar_queue_stalled", "1 while the consumer waits for the queue's lender to look at it."),
}


def _queues(now: model.Status) -> Iterator[Metric]:
    labels = ["cluster", "queue"]
    queues = [(str(s.cluster.id), q) for s in now.clusters for q in s.queues]
    for field, (name, text) in _COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=labels)
        for cluster, queue in queues:
            counter.add_metric([cluster, str(queue.id)], getattr(queue, field))
        yield counter
    drops = CounterMetricFamily(
        "ringbar_queue_dropped_packets", "Packets not passed on, by reason.", labels=[*labels, "reason"]
    )
    for cluster, queue in queues:
        for reason, count in queue.drops.items():
            drops.add_metric([cluster, str(queue.id), reason], count)
    yield drops
    for field, (name, text) in _GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=labels)
        for cluster, queue in queues:
            gauge.add_metric([cluster, str(queue.id)], float(getattr(queue, field)))
        yield gauge


def _devices(now: model.Status) -> Iterator[Metric]:
    opened = GaugeMetricFamily(
        "ringbar_device_info",
        "1 for each program that has a network card, or a part of what one receives, with the mode it got.",
        labels=["cluster", "device", "process", "mode", "clock", "fed_by"],
    )
    for status in now.clusters:
        for d in status.devices:
            labels = [str(status.cluster.id), d.name, str(d.pid), d.mode, d.clock, d.fed_by or ""]
            opened.add_metric(labels, 1)
    yield opened


def _vms(now: model.Status) -> Iterator[Metric]:
    attached = GaugeMetricFamily(
        "ringbar_attachment_info",
        "1 for each VM and cluster plugged into it, with its state.",
        labels=["vm", "cluster", "state", "pool"],
    )
    since = GaugeMetricFamily(
        "ringbar_attachment_since_timestamp_seconds", "When it was plugged in.", labels=["vm", "cluster"]
    )
    for vm in now.vms:
        attached.add_metric([vm.vm, str(vm.cluster), vm.state, vm.pool], 1)
        since.add_metric([vm.vm, str(vm.cluster)], vm.since_ns / 1e9)
    yield from (attached, since)


_WORKER_COUNTERS = {
    "packets": ("ringbar_worker_packets", "Packets that the worker took from its inputs."),
    "bytes": ("ringbar_worker_bytes", "Bytes of these packets."),
    "bursts": ("ringbar_worker_bursts", "Bursts that these packets came in."),
    "cycles_busy": ("ringbar_worker_busy_cycles", "Processor cycles of turns that moved something."),
    "cycles_total": ("ringbar_worker_cycles", "Processor cycles since the start."),
}


def _workers(now: model.Status) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "ringbar_worker_info",
        "1 for each worker that has a name, with its state.",
        labels=["worker", "kind", "policy", "state"],
    )
    for w in now.workers:
        info.add_metric([w.name, w.kind, w.policy or "", w.state], 1)
    yield info
    for field, (name, text) in _WORKER_COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=["worker"])
        for w in now.workers:
            counter.add_metric([w.name], getattr(w, field))
        yield counter
    drops = CounterMetricFamily(
        "ringbar_worker_dropped_packets", "Packets that the worker did not pass on.", labels=["worker", "reason"]
    )
    sent = CounterMetricFamily(
        "ringbar_worker_output_packets", "Packets that an output took.", labels=["worker", "output"]
    )
    refused = CounterMetricFamily(
        "ringbar_worker_output_dropped_packets",
        "Packets that an output did not take, by reason.",
        labels=["worker", "output", "reason"],
    )
    for w in now.workers:
        for reason, count in w.drops.items():
            drops.add_metric([w.name, reason], count)
        for output, packets in _by_address(w.outputs).items():
            sent.add_metric([w.name, output], sum(port.packets for port in packets))
            for reason in packets[0].drops:
                refused.add_metric([w.name, output, reason], sum(port.drops[reason] for port in packets))
    yield from (drops, sent, refused)


def _by_address(ports: list[model.Port]) -> dict[str, list[model.Port]]:
    """One device may be an output twice, and is one series."""
    found: dict[str, list[model.Port]] = {}
    for port in ports:
        found.setdefault(port.address, []).append(port)
    return found


def exposition(host: Host) -> tuple[bytes, str]:
    """The text that Prometheus scrapes, and its media type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Status(host.status()))
    return generate_latest(registry), CONTENT_TYPE_LATEST
