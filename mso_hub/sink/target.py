"""How to write to a repo on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

EMPTY: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class HubTarget:
    """What may be asked of an output repo beyond its name.

    private         make a new repo private
    branch          write to this branch, made from the default branch where it is missing
    create_pr       open a pull request (or add to the one that an earlier run opened) instead of writing to a branch
    journal_branch  keep the journal on this branch too while the run goes on, so that another machine can finish it
    title           of the commit or pull request; an earlier pull request is found by it
    description     the rest of the commit message; a new pull request begins with it
    """

    private: bool = False
    branch: str | None = None
    create_pr: bool = False
    journal_branch: str | None = None
    title: str = "Upload with mso_hub"
    description: str = ""
