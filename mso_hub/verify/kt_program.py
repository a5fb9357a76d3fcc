"""Runs in a Python that has kt-kernel, not in this package's: `python kt_program.py JOB.json`.

Loads the experts of one layer from a folder with kt-kernel's own classes and computes their answers. One process for
each folder: kt-kernel keeps its loader and its thread pools for the life of a process.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def without_pinning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """kt-kernel asks for pinned memory, which a torch without CUDA refuses."""

    @functools.wraps(make)
    def made(*args: Any, **settings: Any) -> torch.Tensor:
        """As `make`."""
        settings.pop("pin_memory", None)
        return make(*args, **settings)

    return made


def layer_of(job: dict[str, Any], **settings: Any) -> Any:
    """kt-kernel's object for the experts of a layer."""
    torch.empty, torch.zeros = without_pinning(torch.empty), without_pinning(torch.zeros)
    from kt_kernel import KTMoEWrapper

    return KTMoEWrapper(
        layer_idx=job["layer"], num_experts=job["experts"], num_experts_per_tok=job["chosen"],
        hidden_size=job["hidden"], moe_intermediate_size=job["inner"],
        gpu_experts_mask=torch.zeros(job["experts"], dtype=torch.bool), cpuinfer_threads=2,
        threadpool_count=job["parts"], weight_path=job["folder"], chunked_prefill_size=64, method=job["method"],
        numa_nodes=[0] * job["parts"], **settings,
    )  # fmt: skip


def answers(layer: Any, inputs: dict[str, torch.Tensor], chosen: int) -> dict[str, torch.Tensor]:
    """Outputs BF16 [n, hidden] for every x.N BF16 [n, hidden] with ids.N [n, chosen] and shares.N [n, chosen]."""
    found = {}
    for name, x in inputs.items():
        if not name.startswith("x."):
            continue
        number = name.removeprefix("x.")
        count = torch.tensor([len(x)], dtype=torch.int32)
        ids, shares = inputs[f"ids.{number}"].contiguous(), inputs[f"shares.{number}"].contiguous()
        out = torch.zeros_like(x)
        places = (count.data_ptr(), chosen, ids.data_ptr(), shares.data_ptr(), x.data_ptr(), out.data_ptr())
        add_to_output = False
        layer.cpu_infer.submit(layer.moe.forward_task(*places, add_to_output))
        layer.cpu_infer.sync()
        found[f"y.{number}"] = out
    return found


def main() -> None:
    """Answer the job; `outputs` is written last."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    layer = layer_of(job)
    layer.load_weights(torch.arange(job["experts"]))
    inputs = {name: tensor.contiguous() for name, tensor in load_file(job["inputs"]).items()}
    found = answers(layer, inputs, job["chosen"])
    import kt_kernel

    facts = {"version": str(kt_kernel.__version__), "variant": str(kt_kernel.__cpu_variant__)}
    save_file(found, job["outputs"], facts)


if __name__ == "__main__":
    main()
