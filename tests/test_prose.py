"""README, guides and concepts can be read in an evening: short paragraphs and sentences, short captions."""

import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# evidence and reference are not read in turn but looked up
READ_IN_TURN = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            *("install", "first-memory", "faq", "memory", "library", "data", "training", "long-rows", "convert"),
            *("transformers", "evaluate", "distributed", "write-an-operator", "architecture", "pooled-memory"),
            "speedrun",
            "own-memory",
            "serve",
        )
    ),
)
MAX_PARAGRAPH_WORDS, MAX_CAPTION_WORDS, MEAN_SENTENCE_WORDS = 120, 40, 20
_ITEM = re.compile(r"^(\s*)([-*]|\d+\.) ")


def paragraphs(text):
    """Every paragraph and every item of a list: no code, headings or tables (numbers stand there)."""
    text = re.sub(r"^[ ]*```.*?^[ ]*```[^\n]*$", "", text, flags=re.M | re.S)
    found = [[]]
    for line in text.splitlines():
        if not line.strip() or line.startswith(("#", "|", "    ")):
            found.append([])
        elif _ITEM.match(line):
            found.append([line.strip()])
        else:
            found[-1].append(line.strip())
    return [" ".join(lines) for lines in found if lines]


def words(text):
    """Words as a reader counts them: of a link its text, of code and formulas one for each part between blanks."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).split()


def sentences(text):
    return [part for part in re.split(r"(?<=[.!?])\s+", text) if len(words(part)) > 3]


@pytest.mark.parametrize("name", READ_IN_TURN)
def test_no_paragraph_is_long(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    long = {len(words(part)): part[:60] for part in paragraphs(text) if len(words(part)) > MAX_PARAGRAPH_WORDS}
    assert not long, f"{name}, words of paragraphs: {long}"


@pytest.mark.parametrize("name", READ_IN_TURN)
def test_sentences_have_about_twenty_words(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    lengths = [len(words(sentence)) for part in paragraphs(text) for sentence in sentences(part)]
    assert not lengths or sum(lengths) / len(lengths) <= MEAN_SENTENCE_WORDS, f"{name}: {sum(lengths) / len(lengths)}"


@pytest.mark.parametrize("name", READ_IN_TURN)
def test_captions_are_short(name):
    """A caption is the paragraph in italics below a picture."""
    parts = paragraphs((ROOT / name).read_text(encoding="utf-8"))
    for picture, caption in itertools.pairwise(parts):
        if picture.startswith("![") and caption.startswith("*"):
            assert len(words(caption)) <= MAX_CAPTION_WORDS, f"{name}: {caption[:80]}"


def test_every_guide_and_concept_of_the_site_is_held_to_this():
    import yaml

    text = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    nav = {key: pages for entry in yaml.safe_load(text)["nav"] for key, pages in entry.items()}
    pages = {f"docs/{page}" for part in ("Start", "Guides", "Concepts") for page in nav[part]}
    elsewhere = {"docs/index.md", "docs/contributing.md"}
    assert {page for page in pages if "/operators/" not in page} - elsewhere == set(READ_IN_TURN) - {"README.md"}
