"""The formats that benchmarks go through, each under every scale search that it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mso_hub.formats import FORMATS, Format, Scheme, build

SCHEMES: dict[str, Scheme] = {
    "nvfp4": Scheme("nvfp4"),
    "mxfp4": Scheme("mxfp4"),
    "w4a16, groups of 32": Scheme("w4a16", group_size=32),
    "w4a16, groups of 128": Scheme("w4a16", group_size=128),
    "w4a16, groups of 128, asymmetric": Scheme("w4a16", group_size=128, symmetric=False),
    "w4a16, one scale a row": Scheme("w4a16", group_size=0),
    "mxfp8": Scheme("mxfp8"),
    "fp8": Scheme("fp8"),
    "fp8_dynamic": Scheme("fp8_dynamic"),
    "fp8_block": Scheme("fp8_block"),
    "w8a16, groups of 128": Scheme("w8a16", group_size=128),
    "w8a16, groups of 128, asymmetric": Scheme("w8a16", group_size=128, symmetric=False),
    "int8": Scheme("int8"),
}


def encoder(scheme: Scheme, search: str | None = None) -> Format:
    """The compressed-tensors encoder of a scheme under one search, its default for None."""
    form = build(replace(scheme, search=search), "compressed-tensors")
    assert form is not None, scheme
    return form


def variants() -> Iterator[tuple[str, str, Format]]:
    """(label, search, encoder) for every scheme and each of its searches, the plain one first."""
    for label, scheme in SCHEMES.items():
        for search in sorted(FORMATS[scheme.format].choices.searches, key=lambda name: name != "absmax"):
            yield label, search, encoder(scheme, search)
