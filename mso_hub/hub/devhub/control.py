"""Handlers below /_devhub/: faults, limits, users, the log. They are neither logged nor hit by faults."""

from __future__ import annotations

import json
from dataclasses import asdict

from mso_hub.hub.devhub.faults import fault_from_json
from mso_hub.hub.devhub.repos import Refused
from mso_hub.hub.devhub.settings import User
from mso_hub.hub.devhub.state import Call, Reply, json_reply


def about(call: Call) -> Reply:
    """GET /_devhub/: the two origins, the mode and the default user's tokens."""
    user = call.state.accounts.users[0]
    facts = {"hub": call.hub, "storage": call.storage, "xet": call.state.xet, "tokens": dict(user.tokens)}
    return json_reply({**facts, "user": user.name, "settings": asdict(call.state.tuning)})


def add_faults(call: Call) -> Reply:
    """POST /_devhub/faults: one fault or a list of them."""
    asked = json.loads(call.body)  # a ValueError becomes a 400
    faults = [fault_from_json(value) for value in (asked if isinstance(asked, list) else [asked])]
    call.state.faults.add(faults)
    return json_reply([asdict(fault) for fault in faults])


def clear_faults(call: Call) -> Reply:
    """DELETE /_devhub/faults."""
    call.state.faults.clear()
    return json_reply([])


def change_settings(call: Call) -> Reply:
    """POST /_devhub/settings: some values of Tuning; answers with all of them."""
    call.state.tune(call.state.tuning.changed(call.json()))
    return json_reply(asdict(call.state.tuning))


def read_log(call: Call) -> Reply:
    """GET /_devhub/log?clear=1."""
    return json_reply(call.state.log.taken(clear=call.flag("clear")))


def add_user(call: Call) -> Reply:
    """POST /_devhub/users {"name", "orgs"}: answers with the tokens by role."""
    asked = call.json()
    user = User.named(str(asked.get("name")), tuple(asked.get("orgs", ())))
    call.state.accounts.add(user)
    return json_reply({role: token for token, role in user.tokens.items()})


def change_repo(call: Call) -> Reply:
    """POST /_devhub/repos/KIND/OWNER/NAME {"disabled"}: what only the Hub's own staff can do."""
    repo = call.state.store.find(call.params["kind"], f"{call.params['owner']}/{call.params['name']}")
    if repo is None:
        raise Refused(404, f"Repository not found: {call.params['owner']}/{call.params['name']}", "RepoNotFound")
    with repo.lock:
        repo.facts["disabled"] = bool(call.json().get("disabled"))
        repo.save()
    return json_reply({"disabled": repo.facts["disabled"]})
