"""README.md of a model repo: YAML between two `---` lines, then text.

What a source says in its YAML was written by strangers: only the keys of KEYS are read, only as text, and they are
written so that YAML 1.1 (Python) and 1.2 (the Hub) read them alike.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from mso_hub.errors import HubError
from mso_hub.hub.address import Address
from mso_hub.hub.client import Client
from mso_hub.hub.commit import Change, MovedError, Put, require_valid_card, send_commit, verify_commit
from mso_hub.hub.target import Access, Wish, look

Value = str | list[str]
ONE = ("license_name", "license_link", "pipeline_tag", "library_name", "base_model_relation")
MANY = ("license", "language", "base_model", "tags")
"""Keys with one text, and keys with one or several."""
KEYS = (*ONE, *MANY)
HEAD = 1 << 20
"""Bytes of a README.md in which its metadata must end; it takes seconds to read more."""
LONGEST, MOST = 400, 400
"""Characters of one text and texts of one key; what is longer is left out."""
FRONT = re.compile(r"\s*---[ \t]*\n(.*?)^---[ \t]*$", re.MULTILINE | re.DOTALL)
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
"""Metadata that is as true of the output as of the source."""
STORAGE_TAG = re.compile(
    r"(nv|mx)?fp\d+(-\w+)?|b?f(loat)?(16|32)|u?int\d+|[wa]\d+(a\d+)?(kv\d+)?|\d+[- ]?bits?|i?q\d(_\w+)*|"
    r"(auto-?)?(awq|gptq)(-\w+)?|gguf|exl[23]|bnb|bitsandbytes|hqq|aqlm|quip.*|eetq|auto-?round|quark|mlx|mso_hub|"
    r"imatrix|llama-?cpp|llm-?compressor|compressed-tensors|model-?opt|model[- ]?optimizer|quant(ized|ization)?|"
    r"(gguf|mlx)-my-repo|base_model:.*",
    re.IGNORECASE,
)
"""Tags, and names of libraries, that speak of how numbers are stored: the source's are not the output's."""
SENSES = frozenset({
    "any-to-any", "image-text-to-text", "image-to-text", "video-text-to-text", "audio-text-to-text",
    "visual-question-answering", "document-question-answering", "automatic-speech-recognition", "multimodal",
    "vision", "vision-language", "vision-language-model", "vlm", "image", "video", "audio", "speech", "omni", "ocr",
})  # fmt: skip
"""Tags and tasks that a language model without its vision and audio parts no longer has."""
ABSENT = frozenset({"~", "null", "Null", "NULL"})
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./+-]*")
"""Texts that need no quotes, in whichever YAML, unless they are WORDS."""
WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
SIMPLE = re.compile(r"[A-Za-z0-9./-]+((?<=[A-Za-z0-9])_+(?=[A-Za-z0-9])[A-Za-z0-9./-]+)*")
"""Names that Markdown leaves alone."""
PAGE = re.compile(r"(blob|resolve|raw|tree)/[^/]+/")


def parse_metadata(readme: bytes) -> dict[str, Value]:
    """What a README.md says under KEYS; {} where its metadata is absent or no YAML mapping.

    Never raises. Texts have no control characters, lists no repetitions; `tags` is always a list.
    """
    import yaml

    text = readme[:HEAD].decode("utf-8-sig", "replace").replace("\r\n", "\n").replace("\r", "\n")
    front = FRONT.match(text)
    if front is None:
        return {}
    try:
        # Texts alone: `language: no` is Norwegian and not False. The C parser would crash on deep nesting.
        found = yaml.load(front[1], Loader=yaml.BaseLoader)  # noqa: S506 - it builds nothing but str, list and dict
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    said = {key: _texts(found.get(key)) for key in KEYS}
    alone = {key for key in said if key != "tags" and not isinstance(found.get(key), list)}
    one: dict[str, Value] = {key: texts[0] for key, texts in said.items() if texts and key in alone}
    return one | {key: texts for key, texts in said.items() if texts and key in MANY and key not in alone}


def _texts(value: object) -> list[str]:
    """The usable texts of a YAML value, each once."""
    found = (v.strip() for v in (value if isinstance(value, list) else [value]) if isinstance(v, str))
    return list(dict.fromkeys(t for t in found if t and t.isprintable() and len(t) <= LONGEST and t not in ABSENT))[
        :MOST
    ]


def join_card(metadata: Mapping[str, object], text: str) -> str:
    """README.md with the metadata on top, keys in the order given; texts that could be mistaken are quoted."""
    import yaml

    dumper: Any = type("Dumper", (yaml.SafeDumper,), {})
    dumper.add_representer(str, _represent)
    front = yaml.dump(dict(metadata), Dumper=dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    return f"---\n{front}---\n\n{text}"


def _represent(dumper: Any, text: str) -> Any:
    plain = PLAIN.fullmatch(text) and text.lower() not in WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


def table(rows: Iterable[Sequence[str]], heads: Sequence[str]) -> str:
    """Markdown; a bar inside a cell is escaped, because it would end the cell in code too."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def visible(text: str) -> str:
    """Any text in one line: what cannot be printed becomes a question mark."""
    return "".join(c if c.isprintable() else "?" for c in text)


