"""How a Python function becomes a kernel: the only place that knows numba's options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numba

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` at its first call, keep the machine code on disk, release the GIL.

    fastmath stays off: with it LLVM may reorder sums or divide by multiplying with a reciprocal,
    and then two machines would write different bytes. error_model="numpy" makes x/0 an infinity,
    as in torch, instead of a Python exception.

    The cache of a kernel is renewed when its own file changes. A kernel that calls a helper from
    another file keeps the old helper, so after editing one delete `__pycache__/*.nb*`.
    """
    njit: Any = numba.njit  # typed in some versions of numba, untyped in others
    options = {"nogil": True, "fastmath": False, "error_model": "numpy"}
    try:
        compiled: Callable[P, R] = njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package folder nor the user's cache folder can be written
        compiled = njit(cache=False, **options)(function)
    return compiled
