"""The ASGI application of both origins: who asks, what the log notes, which handler answers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router

from mso_hub.hub.devhub import api_discussions, api_files, api_repos, api_tree, api_upload, control
from mso_hub.hub.devhub.access import Caller
from mso_hub.hub.devhub.faults import Fault
from mso_hub.hub.devhub.repos import Refused
from mso_hub.hub.devhub.state import Call, Reply, State
from mso_hub.hub.devhub.wire import Receive, Record, Scope, Send, Wire, header

Handler = Callable[[Call], Reply]

OTHER_NAME = {"127.0.0.1": "localhost", "localhost": "127.0.0.1"}
"""Older clients tell origins apart by host name alone, and would send their token to another port of the same."""

_REPO = "/api/{kind:kind}/{owner}/{name}"
ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/api/whoami-v2", api_repos.whoami),
    ("GET", "/api/agent-harnesses", api_repos.agent_harnesses),
    ("POST", "/api/validate-yaml", api_repos.validate_yaml),
    ("POST", "/api/repos/create", api_repos.create_repo),
    ("DELETE", "/api/repos/delete", api_repos.delete_repo),
    ("GET", "/api/{kind:kind}", api_repos.list_repos),
    ("GET", _REPO, api_repos.repo_info),
    ("GET", _REPO + "/revision/{rev}", api_repos.repo_info),
    ("PUT", _REPO + "/settings", api_repos.update_settings),
    ("POST", _REPO + "/user-access-request/grant", api_repos.grant_access),
    ("GET", _REPO + "/auth-check", api_repos.auth_check),
    ("GET", _REPO + "/auth-check/write", api_repos.auth_check),
    ("GET", _REPO + "/tree/{rev}", api_tree.list_tree),
    ("GET", _REPO + "/tree/{rev}/{path:path}", api_tree.list_tree),
    ("POST", _REPO + "/paths-info/{rev}", api_tree.paths_info),
    ("GET", _REPO + "/refs", api_tree.list_refs),
    ("GET", _REPO + "/commits/{rev}", api_tree.list_commits),
    ("POST", _REPO + "/branch/{ref}", api_tree.create_branch),
    ("DELETE", _REPO + "/branch/{ref}", api_tree.delete_ref),
    ("POST", _REPO + "/tag/{ref}", api_tree.create_tag),
    ("DELETE", _REPO + "/tag/{ref}", api_tree.delete_ref),
    ("POST", _REPO + "/super-squash/{ref}", api_tree.super_squash),
    ("POST", _REPO + "/preupload/{rev}", api_upload.preupload),
    ("POST", _REPO + "/commit/{rev}", api_upload.commit),
    ("GET", _REPO + "/xet-read-token/{rev}", api_upload.xet_token),
    ("GET", _REPO + "/xet-write-token/{rev}", api_upload.xet_token),
    ("POST", _REPO + "/lfs-files/duplicate", api_upload.duplicate_lfs_files),
    ("GET", _REPO + "/safetensors-metadata/{path:path}", api_files.safetensors_metadata),
    ("GET", _REPO + "/discussions", api_discussions.listing),
    ("POST", _REPO + "/discussions", api_discussions.create),
    ("GET", _REPO + "/discussions/{num}", api_discussions.details),
    ("POST", _REPO + "/discussions/{num}/merge", api_discussions.merge),
    ("POST", _REPO + "/discussions/{num}/status", api_discussions.change_status),
    ("POST", _REPO + "/discussions/{num}/comment", api_discussions.comment),
    ("POST", _REPO + "/discussions/{num}/title", api_discussions.rename),
)
PAGES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/{owner}/{name}/resolve/{rev}/{path:path}", api_files.resolve),
    ("POST", "/{owner}/{name}.git/info/lfs/objects/batch", api_upload.lfs_batch),
    ("POST", "/{owner}/{name}.git/info/lfs/objects/verify", api_upload.lfs_verify),
)
"""Models have no prefix here, datasets and spaces have theirs."""
CONTROL: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/_devhub/", control.about),
    ("POST", "/_devhub/faults", control.add_faults),
    ("DELETE", "/_devhub/faults", control.clear_faults),
    ("POST", "/_devhub/settings", control.change_settings),
    ("GET", "/_devhub/log", control.read_log),
    ("POST", "/_devhub/users", control.add_user),
    ("POST", "/_devhub/repos/{kind}/{owner}/{name}", control.change_repo),
)


def _refusal(status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> Response:
    """An error as the Hub client reads it."""
    clean = re.sub(r"[^\x20-\x7e]+", " ", message)
    given = {**(headers or {}), "X-Error-Message": clean, **({"X-Error-Code": code} if code else {})}
    return Response(json.dumps({"error": message}), status, given, "application/json")


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """What no route serves; a repo without an owner (gpt2) is a repo that does not exist."""
    of_repo = re.match(r"/api/(models|datasets|spaces)/|.*/resolve/", scope["path"])
    await _refusal(404, f"Nothing at {scope['path']}", "RepoNotFound" if of_repo else "")(scope, receive, send)


class App:
    """ASGI application for the sockets of the hub and of the storage origin."""

    def __init__(self, state: State, hub_port: int, storage_port: int) -> None:
        self._state, self._ports = state, {"hub": hub_port, "storage": storage_port}
        routes = [self._route(method, path, handler) for method, path, handler in (*CONTROL, *ROUTES)]
        for kind in ("datasets", "spaces", ""):
            prefix = f"/{kind}" if kind else ""
            routes += [self._route(m, prefix + path, handler, kind or "models") for m, path, handler in PAGES]
        self._router = Router([route for group in routes for route in group], redirect_slashes=False, default=_nothing)

    def _route(self, method: str, path: str, handler: Handler, kind: str | None = None) -> list[Route]:
        """Routes of one handler; {kind:kind} stands for each kind of repo."""
        if "{kind:kind}" not in path:
            return [Route(path, partial(self._answer, handler, kind), methods=[method])]
        return [
            Route(path.replace("{kind:kind}", kind), partial(self._answer, handler, kind), methods=[method])
            for kind in ("models", "datasets", "spaces")
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        origin = "storage" if scope["server"][1] == self._ports["storage"] else "hub"
        path = unquote(scope["raw_path"].decode("latin-1"))
        if origin == "hub" and path.startswith("/_devhub/"):
            await self._router({**scope, "path": path}, receive, send)
            return
        caller = self._state.accounts.caller(header(scope, b"authorization"))
        record = self._record(scope, origin, path, caller)
        self._state.log.add(record)
        fault = self._state.faults.hit(origin, f"{scope['method']} {path}") or Fault("")
        if fault.expire:
            self._state.signer.void_issued()
        wire = Wire(scope, receive, send, record, fault)
        if origin == "storage":
            await wire.run(self._state.storage)
        else:
            # Revisions are quoted in paths: routes must not see their slashes.
            inner = {**scope, "path": scope["raw_path"].decode("latin-1"), "caller": caller, "fault": fault}
            await wire.run(partial(self._hub, inner))

    def _record(self, scope: Scope, origin: str, path: str, caller: Caller | None) -> Record:
        query = scope["query_string"].decode("latin-1")
        authorized = header(scope, b"authorization") is not None
        user = caller.name if caller and caller.name else None
        span = header(scope, b"range")
        return Record(time.time(), origin, scope["method"], path, query, span, authorized, user)

    async def _hub(self, inner: Scope, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._router(inner, receive, send)
        except ClientDisconnect:
            return

    async def _answer(self, handler: Handler, kind: str | None, request: Request) -> Response:
        caller = request.scope.get("caller", Caller())
        call = self._call(request, await request.body(), caller or Caller(), kind)
        if caller is None:
            return _refusal(401, "Invalid credentials in Authorization header")
        try:
            reply = await run_in_threadpool(handler, call)
        except Refused as error:
            return _refusal(error.status, error.message, error.code, error.headers)
        except ValueError as error:  # not JSON, not base64, not a number; RecipeError of the control handlers
            return _refusal(400, str(error))
        return Response(reply.body, reply.status, dict(reply.headers))

    def _call(self, request: Request, body: bytes, caller: Caller, kind: str | None) -> Call:
        params: dict[str, Any] = {key: unquote(value) for key, value in request.path_params.items()}
        host = request.headers.get("host", "127.0.0.1")
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        fault = request.scope.get("fault", Fault(""))
        return Call(
            state=self._state,
            caller=caller,
            method=request.method,
            path=request.scope["path"],
            params={"kind": kind, **params} if kind else params,
            query=parse_qs(request.scope["query_string"].decode("latin-1"), keep_blank_values=True),
            headers=request.headers,
            body=body,
            hub=f"http://{name}:{self._ports['hub']}",
            storage=f"http://{OTHER_NAME.get(name, name)}:{self._ports['storage']}",
            token_expiry=fault.token_expiry,
        )
