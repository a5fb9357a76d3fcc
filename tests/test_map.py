"""The maps of mso_hub and of its plugin are true: modules, ranks, directions, and who may load what is heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mso_hub
from tests.helpers import tiny_moe

REPOSITORY = Path(__file__).resolve().parents[1]
HEAVY = {
    "torch",
    "numba",
    "llvmlite",
    "safetensors",
    "huggingface_hub",
    "transformers",
    "compressed_tensors",
    "modelopt",
}
ELSEWHERE = "mso_hub.verify.kt_program"
"""Runs in another Python, and is never imported here."""
LAZY = {
    "datasets",
    "huggingface_hub",
    "hf_xet",
    "vllm",
    "ipywidgets",
    "transformers",
    "compressed_tensors",
    "modelopt",
    "ray",
}


class House:
    """A package whose docstring maps its rooms; read as text, so that it need not be importable here."""

    def __init__(self, root: Path, *, entry: bool = False) -> None:
        """Parse every file below `root`; `entry`: the package itself has names of its own, which its rooms may use."""
        self.name = root.name
        self.entry = entry
        files = sorted(root.rglob("*.py"))
        self.modules = {dotted(path, root): ast.parse(path.read_text(encoding="utf-8")) for path in files}
        self.map = ast.get_docstring(self.modules[self.name]) or ""
        self.rank = {name: int(rank) for rank, name in re.findall(r"^ *(\d+) +(\w+) ", self.map, re.MULTILINE)}

    def may_import(self, here: str, there: str) -> bool:
        """The rule of the map; the core itself may be imported by nobody, its names live elsewhere."""
        if there == "":
            return self.entry
        return here == there or self.rank.get(there, 99) < self.rank.get(here, 99)

    def targets(self, statement: ast.Import | ast.ImportFrom) -> list[str]:
        """Modules that an import statement loads: `from mso_hub.plan import select` -> mso_hub.plan.select."""
        if isinstance(statement, ast.Import):
            return [alias.name for alias in statement.names]
        base = statement.module or ""
        below = [f"{base}.{alias.name}" for alias in statement.names]
        return [name if name in self.modules else base for name in below]

    def all_imports(self, module: str) -> set[str]:
        """Everything that a module imports anywhere, inside functions and under TYPE_CHECKING too."""
        nodes = [n for n in ast.walk(self.modules[module]) if isinstance(n, ast.Import | ast.ImportFrom)]
        return {name for node in nodes for name in self.targets(node)}

    def load_imports(self, module: str, *, typing_too: bool = False) -> set[str]:
        """What loading a module imports."""
        found = statements(self.modules[module], typing_too=typing_too)
        return {name for node in found for name in self.targets(node)}


def dotted(path: Path, root: Path) -> str:
    """mso_hub/plan/select.py -> mso_hub.plan.select."""
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """mso_hub.plan.select -> plan; the package itself is the empty string."""
    return module.split(".")[1] if "." in module else ""


def statements(node: ast.AST, *, typing_too: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when a module is loaded, those under `if TYPE_CHECKING:` on request."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            if typing_too:
                yield from statements(child, typing_too=True)
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from statements(child, typing_too=typing_too)


CORE = House(Path(mso_hub.__file__).resolve().parent)
PLUGIN = House(REPOSITORY / "plugins/vllm-mso-hub/src/vllm_mso_hub", entry=True)
both = pytest.mark.parametrize("house", [CORE, PLUGIN], ids=lambda house: house.name)


@both
def test_the_table_lists_every_module_and_nothing_else(house: House) -> None:
    """A new file or room at the top level needs a line in the map, and a line needs its file."""
    assert set(house.rank) == {room(module) for module in house.modules} - {""}


@both
def test_there_are_no_relative_imports(house: House) -> None:
    """One way to write an import, so that these tests see them all."""
    relative = [
        module
        for module, tree in house.modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


@both
def test_imports_only_point_down(house: House) -> None:
    """A module may import lower ranks and its own room; inside functions and for type checkers too."""
    wrong = [
        f"{module} imports {target}"
        for module in house.modules
        for target in house.all_imports(module)
        if target.split(".")[0] == house.name and room(module) and not house.may_import(room(module), room(target))
    ]
    assert not wrong


@both
def test_there_are_no_cycles(house: House) -> None:
    """No module needs itself while it is loaded."""
    modules = house.modules
    graph = {m: {t for t in house.load_imports(m) if t in modules} - {m} for m in modules}
    for module, loads in graph.items():  # loading a.b.c loads the packages a.b and a too, unless they came first
        loads |= {p for p in modules for t in loads if t.startswith(f"{p}.") and not module.startswith(p)}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")
    assert set(order) == set(modules)


def test_what_only_some_need_is_never_imported_on_load() -> None:
    """The Hub client, vLLM, widgets and the reference libraries are imported in the function that needs them."""
    found = {
        f"{module}: {name}"
        for module in CORE.modules
        for name in CORE.load_imports(module, typing_too=True)
        if name.split(".")[0] in LAZY
    }
    assert not found


def test_vllm_can_load_the_plugin_in_every_process() -> None:
    """Importing the package, and what it imports in turn, loads neither torch nor vLLM nor anything else heavy."""
    reached, waiting = set[str](), [PLUGIN.name]
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting += [t for t in PLUGIN.load_imports(module) if t in PLUGIN.modules and t not in reached]
    assert not {name for m in reached for name in PLUGIN.load_imports(m) if name.split(".")[0] in LAZY | HEAVY}


def test_neither_package_imports_the_other() -> None:
    """The core runs without vLLM, the plugin in an environment without the core."""
    assert not [m for m in PLUGIN.modules for t in PLUGIN.all_imports(m) if t.split(".")[0] == CORE.name]
    assert not [m for m in CORE.modules for t in CORE.all_imports(m) if t.split(".")[0] in {PLUGIN.name, "vllm"}]


def test_arithmetic_libraries_live_in_one_room() -> None:
    """torch and numba are imported below formats/numerics and calibrate, nowhere else, not even inside a function."""
    found = {
        f"{module}: {name}"
        for module in CORE.modules
        for name in CORE.all_imports(module)
        if name.split(".")[0] in {"torch", "numba"}
        and not module.startswith(("mso_hub.formats.numerics", "mso_hub.calibrate", ELSEWHERE))
    }
    assert not found


PROGRAM = """
import sys
from mso_hub.cli import main
try:
    main(sys.argv[1:])
