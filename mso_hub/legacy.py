"""The two entry points of the earlier prototype, on top of convert(): old scripts and notebooks go on working."""

from __future__ import annotations

from pathlib import Path

from mso_hub.engine import ThreadEngine
from mso_hub.errors import RecipeError
from mso_hub.events import Listener, ignore
from mso_hub.formats import DENSE
from mso_hub.pipeline import convert
from mso_hub.plan import Plan, Recipe
from mso_hub.plan.reference import exclude_patterns
from mso_hub.sink import open_sink


def check_hardware(num_gpus: int) -> None:
    """Refuse several GPUs: no flag is taken and ignored."""
    if num_gpus != 0:
        raise RecipeError(
            f"num_gpus {num_gpus}: this version computes on processors or on one GPU; leave it out, or say --device "
            "cuda:0; the bytes do not depend on the device"
        )


def check_block_size(block_size: int) -> None:
    """NVFP4 has blocks of 16 by definition; other sizes load nowhere."""
    if block_size != 16:
        raise RecipeError(f"block_size must be 16 for nvfp4, got {block_size}; leave it out")


class StreamingQuantizer:
    """Quantize a folder into another folder.

    input_dir, output_dir  folders, or `hf://org/name`
    format                 key of FORMATS
    mlp_only               True: feed-forward layers and experts; False: every linear layer
    exclude_config         config of a reference model (file or folder) whose exclude list is honoured
    block_size             16
    device, num_gpus       "cpu" or "auto", or "cuda:N" with the same bytes; 0
    resume                 continue an unfinished run; False starts over
    verbose                kept for old callers: progress goes to `on_event`
    calibrate, calib_size, calib_dataset   refused when `calibrate` is set: give `input_scale` instead
    layout, input_scale    as in Recipe
    """

    def __init__(
        self,
        input_dir: str | Path,
        output_dir: str | Path,
        format: str = "nvfp4",  # noqa: A002 - the historic name
        mlp_only: bool = True,
        exclude_config: str | Path | None = None,
        block_size: int = 16,
        device: str = "cpu",
        num_gpus: int = 0,
        resume: bool = True,
        verbose: bool = True,
        calibrate: bool = False,
        calib_size: int = 512,
        calib_dataset: str = "cnn_dailymail",
        *,
        layout: str = "compressed-tensors",
        input_scale: float | None = None,
        on_event: Listener = ignore,
    ) -> None:
        check_block_size(block_size)
        check_hardware(num_gpus)
        if calibrate:
            raise RecipeError(
                f"calibrate with {calib_size} samples of {calib_dataset}: `mso-hub quantize --calibrate` does that; "
                "pass input_scale=1.0, which needs no calibration, or a calibrated checkpoint's scales"
            )
        self.input_dir, self.output_dir = input_dir, output_dir
        self.recipe = Recipe(
            scheme=format,
            layout=layout,
            mode="mlp" if mlp_only else "all-linear",
            imported_ignore=tuple(exclude_patterns(exclude_config)) if exclude_config else (),
            input_scale=input_scale,
        )
        self._engine = ThreadEngine(device=device)
        self._resume, self._on_event = resume, on_event if verbose else ignore

    def run(self) -> Plan:
        """Do it; raises MsoError."""
        sink = open_sink(self.output_dir, fresh=not self._resume)
        return convert(self.input_dir, sink, self.recipe, engine=self._engine, on_event=self._on_event)


def decompress_model_incremental(
    model_path: str | Path,
    output_path: str | Path,
    num_gpus: int = 0,
    fresh: bool = False,
    text_only: bool = False,
    verbose: bool = True,
    *,
    on_event: Listener = ignore,
) -> Plan:
    """Write a packed checkpoint as BF16; continues an unfinished run unless `fresh`.

    num_gpus   0: decoding runs on processors
    text_only  leave vision and audio parts out
    verbose    kept for old callers: progress goes to `on_event`
    """
    check_hardware(num_gpus)
    recipe = Recipe(scheme=DENSE, text_only=text_only)
    sink = open_sink(output_path, fresh=fresh)
    return convert(model_path, sink, recipe, on_event=on_event if verbose else ignore)
