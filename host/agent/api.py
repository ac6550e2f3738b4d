# SPDX-License-Identifier: Apache-2.0
"""The agent's REST interface: :class:`ringbar.host.service.Host` over HTTP, described by OpenAPI at /openapi.json.

Answers are the dataclasses of :mod:`ringbar.host.model` as JSON, errors ``{"error": {code, message, cure, kind}}``.
A caller that accepts ``application/x-ndjson`` gets lines instead: ``{"progress": text}`` while it goes on, and at
the end ``{"result": ...}`` or ``{"error": ...}``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal, Optional

from fastapi import Body, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from ringbar.cli.common import plain
from ringbar.errors import BadAddress, Busy, Error, Incompatible, NotFound
from ringbar.host import model
from ringbar.host.agent import metrics
from ringbar.host.agent.journal import Event, Journal
from ringbar.host.agent.rollback import Rollbacks
from ringbar.host.service import Host, Progress

log = logging.getLogger("ringbar.agent")

LINES = "application/x-ndjson"

Cluster = Annotated[int, Path(ge=0, le=65535, description="number of the cluster")]
QueueName = Annotated[str, Path(pattern=r"^[0-9]{1,5}@[0-9]{1,4}$", description="its address, such as 99@0")]
Target = Annotated[Optional[str], Query(max_length=512, description="a cluster, a queue or a VM; none: everything")]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ClusterWanted(_Request):
    """Settings of a new cluster."""

    id: int = Field(ge=0, le=65535)
    queues: int = Field(0, ge=0, le=2048)
    slots: int = Field(0, ge=0, le=65536)
    buffers: int | None = Field(None, ge=1, le=1 << 24)
    size: Literal[256, 512, 1024, 2048, 4096, 8192, 16384] = 2048
    pages: Literal["auto", "4k", "2M", "1G"] = "auto"
    numa: int | None = Field(None, ge=0, le=1023)
    label: str = Field("", max_length=31)


class QueuesWanted(_Request):
    """Settings of new queues."""

    count: int = Field(1, ge=1, le=2048)
    number: int | None = Field(None, ge=0, le=2047, description="of the first; none: the lowest free ones")
    slots: int = Field(0, ge=0, le=65536)
    credit: int = Field(0, ge=0, le=1 << 24)
    direct: bool = False


class AttachWanted(_Request):
    """What a VM shall receive and send."""

    vm: str = Field(min_length=1, max_length=512)
    rx: list[str] = Field([], max_length=128)
    tx: list[str] = Field([], max_length=128)
    pool: Literal["ro", "rw", "own"] | None = None
    ready: bool = False
    timeout: float = Field(60.0, ge=0, le=86400)
    use_last_slot: bool = False
    replug: bool = False
    interrupts: bool | None = None
    connect: str | None = Field(None, max_length=512)


class DetachWanted(_Request):
    """What is taken away from a VM."""

    vm: str = Field(min_length=1, max_length=512)
    targets: list[str] = Field([], max_length=256)
    timeout: float = Field(30.0, ge=0, le=86400)
    force: bool = False
    connect: str | None = Field(None, max_length=512)


class MigrationWanted(_Request):
    """Where a VM shall go."""

    vm: str = Field(min_length=1, max_length=512)
    to: str = Field(min_length=1, max_length=512)
    timeout: float = Field(300.0, ge=0, le=86400)
    connect: str | None = Field(None, max_length=512)


class TopologyWanted(_Request):
    """A topology file."""

    text: str = Field(max_length=1 << 20)
    file: str = Field("topology", max_length=4096, description="its name, for messages")
    rollback_after: float | None = Field(None, gt=0, le=86400)


class Fault(BaseModel):
    """What is wrong, and the command that mends it."""

    code: str
    message: str
    cure: str | None = None
    kind: str = "Error"
    holder: str | None = None


class ErrorAnswer(BaseModel):
    """An error."""

    error: Fault


class EventsAnswer(BaseModel):
    """Events, oldest first."""

    events: list[Event]


class ClustersAnswer(BaseModel):
    """All clusters."""

    clusters: list[model.Cluster]


class Health(BaseModel):
    """The agent lives."""

    status: Literal["ok"]
    version: str
    pid: int
    events: int


def fault(error: BaseException) -> dict[str, Any]:
    """An exception as the JSON object under ``"error"``."""
    if isinstance(error, TimeoutError):
        error = Error(str(error) or "not finished in time", code="not-finished")
    if not isinstance(error, Error):
        log.exception("internal error", exc_info=error)
        text = " ".join(str(error).split())
        error = Error(f"internal error: {type(error).__name__}: {text}", code="internal", cure="see the agent's log")
    kind = next((k.__name__ for k in (NotFound, Busy, BadAddress, Incompatible) if isinstance(error, k)), "Error")
    return {**error.as_json(), "kind": kind, "holder": getattr(error, "holder", None)}


_STATUS = {"NotFound": 404, "Busy": 409, "Incompatible": 409, "BadAddress": 400}
_STATUS_BY_CODE = {"not-finished": 504, "internal": 500, "no-permission": 403}


def status_of(error: dict[str, Any]) -> int:
    """The HTTP status that goes with an error."""
    return _STATUS_BY_CODE.get(error["code"]) or _STATUS.get(error["kind"], 400)


def _error(error: BaseException) -> JSONResponse:
    said = fault(error)
    return JSONResponse({"error": said}, status_of(said))


async def _answer(request: Request, work: Callable[[Progress], Any]) -> Response:
    """Run ``work`` in a thread; its value as JSON, or progress and value as lines."""
    if LINES not in request.headers.get("accept", ""):
        try:
            return JSONResponse(plain(await asyncio.to_thread(work, lambda step: None)))
        except Exception as e:
            return _error(e)
    return StreamingResponse(_lines(work), media_type=LINES)


async def _lines(work: Callable[[Progress], Any]) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def tell(document: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(said.put_nowait, document)

    def whole() -> None:
        try:
            tell({"result": plain(work(lambda step: tell({"progress": step})))})
        except Exception as e:
            tell({"error": fault(e)})

    # Its own thread: a caller that goes away stops nothing halfway.
    threading.Thread(target=whole, name="request", daemon=True).start()
    while True:
        document = await said.get()
        yield json.dumps(document).encode() + b"\n"
        if "progress" not in document:
            return


def _by(request: Request) -> str:
    """Who asks: what the kernel says of the other end of the socket."""
    return request.client.host if request.client is not None else ""


_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorAnswer, "description": text}
    for code, text in (
        (400, "cannot be done, or cannot be read"),
        (403, "no permission"),
        (404, "there is none"),
        (409, "somebody else holds it"),
        (422, "the request is not as described"),
        (500, "a fault of the agent's own"),
        (504, "not finished within the timeout"),
    )
}


def build(host: Host, journal: Journal, rollbacks: Rollbacks, version: str, pid: int) -> FastAPI:
    """The application.

    :param host: what does the work; its methods are called from threads.
    :param journal: where changes are written.
    :param rollbacks: told when a topology was applied that may have to be taken back.
    """
    app = FastAPI(
        title="ringbar agent",
        version=version,
        summary="Queues of packets, plugged into running VMs.",
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, e: RequestValidationError) -> JSONResponse:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
        text = f"{where}: {first['msg']}" if where else str(first["msg"])
        said = Error(f"the request cannot be read: {text}", code="bad-request", cure="see /openapi.json")
        return JSONResponse({"error": fault(said)}, 422)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, e: HTTPException) -> JSONResponse:
        said = Error(
            f"{request.method} {request.url.path}: {e.detail}".lower(), code="no-such-path", cure="see /openapi.json"
        )
        return JSONResponse({"error": fault(said)}, e.status_code, headers=e.headers)

    def changed(kind: str, subject: str, by: str, change: model.Change, text: str) -> Any:
        if change.changed:
            journal.add(kind, subject, text, by)
        return change

    # ---- clusters and queues

    @app.get("/v1/clusters", response_model=ClustersAnswer)
    async def list_clusters(request: Request) -> Response:
        """All clusters of this host."""
        return await _answer(request, lambda progress: {"clusters": host.list_clusters()})

    @app.post("/v1/clusters", response_model=model.ClusterCreated)
    async def create_cluster(request: Request, wanted: ClusterWanted) -> Response:
        """Make a cluster that lives until it is destroyed."""
        by = _by(request)

        def work(progress: Progress) -> Any:
            settings = wanted.model_dump(exclude={"id"})
            done = host.create_cluster(wanted.id, **settings, progress=progress)
            return changed("cluster-created", str(wanted.id), by, done, f"cluster {wanted.id} made")

        return await _answer(request, work)

    @app.get("/v1/clusters/{cluster}", response_model=model.ClusterStatus)
    async def show_cluster(request: Request, cluster: Cluster) -> Response:
        """One cluster: settings, queues, segments."""
        return await _answer(request, lambda progress: host.show_cluster(cluster))

    @app.delete("/v1/clusters/{cluster}", response_model=model.ClusterDestroyed)
    async def destroy_cluster(request: Request, cluster: Cluster, force: bool = False) -> Response:
        """Remove a cluster with everything in it."""
        by = _by(request)

        def work(progress: Progress) -> Any:
            done = host.destroy_cluster(cluster, force=force, progress=progress)
            return changed("cluster-destroyed", str(cluster), by, done, f"cluster {cluster} destroyed")

        return await _answer(request, work)

    @app.post("/v1/clusters/{cluster}/queues", response_model=model.QueuesChanged)
    async def create_queues(request: Request, cluster: Cluster, wanted: QueuesWanted) -> Response:
        """Make queues with the lowest free numbers; all or none."""
        by = _by(request)

        def work(progress: Progress) -> Any:
            done = host.create_queues(cluster, **wanted.model_dump(), progress=progress)
            return changed("queues-created", str(cluster), by, done, f"queues {', '.join(done.queues)} made")

        return await _answer(request, work)

    @app.patch("/v1/queues/{queue}", response_model=model.QueuesChanged)
    async def set_queue(
        request: Request,
        queue: QueueName,
        pause: Annotated[bool | None, Body()] = None,
        expression: Annotated[str | None, Body(max_length=4096, description="its filter; none: without")] = None,
    ) -> Response:
        """Pause, resume or filter a queue; what is not named stays."""
        by = _by(request)

        def work(progress: Progress) -> Any:
            done = host.set_queue(queue, pause=pause, expression=expression)
            words = [f"filter {expression}"] * (expression is not None)
            words += ["paused" if pause else "resumed"] * (pause is not None)
            return changed("queue-set", queue, by, done, f"queue {queue}: {', '.join(words)}")

        return await _answer(request, work)

    @app.delete("/v1/queues/{queue}", response_model=model.QueuesChanged)
    async def destroy_queue(request: Request, queue: QueueName) -> Response:
        """Remove a queue that nobody holds."""
        by = _by(request)

        def work(progress: Progress) -> Any:
            return changed("queue-destroyed", queue, by, host.destroy_queue(queue), f"queue {queue} destroyed")

        return await _answer(request, work)

    # ---- VMs

    @app.post("/v1/attach", response_model=model.Attached)
    async def attach(request: Request, wanted: AttachWanted) -> Response:
        """Give a VM ends of queues."""
        by = _by(request)

        def work(progress: Progress) -> Any:
            options = wanted.model_dump()
            done = host.attach(options.pop("vm"), options.pop("rx"), options.pop("tx"), **options, progress=progress)
            ends = ", ".join([*wanted.rx, *(f"--tx {queue}" for queue in wanted.tx)])
            return changed("attached", wanted.vm, by, done, f"{wanted.vm}: {ends} attached")

        return await _answer(request, work)

    @app.post("/v1/detach", response_model=model.DetachedFrom)
    async def detach(request: Request, wanted: DetachWanted) -> Response:
        """Take ends of queues away from a VM; with its last one of a cluster, the memory too."""
        by = _by(request)

        def work(progress: Progress) -> Any:
            options = wanted.model_dump()
            done = host.detach(options.pop("vm"), options.pop("targets"), **options, progress=progress)
            what = ", ".join(wanted.targets) or "everything"
            return changed("detached", wanted.vm, by, done, f"{wanted.vm}: {what} detached")

        return await _answer(request, work)

    @app.post("/v1/migrate", response_model=model.Migrated)
    async def migrate(request: Request, wanted: MigrationWanted) -> Response:
        """Detach, migrate, and attach on the other side."""
        by = _by(request)

        def work(progress: Progress) -> Any:
            done = host.migrate(
                wanted.vm, wanted.to, timeout=wanted.timeout, connect=wanted.connect, progress=progress
            )
            return changed("migrated", wanted.vm, by, done, f"{wanted.vm} migrated to {wanted.to}")

        return await _answer(request, work)

    # ---- topologies

    @app.post("/v1/plan", response_model=model.Planned)
    async def plan(request: Request, wanted: TopologyWanted) -> Response:
        """What applying a topology would do."""
        return await _answer(request, lambda progress: host.plan(wanted.text, wanted.file))

    @app.post("/v1/apply", response_model=model.Planned)
    async def apply(request: Request, wanted: TopologyWanted) -> Response:
        """Make it so, with the least change."""
        by = _by(request)

        def work(progress: Progress) -> Any:
            done = host.apply(wanted.text, wanted.file, rollback_after=wanted.rollback_after, progress=progress)
            rollbacks.look()
            text = f"topology {done.name} applied: {'; '.join(step.text for step in done.steps)}"
            return changed("applied", done.name, by, done, text)

        return await _answer(request, work)

    # ---- looking

    @app.get("/v1/status", response_model=model.Status)
    async def status(
        request: Request, target: Target = None, sample: Annotated[float, Query(ge=0, le=60)] = 0.0
    ) -> Response:
        """What is there now."""
        return await _answer(request, lambda progress: host.status(target, sample=sample, progress=progress))

    @app.post("/v1/doctor", response_model=model.Report)
    async def doctor(
        request: Request, target: Target = None, clean: bool = False, connect: Annotated[str | None, Query()] = None
    ) -> Response:
        """What this machine can do, what is missing, and the command that mends it."""

        def work(progress: Progress) -> Any:
            return host.doctor(target, clean=clean, connect=connect, progress=progress)

        return await _answer(request, work)

    @app.get("/v1/events", response_model=EventsAnswer)
    async def events(
        since: Annotated[int | None, Query(ge=0, description="only later ones than this sequence number")] = None,
        follow: Annotated[bool, Query(description="go on with each as it comes, as lines")] = False,
    ) -> Response:
        """What happened."""
        if not follow:
            return JSONResponse({"events": plain(journal.since(since or 0))})
        after = journal.last if since is None else since

        async def lines() -> AsyncIterator[bytes]:
            async for event in journal.follow(after):
                yield json.dumps(plain(event)).encode() + b"\n"

        return StreamingResponse(lines(), media_type=LINES)

    @app.get("/health", response_model=Health)
    async def health() -> Response:
        """The agent lives and answers."""
        return JSONResponse({"status": "ok", "version": version, "pid": pid, "events": journal.last})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus(request: Request) -> Response:
        """Counters in Prometheus's text format."""
        try:
            text, media_type = await asyncio.to_thread(metrics.exposition, host)
        except Exception as e:
            return _error(e)
        return Response(text, media_type=media_type)

    return app