finally:
    sys.stderr.write("LOADED " + " ".join(sorted({name.split(".")[0] for name in sys.modules})))
"""


def loaded_by(*argv: str) -> set[str]:
    """Top-level modules that one command of the CLI loads; fails when the command does."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, *argv], capture_output=True, text=True, check=True)
    return set(run.stderr.rpartition("LOADED ")[2].split())


@pytest.mark.parametrize("command", ["--help", "plan --help", "inspect", "plan", "plan --json --all_linear"])
def test_commands_that_read_headers_load_nothing_heavy(command: str, tmp_path: Path) -> None:
    """`--help`, `inspect` and `plan` answer without torch, numba or any other heavy library."""
    words = command.split()
    folder = [] if "--help" in words else [str(tiny_moe(tmp_path / "moe"))]
    loaded = loaded_by(*words, *folder)
    assert "click" in loaded
    assert not loaded & HEAVY
    if "--help" in words:
        assert "numpy" not in loaded


def test_public_names_are_there() -> None:
    """Everything in `__all__` can be imported, and nothing else pretends to."""
    assert all(getattr(mso_hub, name) is not None for name in mso_hub.__all__)
    assert sorted(mso_hub.__all__) == mso_hub.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mso_hub.nothing  # noqa: B018 - the access is the test
