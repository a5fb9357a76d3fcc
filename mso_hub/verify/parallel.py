"""Which tensor-parallel sizes a packed checkpoint can be cut into, from names, shapes and config.json alone.

An engine cuts a column-parallel weight [N, K] by rows, a row-parallel one by columns, and leaves the others whole.
A part must hold whole groups of the columns that share a scale, and whole 128 x 128 blocks. compressed-tensors'
NVFP4 and MX loaders do not check this: they cut the scales in the wrong place and serve garbage.
Source: vLLM 0.32, layers/linear.py, fused_moe/routed_experts.py, validate_fp8_block_shape in quantization/utils.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mso_hub.formats.decoders.announced import announced
from mso_hub.formats.decoders.fp8 import Fp8Decoder
from mso_hub.formats.decoders.int8 import IntegerDecoder
from mso_hub.formats.decoders.mx import GROUP_SIZE, MxDecoder
from mso_hub.formats.decoders.nvfp4 import Nvfp4Decoder
from mso_hub.formats.decoders.packed_int import PackedInt
from mso_hub.formats.detect import TEXT_CONFIGS, quantization_configs
from mso_hub.formats.weight import Weight
from mso_hub.plan.fusion import FUSED, unit_of
from mso_hub.plan.recipe import DEFAULT_IGNORE
from mso_hub.plan.select import APART, EXPERT
from mso_hub.verify.report import alike

SIZES = (1, 2, 4, 8)
"""What a report speaks of when nobody asked for a size."""
CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
"""Sizes that a message may propose."""
ROW = frozenset(["o_proj", "down_proj", "w2", "out_proj", "wo", "fc2", "dense_4h_to_h"])
COLUMN = frozenset(
    ["q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1",
     "dense_h_to_4h", "q_b_proj", "kv_b_proj"]
)  # fmt: skip
KEYS_AND_VALUES = ("k_proj", "v_proj")
"""Copied to several ranks where there are fewer heads than ranks."""
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "num_routed_experts")
"""What config.json calls the number of experts of a layer."""
REFINED = 32
"""Rows and columns by which vLLM cuts experts of its fp8 method: it repeats the scale of a block for smaller ones."""
LAST_OF_FUSED = frozenset(members[-1] for members in FUSED.values())


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads and experts of the text model; None where config.json does not tell."""

    queries: int | None = None
    keys: int | None = None
    experts: int | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """What an engine does with one packed weight.

    weight  its tensors
    leaf    last component of its name
    expert  one of the numbered experts: whole on its rank under expert parallelism
    cell    rows and columns under one scale; 0 where that many do not matter
    """

    weight: Weight
    leaf: str
    expert: bool
    cell: tuple[int, int]


def setting(config: Mapping[str, Any], *keys: str) -> Any:
    """The first of some settings of the text model that config.json has, at the top or nested; None without."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    for part in TEXT_CONFIGS:
        nested = config.get(part)
        if isinstance(nested, dict) and (found := setting(nested, *keys)) is not None:
            return found
    return None


def whole(value: object) -> int | None:
    """A positive integer, None for everything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def experts_of(config: Mapping[str, Any]) -> int | None:
    """Experts of a layer as config.json has them; None where it does not tell, or in two ways."""
    found = {count for key in EXPERTS if (count := whole(setting(config, key))) is not None}
    return found.pop() if len(found) == 1 else None


def heads_of(config: Mapping[str, Any]) -> Heads:
    """Attention heads as config.json has them; without num_key_value_heads there are as many as for queries."""
    queries, experts = whole(setting(config, "num_attention_heads")), experts_of(config)
    if queries is None or setting(config, "kv_lora_rank") is not None:
        return Heads(queries, None, experts)
    return Heads(queries, whole(setting(config, "num_key_value_heads")) or queries, experts)


