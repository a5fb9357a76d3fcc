"""The storage origin: objects behind signed URLs, as an S3 bucket with a CDN in front would serve them.

GET  /files/REPO../SHA256/NAME         ranges of an LFS or Xet file
PUT  /objects/REPO../SHA256/SIZE       a whole object
PUT  /parts/REPO../SHA256/UPLOAD/N     one part; answers with its ETag
POST /complete/REPO../SHA256/UPLOAD    puts the parts together
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from mso_hub.hub.devhub.disk import CHUNK, Contents, Entry
from mso_hub.hub.devhub.signing import Signer
from mso_hub.hub.devhub.throttle import Throttle
from mso_hub.hub.devhub.wire import Receive, Scope, Send, header, respond

_PATH = re.compile(r"/(files|objects|parts|complete)/.+?/([0-9a-f]{64})(?:/(.+))?")
_METHODS = {"files": ("GET", "HEAD"), "objects": ("PUT",), "parts": ("PUT",), "complete": ("POST",)}


class Gone(Exception):
    """The client went away before its upload was complete."""


@dataclass(slots=True)
class Upload:
    """A multipart upload; while parts arrive in order, `digest` covers the first `hashed` of them."""

    path: Path
    part_size: int
    size: int
    etags: dict[int, str] = field(default_factory=dict)
    digest: Any = field(default_factory=hashlib.sha256)
    hashed: int = 0


class Storage:
    """ASGI application of the storage origin."""

    def __init__(self, contents: Contents, signer: Signer) -> None:
        self._contents, self._signer = contents, signer
        self.down, self.up = Throttle(), Throttle()
        self._uploads: dict[str, Upload] = {}

    def new_upload(self, size: int, part_size: int) -> str:
        """Id of a multipart upload that may now begin; unfinished ones do not outlive the server."""
        path = self._contents.new_part()
        self._uploads[path.name] = Upload(path, part_size, size)
        return path.name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path, method = unquote(scope["raw_path"].decode()), scope["method"]
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        found = _PATH.fullmatch(path)
        with contextlib.suppress(Gone):
            if header(scope, b"authorization") is not None:
                await self._refuse(receive, send, 400, "InvalidArgument: Only one auth mechanism allowed")
                return
            if found is None or method not in _METHODS[found[1]]:
                await self._refuse(receive, send, 404, "NoSuchKey: nothing is served here")
                return
            problem = self._signer.problem(method, path, query)
            if problem:
                await self._refuse(receive, send, 403, problem)
                return
            verb, sha256, rest = found[1], found[2], found[3] or ""
            if verb == "files":
                await self._send_file(scope, receive, send, sha256)
            elif verb == "objects":
                await self._take_object(receive, send, sha256, int(rest))
            elif verb == "parts":
                await self._take_part(receive, send, rest)
            else:
                await self._complete(receive, send, sha256, rest)

    async def _refuse(self, receive: Receive, send: Send, status: int, text: str) -> None:
        """Read what the client still sends, so that it hears the answer instead of a reset."""
        async for _ in self._body(receive):
            pass
        await respond(send, status, text.encode())

    async def _send_file(self, scope: Scope, receive: Receive, send: Send, sha256: str) -> None:
        size = await asyncio.to_thread(self._contents.size, sha256)
        if size is None:
            await respond(send, 404, b"NoSuchKey: no such object")
            return
        span = byte_range(header(scope, b"range"), size)
        headers = {"etag": f'"{sha256}"', "accept-ranges": "bytes", "content-type": "application/octet-stream"}
        if span is None:
            await respond(send, 416, b"InvalidRange", {"content-range": f"bytes */{size}"})
            return
        start, stop = span
        headers["content-length"] = str(stop - start)
        if header(scope, b"range"):
            headers["content-range"] = f"bytes {start}-{max(start, stop - 1)}/{size}"
        pairs = [(key.encode(), value.encode()) for key, value in headers.items()]
        status = 206 if "content-range" in headers else 200
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        await self._send_pieces(receive, send, self._contents.pieces(Entry(size, "", sha256), start, stop))

    async def _send_pieces(self, receive: Receive, send: Send, pieces: Iterator[bytes]) -> None:
        gone = asyncio.create_task(_until_gone(receive))  # `send` does not tell that nobody listens
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                view = memoryview(piece)
                while view:
                    step = view[: self.down.step]
                    await self.down.take(len(step))
                    if gone.done():
                        return
                    await send({"type": "http.response.body", "body": bytes(step), "more_body": True})
                    view = view[len(step) :]
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()

    async def _body(self, receive: Receive) -> AsyncIterator[bytes]:
        """The request body in pieces of about CHUNK bytes."""
        held = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise Gone
            body = message.get("body", b"")
            more = message.get("more_body", False)
            await self.up.take(len(body))
            held += body
            if len(held) >= CHUNK or not more:
                yield bytes(held)
                held.clear()

    async def _store(self, receive: Receive, path: Path, at: int, digest: Any) -> int:
        """Write the body into a file and hash it, in a thread while the next bytes arrive; its length."""
        length = 0
        file = await asyncio.to_thread(os.open, path, os.O_WRONLY | os.O_CREAT, 0o644)
        busy: asyncio.Task[None] | None = None
        try:
            async for data in self._body(receive):
                if busy is not None:
                    await busy
                busy = asyncio.create_task(asyncio.to_thread(_write, file, data, at + length, digest))
                length += len(data)
        finally:
            if busy is not None:
                await busy
            os.close(file)
        return length

    async def _take_object(self, receive: Receive, send: Send, sha256: str, size: int) -> None:
        path, digest = self._contents.new_part(), hashlib.sha256()
        try:
            length = await self._store(receive, path, 0, digest)
            if digest.hexdigest() != sha256 or length != size:
                await respond(send, 400, b"BadDigest: the bytes do not have the announced sha256 and size")
                return
            await asyncio.to_thread(self._contents.accept, path, sha256)
        finally:
            path.unlink(missing_ok=True)
        await respond(send, 200, b"", {"etag": f'"{sha256}"'})

    async def _take_part(self, receive: Receive, send: Send, rest: str) -> None:
        name, _, number = rest.partition("/")
        upload = self._uploads.get(name)
        count = -(-upload.size // upload.part_size) if upload else 0
        if upload is None or not number.isdigit() or not 1 <= int(number) <= count:
            await self._refuse(receive, send, 404, "NoSuchUpload: no such upload or part")
            return
        at = (int(number) - 1) * upload.part_size
        if int(number) <= upload.hashed:
            upload.hashed = -1  # sent again: only the file knows what it holds now
        in_order = upload.hashed == int(number) - 1
        digest = upload.digest.copy() if in_order else hashlib.sha256()
        length = await self._store(receive, upload.path, at, digest)
        if length != min(upload.part_size, upload.size - at):
            await respond(send, 400, b"EntityTooSmall: the part does not have the announced size")
            return
        if in_order and upload.hashed == int(number) - 1:
            upload.digest, upload.hashed = digest, int(number)
        etag = f'"{digest.hexdigest()[:32]}-{number}"'
        upload.etags[int(number)] = etag
        await respond(send, 200, b"", {"etag": etag})

    async def _complete(self, receive: Receive, send: Send, sha256: str, name: str) -> None:
        upload = self._uploads.get(name)
        body = b"".join([data async for data in self._body(receive)])
        if upload is None:
            done = await asyncio.to_thread(self._contents.size, sha256)  # the answer to a completion may have been lost
            await respond(send, 404 if done is None else 200, b"" if done else b"NoSuchUpload: no such upload")
            return
        try:
            told = {int(part["partNumber"]): part["etag"] for part in json.loads(body)["parts"]}
        except (ValueError, KeyError, TypeError):
            told = {}
        if told != upload.etags or len(told) != -(-upload.size // upload.part_size):
            await respond(send, 400, b"InvalidPart: parts are missing or their ETags differ")
            return
        digest = upload.digest if upload.hashed == len(told) else await asyncio.to_thread(_digest_of, upload.path)
        if digest.hexdigest() != sha256 or upload.path.stat().st_size != upload.size:
            await respond(send, 400, b"BadDigest: the bytes do not have the announced sha256 and size")
            return
        await asyncio.to_thread(self._contents.accept, upload.path, sha256)
        del self._uploads[name]
        await respond(send, 200, b'{"success":true}', {"content-type": "application/json"})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def byte_range(value: str | None, size: int) -> tuple[int, int] | None:
    """[start, stop) that a Range header asks for; all when there is none we know, None when it lies outside."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", value or "")
    if found is None or found.groups() == ("", ""):
        return 0, size
    first, last = found.groups()
    if not first:
        return (max(0, size - int(last)), size) if int(last) and size else None
    start, stop = int(first), min(size, int(last) + 1) if last else size
    return (start, stop) if start < stop else None


def _write(file: int, data: bytes, at: int, digest: Any) -> None:
    digest.update(data)
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _digest_of(path: Path) -> Any:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest
