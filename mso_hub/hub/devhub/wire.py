"""Between the socket and the handlers: the log, and the faults that happen on the way."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

from mso_hub.hub.devhub.faults import Fault

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GONE = {"type": "http.disconnect"}


@dataclass(slots=True)
class Record:
    """A request as the log shows it; `status` is None while there is no answer, or where there never was one."""

    time: float
    origin: str
    method: str
    path: str
    query: str
    range: str | None
    authorized: bool
    user: str | None
    status: int | None = None
    bytes_in: int = 0
    bytes_out: int = 0


class Log:
    """The last requests."""

    def __init__(self) -> None:
        self._records: deque[Record] = deque(maxlen=200_000)

    def add(self, record: Record) -> None:
        """Append a request; it may change until it is answered."""
        record.query = re.sub(r"(?<=signature=)\w+", "", record.query)
        self._records.append(record)

    def taken(self, *, clear: bool) -> list[dict[str, Any]]:
        """All records as JSON values."""
        found = [asdict(record) for record in list(self._records)]
        if clear:
            self._records.clear()
        return found


def header(scope: Scope, name: bytes) -> str | None:
    """Value of a request header, None when it is absent."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return None


async def respond(send: Send, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
    """Send a whole answer."""
    given = {"content-length": str(len(body)), **{k.lower(): v for k, v in (headers or {}).items()}}
    pairs = [(key.encode(), value.encode("latin-1")) for key, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class Wire:
    """One request: counts its bytes and lets its fault happen. Handlers see a client that went away."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, record: Record, fault: Fault) -> None:
        self._scope, self._receive, self._send, self._record, self._fault = scope, receive, send, record, fault
        self._uploads = scope["method"] in {"POST", "PUT", "PATCH", "DELETE"}
        self._dead = False
        self._more = True
        self._start: Message | None = None

    async def run(self, app: App) -> None:
        """Hand the request to `app`, or do what the fault says instead."""
        fault = self._fault
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.status and not fault.land:
            while self._more and not self._dead:
                await self.receive()
            await respond(self._count_out, fault.status, b"", dict(fault.headers))
            return
        if fault.land:
            await app(self._scope, self.receive, self._swallow)
            if fault.status:
                await respond(self._count_out, fault.status, b"", dict(fault.headers))
            else:
                await self._close(at_once=True)
            return
        await app(self._scope, self.receive, self.send)

    async def receive(self) -> Message:
        """The next part of the request body."""
        if self._dead:
            return GONE
        message = await self._receive()
        if message["type"] != "http.request":
            self._dead = True
            return message
        self._more = message.get("more_body", False)
        before = self._record.bytes_in
        self._record.bytes_in += len(message.get("body", b""))
        if self._uploads and not self._fault.land:
            limit = self._limit()
            if limit is not None and (self._record.bytes_in >= limit or not self._more):
                await (self._close(at_once=True) if self._fault.cut is not None else self._hang())
                return GONE
            message["body"] = self._corrupted(message.get("body", b""), before)
        return message

    async def send(self, message: Message) -> None:
        """The next part of the answer."""
        if self._dead:
            return
        limit = None if self._uploads else self._limit()
        if limit is None:
            if not self._uploads:
                message["body"] = self._corrupted(message.get("body", b""), self._record.bytes_out)
            await self._count_out(message)
            return
        if message["type"] == "http.response.start":
            if self._scope["method"] == "HEAD":  # it has no body to stop in
                await (self._close(at_once=True) if self._fault.cut is not None else self._hang())
                return
            await self._count_out(message)
            return
        body = message.get("body", b"")
        left = limit - self._record.bytes_out
        if len(body) < left and message.get("more_body", False):
            await self._count_out(message)
            return
        await self._count_out({"type": "http.response.body", "body": body[:left], "more_body": True})
        await (self._close(at_once=False) if self._fault.cut is not None else self._hang())

    def _limit(self) -> int | None:
        return self._fault.cut if self._fault.cut is not None else self._fault.stall

    def _corrupted(self, body: bytes, start: int) -> bytes:
        at = self._fault.corrupt
        if at is None or not start <= at < start + len(body):
            return body
        at -= start
        return body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]

    async def _count_out(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
        if self._scope["method"] != "HEAD":
            self._record.bytes_out += len(message.get("body", b""))
        await self._send(message)

    async def _swallow(self, message: Message) -> None:
        """Whatever the handler answers, nobody hears it."""

    async def _close(self, *, at_once: bool) -> None:
        self._dead = True
        # An ASGI server has no message for this; both protocols of uvicorn keep the transport here.
        transport: asyncio.Transport = self._receive.__self__.transport  # type: ignore[attr-defined]
        if at_once:
            transport.abort()
        else:
            transport.close()  # after what was sent
        await self._hang()

    async def _hang(self) -> None:
        """Do nothing until the client is gone."""
        self._dead = True
        while (await self._receive())["type"] != "http.disconnect":
            pass