def code(text: str) -> str:
    """Any text as code in Markdown."""
    shown = visible(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"`{shown}`" if fence == "`" else f"{fence} {shown} {fence}"


def plain(text: str) -> str:
    """Any text as itself in Markdown; bars are left to `table`."""
    shown = visible(text)
    return shown if SIMPLE.fullmatch(shown) else re.sub(r"([\\`*_{}\[\]<>()#~&!])", r"\\\1", shown)


def resolve_link(link: str, *, here: Container[str], endpoint: str, repo: str | None, revision: str) -> str | None:
    """A `license_link` of `repo` as another repo can use it, None where it would lead nowhere.

    here  files that the other repo has; the Hub takes LICENSE and LICENSE.md alone as relative links
    """
    try:
        parts = urlsplit(link)
    except ValueError:
        return None
    if parts.scheme in ("http", "https") and parts.netloc:
        return link
    if parts.scheme or parts.netloc or not parts.path:
        return None
    if parts.path.startswith("/"):
        return f"{endpoint}{quote(unquote(parts.path))}"
    path = posixpath.normpath(unquote(parts.path))
    path = PAGE.sub("", path, count=1) if PAGE.match(path) else path
    if path.startswith("..") or path == ".":
        return None
    if path in here and (path in ("LICENSE", "LICENSE.md") or repo is None):
        return path
    return None if repo is None else f"{endpoint}/{repo}/blob/{quote(revision, safe='')}/{quote(path)}"


def default_endpoint() -> str:
    """The Hub that is meant where nothing names one: HF_ENDPOINT, else huggingface.co."""
    from huggingface_hub import constants

    return constants.ENDPOINT.rstrip("/")


def require_writable(client: Client, address: Address) -> Access:
    """Whether this account may commit there; RecipeError and HubError when not, before any work is done."""
    return look(client, Wish(address, ""))


def commit_card(
    client: Client, address: Address, parent: str, card: bytes, others: Mapping[str, bytes], title: str
) -> str:
    """Commit README.md and other small files on top of a known head -> URL of the commit or pull request.

    Raises HubError when the head is another one by now, when the Hub does not take the metadata, and when this
    account may not write there.
    """
    access = require_writable(client, address)
    require_valid_card(client, access.target, card)
    puts = {name: Put.of(content) for name, content in {"README.md": card, **others}.items()}
    change = Change(parent, title, access.account, puts=puts)
    try:
        commit = send_commit(client, access.target, change)
    except MovedError as error:
        raise HubError(f"{error}; nothing was written, run the same command again") from None
    verify_commit(client, access.target, change, commit)
    return commit.pull_request or commit.url
