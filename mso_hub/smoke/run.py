"""Headers -> vLLM's own create_weights and load_weights for every rank -> what would not load."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mso_hub.errors import RecipeError
from mso_hub.plan import Plan
from mso_hub.smoke.child import run_job
from mso_hub.smoke.headers import Headers, headers_of_plan, headers_of_source
from mso_hub.smoke.python import python_of_vllm
from mso_hub.smoke.report import ShapeReport, read_shape_report
from mso_hub.smoke.strict import VERSION
from mso_hub.source import Source, open_source

SIZES = (1, 2, 4, 8)
"""Tensor-parallel sizes that are proven by default."""


def prove(
    what: str | Path | Source | Plan,
    *,
    tp: Sequence[int] = SIZES,
    ep: bool = False,
    pp: int = 1,
    layers: int = 0,
    python: str | Path | None = None,
    trust_remote_code: bool = False,
    source: Source | None = None,
) -> ShapeReport:
    """Prove from headers that vLLM loads a checkpoint, every tensor on every rank, without a GPU and without weights.

    what    a folder, `hf://org/name@revision`, an object that speaks Source, or a Plan: what it will write
    tp      tensor-parallel sizes; `pp` pipeline stages and `ep` (experts whole on one rank each) go with all of them
    layers  decoder layers to check, the first ones; 0 for all
    python  a Python that has vLLM; by default that of MSO_VLLM_PYTHON, else the current one
    source  of a Plan, where it is open already
    Runs vLLM's own config resolution, create_weights and load_weights in a process of that Python. What they refuse,
    and what they accept without using it, is in the report. Raises RecipeError for sizes that cannot be,
    CheckpointError or HubError for a source that cannot be read, SmokeError where vLLM cannot be asked.
    """
    _check_sizes(tp, pp, layers)
    interpreter = python_of_vllm(python)
    headers = _headers(what, source, code=trust_remote_code)
    _check_depth(headers, pp, layers)
    job: dict[str, Any] = {
        "version": VERSION,
        "name": headers.name,
        "tensors": [[info.name, info.dtype, list(info.shape), info.file] for info in headers.tensors],
        "tp": list(tp), "pp": pp, "ep": ep, "layers": layers, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="mso-smoke-") as folder:
        model = Path(folder, "model")
        model.mkdir()
        headers.write(model)
        data = run_job(interpreter, "shapes", {**job, "folder": str(model)}, Path(folder))
    return read_shape_report(data, headers.name, len(headers.tensors), str(interpreter), tp)


def _headers(what: str | Path | Source | Plan, source: Source | None, *, code: bool) -> Headers:
    plan = what if isinstance(what, Plan) else None
    where = what if not isinstance(what, Plan) else source or what.source
    opened = open_source(where) if isinstance(where, str | Path) else where
    try:
        if plan is not None:
            return headers_of_plan(plan, opened, code=code)
        return headers_of_source(opened, code=code)
    finally:
        if opened is not where:
            opened.close()


def _check_sizes(tp: Sequence[int], pp: int, layers: int) -> None:
    """RecipeError for sizes that no model can have."""
    if not tp or any(type(size) is not int or size < 1 for size in tp) or len(set(tp)) != len(tp):
        raise RecipeError(f"tp must be different whole numbers > 0, got {list(tp)}; 1,2,4,8 are usual")
    if pp < 1:
        raise RecipeError(f"pp must be a number of pipeline stages > 0, got {pp}; 1 means none")
    if layers < 0:
        raise RecipeError(f"layers must be a number of decoder layers, 0 for all, got {layers}")


def _check_depth(headers: Headers, pp: int, layers: int) -> None:
    """RecipeError for more layers or stages than a model has; where its config does not tell, vLLM will."""
    count = _depth(headers.config)
    if count is not None and layers > count:
        raise RecipeError(f"layers must be at most {count}, the decoder layers of {headers.name}, got {layers}")
    most = layers or count
    if most is not None and pp > most:
        raise RecipeError(f"pp must be at most {most}, a layer for each stage, got {pp}; give fewer stages")


def _depth(config: Mapping[str, Any]) -> int | None:
    """Decoder layers, of the text model where there are several."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(part, Mapping) and type(part.get("num_hidden_layers")) is int:
            return int(part["num_hidden_layers"])
    return None
