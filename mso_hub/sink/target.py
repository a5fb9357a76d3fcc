"""How to write to a repo on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from mso_hub.hub import is_address, parse_address

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


def converted(src: str, what: str) -> tuple[str, str]:
    """Title and description of the commit that holds what was made from `src`.

    src   folder, or hf://org/name@revision
    what  formats, as a Recipe's label has them
    """
    origin = parse_address(src) if is_address(src) else None
    name = origin.repo_id if origin else Path(src).resolve().name
    title = f"{what.upper()} of {name}, made with mso_hub"
    description = (
        f"Converted from {origin or 'a folder'} by mso_hub {version('mso-hub')}, tensor by tensor. README.md says what "
        "changed, with sizes and errors; mso_hub.json has the settings and the SHA-256 of every file."
    )
    return title, description
