"""Handlers: everything that puts files into a repo."""

from __future__ import annotations

import base64
import fnmatch
import json
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mso_hub.hub.devhub.access import require_files, require_read, require_write, require_write_token
from mso_hub.hub.devhub.api_discussions import open_discussion
from mso_hub.hub.devhub.disk import Contents, Entry
from mso_hub.hub.devhub.repos import BRANCH, PULL, Refused, Repo, Tree, require_path
from mso_hub.hub.devhub.state import Call, Reply, json_reply

REGULAR_LIMIT = 10 << 20
"""Bytes above which a file goes to LFS whatever its name."""
TOKEN_LIFE = 3600


def _require_write(call: Call, repo: Repo, revision: str | None) -> None:
    """Branches of a repo for its owners; for a pull request (revision None) a write token is enough."""
    require_write(call.caller, repo, None if call.flag("create_pr") else revision)


def preupload(call: Call) -> Reply:
    """POST /api/KIND/ID/preupload/REV: which files are small, large, or ignored, and what lies there now."""
    repo, asked = call.repo(), call.json()
    _require_write(call, repo, call.params["rev"])
    tree = repo.commit(repo.resolve(call.params["rev"])).tree
    patterns = _lfs_patterns(call, tree)
    ignored = _lines(asked.get("gitIgnore") or _small(call, tree, ".gitignore"))
    listed = []
    for file in asked.get("files", ()):
        path, size = require_path(file.get("path")), int(file.get("size", 0))
        sample = base64.b64decode(file.get("sample", ""))
        large = size > REGULAR_LIMIT or _matches(path, patterns) or _is_binary(sample)
        entry = tree.get(path)
        oid = (entry.sha256 or entry.oid) if entry else None
        mode = "lfs" if large else "regular"
        listed.append({"path": path, "uploadMode": mode, "shouldIgnore": _matches(path, ignored), "oid": oid})
    return json_reply({"files": listed})


def _small(call: Call, tree: Tree, path: str) -> str:
    entry = tree.get(path)
    return call.state.contents.read(entry).decode(errors="replace") if entry and not entry.sha256 else ""


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _lfs_patterns(call: Call, tree: Tree) -> list[str]:
    return [line.split()[0] for line in _lines(_small(call, tree, ".gitattributes")) if "filter=lfs" in line]


def _matches(path: str, patterns: Sequence[str]) -> bool:
    names = (path, path.rpartition("/")[2], *(path[:at] + "/" for at, letter in enumerate(path) if letter == "/"))
    return any(fnmatch.fnmatch(name, pattern.lstrip("/")) for name in names for pattern in patterns)


def _is_binary(sample: bytes) -> bool:
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        if error.start < len(sample) - 3:  # else a letter that the end of the sample cuts
            return True
    return b"\0" in sample


def lfs_batch(call: Call) -> Reply:
    """POST /ID.git/info/lfs/objects/batch."""
    asked = call.json()
    repo = call.repo()
    if asked.get("operation") == "download":
        require_files(call.caller, repo)
        return json_reply({"objects": [_download_actions(call, repo, o["oid"], o["size"]) for o in asked["objects"]]})
    require_write(call.caller, repo, (asked.get("ref") or {}).get("name"))
    objects, multipart = [], False
    for wanted in asked.get("objects", ()):
        sha256, size = str(wanted.get("oid")), int(wanted.get("size", -1))
        if not re.fullmatch(r"[0-9a-f]{64}", sha256) or size < 0:
            error = {"code": 422, "message": f"oid must be a sha256 and size a number, got {sha256} and {size}"}
            objects.append({"oid": sha256, "size": size, "error": error})
            continue
        held = call.state.contents.size(sha256)
        if held is not None and held != size:
            error = {"code": 422, "message": f"object {sha256} has {held} bytes, not {size}"}
            objects.append({"oid": sha256, "size": size, "error": error})
        elif held is not None:
            objects.append({"oid": sha256, "size": size})
        else:
            multipart |= size > call.state.tuning.multipart_above
            objects.append({"oid": sha256, "size": size, "actions": _upload_actions(call, repo, sha256, size)})
    return json_reply({"transfer": "multipart" if multipart else "basic", "objects": objects})


