"""The head of a README.md: what is taken from a stranger's, what is written, and who reads it the same."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from hypothesis import given, settings
from hypothesis import strategies as st

from mso_hub.errors import HubError, RecipeError
from mso_hub.hub import Client
from mso_hub.hub.commit import require_valid_card
from mso_hub.hub.lookup import read_small
from mso_hub.hub.model_card import (
    HEAD,
    KEYS,
    code,
    commit_card,
    join_card,
    parse_metadata,
    plain,
    resolve_link,
    table,
)
from mso_hub.hub.target import Target
from tests.hub.cards import metadata, validate
from tests.hub.serving import Served, serving

GOOD: dict[str, object] = {"license": "mit", "tags": ["a"]}
BLOCK = "license: mit\ntags: [a]"
READ: dict[str, tuple[bytes, dict[str, object]]] = {
    "plain": (f"---\n{BLOCK}\n---\n# Text".encode(), GOOD),
    "at the end": (f"---\n{BLOCK}\n---".encode(), GOOD),
    "empty lines in front": (f"\n\n---\n{BLOCK}\n---\n".encode(), GOOD),
    "blanks behind the dashes": (f"---  \n{BLOCK}\n--- \n".encode(), GOOD),
    "a byte order mark": (b"\xef\xbb\xbf" + f"---\n{BLOCK}\n---\n".encode(), GOOD),
    "Windows": (f"---\n{BLOCK}\n---\ntext\n".replace("\n", "\r\n").encode(), GOOD),
    "an old Mac": (f"---\n{BLOCK}\n---\ntext\n".replace("\n", "\r").encode(), GOOD),
    "more dashes in the text": (f"---\n{BLOCK}\n---\n\n---\nlicense: evil\n---\n".encode(), GOOD),
    "a megabyte of text": (f"---\n{BLOCK}\n---\n".encode() + b"x" * 3 * HEAD, GOOD),
    "keys of strangers": (
        f"---\n{BLOCK}\ninference: {{a: 1}}\nwidget: [x]\nextra_gated_prompt: no\n---\n".encode(),
        GOOD,
    ),
    "a JSON mapping": (b'---\n{"license": "mit", "tags": ["a"]}\n---\n', GOOD),
    "a key twice": (b"---\nlicense: apache-2.0\nlicense: mit\ntags: [a]\n---\n", GOOD),
    "one tag without a list": (b"---\nlicense: mit\ntags: a\n---\n", GOOD),
    "tags that are no texts": (b"---\nlicense: mit\ntags: [a, {b: c}, [d], null, '', ~, a]\n---\n", GOOD),
    "a text of two lines": (b'---\nlicense: mit\ntags: [a, "b\\nc"]\nlicense_name: "a\\u202eb"\n---\n', GOOD),
    "a text without end": (f"---\n{BLOCK}\nlicense_name: {'x' * 5000}\n---\n".encode(), GOOD),
    "bytes that are no UTF-8": (b"---\nlicense: mit\ntags: [a]\nmodel: \xff\xfe\n---\n\xff", GOOD),
    "a list for one text": (b"---\nlicense: mit\ntags: [a]\npipeline_tag: [x, y]\n---\n", GOOD),
    "numbers and words": (
        b"---\nlanguage: [no, en, yes]\ntags: [4, 1e3, true, 2024-01-01, 2024-99-99]\nlicense: on\n---\n",
        {"language": ["no", "en", "yes"], "tags": ["4", "1e3", "true", "2024-01-01", "2024-99-99"], "license": "on"},
    ),
    "several licences": (b"---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}),
    "Python objects": (b"---\nlicense: !!python/object/apply:os.getcwd []\ntags: [a]\n---\n", {"tags": ["a"]}),
    "nothing": (b"", {}),
    "no front matter": (b"# Title\n\n---\nlicense: mit\n---\n", {}),
    "an end that is missing": (b"---\nlicense: mit\n", {}),
    "empty front matter": (b"---\n---\ntext", {}),
    "broken YAML": (b"---\nlicense: [mit\ntags: }\n---\n", {}),
    "a list": (b"---\n- license: mit\n---\n", {}),
    "one word": (b"---\nlicense\n---\n", {}),
    "two documents": (b"---\nlicense: mit\n...\na: b\n---\n", {}),
    "a key that is a list": (b"---\n[a, b]: c\nlicense: mit\n---\n", {}),
    "an alias of nothing": (b"---\nlicense: *x\n---\n", {}),
    "zero bytes": (b"---\nlicense: mit\n\0\n---\n", {}),
    "deep nesting": (b"---\nlicense: " + b"[" * 100_000 + b"\n---\n", {}),
    "closed deep nesting": (b"---\nlicense: " + b"[" * 2000 + b"]" * 2000 + b"\n---\n", {}),
    "metadata without end": (b"---\nlicense: mit\n" + b"# x\n" * (HEAD // 4) + b"---\n", {}),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("model-card")
    with serving(folder, xet=False) as served, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", served.hub.endpoint)
        yield served


@pytest.mark.parametrize("kind", READ)
def test_metadata_of_strangers(kind: str) -> None:
    """Never an error, never more than the named keys, always texts."""
    readme, wanted = READ[kind]
    started = time.monotonic()
    assert parse_metadata(readme) == wanted
    assert time.monotonic() - started < 5


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=200, deadline=None)
def test_no_readme_is_too_strange(data: bytes, framed: bool) -> None:
    """Whatever it holds, what was read can be written, and reads the same again."""
    found = parse_metadata(b"---\n" + data + b"\n---\n" if framed else data)
    assert set(found) <= set(KEYS)
    assert parse_metadata(join_card(found, "text").encode()) == found


TEXTS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=30) | st.sampled_from(
    [
        "no", "Yes", "null", "1e3", "0o17", "0x1F", "1:20", ".inf", "-", "?", "a: b", "a #b", "#a", "{", "*a", "&a",
        "!a", "%a", "@a", "`a", "'", '"', "---", "...", "<<", "=", "2024-01-01", "12e03", "4-bit", "a/b", "\U0001f600",
    ]
)  # fmt: skip


@given(base=TEXTS, tags=st.lists(TEXTS, min_size=1, max_size=5, unique=True))
@settings(max_examples=300, deadline=None)
def test_every_text_comes_back_as_a_text(base: str, tags: list[str]) -> None:
    """For the Hub's client too; what is not plain is quoted, so that no YAML takes it for something else."""
    content = join_card({"base_model": base, "tags": tags}, "# Title\n\n---\nx: y\n---\n")
    data = metadata(content)
    assert (data["base_model"], data["tags"]) == (base, tags)
    assert ModelCard(content).text.startswith("\n# Title")
    tokens = [t for t in yaml.scan(content.split("\n---\n")[0]) if isinstance(t, yaml.ScalarToken)]
    assert all(t.plain is False or (t.value[0].isascii() and t.value[0].isalpha()) for t in tokens)


