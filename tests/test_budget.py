"""The budget of both packages, core and plugin: short files and functions, annotated, documented, nothing swallowed.

Measured on the syntax tree, so no module is imported. Each test lists every offender at once.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (ROOT / "mso_hub", ROOT / "plugins" / "vllm-mso-hub" / "src" / "vllm_mso_hub")
PROGRAMS = ("mso_hub/cli/", "plugins/vllm-mso-hub/src/vllm_mso_hub/__main__.py")
"""What talks to a person, and may print."""
MODULES = {str(path.relative_to(ROOT)): path for package in PACKAGES for path in sorted(package.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}

FILE_LINES = 400
FUNCTION_LINES = 80
FUNCTION_LINES_P90 = 40
RAISES_WITH_VALUE = 0.9

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    """Every function and method, nested ones too, with the place to look."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{name}:{node.lineno} {node.name}", node


def length(function: Function) -> int:
    """Lines from `def` to the end, the docstring included, decorators not."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_packages_are_found(package: Path) -> None:
    assert package / "__init__.py" in MODULES.values()


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES


def test_functions_are_short() -> None:
    long = {place: length(node) for place, node in functions() if length(node) > FUNCTION_LINES}
    assert not long


def test_nine_functions_of_ten_fit_on_a_screen() -> None:
    lengths = [length(node) for _, node in functions()]
    assert statistics.quantiles(lengths, n=10, method="inclusive")[-1] <= FUNCTION_LINES_P90


def test_every_argument_is_annotated() -> None:
    bare = [f"{place}({argument})" for place, node in functions() for argument in unannotated(node)]
    assert not bare


def unannotated(function: Function) -> list[str]:
    """Names of arguments without a type; a leading self or cls needs none."""
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    if positional and positional[0].arg in {"self", "cls"}:
        positional = positional[1:]
    starred = [argument for argument in (spec.vararg, spec.kwarg) if argument]
    return [argument.arg for argument in (*positional, *spec.kwonlyargs, *starred) if not argument.annotation]


def test_everything_public_is_documented() -> None:
    silent = [f"{name}: the module" for name, tree in TREES.items() if not ast.get_docstring(tree)]
    for name, tree in TREES.items():
        silent += [f"{name}:{line} {label}" for label, line in undocumented(tree)]
    assert not silent


def undocumented(scope: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Public classes, methods and functions without a docstring; overloads and setters repeat another one."""
    for node in scope.body:
        if not isinstance(node, (ast.ClassDef, Function)) or node.name.startswith("_"):
            continue
        repeats = isinstance(node, Function) and any(
            ast.unparse(decorator).endswith(("overload", ".setter")) for decorator in node.decorator_list
        )
        if not ast.get_docstring(node) and not repeats:
            yield prefix + node.name, node.lineno
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node, f"{prefix}{node.name}.")


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if not name.startswith(PROGRAMS)
        and isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not printing


def test_no_error_is_swallowed() -> None:
    swallowing = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and catches_everything(node)
        and not raises(node)
        and not (name.startswith("plugins/") and reports(node))
    ]
    assert not swallowing


def catches_everything(handler: ast.ExceptHandler) -> bool:
    """Whether the handler is bare, or names Exception or BaseException, alone or among others."""
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(kind) in {"Exception", "BaseException"} for kind in caught)


def raises(handler: ast.ExceptHandler) -> bool:
    """Whether the handler raises, on some path at least."""
    return any(isinstance(node, ast.Raise) for node in ast.walk(handler))


def reports(handler: ast.ExceptHandler) -> bool:
    """Whether the handler uses what it caught. The plugin asks vLLM, which may raise anything, and reports that."""
    used = {node.id for line in handler.body for node in ast.walk(line) if isinstance(node, ast.Name)}
    return handler.name in used


def test_errors_name_the_value_that_was_wrong() -> None:
    raised = [
        (f"{name}:{node.lineno} {ast.unparse(node)[:80]}", names_a_value(node.exc))
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and node.exc and makes_an_error(node.exc)
    ]
    silent = [place for place, named in raised if not named]
    assert len(silent) <= (1 - RAISES_WITH_VALUE) * len(raised), "\n".join(silent)


def makes_an_error(expression: ast.expr) -> bool:
    """Whether `raise` builds a new error here; `raise error` passes on one that exists."""
    return isinstance(expression, ast.Call) or ast.unparse(expression).rsplit(".", 1)[-1][:1].isupper()


def names_a_value(expression: ast.expr) -> bool:
    """Whether some argument of the error is more than fixed text."""
    if not isinstance(expression, ast.Call):
        return False
    arguments = [*expression.args, *(keyword.value for keyword in expression.keywords)]
    return any(not isinstance(node, ast.Constant) for argument in arguments for node in parts(argument))


def parts(expression: ast.expr) -> list[ast.expr]:
    """The pieces of an f-string, or the expression itself."""
    return expression.values if isinstance(expression, ast.JoinedStr) else [expression]
