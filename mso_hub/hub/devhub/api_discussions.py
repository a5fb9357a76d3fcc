"""Handlers: discussions and pull requests. Pull request N is the ref refs/pr/N."""

from __future__ import annotations

import uuid
from typing import Any

from mso_hub.hub.devhub.access import require_write, require_write_token
from mso_hub.hub.devhub.repos import BRANCH, PULL, Refused, Repo, Tree, now
from mso_hub.hub.devhub.state import Call, Reply, json_reply

_STATUS = {"open": {"open", "draft"}, "closed": {"closed", "merged"}}


def _event(kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"id": uuid.uuid4().hex[:24], "type": kind, "createdAt": now(), "author": {"name": author}, "data": data}


def _comment(author: str, text: str) -> dict[str, Any]:
    latest = {"raw": text, "html": text, "updatedAt": now(), "author": {"name": author}}
    return _event("comment", author, {"edited": False, "hidden": False, "numEdits": 0, "latest": latest})


def open_discussion(repo: Repo, author: str, title: str, text: str, pull: tuple[str, str, str] | None) -> int:
    """Number of a new discussion or, with pull = (target ref, base commit, head commit), pull request.

    The caller holds the lock of the repo and saves it.
    """
    number = len(repo.discussions) + 1
    facts: dict[str, Any] = {
        "num": number, "title": title, "status": "open", "author": {"name": author}, "createdAt": now(),
        "isPullRequest": pull is not None, "events": [_comment(author, text)],
    }  # fmt: skip
    if pull is not None:
        base, parent, head = pull
        facts |= {"changes": {"base": base}, "base_commit": parent}
        repo.refs[f"{PULL}{number}"] = head
    repo.discussions.append(facts)
    return number


def create(call: Call) -> Reply:
    """POST /api/KIND/ID/discussions; a pull request made here is a draft without changes."""
    repo, asked = call.repo(), call.json()
    require_write_token(call.caller)
    title = str(asked.get("title") or "").strip()
    if len(title) < 3:
        raise Refused(400, f"The title of a discussion needs 3 letters, got {title!r}")
    with repo.lock:
        head = repo.refs[BRANCH + "main"]
        pull = (BRANCH + "main", head, head) if asked.get("pullRequest") else None
        number = open_discussion(repo, call.caller.name, title, str(asked.get("description") or ""), pull)
        if pull:
            repo.discussions[number - 1]["status"] = "draft"
        repo.save()
    return json_reply({"num": number, "pullRequest": bool(pull), "url": f"{call.hub}/{repo.page}/discussions/{number}"})


def listing(call: Call) -> Reply:
    """GET /api/KIND/ID/discussions?type=&status=&author=&p=, the newest first."""
    repo = call.repo()
    kind, status, author = (call.query.get(key, ["all"])[-1] for key in ("type", "status", "author"))
    found = [
        _public(repo, facts)
        for facts in reversed(repo.discussions)
        if kind in {"all", "pull_request" if facts["isPullRequest"] else "discussion"}
        and (status == "all" or facts["status"] in _STATUS.get(status, {status}))
        and author in {"all", facts["author"]["name"]}
    ]
    start = int(call.query.get("p", ["0"])[-1]) * call.state.tuning.page_size
    some = found[start : start + call.state.tuning.page_size]
    return json_reply({"discussions": some, "count": len(found), "start": start, "numClosedDiscussions": 0})


def _public(repo: Repo, facts: dict[str, Any]) -> dict[str, Any]:
    keys = ("num", "title", "status", "author", "createdAt", "isPullRequest")
    return {**{key: facts[key] for key in keys}, "repo": {"name": repo.id, "type": repo.kind[:-1]}}


def _discussion(call: Call, repo: Repo) -> dict[str, Any]:
    number = call.params["num"]
    if not number.isdigit() or not 1 <= int(number) <= len(repo.discussions):
        raise Refused(404, f"Discussion {number} not found")
    return repo.discussions[int(number) - 1]


def details(call: Call) -> Reply:
    """GET /api/KIND/ID/discussions/NUM."""
    repo = call.repo()
    facts = _discussion(call, repo)
    shown = {**_public(repo, facts), "events": facts["events"]}
    if facts["isPullRequest"]:
        base, ours, theirs = _trees(repo, facts)
        changed = _changes(base, theirs)
        shown["changes"] = facts["changes"]
        is_open = facts["status"] in _STATUS["open"]
        shown["filesWithConflicts"] = _conflicts(base, ours, theirs) if is_open else []
        shown["diff"] = "".join(f"diff --git a/{path} b/{path}\n" for path in sorted(changed))
    return json_reply(shown)