def _upload_actions(call: Call, repo: Repo, sha256: str, size: int) -> dict[str, Any]:
    tuning = call.state.tuning
    verify = {"href": f"{call.hub}/{repo.page}.git/info/lfs/objects/verify"}
    if size <= tuning.multipart_above:
        return {"upload": {"href": call.signed("PUT", f"/objects/{repo.page}/{sha256}/{size}")}, "verify": verify}
    upload = call.state.storage.new_upload(size, tuning.part_size)
    count = -(-size // tuning.part_size)
    parts = {f"{n:05d}": call.signed("PUT", f"/parts/{repo.page}/{sha256}/{upload}/{n}") for n in range(1, count + 1)}
    href = call.signed("POST", f"/complete/{repo.page}/{sha256}/{upload}")
    return {"upload": {"href": href, "header": {"chunk_size": str(tuning.part_size), **parts}}, "verify": verify}


def _download_actions(call: Call, repo: Repo, sha256: str, size: int) -> dict[str, Any]:
    if call.state.contents.size(sha256) != size:
        return {"oid": sha256, "size": size, "error": {"code": 404, "message": "no such object"}}
    href = call.signed("GET", f"/files/{repo.page}/{sha256}")
    return {"oid": sha256, "size": size, "actions": {"download": {"href": href}}}


def lfs_verify(call: Call) -> Reply:
    """POST /ID.git/info/lfs/objects/verify."""
    asked = call.json()
    require_write_token(call.caller)
    found = call.state.contents.size(str(asked.get("oid"))) if re.fullmatch(r"\w{64}", str(asked.get("oid"))) else None
    if found is None or found != asked.get("size"):
        raise Refused(404, f"Object {asked.get('oid')} of {asked.get('size')} bytes does not exist")
    return json_reply({})


def xet_token(call: Call) -> Reply:
    """GET /api/KIND/ID/xet-read-token/REV or xet-write-token; casUrl is a folder, which clients use themselves."""
    if not call.state.xet:
        raise Refused(404, "This server has no Xet storage; set HF_HUB_DISABLE_XET=1 to upload by LFS")
    repo, write = call.repo(), "/xet-write-token/" in call.path
    if write:
        revision = call.params["rev"]
        _require_write(call, repo, None if revision == "None" else revision)
    else:
        require_files(call.caller, repo)
    life = TOKEN_LIFE if call.token_expiry is None else call.token_expiry
    facts = {
        "accessToken": f"xet_{'write' if write else 'read'}_{repo.id}",
        "exp": int(time.time() + life),
        "casUrl": f"local://{call.state.contents.cas}",
    }
    headers = {
        "X-Xet-Cas-Url": str(facts["casUrl"]),
        "X-Xet-Access-Token": str(facts["accessToken"]),
        "X-Xet-Token-Expiration": str(facts["exp"]),
    }
    return json_reply(facts, headers=headers)


def duplicate_lfs_files(call: Call) -> Reply:
    """POST /api/KIND/SOURCE/lfs-files/duplicate: content is shared here, so it is enough that the source has it."""
    repo, asked = call.repo(), call.json()
    require_files(call.caller, repo)
    target = asked.get("target") or {}
    found = call.state.store.find(f"{target.get('type', 'model')}s", str(target.get("name")))
    require_write(call.caller, require_read(call.caller, found, str(target.get("name"))))
    held = {entry.sha256 for sha in repo.refs.values() for entry in repo.commit(sha).tree.values()}
    failed = [
        {"sha256": file.get("sha256"), "error": "no such file in the source"}
        for file in asked.get("files", ())
        if file.get("sha256") not in held
    ]
    return json_reply({"success": not failed, "failed": failed})


def commit(call: Call) -> Reply:
    """POST /api/KIND/ID/commit/REV: a new commit on a branch, on a pull request, or as a new pull request."""
    repo, revision = call.repo(), call.params["rev"]
    _require_write(call, repo, revision)
    head, operations = _operations(call.body)
    additions = dict(_additions(call.state.contents, operations))
    with repo.lock:
        parent = repo.resolve(revision)
        create_pr, wanted = call.flag("create_pr"), head.get("parentCommit")
        if wanted and create_pr:
            parent = repo.resolve(str(wanted))
        elif wanted and wanted != parent:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        ref = repo.ref(revision)
        if not create_pr and (ref is None or not ref.startswith((BRANCH, PULL))):
            raise Refused(400, f"{revision} is not a branch")
        before = repo.commit(parent).tree
        tree = _changed(before, operations, additions)
        title = str(head.get("summary") or "Upload with huggingface_hub")
        message = str(head.get("description") or "")
        facts: dict[str, Any] = {"success": True}
        if create_pr:
            sha = repo.new_commit(tree, parent, title, message, call.caller.name)
            base = ref if ref and ref.startswith(BRANCH) else BRANCH + "main"
            number = open_discussion(repo, call.caller.name, title, message, (base, parent, sha))
            facts["pullRequestUrl"] = f"{call.hub}/{repo.page}/discussions/{number}"
        elif tree == before:
            sha = parent  # nothing would change: the Hub makes no empty commits
        else:
            sha = repo.new_commit(tree, parent, title, message, call.caller.name)
            repo.refs[str(ref)] = sha
        repo.save()
    facts |= {"commitOid": sha, "commitUrl": f"{call.hub}/{repo.page}/commit/{sha}", "hookOutput": ""}
    return json_reply(facts)


def _operations(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """(header, [(key, value)]) of an NDJSON body."""
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        found = [(str(line["key"]), dict(line["value"])) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(400, f"Not a commit: {error!r}") from error
    if not found or found[0][0] != "header":
        raise Refused(400, f"The first line of a commit must be its header, got {found[:1]!r:.80}")
    return found[0][1], found[1:]


def _additions(contents: Contents, operations: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, Entry]]:
    """(path, entry) of the files that a commit adds; 400 when the content of one is not there."""
    for key, value in operations:
        if key == "file":
            encoded = str(value.get("content", ""))
            data = base64.b64decode(encoded) if value.get("encoding") == "base64" else encoded.encode()
            yield require_path(value.get("path")), contents.put(data)
        elif key == "lfsFile":
            sha256 = str(value.get("oid"))
            size = contents.size(sha256) if re.fullmatch(r"[0-9a-f]{64}", sha256) else None
            if size is None or value.get("size", size) != size:
                raise Refused(
                    400,
                    "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
                    f"For instance, {value.get('path')}: oid {sha256}, size {value.get('size')}",
                )
            yield require_path(value.get("path")), contents.lfs_entry(sha256, size)


def _changed(before: Tree, operations: Sequence[tuple[str, dict[str, Any]]], additions: Tree) -> Tree:
    """The tree after all operations, in their order."""
    tree = dict(before)
    for key, value in operations:
        path = require_path(str(value.get("path", "")).rstrip("/"))
        if key in {"file", "lfsFile"}:
            tree[path] = additions[path]
        elif key == "deletedFile":
            if tree.pop(path, None) is None:
                raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif key == "deletedFolder":
            inside = [name for name in tree if name.startswith(f"{path}/")]
            if not inside:
                raise Refused(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
            for name in inside:
                del tree[name]
        else:
            raise Refused(400, f"Unknown operation in a commit: {key}")
    parents = {path[:at] for path in tree for at, letter in enumerate(path) if letter == "/"}
    both = parents & set(tree)
    if both:
        raise Refused(400, f"{min(both)} cannot be a file and a folder")
    return tree
