"""What must not be written: over the source, or where more people may read than may read the source."""

from __future__ import annotations

from mso_hub.errors import RecipeError, SinkError
from mso_hub.hub import Address, Origin
from mso_hub.hub.permission import require_branch_name
from mso_hub.hub.target import DEFAULT, PULL_REQUEST, Wish


def require_other(origin: Origin, endpoint: str, wish: Wish) -> None:
    """RecipeError when the target is the source; a pull request to it is none."""
    same_repo = origin.repo_id.lower() == wish.address.repo_id.lower() and origin.endpoint.rstrip("/") == endpoint
    if same_repo and not wish.create_pr and (origin.revision or DEFAULT) == wish.revision:
        raise RecipeError(
            f"{Address(wish.address.repo_id, wish.branch or wish.address.revision)}: input and output must be "
            f"different repos or branches, the input is {Address(origin.repo_id, origin.revision)}; choose another "
            "repo, or write to a branch of its own with --branch"
        )


def require_hidden(origin: Origin | None, wish: Wish, *, private: bool | None) -> None:
    """An error when everybody would see what was to stay private.

    private  is the target repo? None where it is to be created
    """
    what = f"hf://{wish.address.repo_id}"
    if wish.private and private is False:
        if wish.create_pr:
            raise RecipeError(
                f"{what}: is public and so are pull requests to it, --private only makes a new repo private; leave "
                "--private away, or choose another repo without --create_pr"
            )
        raise SinkError(
            f"{what}: is public, and --private only makes a new repo private; make it private in its settings, or "
            "choose another repo"
        )
    if origin is None or not origin.private or private or (private is None and wish.private):
        return
    ways_out = (
        "give --private" if private is None else "choose a private repo, or make this one private in its settings"
    )
    raise RecipeError(f"hf://{origin.repo_id} is private, {what} would be public; {ways_out}")


def require_journal_branch(branch: str, wish: Wish) -> None:
    """RecipeError for a journal branch that holds, or would hold, something else."""
    what = str(wish.address)
    require_branch_name(branch, "--journal_branch", what)
    reason = ""
    if wish.create_pr or PULL_REQUEST.fullmatch(wish.revision):
        reason = "the output goes to a pull request"
    elif branch == wish.revision:
        reason = "the output goes to the same branch"
    elif branch.startswith((f"{wish.revision}/", "refs/")) or wish.revision.startswith(f"{branch}/"):
        reason = f"git takes no such name beside {wish.revision}"
    elif branch == DEFAULT:
        reason = "this is the default branch"
    if reason:
        raise RecipeError(
            f"{what}: --journal_branch {branch} needs a branch of its own in a repo that this account may write to, "
            f"{reason}; leave it away, or choose another one"
        )
