# SPDX-License-Identifier: Apache-2.0
"""The errors of ringbar: each says what is wrong and, where there is one, the command that mends it."""

from __future__ import annotations

from typing import Any


class Error(Exception):
    """Something ringbar was asked to do cannot be done.

    :param message: the cause, one sentence, for people.
    :param code: a short stable word for programs, for example ``"no-such-cluster"``.
    :param cure: the command or change that mends it; None where there is none.
    """

    default_code = "failed"

    def __init__(self, message: str, *, code: str | None = None, cure: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code if code is not None else self.default_code
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.message}; {self.cure}" if self.cure else self.message

    def as_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints under ``"error"``."""
        return {"code": self.code, "message": self.message, "cure": self.cure}


class NotFound(Error):
    """A cluster, queue, device, interface or VM that does not exist."""

    default_code = "not-found"


class Busy(Error):
    """Somebody else holds it. ``holder`` says who and since when; the cure frees it."""

    default_code = "busy"

    def __init__(
        self, message: str, *, holder: str | None = None, code: str | None = None, cure: str | None = None
    ):
        super().__init__(message, code=code, cure=cure)
        self.holder = holder


class Detached(Error):
    """The memory behind an end is gone: unplugged, detached, or its cluster destroyed."""

    default_code = "detached"


class Incompatible(Error):
    """Two sides that do not fit: ABI version, page size, or a segment of another kind."""

    default_code = "incompatible"


class BadAddress(Error):
    """An address (``99@0``, ``zc:eth1@2``, ``qmp:/path``) that cannot be read."""

    default_code = "bad-address"