def _trees(repo: Repo, facts: dict[str, Any]) -> tuple[Tree, Tree, Tree]:
    """(where the pull request began, its target now, its head)."""
    target = repo.refs.get(facts["changes"]["base"], facts["base_commit"])
    shas = (facts["base_commit"], target, repo.refs[f"{PULL}{facts['num']}"])
    base, ours, theirs = (repo.commit(sha).tree for sha in shas)
    return base, ours, theirs


def _changes(before: Tree, after: Tree) -> set[str]:
    return {path for path in {*before, *after} if before.get(path) != after.get(path)}


def _conflicts(base: Tree, ours: Tree, theirs: Tree) -> list[str]:
    """Paths that both sides changed, and not to the same content."""
    both = _changes(base, ours) & _changes(base, theirs)
    return sorted(path for path in both if ours.get(path) != theirs.get(path))


def merge(call: Call) -> Reply:
    """POST /api/KIND/ID/discussions/NUM/merge: its changes become one commit on the target branch."""
    repo = call.repo()
    require_write(call.caller, repo, BRANCH)
    with repo.lock:
        facts = _discussion(call, repo)
        if not facts["isPullRequest"] or facts["status"] != "open":
            raise Refused(400, f"Only an open pull request can be merged, {facts['num']} is {facts['status']}")
        base, ours, theirs = _trees(repo, facts)
        conflicts = _conflicts(base, ours, theirs)
        if conflicts:
            raise Refused(409, f"Conflicts in {', '.join(conflicts)}")
        changed = _changes(base, theirs)
        tree = {path: entry for path, entry in ours.items() if path not in changed}
        tree |= {path: theirs[path] for path in changed if path in theirs}
        target = facts["changes"]["base"]
        title = f"{facts['title']} (#{facts['num']})"
        sha = repo.new_commit(tree, repo.resolve(target), title, "", call.caller.name)
        repo.refs[target] = sha
        facts["changes"]["mergeCommitId"] = sha
        _set_status(call, facts, "merged")
        repo.save()
    return json_reply({"status": "merged", "mergeCommitId": sha})


def _set_status(call: Call, facts: dict[str, Any], status: str) -> dict[str, Any]:
    text = str(call.json().get("comment") or "")
    if text:
        facts["events"].append(_comment(call.caller.name, text))
    facts["status"] = status
    event = _event("status-change", call.caller.name, {"status": status})
    facts["events"].append(event)
    return event


def change_status(call: Call) -> Reply:
    """POST /api/KIND/ID/discussions/NUM/status: open or closed."""
    repo, asked = call.repo(), call.json()
    require_write_token(call.caller)
    with repo.lock:
        facts = _discussion(call, repo)
        if facts["author"]["name"] != call.caller.name:
            require_write(call.caller, repo, BRANCH)
        if asked.get("status") not in {"open", "closed"} or facts["status"] == "merged":
            raise Refused(400, f"A discussion that is {facts['status']} cannot become {asked.get('status')!r}")
        event = _set_status(call, facts, asked["status"])
        repo.save()
    return json_reply({"newStatus": event})


def comment(call: Call) -> Reply:
    """POST /api/KIND/ID/discussions/NUM/comment."""
    repo, text = call.repo(), str(call.json().get("comment") or "")
    require_write_token(call.caller)
    with repo.lock:
        event = _comment(call.caller.name, text)
        _discussion(call, repo)["events"].append(event)
        repo.save()
    return json_reply({"newMessage": event})


def rename(call: Call) -> Reply:
    """POST /api/KIND/ID/discussions/NUM/title."""
    repo, title = call.repo(), str(call.json().get("title") or "")
    require_write_token(call.caller)
    with repo.lock:
        facts = _discussion(call, repo)
        if facts["author"]["name"] != call.caller.name:
            require_write(call.caller, repo, BRANCH)
        event = _event("title-change", call.caller.name, {"from": facts["title"], "to": title})
        facts["title"] = title
        facts["events"].append(event)
        repo.save()
    return json_reply({"newTitle": event})
