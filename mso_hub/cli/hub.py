"""Commands about the Hub itself: the model card alone, and a Hub on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mso_hub.cli.options import given, opt, read_size
from mso_hub.errors import RecipeError

if TYPE_CHECKING:
    from mso_hub.hub.devhub.settings import Settings


@click.command()
@click.argument("checkpoint", callback=given)
@opt(
    "source",
    metavar="WHERE",
    help="Where it came from, for errors, licence and tags; by default the repo that mso_hub.json names.",
)
@opt("base_model", metavar="REPO", help="The base model, where it cannot be seen from the source.")
@opt("evaluation", metavar="FILE", help="JSON of `mso-hub evaluate` of this checkpoint, to be shown in the card.")
@opt("output", metavar="FILE", help="Write the card there (- prints it) instead of into the checkpoint.")
@opt("fresh", is_flag=True, help="Replace a README.md that this tool did not write, or that was edited since.")
def card(
    checkpoint: str, source: str | None, base_model: str | None, evaluation: str | None, output: str | None, fresh: bool
) -> None:  # fmt: skip
    """Write the model card of a finished checkpoint: into its folder, or as a commit into its repo."""
    from mso_hub.progress import waiting
    from mso_hub.recard import make_card, publish_card, require_place

    if output is None:
        require_place(checkpoint, fresh=fresh)
    elif output != "-" and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise RecipeError(f"--output {output}: needs the name of a file in a folder that exists")
    made = make_card(checkpoint, source=source, base_model=base_model, evaluation=evaluation, on_event=waiting)
    if output is None:
        click.echo(publish_card(made, fresh=fresh))
    elif output == "-":
        click.echo(made.content, nl=False)
    else:
        Path(output).write_bytes(made.content)
        click.echo(output)


@click.command()
@click.option("--dir", "folder", required=True, metavar="DIR", callback=given, help="Where its repos are kept.")
@opt("port", type=click.IntRange(0, 65535), default=7860, metavar="PORT", help="0 takes a free one [7860].")
@click.option("--xet/--no_xet", " /--no-xet", default=True, help="Large files in Xet storage (default), or plain LFS.")
@opt("bandwidth", metavar="RATE", help="Limit of the LFS storage each way, a second: 50MB.")
def devhub(folder: str, port: int, xet: bool, bandwidth: str | None) -> None:
    """Serve a Hub on this machine, for demos, offline work and tests. Ctrl-C stops it; what it holds stays in DIR."""
    from mso_hub.hub.devhub.server import serve
    from mso_hub.hub.devhub.settings import Settings, Tuning

    rate = float(read_size(bandwidth, "bandwidth")) if bandwidth else 0.0
    tuning = Tuning(bandwidth_down=rate, bandwidth_up=rate)
    settings = Settings(Path(folder), port=port, xet=xet, tuning=tuning)
    try:
        serve(settings, lambda endpoint: click.echo(how_to_use(settings, endpoint)))
    except KeyboardInterrupt:
        return  # the way to stop it, and nothing was cut short: the exit code is 0


def how_to_use(settings: Settings, endpoint: str) -> str:
    """What to type in another shell so that every program of the Hub's works with this one.

    Raises RecipeError when the folder's users.json has no account that may write.
    """
    from mso_hub.hub.devhub.settings import users_from_json

    kept = settings.folder / "users.json"
    users = users_from_json(kept.read_bytes(), str(kept)) if kept.is_file() else settings.users
    tokens = [token for user in users for token, role in user.tokens.items() if role == "write"]
    if not tokens:
        raise RecipeError(f"{kept}: needs an account with a token that may write, found none among {len(users)}")
    lines = [
        f"{settings.folder}: a Hub on {endpoint}; stop it with Ctrl-C. In another shell:\n",
        f"export HF_ENDPOINT={endpoint}",
        f"export HF_TOKEN={shlex.quote(tokens[0])}",
    ]
    return "\n".join(lines if settings.xet else [*lines, "export HF_HUB_DISABLE_XET=1"])