def cut_of(weight: Weight, configs: Sequence[Mapping[str, Any]]) -> Cut | None:
    """How an engine cuts a packed weight; None for what is not cut, or nobody knows how.

    configs  as `quantization_configs` finds them: one block of a small weight looks like one scale for all of it
    """
    leaf = weight.module.rpartition(".")[2]
    if leaf not in ROW | COLUMN or any(DEFAULT_IGNORE[reason].search(weight.module) for reason in APART):
        return None
    decoder, expert = weight.decoder, EXPERT.match(weight.module) is not None
    if isinstance(decoder, Nvfp4Decoder):
        cell = (0, 16)
    elif isinstance(decoder, MxDecoder):
        cell = (0, GROUP_SIZE)
    elif isinstance(decoder, PackedInt):
        cell = (0, decoder.group_size or (0 if 32 % decoder.bits else 32 // decoder.bits))
    elif isinstance(decoder, IntegerDecoder):
        cell = (0, decoder.group_size or 0)
    elif isinstance(decoder, Fp8Decoder):
        cell = _fp8_cell(decoder, announced(configs, weight.module).strategy == "block")
        if expert and cell[0] and decoder.layout == "deepseek":
            cell = (min(cell[0], REFINED), min(cell[1], REFINED))
    else:
        return None
    return Cut(weight, leaf, expert, cell)


def _fp8_cell(decoder: Fp8Decoder, says_blocks: bool) -> tuple[int, int]:
    """Rows and columns that must stay together; 0 for scales of whole rows or of the whole weight."""
    if decoder.cell[0] > 1 and (decoder.grid != (1, 1) or says_blocks):
        return decoder.cell
    return (0, decoder.cell[1]) if decoder.cell[0] == 1 and decoder.grid[1] > 1 else (0, 0)


def cuts_of(config: Mapping[str, Any], weights: Iterable[Weight]) -> list[Cut]:
    """How an engine cuts the packed ones among the weights.

    config  config.json
    """
    configs = quantization_configs(config)
    found = (cut_of(weight, configs) for weight in weights if weight.decoder is not None)
    return [cut for cut in found if cut is not None]


def misfit(cut: Cut, tp: int, heads: Heads) -> str:
    """Why a weight cannot be cut into `tp` parts, "" when it can.

    cut    of an expert under expert parallelism: ask for tp 1
    """
    rows, columns = cut.weight.shape
    high, wide = cut.cell
    name, scale = cut.weight.home.name, f"a multiple of the {wide} that share a scale"
    if cut.leaf in ROW:
        if columns % tp:
            return f"{name}: {columns} columns cannot be cut into {tp} equal parts"
        if wide and (tp > 1 or not high) and columns // tp % wide:
            return f"{name}: {columns} columns cut into {tp} are {columns // tp} each, not {scale}"
        return ""
    copies = tp // heads.keys if cut.leaf in KEYS_AND_VALUES and heads.keys and tp > heads.keys else 1
    if rows % (tp // copies):
        return f"{name}: {rows} rows cannot be cut into {tp // copies} equal parts"
    part = rows // (tp // copies)
    fused = tp > 1 or cut.expert or (unit_of(cut.weight.module) is not None and cut.leaf not in LAST_OF_FUSED)
    if high and fused and part % high:
        return f"{name}: {rows} rows cut into {tp // copies} are {part} each, not a multiple of {high}"
    if wide and not high and columns % wide:
        return f"{name}: {columns} columns are not {scale}"
    return ""


def misfits(heads: Heads, cuts: Iterable[Cut], tp: int, *, ep: bool = False) -> list[str]:
    """Sentences about what stands in the way of a tensor-parallel size, one for all weights that differ in numbers.

    ep  numbered experts lie whole on the ranks
    """
    said: dict[str, str] = {}
    if heads.queries and heads.queries % tp:
        said["heads"] = f"config.json: {heads.queries} attention heads cannot be shared out equally"
    elif heads.keys and heads.keys % tp and tp % heads.keys:
        said["heads"] = f"config.json: {heads.keys} key-value heads can neither be shared out nor copied equally"
    if ep and heads.experts and heads.experts < tp:
        said["experts"] = f"config.json: {heads.experts} experts are fewer than ranks"
    for cut in cuts:
        if found := misfit(cut, 1 if ep and cut.expert else tp, heads):
            said[cut.weight.module] = found
    return list(alike(said))


def parallel_problems(
    config: Mapping[str, Any], weights: Iterable[Weight], sizes: Sequence[int], *, ep: bool = False
) -> Iterator[str]:
    """For each size that was asked for and does not fit: every reason, and the sizes that would fit.

    config   config.json
    weights  packed ones are looked at
    """
    heads, cuts = heads_of(config), cuts_of(config, weights)
    for tp in sizes:
        reasons = misfits(heads, cuts, tp, ep=ep)
        if not reasons:
            continue
        fitting = [str(size) for size in CANDIDATES if not misfits(heads, cuts, size, ep=ep)]
        way = f"sizes that fit: {', '.join(fitting)}" if fitting else "no size fits"
        if not ep and not misfits(heads, cuts, tp, ep=True):
            way += f"; with expert parallelism {tp} fits too"
        yield from (f"tensor-parallel size {tp}: {reason}; {way}" for reason in reasons)


def parallel_notes(config: Mapping[str, Any], weights: Iterable[Weight]) -> Iterator[str]:
    """What a report says of 1, 2, 4 and 8 when nobody asked; nothing where no weight is known to be cut."""
    heads, cuts = heads_of(config), cuts_of(config, weights)
    if not cuts:
        return
    found = {tp: misfits(heads, cuts, tp) for tp in SIZES}
    fitting = ", ".join(str(tp) for tp, reasons in found.items() if not reasons) or "none of 1, 2, 4, 8"
    against = next(((tp, reasons[0]) for tp, reasons in found.items() if reasons), None)
    yield f"fits tensor-parallel sizes {fitting}" + ("; not {}: {}".format(*against) if against else "")
