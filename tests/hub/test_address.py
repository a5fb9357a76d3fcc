"""Addresses of repos, as people type and paste them."""

from __future__ import annotations

import pytest

from mso_hub.errors import RecipeError
from mso_hub.hub import Address, is_address, looks_like_repo, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://org/name", Address("org/name")),
        ("hf://org/name/", Address("org/name")),
        ("hf://models/org/name", Address("org/name")),
        ("hf://org/name@v1.0", Address("org/name", "v1.0")),
        ("hf://org/name@refs/pr/3", Address("org/name", "refs/pr/3")),
        ("hf://org/name@refs/pr/3/sub", Address("org/name", "refs/pr/3", "sub")),
        ("hf://org/name@feature%2Fx", Address("org/name", "feature/x")),
        ("hf://org/name@main/a/b/", Address("org/name", "main", "a/b")),
        ("hf://org/name/a", Address("org/name", None, "a")),
        ("https://huggingface.co/org/name", Address("org/name")),
        ("https://huggingface.co/org/name/tree/main/a", Address("org/name", "main", "a")),
    ],
)
def test_reads_addresses(text: str, address: Address) -> None:
    assert is_address(text)
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "hf://", "hf://gpt2", "hf://org/na me", "hf://org/name@", "hf://org/..", "https://example.com/x/y",
        "http://127.0.0.1:5000/org/name", "hf://datasets/a/b", "hf://spaces/a/b", "hf://buckets/a/b",
    ],
)  # fmt: skip
def test_refuses_what_is_no_model_repo(text: str) -> None:
    with pytest.raises(RecipeError, match=r"must be (hf://org/name|a model repo)"):
        parse_address(text)


def test_a_token_in_an_address_is_not_repeated() -> None:
    secret = "hf_" + "x" * 34
    with pytest.raises(RecipeError) as caught:
        parse_address(f"https://user:{secret}@example.com/org/name?token={secret}")
    assert secret not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("text", ["./hf", "/hf://x", "C:/x", "org/name", ""])
def test_folders_are_no_addresses(text: str) -> None:
    assert not is_address(text)


def test_a_forgotten_scheme_is_noticed() -> None:
    assert looks_like_repo("org/name")
    assert not looks_like_repo("./org/name")
