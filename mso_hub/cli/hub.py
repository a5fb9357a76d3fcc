"""Commands about the Hub itself: the model card alone, and a Hub on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from mso_hub.cli.options import given, opt, read_size


@click.command()
@click.argument("checkpoint", callback=given)
@opt(
    "source", metavar="WHERE", help="Where it came from: adds the dequantized error of every weight, licence and tags."
)
@opt("base_model", metavar="REPO", help="The base model, where it cannot be seen from the source.")
@opt("output", metavar="FILE", help="Write the card there (- prints it) instead of into the checkpoint.")
def card(checkpoint: str, source: str | None, base_model: str | None, output: str | None) -> None:
    """Write the model card of a finished checkpoint: into its folder, or as a commit into its repo."""
    from mso_hub.recard import make_card, publish_card

    content = make_card(checkpoint, source=source, base_model=base_model)
    if output == "-":
        click.echo(content.decode(), nl=False)
    elif output:
        Path(output).write_bytes(content)
    else:
        click.echo(publish_card(checkpoint, content))


@click.command()
@click.option("--dir", "folder", required=True, metavar="DIR", callback=given, help="Where its repos are kept.")
@opt("port", type=click.IntRange(0, 65535), default=7860, metavar="PORT", help="0 takes a free one [7860].")
@click.option("--xet/--no_xet", " /--no-xet", default=True, help="Large files in Xet storage (default), or plain LFS.")
@opt("bandwidth", metavar="RATE", help="Limit of the LFS storage each way, a second: 50MB.")
def devhub(folder: str, port: int, xet: bool, bandwidth: str | None) -> None:
    """Serve a Hub on this machine, for demos, offline work and tests."""
    from mso_hub.hub.devhub.server import serve
    from mso_hub.hub.devhub.settings import Settings, Tuning, users_from_json

    rate = float(read_size(bandwidth, "bandwidth")) if bandwidth else 0.0
    tuning = Tuning(bandwidth_down=rate, bandwidth_up=rate)
    settings = Settings(Path(folder), port=port, xet=xet, tuning=tuning)

    def ready(endpoint: str) -> None:
        """Say how to use it."""
        kept = Path(folder) / "users.json"
        users = users_from_json(kept.read_bytes(), str(kept)) if kept.is_file() else settings.users
        token = next(token for user in users for token, role in user.tokens.items() if role == "write")
        off = "" if xet else "export HF_HUB_DISABLE_XET=1\n"
        click.echo(f"{folder}: a Hub on {endpoint}; stop it with Ctrl-C. In another shell:\n")
        click.echo(f"export HF_ENDPOINT={endpoint}\nexport HF_TOKEN={token}\n{off}")

    serve(settings, ready)
