# SPDX-License-Identifier: Apache-2.0
"""What a topology file may say. Errors name the line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ringbar import address
from ringbar.errors import Error

MOST_BYTES = 1 << 20
"""Of a file."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


def _queues(text: str) -> str:
    try:
        address.parse_queues(text)
    except Error as e:
        raise ValueError(e.message) from None
    return text


def _device(text: str) -> str:
    """Queues, NICs, interfaces and the stack. No files: the agent would open them as itself, for whoever may ask it."""
    try:
        devices = address.parse_devices(text)
    except Error as e:
        raise ValueError(e.message) from None
    if any(isinstance(device, address.FileAddress) for device in devices):
        raise ValueError(
            f"{text}: capture files are for tools that you start yourself, ringbar capture and ringbar bridge"
        )
    return text


Queues = Annotated[str, AfterValidator(_queues)]
Device = Annotated[str, AfterValidator(_device)]


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"{value} is no power of two; {1 << value.bit_length()} would be")
    return value


def _groups(value: Any) -> Any:
    """``[a, b]`` is one application for each; ``[[a, b], c]`` balances inside the first."""
    if isinstance(value, str):
        return [[value]]
    if isinstance(value, list):
        return [v if isinstance(v, list) else [v] for v in value]
    return value


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class QueuePart(_Part):
    """A queue, or several alike."""

    slots: Annotated[int, Field(ge=2, le=65536), AfterValidator(_power_of_two)] = 4096
    credit: int | None = Field(None, ge=1, le=1 << 24, description="most buffers lent at once; none: slots + 128")
    direct: bool = Field(False, description="between two VMs, which then trust each other")
    filter: str | None = Field(None, min_length=1, description="what it carries, in libpcap's syntax")


class ClusterPart(_Part):
    """A cluster."""

    label: str = Field("", max_length=31)
    buffers: Literal["auto"] | Annotated[int, Field(ge=1, le=1 << 24)] = "auto"
    size: Literal[256, 512, 1024, 2048, 4096, 8192, 16384] = 2048
    pages: Literal["auto", "4k", "2M", "1G"] = "auto"
    numa: int | None = Field(None, ge=0)
    queues: dict[str | int, QueuePart | None] = Field({}, description="by number, or several alike: 0-3")

    def each_queue(self) -> Iterator[tuple[int, QueuePart]]:
        """Every queue with its number.

        :raises ValueError: for a number that is none, or comes twice.
        """
        seen = set()
        for key, part in self.queues.items():
            first, _, last = str(key).partition("-")
            numbers = (first, last or first)
            if not all(n.isascii() and n.isdigit() and int(n) < 2048 for n in numbers) or int(first) > int(numbers[1]):
                raise ValueError(f"queues.{key}: a queue is a number from 0 to 2047, or several: 0-3")
            for number in range(int(first), int(numbers[1]) + 1):
                if number in seen:
                    raise ValueError(f"queues.{key}: queue {number} comes twice")
                seen.add(number)
                yield number, part or QueuePart.model_validate({})


class WorkerPart(_Part):
    """A tool that goes on in the background."""

    kind: Literal["bridge", "balance", "fanout", "merge", "delay", "replicate"]
    inputs: Annotated[list[Device], BeforeValidator(_list)] = Field(alias="in", min_length=1)
    outputs: Annotated[list[list[Device]], BeforeValidator(_groups)] = Field(alias="out", min_length=1)
    policy: str | None = Field(
        None, pattern=r"^[a-z0-9-]+$", description="a policy that has a name: no library of yours"
    )
    filter: str | None = Field(None, min_length=1)
    steer: str | None = Field(
        None, min_length=1, description="what is taken from the NIC; the rest stays with the kernel"
    )
    take_all: bool = False
    by: str | None = Field(None, description="of a delay: 10ms")
    core: int | None = Field(None, ge=0)
    idle: Literal["adaptive", "busy", "event"] | None = None


class VmPart(_Part):
    """What a VM receives and sends, as the VM sees it."""

    rx: Annotated[list[Queues], BeforeValidator(_list)] = []
    tx: Annotated[list[Queues], BeforeValidator(_list)] = []
    pool: Literal["ro", "rw", "own"] | None = None

    def ends(self) -> set[tuple[str, str]]:
        """Pairs of address and ``rx`` or ``tx``."""
        return {
            (str(q), way)
            for way, texts in (("rx", self.rx), ("tx", self.tx))
            for t in texts
            for q in address.parse_queues(t)
        }


class Topology(_Part):
    """A whole file."""

    ringbar: Literal[1] = Field(description="version of this schema")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="what the file owns bears this mark")
    clusters: dict[Annotated[int, Field(ge=0, le=65535)], ClusterPart] = {}
    workers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")], WorkerPart] = {}
    vms: dict[Annotated[str, Field(min_length=1, max_length=512)], VmPart] = {}


