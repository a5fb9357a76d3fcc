"""The one module that touches transformers beyond its documented interface. Written for 5.17 up to 6.

Private names used, each with what it is needed for:

    core_model_loading.rename_source_key                    stored name -> parameter
    core_model_loading.convert_and_load_state_dict_in_model part of a model from tensors of ours
    conversion_mapping.get_model_conversion_mapping         how stored tensors are merged and renamed
    initialization.meta_device_safe_creation_ops            models of strangers, built without memory
    PreTrainedModel._from_config, ._init_weights, ._get_dtype_plan
    modeling_utils.ALL_ATTENTION_FUNCTIONS                  where keys and values pass by
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mso_hub.errors import CheckpointError, RecipeError

LEAST, BELOW = (5, 17), 6
"""Releases that were tried: from 5.17, before 6."""
WAY_OUT = (
    "or leave calibration out: `--input_scale NUMBER` sets one activation scale everywhere, and most formats need none"
)

_LOCK = threading.RLock()


def library() -> Any:
    """The transformers package; RecipeError when it is missing or of another age."""
    try:
        import transformers
    except ImportError as error:
        raise RecipeError("calibration needs transformers: pip install 'mso-hub[calibrate]'") from error
    numbers = tuple(int(n) for n in re.findall(r"\d+", transformers.__version__)[:2])
    if numbers < LEAST or numbers[0] >= BELOW:
        raise RecipeError(
            f"calibration needs transformers >= {'.'.join(map(str, LEAST))} and < {BELOW}, found "
            f"{transformers.__version__}: pip install 'mso-hub[calibrate]'"
        )
    return transformers


def version() -> str:
    """Of transformers."""
    return str(library().__version__)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a model is made from.

    config  the library's object for config.json
    make    keyword arguments of `_from_config` -> model
    """

    config: Any
    make: Callable[..., nn.Module]


def read_blueprint(folder: Path, said: Mapping[str, Any], name: str, *, trust_remote_code: bool) -> Blueprint:
    """The class of a model and its config, from a folder with config.json; no network is used.

    folder             holds config.json and, for trusted code, the repo's .py files
    said               the same config.json, parsed
    name               what messages call the model
    trust_remote_code  run the repo's code where transformers has no class of its own for this model
    Raises RecipeError for a model that transformers does not know, CheckpointError for a config that it cannot read.
    """
    lib = library()
    kind = said.get("model_type")
    architecture = next(iter(said.get("architectures") or ()), None)
    native = kind in lib.CONFIG_MAPPING and (architecture is None or hasattr(lib, str(architecture)))
    if not native and not said.get("auto_map"):
        raise RecipeError(
            f"{name}: transformers {lib.__version__} has no {architecture or 'model'} of type {kind!r}; install a "
            f"release that has it, {WAY_OUT}"
        )
    if not native and not trust_remote_code:
        raise RecipeError(
            f"{name}: transformers {lib.__version__} has no {architecture or 'model'} of type {kind!r}, the repo "
            f"brings its own code; read it, then allow it with --trust_remote_code, {WAY_OUT}"
        )
    try:
        config = lib.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=not native)
        if native and architecture is not None:
            found = getattr(lib, architecture)
            return Blueprint(config, found._from_config)  # noqa: SLF001
        if native:
            return Blueprint(config, lib.AutoModelForCausalLM.from_config)
        found = _remote_class(config, folder)
        return Blueprint(config, found._from_config)  # noqa: SLF001
    except ImportError as error:
        raise RecipeError(f"{name}: the repo's code needs a package that is missing: {error}; install it") from error
    except Exception as error:
        raise CheckpointError(
            f"{name}: transformers {lib.__version__} cannot use config.json: {type(error).__name__}: {error}"
        ) from error


def _remote_class(config: Any, folder: Path) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    entry = next((v for k, v in config.auto_map.items() if k in ("AutoModelForCausalLM", "AutoModel")), None)
    if entry is None or "--" in str(entry):
        raise ImportError(f"auto_map of config.json names {entry!r}; the class must be in the repo itself")
    return get_class_from_dynamic_module(entry, str(folder), local_files_only=True)


def build(blueprint: Blueprint, dtype: torch.dtype, attention: str | None) -> nn.Module:
    """The model on the meta device: no weights, real buffers where they are not stored.

    attention  `sdpa`, `eager`, ... or None for what transformers would take
    Raises RecipeError for an attention that the model does not have.
    """
    from transformers import initialization

    wanted = {} if attention is None else {"attn_implementation": attention}
    try:
        with torch.device("meta"), initialization.meta_device_safe_creation_ops():
            model = blueprint.make(blueprint.config, dtype=dtype, experts_implementation="eager", **wanted)
    except ValueError as error:
        raise RecipeError(f"{type(blueprint.config).__name__}: the model cannot be built: {error}") from error
    except Exception as error:
        # Whatever the code of a model raises when config.json says something that it does not have.
        raise CheckpointError(
            f"{type(blueprint.config).__name__}: the model cannot be built from its config.json: "
            f"{type(error).__name__}: {error}; correct it, {WAY_OUT}"
        ) from error
    model.eval().requires_grad_(requires_grad=False)
    _restore_buffers(model)
    return model


