"""A few greedy tokens and the log-likelihood of a prompt, from vLLM: on a GPU with its kernels, on a CPU with ours.

    job     {"version": 1, "name": .., "folder": .., "prompts": [[token ids] or text, ..], "max_tokens": 16,
             "tp": 1, "emulate": true, "max_model_len": 256}
    report  {"version": 1, "vllm": "0.32.0", "device": "cpu", "emulated": true, "kernels": [..], "seconds": 3.2,
             "outputs": [{"tokens": [..], "prompt_nll": 6.4041, "prompt_logprobs": [..]}, ..]}

`prompt_nll` is the mean negative log-likelihood in nats of all prompt tokens but the first; null for a prompt of one.
`prompt_logprobs` are those tokens' own log-likelihoods. `kernels` lists what multiplied: "scheme: kernel, 8 layers".
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vllm_mso_hub import EMULATE, LOAD_FORMAT, register
from vllm_mso_hub.compat import private, unsupported, version
from vllm_mso_hub.job import VERSION, JobError

KEYS = ("version", "name", "folder", "prompts", "max_tokens", "tp", "emulate", "max_model_len")
_SEQUENCES = 8
_BLOCK = 128  # tokens that vLLM reserves together
_LEAST_CACHE = 8 * 2**20
_EXTENSION = "vllm_mso_hub.generate.Worker"
_HOOK = "vllm.general_plugins"


class Worker:
    """What vLLM adds to its worker class, in every process that holds a part of the model."""

    model_runner: Any

    def mso_kernels(self) -> list[str]:
        """Sorted "scheme: kernel, n layers" of this worker's model."""
        return kernels(self.model_runner.model)


def run(job: Any) -> dict[str, Any]:
    """The report of a job. JobError for a bad job and for what cannot run here; vLLM's own errors pass through.

    A model that loads only in part is an error, as with `--load-format mso_checked`. This process is vLLM's afterwards:
    its environment variables stay set and emulation stays installed.
    """
    check(job)
    start = time.monotonic()
    set_environment(job)
    register()
    platform = private("vllm.platforms", "current_platform")
    with engine(job) as llm:
        return {
            "version": VERSION,
            "vllm": version(),
            "device": "cpu" if platform.is_cpu() else platform.get_device_name(),
            "emulated": bool(job["emulate"] and platform.is_cpu()),
            "kernels": sorted(set(itertools.chain(*llm.collective_rpc("mso_kernels")))),
            "outputs": outputs(llm, job),
            "seconds": round(time.monotonic() - start, 3),
        }


def kernels(model: Any) -> list[str]:
    """Sorted "scheme: kernel, n layers" of a model of vLLM's, one line for each pair that occurs."""
    found: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        scheme = getattr(module, "scheme", None) or method
        kernel = next((name for part in (scheme, method) if (name := _kernel(part))), None)
        replaced = getattr(method, "mso_replaces", None)
        if kernel is not None:
            name, how = (type(scheme).__name__, "") if replaced is None else (replaced, " on dequantized weights")
            found[f"{name}: {kernel}{how}"] += 1
    return [f"{pair}, {count} layer{'s' * (count > 1)}" for pair, count in sorted(found.items())]


def _kernel(part: Any) -> str | None:
    """Name of the kernel or the experts that a scheme or a method holds."""
    experts = getattr(part, "experts_cls", None)
    if experts is not None:
        return str(experts.__name__)
    names = (type(value).__name__ for value in vars(part).values()) if part is not None else ()
    return next((name for name in names if name.endswith("Kernel")), None)


def check(job: Any) -> None:
    """JobError unless a job has the keys and values that this module's docstring names, and vLLM is a tested one."""
    if not isinstance(job, Mapping):
        raise JobError(f"job: expected an object, got {type(job).__name__}")
    missing, unknown = sorted(set(KEYS) - set(job)), sorted(set(map(str, job)) - set(KEYS))
    if missing or unknown or job["version"] != VERSION:
        raise JobError(
            f"job: missing keys {missing}, unknown keys {unknown}, version {job.get('version')!r} (expected {VERSION})"
        )
    prompts = job["prompts"]
    if not isinstance(prompts, list) or not prompts or not all(prompts):
        raise JobError("prompts: expected a list of at least one text or list of token ids, none of them empty")
    texts = sum(isinstance(prompt, str) for prompt in prompts)
    if texts not in (0, len(prompts)):
        raise JobError("prompts: expected texts or lists of token ids, got both")
    for name in ("max_tokens", "tp", "max_model_len"):
        if not isinstance(job[name], int) or job[name] < 1:
            raise JobError(f"{name}: expected a number of at least 1, got {job[name]!r}")
    reason = unsupported(version())
    if reason is not None:
        raise JobError(reason)


