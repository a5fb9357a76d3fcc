"""Silence around vLLM: nothing of its log or of its prints reaches the screen, its errors are kept for the report."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

_KEPT = 4


class _Errors(logging.Handler):
    """Keeps the last error messages, and the last line of the traceback that came with each."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
        self.lines = [*self.lines, " ".join(text.split())[:500]][-_KEPT:]


@contextmanager
def quiet() -> Iterator[Callable[[], str]]:
    """Inside, vLLM writes nothing; the function that is handed out returns what it logged as errors and forgets it."""
    logger = logging.getLogger("vllm")
    handlers, propagate, errors = logger.handlers, logger.propagate, _Errors()

    def taken() -> str:
        lines, errors.lines = errors.lines, []
        return "; ".join(lines)

    logger.handlers, logger.propagate = [errors], False
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield taken
    finally:
        logger.handlers, logger.propagate = handlers, propagate