def _restore_buffers(model: nn.Module) -> None:
    """Buffers that no checkpoint stores (rotary frequencies, embedding scales), which the meta device has lost.

    In transformers 5 the `_init_weights` of the model that owns a module makes them anew. What it does not make is
    found because it is still NaN.
    """
    lost = [
        (module, name)
        for module in model.modules()
        for name, buffer in module._buffers.items()  # noqa: SLF001
        if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set  # noqa: SLF001
    ]
    for module, name in lost:
        old = module._buffers[name]  # noqa: SLF001
        assert old is not None  # noqa: S101 - filtered above
        fresh = torch.empty(old.shape, dtype=old.dtype, device="cpu")
        module._buffers[name] = fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh.zero_()  # noqa: SLF001
    if lost:
        with torch.no_grad():
            _init_below(model, model)
    for module, name in lost:
        made = module._buffers[name]  # noqa: SLF001
        if made is None or (made.is_floating_point() and bool(made.isnan().any())):
            raise RecipeError(
                f"{type(module).__name__}.{name}: is not stored, and the model's code does not compute it when weights "
                f"are loaded; this model cannot be calibrated, {WAY_OUT}"
            )


def _init_below(module: nn.Module, owner: Any) -> None:
    """Children first, as transformers does; parameters are on meta, so that this costs nothing."""
    owner = module if isinstance(module, library().PreTrainedModel) else owner
    for child in module.children():
        _init_below(child, owner)
    owner._init_weights(module)  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor goes.

    targets  parameters or buffers that it becomes or is a part of; several when it is cut
    pattern  which pattern of `merge` it matched, None when it is only renamed
    merge    patterns of all tensors that are put together with it, in the order in which they are concatenated
    steps    class names of the operations, in order
    """

    targets: tuple[str, ...]
    pattern: str | None = None
    merge: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()


class Names:
    """Stored name -> parameter, by the rules that transformers has for a model."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._model = model
        self._known = model.state_dict()

    def place(self, stored: str) -> Place | None:
        """Where it goes, None when the model has no use for it."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(stored, self._renamings, self._converters, prefix, self._known)
        if target not in self._known and stored in self._known:  # transformers tries the plain name too
            target, pattern = rename_source_key(stored, [], [], prefix, self._known)
        if target not in self._known:
            return None
        if pattern is None:
            return Place((target,))
        rule = next(c for c in self._converters if pattern in c.source_patterns)
        first = rule.target_patterns[0]
        targets = tuple(t for t in (target.replace(first, other) for other in rule.target_patterns) if t in self._known)
        steps = tuple(type(step).__name__ for step in rule.operations)
        return Place(targets or (target,), pattern, tuple(rule.source_patterns), steps)


def load_into(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, device: str) -> None:
    """Fill the parameters that these stored tensors make; all parts of a merged one must be among them.

    Raises CheckpointError when a shape does not fit the config or a merge fails.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    how = LoadStateDictConfig(
        weight_mapping=get_model_conversion_mapping(model),
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),  # type: ignore[operator]  # noqa: SLF001
        device_map={"": device},
    )
    with _LOCK, torch.no_grad():
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            info, _ = convert_and_load_state_dict_in_model(model, tensors, how)
        finally:
            if shown:
                logging.enable_progress_bar()
    if info.mismatched_keys:
        name, found, wanted = min(info.mismatched_keys)
        raise CheckpointError(f"{name}: config.json makes it {list(wanted)}, the stored tensors {list(found)}")
    if info.conversion_errors:
        name, why = next(iter(info.conversion_errors.items()))
        raise CheckpointError(f"{name}: the stored tensors cannot be put together: {why}")


def text_config(config: Any) -> Any:
    """The language model's part of a config."""
    return config.get_text_config()


def decoder_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The module whose forward runs the decoder layers, and the name of its list of them."""
    count = text_config(model.config).num_hidden_layers
    if count < 1:
        raise CheckpointError(f"{type(model).__name__}: config.json says {count} decoder layers; correct it")
    found = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    root = found if isinstance(found, nn.Module) else model
    for module in root.modules():  # Llama-4 calls the whole model its decoder
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name
    raise RecipeError(
        f"{type(model).__name__}: has no list of {count} decoder layers; it cannot be calibrated, {WAY_OUT}"
    )


def is_linear(module: nn.Module) -> bool:
    """Does it multiply by a weight: [N, K] (Linear) or [K, N] (GPT-2's Conv1D)?"""
    return isinstance(module, nn.Linear) or is_turned(module)


def is_turned(module: nn.Module) -> bool:
    """Is its weight [K, N]?"""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


Seen = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


@contextmanager
def watch_attention(seen: Seen) -> Iterator[None]:
    """Within the block, `seen(attention module, key, value)` is called with what every attention function gets.

    Keys and values have the shape [rows, KV heads, length, head size], after rotary embedding and norms, before heads
    are repeated; those that it returns are attended to. One block at a time.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions  # noqa: N811

    found = functions.get_interface

    def get_interface(implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        attention = found(implementation, default)

        def watched(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
            key, value = seen(module, key, value)
            return attention(module, query, key, value, *rest, **more)

        return watched

    functions.get_interface = get_interface
    try:
        yield
    finally:
        del functions.get_interface