def json_schema() -> dict[str, Any]:
    """The schema for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Topology.model_json_schema(by_alias=True)}


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys and without anchors that multiply."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, (str, int)):
                raise yaml.constructor.ConstructorError(None, None, "a key is a word or a number", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' comes twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None,
                None,
                "aliases (*name) are not used here",
                self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        return super().compose_node(parent, index)


def _line(root: yaml.Node | None, where: tuple[Any, ...]) -> int:
    """The line of what an error is about, as far down as the file goes."""
    node, line = root, 1
    for part in where:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if str(k.value) == str(part)), None)
            if found is None:
                continue
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


class Source:
    """A file as it was read, for messages that name lines."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        if len(text.encode()) > MOST_BYTES:
            raise Error(f"{file} has more than {MOST_BYTES >> 20} MiB", code="bad-topology", cure="several files")
        try:
            self.root = yaml.compose(text, Loader=_Loader)
            loaded = yaml.load(text, Loader=_Loader)
        except yaml.MarkedYAMLError as e:
            mark = e.problem_mark or e.context_mark
            line = mark.line + 1 if mark else 1
            raise Error(
                f"{file}:{line}: {e.problem or e.context}", code="bad-topology", cure="mend that line"
            ) from None
        except (yaml.YAMLError, RecursionError, ValueError) as e:
            raise Error(f"{file}: {' '.join(str(e).split())}", code="bad-topology", cure="mend the file") from None
        if not isinstance(loaded, dict):
            raise self.error((), "a topology begins with 'ringbar: 1'")
        try:
            self.topology = Topology.model_validate(loaded)
        except ValidationError as e:
            first = e.errors()[0]
            where = tuple(
                p for p in first["loc"] if not (isinstance(p, str) and p.startswith(("function-", "literal[")))
            )
            what = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                what = "there is no such setting"
            raise self.error(where, what) from None
        self._check()

    def error(self, where: tuple[Any, ...], what: str) -> Error:
        """An error that names the file, the line, and the setting."""
        path = ".".join(str(part) for part in where)
        told = f"{path}: {what}" if path else what
        return Error(f"{self.file}:{_line(self.root, where)}: {told}", code="bad-topology", cure="mend that line")

    def _check(self) -> None:
        """What only the whole file shows."""
        t = self.topology
        queues: dict[str, QueuePart] = {}
        for number, cluster in t.clusters.items():
            try:
                for index, part in cluster.each_queue():
                    queues[f"{number}@{index}"] = part
            except ValueError as e:
                where, _, what = str(e).partition(": ")
                raise self.error(("clusters", number, *where.split(".")), what) from None
        holders: dict[tuple[str, str], str] = {}

        def hold(queue: address.QueueAddress, way: str, who: str, where: tuple[Any, ...]) -> None:
            name = str(queue)
            if queue.cluster in t.clusters and name not in queues:
                raise self.error(where, f"cluster {queue.cluster} has no queue {queue.queue} in this file")
            if who.startswith("worker") and name in queues and queues[name].direct:
                raise self.error(where, f"{name} is direct: only VMs use it")
            held = holders.setdefault((name, way), who)
            if held != who:
                side = "receives from" if way == "rx" else "sends to"
                raise self.error(where, f"{held} {side} {name} already")

        for name, vm in t.vms.items():
            try:
                address.parse_vm(name)
            except Error as e:
                raise self.error(("vms", name), e.message) from None
            if not vm.rx and not vm.tx:
                raise self.error(("vms", name), "it neither receives nor sends anything")
            if vm.tx and vm.pool == "ro":
                raise self.error(("vms", name, "pool"), "a VM that sends needs to write packets: rw, or own")
            for way, texts in (("rx", vm.rx), ("tx", vm.tx)):
                for i, text in enumerate(texts):
                    for queue in address.parse_queues(text):
                        hold(queue, way, f"VM {name}", ("vms", name, way, i))
                        if way == "tx" and vm.pool == "own" and str(queue) in queues and queues[str(queue)].direct:
                            what = f"who has a pool of its own cannot send on direct queue {queue}: pool: rw"
                            raise self.error(("vms", name, "pool"), what)
        for name, worker in t.workers.items():
            device: address.DeviceAddress
            places = [("in", i, "rx", d) for i, d in enumerate(worker.inputs)]
            places += [("out", i, "tx", d) for i, group in enumerate(worker.outputs) for d in group]
            for key, i, way, text in places:
                for device in address.parse_devices(text):
                    if isinstance(device, address.QueueAddress):
                        hold(device, way, f"worker {name}", ("workers", name, key, i))
            if worker.kind == "delay" and not worker.by:
                raise self.error(("workers", name), "a delay says by how much: by: 10ms")


def read(path: str) -> Source:
    """Read a topology file.

    :raises Error: it is not there, or what is wrong in which line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return Source(file.read(MOST_BYTES + 1), path)
    except OSError as e:
        raise Error(f"{path}: {(e.strerror or str(e)).lower()}", code="no-such-file", cure="see: ls") from None
    except UnicodeDecodeError:
        raise Error(f"{path} is no text in UTF-8", code="bad-topology", cure="save it as UTF-8") from None
