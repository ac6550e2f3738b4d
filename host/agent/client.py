# SPDX-License-Identifier: Apache-2.0
"""The agent as a :class:`~ringbar.host.service.Host`: the same methods, done by the daemon behind its socket."""

from __future__ import annotations

import dataclasses
import functools
import http.client
import json
import os
import socket
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from ringbar.errors import BadAddress, Busy, Error, Incompatible, NotFound
from ringbar.host import model
from ringbar.host.service import Host, Progress, silent

T = TypeVar("T")

_KINDS: dict[str, type[Error]] = {"NotFound": NotFound, "BadAddress": BadAddress, "Incompatible": Incompatible}


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


def decode(kind: Any, value: Any) -> Any:
    """JSON as the dataclass that it was made from; fields of a newer agent are left out."""
    return _decoder(kind)(value)


def _as_it_is(value: Any) -> Any:
    return value


@functools.cache
def _decoder(kind: Any) -> Callable[[Any], Any]:
    """What makes such values: worked out once for each type, since a status has thousands of them."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        fields = {f.name: _decoder(hints[f.name]) for f in dataclasses.fields(kind)}
        return lambda value: kind(**{name: fields[name](part) for name, part in value.items() if name in fields})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        each = _decoder(arguments[0])
        return _as_it_is if each is _as_it_is else lambda value: [each(part) for part in value]
    if type(None) in arguments:
        some = _decoder(next(a for a in arguments if a is not type(None)))
        return _as_it_is if some is _as_it_is else lambda value: None if value is None else some(value)
    return _as_it_is


def to_error(said: dict[str, Any]) -> Error:
    """The exception that the agent met."""
    code, cure = said.get("code"), said.get("cure")
    if said.get("kind") == "Busy":
        return Busy(said["message"], holder=said.get("holder"), code=code, cure=cure)
    return _KINDS.get(said.get("kind", ""), Error)(said["message"], code=code, cure=cure)


class AgentHost(Host):
    """A Host whose methods are done by the agent.

    :param path: its socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def _lines(self, method: str, path: str, body: Any = None) -> Iterator[dict[str, Any]]:
        connection = _Connection(self._path)
        headers = {"Accept": "application/x-ndjson"}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            for line in response:
                if line.strip():
                    yield json.loads(line)
        except PermissionError:
            raise Error(
                f"no permission to use the agent's socket {self._path}",
                code="no-permission",
                cure="be in the group ringbar (sudo usermod -aG ringbar $USER, then log in anew), or use sudo",
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise self._gone(e) from None
        finally:
            connection.close()

    def _gone(self, why: BaseException | None) -> Error:
        return Error(
            f"the agent at {self._path} ended before it had answered{f': {why}' if why and str(why) else ''}",
            code="agent-gone",
            cure="systemctl status ringbar-agent says why; ringbar status, what was done",
        )

    def _call(self, answer: type[T], method: str, path: str, body: Any = None, progress: Progress = silent) -> T:
        for line in self._lines(method, path, body):
            if "progress" in line:
                progress(line["progress"])
            elif "error" in line:
                raise to_error(line["error"])
            else:
                return decode(answer, line.get("result", line))  # type: ignore[no-any-return]
        raise self._gone(None)

    def create_cluster(self, cluster: int, *, progress: Progress = silent, **settings: Any) -> model.ClusterCreated:
        """As the Host's."""
        return self._call(model.ClusterCreated, "POST", "/v1/clusters", {"id": cluster, **settings}, progress)

    def list_clusters(self) -> list[model.Cluster]:
        """As the Host's."""
        for line in self._lines("GET", "/v1/clusters"):
            if "error" in line:
                raise to_error(line["error"])
            return [decode(model.Cluster, c) for c in line["result"]["clusters"]]
        return []

    def show_cluster(self, cluster: int) -> model.ClusterStatus:
        """As the Host's."""
        return self._call(model.ClusterStatus, "GET", f"/v1/clusters/{cluster}")

    def destroy_cluster(
        self, cluster: int, *, force: bool = False, progress: Progress = silent
    ) -> model.ClusterDestroyed:
        """As the Host's."""
        path = f"/v1/clusters/{cluster}?{urlencode({'force': force})}"
        return self._call(model.ClusterDestroyed, "DELETE", path, None, progress)

    def create_queues(self, cluster: int, *, progress: Progress = silent, **settings: Any) -> model.QueuesChanged:
        """As the Host's."""
        return self._call(model.QueuesChanged, "POST", f"/v1/clusters/{cluster}/queues", settings, progress)

    def set_queue(self, queue: str, **settings: Any) -> model.QueuesChanged:
        """As the Host's."""
        return self._call(model.QueuesChanged, "PATCH", f"/v1/queues/{quote(queue, '')}", settings)

    def destroy_queue(self, queue: str) -> model.QueuesChanged:
        """As the Host's."""
        return self._call(model.QueuesChanged, "DELETE", f"/v1/queues/{quote(queue, '')}")

    def attach(
        self, vm: str, rx: list[str], tx: list[str], *, progress: Progress = silent, **options: Any
    ) -> model.Attached:
        """As the Host's."""
        return self._call(model.Attached, "POST", "/v1/attach", {"vm": vm, "rx": rx, "tx": tx, **options}, progress)

    def detach(
        self, vm: str, targets: list[str], *, progress: Progress = silent, **options: Any
    ) -> model.DetachedFrom:
        """As the Host's."""
        return self._call(model.DetachedFrom, "POST", "/v1/detach", {"vm": vm, "targets": targets, **options}, progress)

    def migrate(self, vm: str, to: str, *, progress: Progress = silent, **options: Any) -> model.Migrated:
        """As the Host's."""
        return self._call(model.Migrated, "POST", "/v1/migrate", {"vm": vm, "to": to, **options}, progress)

    def status(self, target: str | None = None, *, sample: float = 0.0, progress: Progress = silent) -> model.Status:
        """As the Host's."""
        query: dict[str, Any] = {"sample": sample}
        if target is not None:
            query["target"] = target
        return self._call(model.Status, "GET", f"/v1/status?{urlencode(query)}", None, progress)

    def doctor(
        self,
        target: str | None = None,
        *,
        clean: bool = False,
        connect: str | None = None,
        progress: Progress = silent,
    ) -> model.Report:
        """As the Host's."""
        query: dict[str, Any] = {"clean": clean}
        if target is not None:
            query["target"] = target
        if connect is not None:
            query["connect"] = connect
        return self._call(model.Report, "POST", f"/v1/doctor?{urlencode(query)}", None, progress)

    def plan(self, text: str, file: str) -> model.Planned:
        """As the Host's."""
        return self._call(model.Planned, "POST", "/v1/plan", {"text": text, "file": file})

    def apply(
        self, text: str, file: str, *, rollback_after: float | None = None, progress: Progress = silent
    ) -> model.Planned:
        """As the Host's."""
        body = {"text": text, "file": file, "rollback_after": rollback_after}
        return self._call(model.Planned, "POST", "/v1/apply", body, progress)

    def events(self, since: int | None = None, follow: bool = False) -> Iterator[dict[str, Any]]:
        """What happened, oldest first; with ``follow`` each as it comes, without end."""
        query: dict[str, Any] = {"follow": follow}
        if since is not None:
            query["since"] = since
        for line in self._lines("GET", f"/v1/events?{urlencode(query)}"):
            if "error" in line:
                raise to_error(line["error"])
            yield from line["events"] if "events" in line else [line]


def reachable(path: Path) -> bool:
    """Does an agent listen there?"""
    if not os.path.exists(path):  # where it cannot be looked for, the registry's own error says what to do
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except PermissionError:
            return True  # there is one; the first call says what to do
        except OSError:
            return False
    return True
