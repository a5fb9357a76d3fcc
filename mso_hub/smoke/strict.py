"""JSON of the plugin, read strictly: a key that is missing, unknown or of another type is a ValueError naming it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from mso_hub.errors import SmokeError

VERSION = 1
"""Of the job's and of the report's JSON."""
Value = TypeVar("Value")


def load(data: bytes) -> Mapping[str, Any]:
    """A report's JSON object without its version; SmokeError for another version, or for what is no report."""
    try:
        content = json.loads(data)
        version = content.pop("version")
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise SmokeError(f"the report must be a JSON object with a version, is {data[:80]!r}") from error
    if version != VERSION:
        raise SmokeError(
            f"the report has version {version!r}, this mso_hub reads version {VERSION}; another vllm-mso-hub is in "
            "the way: update both, or take it out of that Python"
        )
    return dict(content)


def entries(value: Any, what: str, keys: str) -> Mapping[str, Any]:
    """A value that is an object with exactly these keys."""
    if not isinstance(value, Mapping) or set(value) != set(keys.split()):
        found = sorted(value) if isinstance(value, Mapping) else value
        raise ValueError(f"{what} needs {keys}, got {found!r:.200}")
    return value


def typed(found: Mapping[str, Any], key: str, kind: type[Value]) -> Value:
    """An entry of exactly this type: true is no number, 1 is not true."""
    value = found[key]
    if type(value) is not kind:
        raise ValueError(f"{key} must be of type {kind.__name__}, got {value!r:.80}")
    return value


def text(found: Mapping[str, Any], key: str) -> str:
    """An entry that is text."""
    return typed(found, key, str)


def number(found: Mapping[str, Any], key: str) -> float:
    """An entry that is a number, whole or not."""
    return float(typed(found, key, int)) if type(found[key]) is int else typed(found, key, float)


def whole_numbers(found: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """An entry that is a list of whole numbers."""
    values = typed(found, key, list)
    if any(type(value) is not int for value in values):
        raise ValueError(f"{key} must be whole numbers, got {values!r:.80}")
    return tuple(values)


def texts(found: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """An entry that is a list of texts."""
    values = typed(found, key, list)
    if any(type(value) is not str for value in values):
        raise ValueError(f"{key} must be texts, got {values!r:.80}")
    return tuple(values)
