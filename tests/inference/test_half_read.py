"""A document that a killed `add` left half-read is finished, closed or dropped; nothing is glued to it or doubled."""

import pytest
import torch

from hsa_ultralong.inference import Library
from hsa_ultralong.memory import MemoryFile, MemoryFileError, MemoryWriter, export_memory
from hsa_ultralong.memory.half_read import half_read
from hsa_ultralong.testing.factories import tiny_model
from tests.inference.test_library import EXACT, assert_holds, bits, document, loaded

TEXT, OTHER = document(50), document(20, seed=3)
SMALL = {"piece_tokens": 7, "commit_tokens": 14}


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def path(model, tmp_path):
    """A memory whose second document was read to token 28 of 50."""
    path = tmp_path / "a.hsa"
    with Library.create(model, path, **EXACT) as library:
        library.add(OTHER, name="first")

        def killed(done, _):
            if done >= 35:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            library.add(TEXT, name="book", metadata={"a": 1}, progress=killed, **SMALL)
        assert library.half_read.num_tokens == 50 and library.half_read.document.num_tokens == 28
    return path


def test_the_same_text_given_again_finishes_it(model, path):
    with Library.open(model, path) as library:
        id = library.add(TEXT, name="book", metadata={"a": 1}, **SMALL)
        assert library.half_read is None and library.documents[1].id == id
    assert_holds(path, model, [OTHER, TEXT])
    with MemoryFile.open(path) as file:
        assert file.build_state == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda library: library.add(OTHER, name="more"),
        lambda library: library.add(OTHER, name="book", metadata={"a": 1}),
        lambda library: library.add(OTHER, name="more", commit=False),
        lambda library: library.extend(OTHER),
        lambda library: library.merge([library.writer.path.with_name("b.hsa")]),
        lambda library: library.edit("book", 3, 4, [1]),
        lambda library: library.replace("book", OTHER),
    ],
)
def test_whatever_would_glue_to_it_is_refused_in_one_line_that_names_the_ways_on(model, path, change):
    with Library.create(model, path.with_name("b.hsa"), **EXACT) as library:
        library.add(OTHER)
    before = bits(path)
    with Library.open(model, path) as library:
        with pytest.raises(ValueError, match=r"'book' is half-read \(28 of 50 tokens\); .*hsa memory close .*--drop"):
            change(library)
        assert bits(path) == before
        library.add(TEXT, name="book", metadata={"a": 1})
    assert_holds(path, model, [OTHER, TEXT])


def test_other_documents_can_be_changed_beside_it(model, path):
    with Library.open(model, path) as library:
        library.edit("first", 3, 5, [1, 2, 3])
        library.replace("first", TEXT[:11])
        library.compact()
        assert library.half_read.document.num_tokens == 28
        library.delete("first")
        library.add(TEXT, name="book", metadata={"a": 1})
    assert_holds(path, model, [TEXT])


def test_closed_it_keeps_what_was_read_and_its_metadata_says_so(model, path):
    with Library.open(model, path) as library:
        library.close_document()
        assert library.half_read is None
        assert library.documents[1].metadata == {"a": 1, "closed_early": 50}
        library.extend(TEXT[28:30])
        assert library.half_read is None
        library.add(OTHER, name="more")
    assert_holds(path, model, [OTHER, TEXT[:30], OTHER])


def test_dropped_it_is_gone(model, path):
    with Library.open(model, path) as library:
        library.delete("book")
        assert library.half_read is None
        library.extend(TEXT[:5], close=True)
    assert_holds(path, model, [torch.cat((OTHER, TEXT[:5]))])
    with MemoryFile.open(path) as file:
        assert file.build_state == {}


def test_a_document_left_open_on_purpose_is_not_half_read(model, tmp_path):
    path = tmp_path / "b.hsa"
    with Library.create(model, path, **EXACT) as library:
        library.add(TEXT, close=False, **SMALL)
        assert library.half_read is None
        library.extend(OTHER[:3])
        library.add(OTHER, name="more")
    assert_holds(path, model, [torch.cat((TEXT, OTHER[:3])), OTHER])


def test_the_state_of_other_builders_stays(model, path):
    with MemoryWriter.open(path) as writer:
        writer.commit(build_state={**writer.build_state, "mine": [1]})
    with Library.open(model, path) as library:
        library.add(TEXT, name="book", metadata={"a": 1}, **SMALL)
    with MemoryFile.open(path) as file:
        assert file.build_state == {"mine": [1]}


def test_a_copy_is_as_half_read_as_the_original_and_merging_it_is_refused(model, path, tmp_path):
    with MemoryFile.open(path) as file:
        export_memory(file, tmp_path / "all.hsa")
        export_memory(file, tmp_path / "one.hsa", [1])
    for name, first in (("all.hsa", [OTHER]), ("one.hsa", [])):
        with Library.open(model, tmp_path / name) as library:
            assert library.half_read.num_tokens == 50
            library.add(TEXT, name="book", metadata={"a": 1})
        assert_holds(tmp_path / name, model, [*first, TEXT])
    with Library.create(model, tmp_path / "c.hsa", **EXACT) as library:
        library.add(OTHER)
        with pytest.raises(MemoryFileError, match=r"open document 'book'; close it first \(hsa memory close"):
            library.merge([path])


def test_opening_it_for_questions_says_how_much_is_missing(path, caplog):
    loaded(path)
    assert "'book' is half-read (28 of 50 tokens)" in caplog.text and "\n" not in caplog.records[0].message


@pytest.mark.parametrize("note", [None, 3, [], {}, {"name": "book"}, {"name": "book", "num_tokens": "x"}, {"name": 1}])
def test_a_strange_note_is_no_note(model, path, note):
    with MemoryFile.open(path) as file:
        assert half_read(file.documents[-1], {"reading": note}) is None
