"""The tokenizer of a checkpoint, and text -> token ids as the model saw them in training."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mso_hub.calibrate.text.formatters import Turn, as_lines
from mso_hub.errors import CheckpointError, RecipeError
from mso_hub.source import Source

VOCABULARY = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "tiktoken.model",
    "spiece.model", "sentencepiece.bpe.model", "*.spm",
)  # fmt: skip
"""Files of which a tokenizer needs at least one."""
BESIDE = (
    "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "config.json",
)  # fmt: skip
"""Files that say how the vocabulary is used."""


def open_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or of a repo on the Hub, by transformers.AutoTokenizer; nothing else is fetched.

    trust_remote_code  Python code of the checkpoint may run; without it such a tokenizer is an error
    Its files are copied into a temporary folder, which is gone when this returns, and opened without any network.
    Raises CheckpointError that names the missing file, or what transformers cannot do with what is there; RecipeError
    where the package transformers is missing.
    """
    files = source.files()
    wanted = [name for name in files if _belongs(name, code=trust_remote_code)]
    if not any(fnmatchcase(name, pattern) for name in wanted for pattern in VOCABULARY):
        have = ", ".join(sorted(name for name in files if "/" not in name)[:12]) or "nothing"
        raise CheckpointError(
            f"{source.name}: has no tokenizer: needs tokenizer.json (or tokenizer.model, or vocab.json with "
            f"merges.txt), has {have}; add the file of the model that this one was made from"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise RecipeError(
            f"tokenizer of {source.name}: needs the package transformers ({error}); pip install 'mso-hub[calibrate]'"
        ) from error
    # transformers keeps a checkpoint's code under the name of its folder: the same name every time.
    label = f"tokenizer_{hashlib.sha256(os.fsencode(source.name)).hexdigest()[:12]}"
    with tempfile.TemporaryDirectory(prefix="mso_hub_") as temporary:
        folder = Path(temporary, label)
        for name in wanted:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read(name, 0, files[name]).tobytes())
        try:
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            # Whatever a broken file or code of others raises: the tokenizer cannot be used, and this is why.
            raise CheckpointError(f"{source.name}: {_cannot_open(error, trust_remote_code)}") from error


def _belongs(name: str, *, code: bool) -> bool:
    """Is a file of the repo part of the tokenizer?"""
    if name.startswith("additional_chat_templates/") or (code and name.endswith(".py")):
        return True
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in (*VOCABULARY, *BESIDE))


def _cannot_open(error: Exception, trusted: bool) -> str:
    text = " ".join(str(error).split())[:400] or type(error).__name__
    remote = "trust_remote_code" in text and not trusted
    way = "; its Python code runs with --trust_remote_code only" if remote else ""
    return f"its tokenizer cannot be opened: {text}{way}"


@dataclass(frozen=True, slots=True)
class Encoder:
    """Text -> ids, with what a row of this model starts with and how its documents end.

    start  ids that the tokenizer puts before any text (BOS of Llama and Gemma); every row begins with them
    end    ids between documents: EOS, or an empty line where the tokenizer has no EOS
    """

    tokenizer: Any
    start: tuple[int, ...]
    end: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def chats(self) -> bool:
        """Has the tokenizer a chat template?"""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def ids(self, document: str | Sequence[Turn], limit: int) -> list[int]:
        """At most `limit` ids of a document, without `start` and `end`.

        A conversation goes through the chat template, or becomes `role: text` lines where there is none.
        Raises ValueError where the template refuses the conversation, and for half a character: a lone surrogate, as
        JSON may have it.
        """
        text = document if isinstance(document, str) else self._conversation(document)
        text.encode()
        # A token is rarely more than 16 characters, and a book need not be read to its end for one row.
        ids = self._plain(text[: 16 * limit])
        while self.start and tuple(ids[: len(self.start)]) == self.start:  # templates write BOS themselves
            ids = ids[len(self.start) :]
        return ids[:limit]

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _conversation(self, turns: Sequence[Turn]) -> str:
        if not self.chats:
            return as_lines(turns)
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(list(turns), tokenize=False))
        except TemplateError as error:
            raise ValueError(f"the chat template refuses it: {' '.join(str(error).split())}") from error


def make_encoder(tokenizer: Any) -> Encoder:
    """What a tokenizer does by itself, found by asking it."""

    def encode(text: str, *, special: bool) -> tuple[int, ...]:
        """Ids of a text."""
        return tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    plain, whole = encode("a", special=False), encode("a", special=True)
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    if tokenizer.eos_token_id is not None:
        return Encoder(tokenizer, whole[:at], (int(tokenizer.eos_token_id),), ())
    note = "the tokenizer has no end-of-text token: documents are joined by an empty line"
    return Encoder(tokenizer, whole[:at], encode("\n\n", special=False), (note,))