def set_environment(job: Mapping[str, Any]) -> None:
    """Before vLLM starts: no network, few words, one process where there is one rank."""
    wanted = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    wanted |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if job["tp"] == 1 else "1"
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB, in place of `cache_bytes`
    os.environ[EMULATE] = "1" if job["emulate"] else "0"
    if job["tp"] > 1:
        _check_installed()


def _check_installed() -> None:
    """JobError unless the processes that vLLM starts will find this package by themselves."""
    found = [hook for hook in entry_points(group=_HOOK) if hook.value == "vllm_mso_hub:register"]
    allowed = os.environ.get("VLLM_PLUGINS")
    if not found:
        raise JobError(
            "tp: the processes of several ranks load installed plugins only, and vllm-mso-hub is not installed in this "
            "environment; install it with `mso-hub setup-vllm`, or `pip install --no-deps` of plugins/vllm-mso-hub"
        )
    if allowed is not None and found[0].name not in allowed.split(","):
        raise JobError(f"tp: VLLM_PLUGINS={allowed!r} leaves out {found[0].name}; add it or unset the variable")


def _cache_dtype(config: Mapping[str, Any]) -> str:
    """What the checkpoint asks for, but on a CPU no FP8 where attention is latent: vLLM has none there."""
    asks = bool((config.get("quantization_config") or {}).get("kv_cache_scheme"))
    latent = asks and "kv_lora_rank" in config and private("vllm.platforms", "current_platform").is_cpu()
    return "bfloat16" if latent else "auto"


def cache_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Room for the keys and values of a few sequences of `tokens` tokens: vLLM would take GiB.

    config  config.json of a text model, or what it has as `text_config`
    """
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 1
    head = config.get("head_dim") or config["hidden_size"] // (config.get("num_attention_heads") or 1)
    blocks = -(-tokens // _BLOCK) * _SEQUENCES
    return max(_LEAST_CACHE, int(2 * 2 * heads * head * config["num_hidden_layers"]) * _BLOCK * blocks)


@contextmanager
def engine(job: Mapping[str, Any], **more: Any) -> Iterator[Any]:
    """vLLM's LLM of a job's folder, with `more` of its arguments; its processes and groups are gone on the way out."""
    gc.freeze()  # vLLM collects garbage as it starts, and what has been imported is none
    config = json.loads((Path(job["folder"]) / "config.json").read_text())
    config = config.get("text_config", config)
    llm = None
    try:
        llm = private("vllm", "LLM")(
            model=job["folder"],
            tensor_parallel_size=job["tp"],
            max_model_len=job["max_model_len"],
            skip_tokenizer_init=not isinstance(job["prompts"][0], str),
            enforce_eager=True,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=cache_bytes(config, job["max_model_len"]),
            kv_cache_dtype=_cache_dtype(config),
            max_num_seqs=_SEQUENCES,
            disable_log_stats=True,
            worker_extension_cls=_EXTENSION,
            load_format=LOAD_FORMAT,
            **more,
        )
        yield llm
    finally:
        with _one_collection():
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
                del llm
            private("vllm.distributed", "destroy_model_parallel")()
            private("vllm.distributed", "destroy_distributed_environment")()


@contextmanager
def _one_collection() -> Iterator[None]:
    """Garbage is collected once, at the end: vLLM does it four times as it shuts down, a million objects each time."""
    collect = gc.collect
    gc.collect = lambda *_, **__: 0
    try:
        yield
    finally:
        gc.collect = collect
        gc.collect()


def outputs(llm: Any, job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens and log-likelihoods of every prompt of a job, as they stand in its report."""
    sampling = private("vllm", "SamplingParams")(
        temperature=0.0, max_tokens=job["max_tokens"], prompt_logprobs=0, ignore_eos=True
    )
    texts = isinstance(job["prompts"][0], str)
    prompts = job["prompts"] if texts else [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    if not texts:
        sampling.detokenize = False
    answers = llm.generate(prompts, sampling, use_tqdm=False)
    return [_output(answer) for answer in answers]


def _output(answer: Any) -> dict[str, Any]:
    """Tokens of one answer and the log-likelihoods of its prompt's tokens from the second on."""
    pairs = zip(answer.prompt_token_ids[1:], answer.prompt_logprobs[1:], strict=True)
    likelihoods = [float(given[token].logprob) for token, given in pairs]
    return {
        "tokens": list(answer.outputs[0].token_ids),
        "prompt_nll": -sum(likelihoods) / len(likelihoods) if likelihoods else None,
        "prompt_logprobs": likelihoods,
    }
