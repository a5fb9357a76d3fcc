"""Handlers: what lies in a repo at a revision, and its refs."""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import parse_qs

from mso_hub.hub.devhub.access import require_write
from mso_hub.hub.devhub.disk import Contents, Entry, pointer_size
from mso_hub.hub.devhub.repos import BRANCH, PULL, TAG, Refused, Repo, Tree, require_ref_name
from mso_hub.hub.devhub.state import Call, Reply, json_reply

EXPANDED_PAGE = 50


def file_facts(contents: Contents, path: str, entry: Entry) -> dict[str, Any]:
    """A file as the tree lists it."""
    facts: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.sha256:
        facts["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer_size(entry)}
        xet_hash = contents.xet_hash(entry.sha256)
        if xet_hash:
            facts["xetHash"] = xet_hash
    return facts


def _under(tree: Tree, folder: str) -> Tree:
    """Files below a folder, "" for all."""
    prefix = f"{folder}/" if folder else ""
    return {path: entry for path, entry in tree.items() if path.startswith(prefix)}


def _folder_facts(tree: Tree, folder: str) -> dict[str, Any]:
    digest = hashlib.sha1(usedforsecurity=False)
    for path, entry in sorted(_under(tree, folder).items()):
        digest.update(f"{path}\0{entry.oid}\n".encode())
    return {"type": "directory", "oid": digest.hexdigest(), "size": 0, "path": folder}


def _folders(tree: Tree) -> set[str]:
    """Every folder that has a file somewhere below it."""
    return {path[:at] for path in tree for at, letter in enumerate(path) if letter == "/"}


def list_tree(call: Call) -> Reply:
    """GET /api/KIND/ID/tree/REV[/PATH], folders among the files, in the order of their names."""
    repo = call.repo()
    sha = call.pinned("") or repo.resolve(call.params["rev"])
    commit = repo.commit(repo.resolve(sha))
    folder = call.params.get("path", "").strip("/")
    below = _under(commit.tree, folder)
    if folder and not below:
        raise Refused(
            404, f"{folder} does not exist on {call.params['rev']!r}", "EntryNotFound", {"X-Repo-Commit": sha}
        )
    folders = {name for name in _folders(below) if name.startswith(f"{folder}/" if folder else "")}
    names = sorted({*below, *folders})
    if not call.flag("recursive"):
        depth = folder.count("/") + 1 if folder else 0
        names = [name for name in names if name.count("/") == depth]
    expand = call.flag("expand")
    some, headers = call.page(names, sha, EXPANDED_PAGE if expand else None)
    contents = call.state.contents
    listed = [
        file_facts(contents, name, below[name]) if name in below else _folder_facts(commit.tree, name) for name in some
    ]
    if expand:
        _expand(repo, sha, listed)
    return json_reply(listed, headers={**headers, "X-Repo-Commit": sha})


def paths_info(call: Call) -> Reply:
    """POST /api/KIND/ID/paths-info/REV; unknown paths are left out."""
    repo = call.repo()
    sha = repo.resolve(call.params["rev"])
    if call.headers.get("content-type", "").startswith("application/json"):
        asked = call.json()
        paths, expand = list(asked.get("paths", ())), bool(asked.get("expand"))
    else:
        form = parse_qs(call.body.decode(), keep_blank_values=True)
        paths, expand = form.get("paths", []), form.get("expand", ["false"])[-1].lower() in {"true", "1"}
    if len(paths) > 1000:
        raise Refused(413, f"At most 1000 paths, got {len(paths)}")
    tree = repo.commit(sha).tree
    folders = _folders(tree)
    listed = [
        file_facts(call.state.contents, path, tree[path]) if path in tree else _folder_facts(tree, path)
        for path in (str(path).strip("/") for path in paths)
        if path in tree or path in folders
    ]
    if expand:
        _expand(repo, sha, listed)
    return json_reply(listed, headers={"X-Repo-Commit": sha})


def _expand(repo: Repo, sha: str, listed: list[dict[str, Any]]) -> None:
    """Add the last commit that touched each path."""
    missing = {facts["path"]: facts for facts in listed}
    for commit in repo.history(sha):
        before: Tree = repo.commit(commit.parent).tree if commit.parent else {}
        for path, facts in list(missing.items()):
            if _state(commit.tree, path, facts) != _state(before, path, facts):
                facts["lastCommit"] = {"id": commit.id, "title": commit.title, "date": commit.date}
                del missing[path]
    for facts in listed:
        if facts["type"] == "file":
            scan = {"status": "safe", "avScan": None, "pickleImportScan": None}
            facts["securityFileStatus"] = scan


def _state(tree: Tree, path: str, facts: dict[str, Any]) -> Any:
    return tree.get(path) if facts["type"] == "file" else _under(tree, path)


def list_refs(call: Call) -> Reply:
    """GET /api/KIND/ID/refs[?include_prs=1]."""
    repo = call.repo()

    def listed(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in sorted(repo.refs.items())
            if ref.startswith(prefix)
        ]

    refs = {"branches": listed(BRANCH), "converts": [], "tags": listed(TAG)}
    if call.flag("include_prs"):
        refs["pullRequests"] = listed(PULL)
    return json_reply(refs)


def list_commits(call: Call) -> Reply:
    """GET /api/KIND/ID/commits/REV, the newest first."""
    repo = call.repo()
    sha = call.pinned("") or repo.resolve(call.params["rev"])
    some, headers = call.page(list(repo.history(sha)), sha)
    listed = []
    for commit in some:
        facts: dict[str, Any] = {"id": commit.id, "title": commit.title, "message": commit.message}
        facts |= {"date": commit.date, "authors": [{"user": commit.author}]}
        if call.query.get("expand[]") or call.query.get("expand"):
            facts["formatted"] = {"title": commit.title, "message": commit.message}
        listed.append(facts)
    return json_reply(listed, headers={**headers, "X-Total-Count": str(len(listed))})


def create_branch(call: Call) -> Reply:
    """POST /api/KIND/ID/branch/NAME."""
    return _create_ref(call, BRANCH, call.params["ref"], str(call.json().get("startingPoint") or "main"))


def create_tag(call: Call) -> Reply:
    """POST /api/KIND/ID/tag/REV."""
    return _create_ref(call, TAG, call.json().get("tag"), call.params["ref"])


def _create_ref(call: Call, prefix: str, name: Any, start: str) -> Reply:
    repo = call.repo()
    require_write(call.caller, repo, BRANCH)
    ref = prefix + require_ref_name(name)
    with repo.lock:
        if ref in repo.refs:
            raise Refused(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.resolve(start)
        repo.save()
    return Reply(201)


def delete_ref(call: Call) -> Reply:
    """DELETE /api/KIND/ID/branch/NAME or .../tag/NAME."""
    repo = call.repo()
    require_write(call.caller, repo, BRANCH)
    ref = (TAG if "/tag/" in call.path else BRANCH) + call.params["ref"]
    with repo.lock:
        if ref == BRANCH + "main":
            raise Refused(403, f"The branch main of {repo.id} cannot be deleted")
        if repo.refs.pop(ref, None) is None:
            raise Refused(404, f"Reference does not exist: {ref}", "RevisionNotFound")
        repo.save()
    return Reply()


def super_squash(call: Call) -> Reply:
    """POST /api/KIND/ID/super-squash/BRANCH: one commit with the same tree and no parent."""
    repo = call.repo()
    require_write(call.caller, repo, BRANCH)
    with repo.lock:
        ref = BRANCH + call.params["ref"]
        if ref not in repo.refs:
            raise Refused(404, f"Invalid rev id: {call.params['ref']}", "RevisionNotFound")
        tree = repo.commit(repo.refs[ref]).tree
        message = str(call.json().get("message") or "Super-squash")
        repo.refs[ref] = repo.new_commit(tree, None, message, "", call.caller.name)
        repo.save()
    return Reply()
