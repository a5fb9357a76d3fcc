"""Prove from headers alone that every rank loads every tensor as it is stored.

prove(job) -> Report

refusals   what cannot be checked at all, said in one sentence
stream     headers -> meta tensors; a checkpoint cut to its first layers
rank       one rank's create_weights and load_weights, watched
names      parameter -> the checkpoint tensors it is made of
findings   what the ranks did -> problems
"""

from __future__ import annotations

import importlib.metadata
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_mso_hub.compat import unsupported, version
from vllm_mso_hub.compat.kernels import no_kernels
from vllm_mso_hub.compat.log import quiet
from vllm_mso_hub.compat.model import engine_config
from vllm_mso_hub.job import Header, Job, JobError, Problem, Refusal, Report, World
from vllm_mso_hub.shapes.findings import Facts, problems_of
from vllm_mso_hub.shapes.rank import Rank, explain, load_rank
from vllm_mso_hub.shapes.refusals import config_problem, left_alone, refusal
from vllm_mso_hub.shapes.stream import cut_folder, first_layers, known_dtypes
from vllm_mso_hub.track import Reads


def prove(job: Job) -> Report:
    """Load the headers of a job into every rank of every world, with vLLM's own code and without weights.

    What keeps vLLM from coming up at all is `Report.refused`; a crash inside it in one world is a problem of that
    world. RuntimeError when this process is in a torch.distributed world already.
    """
    started = time.monotonic()
    if torch.distributed.is_initialized():
        raise RuntimeError("this process is in a torch.distributed world already; run the shape proof in a fresh one")
    refused = unsupported(version())
    if refused is not None:
        return _report(started, "", (), Refusal("version", refused))
    with tempfile.TemporaryDirectory() as scratch, quiet() as log, no_kernels():
        try:
            known_dtypes(job.tensors)
            folder, headers = _cut(job, Path(scratch))
        except JobError as error:
            return _report(started, "", (), Refusal("config", f"{job.name}: {error}"))
        try:
            base = _config(job, folder, 1, 1)
        except Exception as error:  # noqa: BLE001 - whatever stops the configuration stops the whole job
            return _report(started, "", (), refusal(job, explain(error), log()))
        worlds = tuple(_world(job, folder, headers, tp, base, log) for tp in job.tp)
        return _report(started, str(base.model_config.architecture), worlds, None)


def _cut(job: Job, scratch: Path) -> tuple[str, tuple[Header, ...]]:
    """Folder and headers of the job's first layers; JobError when there is no config.json or there are fewer layers."""
    if not (Path(job.folder) / "config.json").is_file():
        raise JobError(f"{job.folder} holds no config.json, which says what vLLM should build")
    if not job.layers:
        return job.folder, job.tensors
    return cut_folder(job.folder, job.layers, scratch), first_layers(job.tensors, job.layers)


def _config(job: Job, folder: str, tp: int, pp: int) -> Any:
    return engine_config(folder, tp=tp, pp=pp, ep=job.ep, trust_remote_code=job.trust_remote_code)


def _world(job: Job, folder: str, headers: tuple[Header, ...], tp: int, base: Any, log: Callable[[], str]) -> World:
    started = time.monotonic()
    ranks: list[Rank] = []
    reads: Reads = {}
    problems: list[Problem] = []
    try:
        ranks.extend(load_rank(_config(job, folder, tp, job.pp), rank, headers, reads) for rank in range(tp * job.pp))
    except Exception as error:  # noqa: BLE001 - vLLM refuses this world; the others are still to be checked
        problems.append(config_problem(base, tp, tuple(range(tp * job.pp)), explain(error), log()))
    else:
        by_name = {header.name: header for header in headers}
        experts = int(base.model_config.get_num_experts())
        facts = Facts(tp, ranks, by_name, experts, reads, left_alone(base))
        problems = problems_of(facts)
    seconds = round(time.monotonic() - started, 3)
    return World(tp, job.pp, job.ep, seconds, tuple(rank.nbytes for rank in ranks), tuple(problems))


def _report(started: float, architecture: str, worlds: tuple[World, ...], refused: Refusal | None) -> Report:
    unit = 1 if sys.platform == "darwin" else 1024
    return Report(
        vllm=version(),
        torch=importlib.metadata.version("torch"),
        architecture=architecture,
        seconds=round(time.monotonic() - started, 3),
        peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        worlds=worlds,
        refused=refused,
    )
