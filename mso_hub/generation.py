"""A folder -> a few tokens and likelihoods from vLLM, held against the same weights decompressed to BF16.

Both checkpoints run in vLLM one after the other, from the same prompts. Where only weights are quantized the two
compute with the same numbers, so tokens and likelihoods must agree; quantized activations may cost likelihood.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mso_hub.checkpoint import parse_config
from mso_hub.errors import CheckpointError, RecipeError, SmokeError
from mso_hub.formats.decoders.base import shape_reader
from mso_hub.formats.detect import quantization_configs, read_weights
from mso_hub.hub import is_address
from mso_hub.pipeline import convert
from mso_hub.plan import Recipe
from mso_hub.smoke.child import ended_by_signals, run_job
from mso_hub.smoke.python import python_of_vllm
from mso_hub.smoke.strict import VERSION, entries, load, number, text, texts, typed, whole_numbers
from mso_hub.source import Source, open_source, read_checkpoint

MAX_NLL_GAP = 0.2
"""Nats per token that quantized activations may cost, a factor 1.22 in perplexity. On the small trained model of the
tests W4A4 cost 0.023 at most, and a global scale that vLLM takes for two weights at once cost 0.84 at least."""
SAME_NLL = 1e-3
"""Nats per token by which equal numbers may differ: kernels add in another order."""
MAX_TOKENS = 16
CONTEXT = 512
"""Tokens of prompt and answer that there is always room for, where the model has."""
PROMPTS = (
    "The quick brown fox jumps over the lazy dog, and then it sits down in the grass and looks at the river.",
    "In the year 1905 a clerk in a patent office wrote four papers. One of them explained why",
)
"""Asked of a model that has a tokenizer."""
TOKEN_PROMPTS, PROMPT_TOKENS = 2, 32
"""Prompts of pseudo-random tokens, for a model that has none."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")
WEIGHT_ONLY_METHODS = frozenset({"awq", "gptq", "auto-round", "auto_round", "mxfp4", "gpt_oss_mxfp4"})
"""Values of quant_method whose activations stay as they are."""
ROUNDING_KERNELS = ("CPUWNA16", "CPUExpertsInt4")
"""Kernels of vLLM that quantize activations by themselves: on a CPU, INT4 weights meet INT8 activations."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a model made of a prompt.

    tokens          its greedy answer
    nll             mean negative log-likelihood of the prompt's tokens, nats
    """

    tokens: tuple[int, ...]
    nll: float


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt's two outputs: of the checkpoint, and of its BF16 weights."""

    output: Output
    reference: Output

    @property
    def gap(self) -> float:
        """Nats per token that the checkpoint is worse."""
        return self.output.nll - self.reference.nll


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """Does a checkpoint generate what its numbers say?

    device       "cpu", or the name of a GPU
    emulated     may kernels that vLLM lacks on a CPU be replaced? `kernels` are those that ran
    weight_only  are activations left as they are, so that both must agree?
    dense        was nothing quantized, so that the checkpoint is its own reference?
    problems     one sentence each
    """

    name: str
    python: str
    vllm: str
    device: str
    emulated: bool
    kernels: tuple[str, ...]
    seconds: float
    weight_only: bool
    dense: bool
    pairs: tuple[Pair, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Is nothing wrong?"""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a number that is not finite is null there."""
        content = asdict(self)
        for pair in content["pairs"]:
            for output in pair.values():
                output["nll"] = output["nll"] if math.isfinite(output["nll"]) else None
        return {"ok": self.ok, **content}


@dataclass(frozen=True, slots=True)
class _Run:
    """One checkpoint's answer."""

    vllm: str
    device: str
    emulated: bool
    kernels: tuple[str, ...]
    seconds: float
    outputs: tuple[Output, ...]


def compare_generation(
    folder: str | Path,
    *,
    prompts: Sequence[str | Sequence[int]] = (),
    max_tokens: int = MAX_TOKENS,
    max_nll_gap: float = MAX_NLL_GAP,
    tp: int = 1,
    python: str | Path | None = None,
) -> GenerationReport:
    """Generate from a checkpoint and from its own weights in BF16, and compare.

    folder       with real weights
    prompts      texts, for the folder's tokenizer, or lists of token ids; by default two English texts, or random
                 tokens where there is no tokenizer
    max_tokens   tokens of each greedy answer
    max_nll_gap  nats per token that quantized activations may cost; weights alone may cost none
    tp           processes that share the model, on a CPU too
    python       a Python that has vLLM; by default that of MSO_VLLM_PYTHON, else the current one
    Raises RecipeError for what cannot be, SmokeError where vLLM cannot be asked, and MsoError as `convert` does.
    """
    if isinstance(folder, str) and is_address(folder):
        raise RecipeError(
            f"{folder}: generating needs the weights in a folder, this is a repo; `hf download ORG/NAME --local-dir "
            "DIR` fetches it, a proof from headers needs no weights"
        )
    if max_tokens < 1 or tp < 1 or not max_nll_gap >= 0:
        raise RecipeError(
            f"max_tokens and tp must be at least 1 and max_nll_gap at least 0, got {max_tokens}, {tp}, {max_nll_gap}"
        )
    interpreter = python_of_vllm(python)
    with closing(open_source(folder)) as source, _scratch() as place:
        config, dense = _inspect(source)
        _check_heads(config, tp)
        asked = _prompts(source, config, prompts)
        job = {
            "version": VERSION, "prompts": asked, "max_tokens": max_tokens, "tp": tp, "emulate": True,
            "max_model_len": _context(config, asked, max_tokens),
        }  # fmt: skip
        mine = _run(
            interpreter, {**job, "name": source.name, "folder": str(Path(folder).resolve())}, Path(place, "own")
        )
        theirs = mine
        if not dense:
            reference = Path(place, "bf16")
            convert(source, str(reference), Recipe(scheme="bf16"), card=False)
            name = f"{source.name} in BF16"
            theirs = _run(interpreter, {**job, "name": name, "folder": str(reference)}, Path(place, "theirs"))
    pairs = tuple(Pair(a, b) for a, b in zip(mine.outputs, theirs.outputs, strict=True))
    exact = weight_only(config) and not any(name in kernel for kernel in mine.kernels for name in ROUNDING_KERNELS)
    problems = [problem for at, pair in enumerate(pairs, 1) for problem in _problems(at, pair, exact, max_nll_gap)]
    return GenerationReport(
        source.name, str(interpreter), mine.vllm, mine.device, mine.emulated, mine.kernels,
        mine.seconds + (0 if dense else theirs.seconds), exact, dense, pairs, tuple(problems),
    )  # fmt: skip


def weight_only(config: Mapping[str, Any]) -> bool:
    """Does a config.json leave activations and the KV cache as they are? Not where it does not tell."""
    return all(map(_weight_only, quantization_configs(config)))


def _weight_only(said: Mapping[str, Any]) -> bool:
    if said.get("kv_cache_scheme") or said.get("kv_cache_quant_algo"):
        return False
    layers = said.get("quantized_layers")
    named = layers.values() if isinstance(layers, Mapping) else [said]
    algos = [
        str(entry["quant_algo"]).upper() for entry in named if isinstance(entry, Mapping) and "quant_algo" in entry
    ]
    if algos:
        return all(algo.startswith(("W4A16", "W8A16")) for algo in algos)
    groups = said.get("config_groups")
    if isinstance(groups, Mapping):
        return not any(isinstance(group, Mapping) and group.get("input_activations") for group in groups.values())
    return said.get("quant_method") in WEIGHT_ONLY_METHODS


def _inspect(source: Source) -> tuple[Mapping[str, Any], bool]:
    """config.json (with what hf_quant_config.json says where it says nothing), and is every weight dense?"""
    checkpoint = read_checkpoint(source)
    read_shape = shape_reader(source.read)
    found = [
        weight
        for g in checkpoint.groups
        for weight in read_weights(g.tensors, checkpoint.config, read_shape, "BF16")[0]
    ]
    dense = all(weight.decoder is None or not weight.decoder.layout for weight in found)
    config = dict(checkpoint.config)
    if not quantization_configs(config) and "hf_quant_config.json" in checkpoint.files:
        size = checkpoint.files["hf_quant_config.json"]
        said = parse_config(source.read("hf_quant_config.json", 0, size).tobytes(), "hf_quant_config.json")
        if not isinstance(said.get("quantization"), dict):
            raise CheckpointError(
                "hf_quant_config.json: needs an object `quantization`, it has none; restore it, or remove the file "
                "where nothing is quantized"
            )
        config["quantization_config"] = said["quantization"]
    return config, dense


def _part(config: Mapping[str, Any], key: str) -> int | None:
    """A whole number of the text model's config."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(part, Mapping) and type(part.get(key)) is int:
            return int(part[key])
    return None


def _check_heads(config: Mapping[str, Any], tp: int) -> None:
    """RecipeError where the processes cannot share the attention heads."""
    heads = _part(config, "num_attention_heads")
    if heads is not None and heads % tp:
        fit = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise RecipeError(f"tp: {heads} attention heads cannot be shared out among {tp} processes; {fit} would fit")


@contextmanager
def _scratch() -> Iterator[str]:
    """A folder for the weights in BF16, which goes whatever ends the run."""
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="mso-generate-") as place:
        yield place


def _context(config: Mapping[str, Any], prompts: Sequence[Any], max_tokens: int) -> int:
    """Tokens to make room for: a text has at most as many as bytes."""
    longest = max(len(prompt.encode()) if isinstance(prompt, str) else len(prompt) for prompt in prompts)
    wanted = max(CONTEXT, longest + 1 + max_tokens)
    return min(wanted, _part(config, "max_position_embeddings") or wanted)


def _prompts(source: Source, config: Mapping[str, Any], given: Sequence[str | Sequence[int]]) -> list[Any]:
    """Texts for the folder's tokenizer, or tokens below its vocabulary's size."""
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    if given and not texts:
        return [list(prompt) for prompt in given]
    if len(texts) < len(given):
        raise RecipeError(f"prompts: must be texts or lists of token ids, got {len(texts)} texts of {len(given)}")
    files = source.files()
    if any(name in files for name in TOKENIZERS):
        return texts or list(PROMPTS)
    if texts:
        raise RecipeError(f"{source.name}: --prompt {texts[0]!r:.40} needs a tokenizer, there is none; leave it out")
    vocabulary = _part(config, "vocab_size")
    if vocabulary is None or vocabulary < 2:
        raise SmokeError(f"{source.name}: needs a tokenizer or a vocab_size in config.json, has {vocabulary}")
    numbers = range(TOKEN_PROMPTS * PROMPT_TOKENS)
    tokens = [(7919 * n * n + 104_729 * n + 1) % vocabulary for n in numbers]
    return [tokens[at : at + PROMPT_TOKENS] for at in range(0, len(tokens), PROMPT_TOKENS)]


def _run(python: Path, job: Mapping[str, Any], folder: Path) -> _Run:
    """One run of vLLM; SmokeError where its report is not one."""
    folder.mkdir()
    content = load(run_job(python, "generate", job, folder))
    try:
        found = entries(content, "report", "vllm device emulated kernels seconds outputs")
        outputs = tuple(map(_output, typed(found, "outputs", list)))
        run = _Run(
            text(found, "vllm"), text(found, "device"), typed(found, "emulated", bool), texts(found, "kernels"),
            number(found, "seconds"), outputs,
        )  # fmt: skip
    except ValueError as error:
        raise SmokeError(f"the report of {python} cannot be used: {error}") from error
    if len(outputs) != len(job["prompts"]):
        raise SmokeError(f"the report of {python} has {len(outputs)} outputs for {len(job['prompts'])} prompts")
    return run


def _output(value: Any) -> Output:
    found = entries(value, "output", "tokens prompt_nll prompt_logprobs")
    if found["prompt_nll"] is None:
        raise ValueError("a prompt of one token has no likelihood; give a longer --prompt")
    return Output(whole_numbers(found, "tokens"), number(found, "prompt_nll"))


def _problems(at: int, pair: Pair, exact: bool, most: float) -> list[str]:
    """What is wrong with a prompt's outputs."""
    for output, whose in ((pair.output, "the checkpoint"), (pair.reference, "its weights in BF16")):
        if not math.isfinite(output.nll):
            return [f"prompt {at}: the likelihood of {whose} is {output.nll}; a scale or a weight is NaN or Inf"]
    gap = f"{pair.output.nll:.4f} nats per token, its weights in BF16 have {pair.reference.nll:.4f}"
    if not exact:
        return [f"prompt {at}: {gap}; at most {most:g} more are allowed (--max_nll_gap)"] if pair.gap > most else []
    found = []
    if abs(pair.gap) > SAME_NLL:
        found.append(f"prompt {at}: {gap}; only weights are quantized, so they must not differ by more than {SAME_NLL}")
    if pair.output.tokens != pair.reference.tokens:
        found.append(
            f"prompt {at}: answers {list(pair.output.tokens)}, its weights in BF16 {list(pair.reference.tokens)}; only "
            "weights are quantized, so both must be the same"
        )
    return found


def generation_text(report: GenerationReport) -> str:
    """What `mso-hub smoke --generate` prints."""
    how = "kernels (emulated where vLLM has none)" if report.emulated else "vLLM's own kernels"
    kernels = f": {', '.join(report.kernels)}" if report.kernels else ""
    against = "dense, it is its own reference" if report.dense else (
        "only weights are quantized: must equal them in BF16" if report.weight_only
        else "activations are quantized too: may differ from BF16"
    )  # fmt: skip
    lines = [f"{report.name}: vLLM {report.vllm} on {report.device}, {how}{kernels}", against]
    for at, pair in enumerate(report.pairs, 1):
        same = "the same tokens" if pair.output.tokens == pair.reference.tokens else "other tokens"
        lines.append(f"prompt {at}: {pair.output.nll:.4f} nats per token, BF16 {pair.reference.nll:.4f}, {same}")
    return "\n".join([*lines, *(f"PROBLEM {problem}" for problem in report.problems)])
