"""`hf://org/name@revision` -> Address. Web addresses of the Hub are understood too."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from mso_hub.errors import RecipeError
from mso_hub.hub.client import mask

PREFIXES = ("hf://", "https://", "http://")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Address:
    """A model repo on the Hub.

    repo_id   `org/name`
    revision  branch, tag, `refs/pr/N` or commit as the user typed it; None for the default branch
    folder    folder inside the repo, "" for all of it
    """

    repo_id: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        """As the user would type it."""
        revision = self.revision or ""
        # Elsewhere a slash ends the revision.
        at = revision if revision.startswith("refs/") else quote(revision, safe="")
        at = at and f"@{at}"
        return f"hf://{self.repo_id}{at}" + (f"/{self.folder}" if self.folder else "")


def is_address(where: str) -> bool:
    """Does this text name a place on the Hub? A folder never starts like that."""
    return where.startswith(PREFIXES)


def looks_like_repo(where: str | Path) -> bool:
    """Could this text be `org/name` without its `hf://`?"""
    return REPO_ID.fullmatch(str(where)) is not None


def parse_address(where: str) -> Address:
    """RecipeError for what is not a model repo: datasets, spaces, buckets, malformed names."""
    from huggingface_hub.errors import HfUriError, HFValidationError
    from huggingface_hub.utils import parse_hf_uri

    try:
        uri = parse_hf_uri(where)
    except (HfUriError, HFValidationError) as error:
        raise RecipeError(
            f"{mask(where)}: must be hf://org/name or hf://org/name@revision, could not be read so: "
            f"{mask(str(error).splitlines()[0])}"
        ) from None
    if uri.type != "model":
        raise RecipeError(f"{where}: must be a model repo, this is a {uri.type}; checkpoints live in model repos")
    return Address(uri.id, uri.revision, uri.path_in_repo.strip("/"))
