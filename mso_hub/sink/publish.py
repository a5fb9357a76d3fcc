"""All files of a run -> one commit, on top of whatever harmless thing somebody committed meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mso_hub.errors import HubError
from mso_hub.hub.client import Client
from mso_hub.hub.commit import Change, Commit, MovedError, described, send_commit, verify_commit
from mso_hub.hub.target import Target
from mso_hub.sink.survey import Survey, collides

REBASES = 5
"""Times that the commit moves on to a new head before it gives up."""


def publish(client: Client, target: Target, change: Change, survey: Survey, look_again: Callable[[], Survey]) -> Commit:
    """Make the commit and check it; HubError when the target changed in a way that this run must not overwrite.

    survey      the target as it was when the run began
    look_again  the target as it is now
    """
    for left in reversed(range(REBASES)):
        missing = {path: put for path, put in change.puts.items() if not put.is_in(survey.files.get(path))}
        gone = [path for path in change.deletes if path in survey.files]
        if not missing and not gone:
            commit = described(client, target, survey.commit)
            break
        try:
            commit = send_commit(client, target, replace(change, parent=survey.commit, puts=missing, deletes=gone))
            break
        except MovedError:
            if not left:
                raise
            new = look_again()
            _require_harmless(survey, new, change)
            survey = new
    verify_commit(client, target, change, commit)
    return commit


def _require_harmless(old: Survey, new: Survey, change: Change) -> None:
    """HubError when what changed is ours to write, or makes another checkpoint of the target."""
    if all(put.is_in(new.files.get(path)) for path, put in change.puts.items()):
        return  # another run of the same job was faster
    ours = {*change.puts, *change.deletes}
    harm = [path for path in old.changes(new) if path in ours or collides(path)]
    if harm:
        raise HubError(
            f"{new.name}: somebody committed {harm[0]} there while this run went on (commit {new.commit[:12]}, it was "
            f"{old.commit[:12]}); nothing was overwritten and what is uploaded is kept; remove it there and run the "
            f"same command again, or {'choose another repo' if new.proposal else 'choose another repo or --branch'}"
        )
