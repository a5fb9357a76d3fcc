"""Handlers: users, repos and their settings."""

from __future__ import annotations

import importlib
import re
from typing import Any

from mso_hub.hub.devhub.access import require_files, require_owner, require_read, require_write
from mso_hub.hub.devhub.disk import pointer_size
from mso_hub.hub.devhub.repos import BRANCH, Refused, Repo
from mso_hub.hub.devhub.state import Call, Reply, json_reply

LFS_PATTERNS = """
    7z arrow bin bz2 ckpt ftz gz h5 joblib lfs.* mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl pt pth
    rar safetensors tar.* tar tflite tgz wasm xz zip zst
""".split()  # noqa: SIM905 - a list of words reads better without the quotes
ATTRIBUTES = "".join(f"*.{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LFS_PATTERNS).encode()
"""The .gitattributes of a new repo."""


def whoami(call: Call) -> Reply:
    """GET /api/whoami-v2."""
    caller = call.caller
    if not caller.name:
        raise Refused(401, "Invalid username or password.")
    orgs = [
        {"type": "org", "name": org, "fullname": org, "roleInOrg": "write", "isEnterprise": False}
        for org in caller.orgs
    ]
    token = {"displayName": caller.role, "role": caller.role, "createdAt": "2024-01-01T00:00:00.000Z"}
    facts = {
        "type": "user", "id": caller.name, "name": caller.name, "fullname": caller.name, "isPro": False,
        "email": f"{caller.name}@localhost", "emailVerified": True, "canPay": False, "periodEnd": None,
        "avatarUrl": "", "orgs": orgs, "auth": {"type": "access_token", "accessToken": token},
    }  # fmt: skip
    return json_reply(facts)


def agent_harnesses(_call: Call) -> Reply:
    """GET /api/agent-harnesses: clients ask once a day; here is nothing to know."""
    return json_reply({"standardEnvVars": [], "harnesses": {}})


def validate_yaml(call: Call) -> Reply:
    """POST /api/validate-yaml: is the head of a README YAML?"""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---(\r?\n|$)", str(call.json().get("content", "")), re.DOTALL)
    errors: list[dict[str, Any]] = []
    warnings: list[dict[str, Any]] = []
    if found is None:
        warnings.append({"message": "empty or missing yaml metadata in repo card"})
    else:
        yaml = importlib.import_module("yaml")  # the Hub client depends on it
        try:
            if not isinstance(yaml.safe_load(found[1]), (dict, type(None))):
                errors.append({"message": "YAML metadata must be a mapping"})
        except yaml.YAMLError as error:
            errors.append({"message": f"YAML metadata could not be read: {error}"})
    return json_reply({"errors": errors, "warnings": warnings}, 400 if errors else 200)


def _named(call: Call) -> tuple[str, str]:
    """(kind, OWNER/NAME) of a request whose body names a repo."""
    facts = call.json()
    owner = facts.get("organization") or call.caller.name
    return f"{facts.get('type') or 'model'}s", f"{owner}/{facts.get('name')}"


def create_repo(call: Call) -> Reply:
    """POST /api/repos/create."""
    facts = call.json()
    kind, repo_id = _named(call)
    require_owner(call.caller, repo_id.split("/")[0])
    private = bool(facts.get("private")) or facts.get("visibility") == "private"
    attributes = call.state.contents.put(ATTRIBUTES)
    repo, new = call.state.store.create(kind, repo_id, call.caller.name, private=private, attributes=attributes)
    url = f"{call.hub}/{repo.page}"
    if new:
        return json_reply({"url": url, "name": repo.id, "id": repo.id})
    error = "You already created this model repo" if kind == "models" else f"You already created this {kind[:-1]} repo"
    return json_reply({"error": error, "url": url, "name": repo.id}, 409, {"X-Error-Message": error})


def delete_repo(call: Call) -> Reply:
    """DELETE /api/repos/delete."""
    kind, repo_id = _named(call)
    repo = require_read(call.caller, call.state.store.find(kind, repo_id), repo_id)
    require_owner(call.caller, repo.owner)
    call.state.store.delete(repo)
    return Reply()


def update_settings(call: Call) -> Reply:
    """PUT /api/KIND/ID/settings: private and gated."""
    repo, facts = call.repo(), call.json()
    require_write(call.caller, repo, BRANCH)
    if facts.get("gated", False) not in {"auto", "manual", False}:
        raise Refused(400, f"gated must be auto, manual or false, got {facts['gated']!r}")
    with repo.lock:
        repo.facts["gated"] = facts.get("gated", repo.facts["gated"])
        private = facts["visibility"] == "private" if "visibility" in facts else facts.get("private")
        repo.facts["private"] = repo.facts["private"] if private is None else bool(private)
        repo.save()
    return json_reply({"private": repo.facts["private"], "gated": repo.facts["gated"]})


def grant_access(call: Call) -> Reply:
    """POST /api/KIND/ID/user-access-request/grant: let a user into a gated or private repo."""
    repo, user = call.repo(), str(call.json().get("user"))
    require_write(call.caller, repo, BRANCH)
    with repo.lock:
        repo.facts["granted"] = sorted({*repo.facts["granted"], user})
        repo.save()
    return json_reply({})


def auth_check(call: Call) -> Reply:
    """GET /api/KIND/ID/auth-check and .../auth-check/write."""
    repo = call.repo()
    require_files(call.caller, repo)
    if call.path.endswith("/write"):
        require_write(call.caller, repo, BRANCH)
    return json_reply({})


def repo_info(call: Call) -> Reply:
    """GET /api/KIND/ID and .../revision/REV."""
    repo = call.repo()
    sha = repo.resolve(call.params.get("rev", "main"))
    facts = _facts(repo, sha, blobs=call.flag("blobs"))
    wanted = {*call.query.get("expand", ()), *call.query.get("expand[]", ())}
    if wanted:
        facts = {key: value for key, value in facts.items() if key in wanted | {"_id", "id"}}
    return json_reply(facts)


def list_repos(call: Call) -> Reply:
    """GET /api/KIND with author, search and limit."""
    author, search = (call.query.get(key, [""])[-1].lower() for key in ("author", "search"))
    found = [
        repo
        for repo in call.state.store.listed(call.params["kind"])
        if call.caller.may_read(repo) and not repo.facts["disabled"] and BRANCH + "main" in repo.refs
        and author in {"", repo.owner.lower()} and search in repo.id.lower()
    ]  # fmt: skip
    limit = call.query.get("limit", [""])[-1]
    items, headers = call.page(found, size=int(limit) if limit.isdigit() and int(limit) else None)
    listed = [_facts(repo, repo.refs[BRANCH + "main"], blobs=False) for repo in items]
    for facts in listed:
        if not call.flag("full"):
            del facts["siblings"]
    return json_reply(listed, headers=headers)


def _facts(repo: Repo, sha: str, *, blobs: bool) -> dict[str, Any]:
    commit = repo.commit(sha)
    siblings = []
    for path, entry in commit.tree.items():
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            sibling |= {"size": entry.size, "blobId": entry.oid}
            if entry.sha256:
                sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": pointer_size(entry)}
        siblings.append(sibling)
    facts = {
        "_id": repo.id, "id": repo.id, "author": repo.owner, "sha": sha, "lastModified": commit.date,
        "createdAt": repo.facts["created"], "private": repo.facts["private"], "gated": repo.facts["gated"],
        "disabled": repo.facts["disabled"], "tags": [], "downloads": 0, "likes": 0, "siblings": siblings,
        "usedStorage": sum(entry.size for entry in commit.tree.values()),
    }  # fmt: skip
    return {**facts, "modelId": repo.id} if repo.kind == "models" else facts