def test_keys_keep_their_order() -> None:
    """The most telling first."""
    assert join_card({"license": "mit", "base_model": "a/b", "tags": ["4-bit"]}, "text\n") == (
        '---\nlicense: mit\nbase_model: a/b\ntags:\n- "4-bit"\n---\n\ntext\n'
    )


def test_the_hub_takes_it(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """Asked by our client and by the Hub's own."""
    content = join_card({"license": "other: x", "base_model": "a/b: #c", "language": ["no"]}, "# T\n\n---\na: [\n---\n")
    require_valid_card(served.client(), Target("dev/x"), content.encode())
    with caplog.at_level(logging.ERROR):
        validate(content)
    assert "/api/validate-yaml" in [request.path for request in served.hub.log()]


# ---------------------------------------------------------------------------------------------------------- links

HUB = "https://hub"
LINKS: dict[str, str | None] = {
    "LICENSE": "LICENSE",
    "./LICENSE": "LICENSE",
    "LICENSE.txt": f"{HUB}/a/b/blob/main/LICENSE.txt",
    "docs/MY LICENSE.md": f"{HUB}/a/b/blob/main/docs/MY%20LICENSE.md",
    "blob/main/TERMS.md": f"{HUB}/a/b/blob/main/TERMS.md",
    "/a/other/blob/main/LICENSE": f"{HUB}/a/other/blob/main/LICENSE",
    "https://x.org/terms?a=b": "https://x.org/terms?a=b",
    "javascript:alert(1)": None,
    "data:text/html,x": None,
    "//x.org/terms": None,
    "../secret": None,
    "#terms": None,
    "http://[": None,
    ".": None,
}


@pytest.mark.parametrize("link", LINKS)
def test_a_licence_link_leads_somewhere(link: str) -> None:
    """A file that came along is named as it is, another one at the source; what leads nowhere is dropped."""
    assert resolve_link(link, here={"LICENSE"}, endpoint=HUB, repo="a/b", revision="main") == LINKS[link]


def test_a_licence_link_without_a_source() -> None:
    """There is nothing to point at but what came along."""
    here = {"LICENSE", "docs/terms.md"}
    found = [resolve_link(n, here=here, endpoint=HUB, repo=None, revision="main") for n in (*sorted(here), "NOTICE")]
    assert found == ["LICENSE", "docs/terms.md", None]
    assert resolve_link("LICENSE", here=(), endpoint=HUB, repo="a/b", revision="x/y") == f"{HUB}/a/b/blob/x%2Fy/LICENSE"


# ------------------------------------------------------------------------------------------------------- Markdown

NAMES = [
    "a|b",
    "a`b",
    "``",
    "a\nb",
    "<b>x</b>",
    "*a*",
    "_a_",
    "[a](b)",
    "a\\",
    "\\|",
    "~~a~~",
    "model.layers.N.up_proj",
]


def rendered(text: str) -> str:
    """HTML, with tables as the Hub shows them."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": False})
    return str(markdown.enable(["table", "strikethrough"]).render(text))


@pytest.mark.parametrize("name", NAMES)
def test_no_name_breaks_a_table(name: str) -> None:
    """Two rows of three cells, and nothing became bold, a link or HTML."""
    html = rendered(table([(code(name), plain(name), "1"), ("x", "y", "2")], ("a", "b", "c")))
    assert (html.count("<tr>"), html.count("<td>"), html.count("<th>")) == (3, 6, 3)
    assert not any(mark in html for mark in ("<b>", "<em>", "<strong>", "<a ", "<s>"))
    assert "<code>" in html


def test_simple_names_stay_readable() -> None:
    """The source of a card is read too."""
    assert plain("org/My_Model-7B.v2") == "org/My_Model-7B.v2"
    assert plain("a._b_.c") == "a.\\_b\\_.c"


# --------------------------------------------------------------------------------------------------------- commit


def test_a_card_is_one_commit_on_the_known_head(served: Served) -> None:
    """Two files change, and who was slower gets an error."""
    repo = served.put({"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\nold"})
    client, address = served.client(), served.address(repo)
    head = client.api.model_info(repo).sha
    url = commit_card(client, address, str(head), b"---\nlicense: mit\n---\nnew", {"mso_hub.json": b"{}"}, "Card")
    done = client.api.list_repo_commits(repo)[0]
    assert (url, done.title) == (f"{served.hub.endpoint}/{repo}/commit/{done.commit_id}", "Card")
    assert {f: read_small(client, repo, f, "main") for f in ("config.json", "README.md")} == {
        "config.json": b"{}", "README.md": b"---\nlicense: mit\n---\nnew",
    }  # fmt: skip
    with pytest.raises(HubError, match=r"somebody committed there since .*; nothing was written, run the same"):
        commit_card(client, address, str(head), b"# other", {}, "Card")
    with pytest.raises(HubError, match="does not take its metadata"):
        commit_card(client, address, done.commit_id, b"---\n- a\n---\n", {}, "Card")
    assert client.api.list_repo_commits(repo)[0].commit_id == done.commit_id


def test_a_card_needs_a_branch_and_permission(served: Served) -> None:
    """Said before anything is sent."""
    repo = served.put({"config.json": b"{}"})
    head = str(served.client().api.model_info(repo).sha)
    reader = Client(served.hub.endpoint, served.hub.token("read"))
    with pytest.raises(HubError, match="needs a token with write permission"):
        commit_card(reader, served.address(repo), head, b"# x", {}, "Card")
    with pytest.raises(HubError, match="needs a branch"):
        commit_card(served.client(), served.address(repo, head), head, b"# x", {}, "Card")
    with pytest.raises(RecipeError, match="must be a whole repo"):
        commit_card(served.client(), served.address(repo, folder="sub"), head, b"# x", {}, "Card")
