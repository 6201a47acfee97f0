"""One loop reads a document into device memory, onto tiers and into a file: the same pieces, compiled, streamed."""

import threading

import numpy as np
import pytest
import torch

from hsa_ultralong.inference import Library, append, reading_loop
from hsa_ultralong.inference.reading_loop import as_tokens
from hsa_ultralong.memory import MemoryFile, MemoryFileError, MemoryWriter
from hsa_ultralong.models import pieces, reading
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.testing.processes import HANG_SECONDS
from tests.inference.test_library import EXACT, assert_holds, document

TEXT = document(50)
SINKS = ("device", "host", "tiered", "file")
SMALL = {"piece_tokens": 7, "commit_tokens": 14}


@pytest.fixture
def model():
    return tiny_model()


def place(sink, tmp_path):
    return tmp_path / "a.hsa" if sink == "file" else sink


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("cut", [50, 9, 1])
def test_every_sink_reads_the_same_pieces_of_texts_and_streams(model, tmp_path, monkeypatch, sink, cut):
    read, lengths = reading.DocumentReader.read, []

    def noted(self, tokens):
        lengths.append(len(tokens))
        return read(self, tokens)

    monkeypatch.setattr(reading.DocumentReader, "read", noted)
    memory = model.memorize(iter(TEXT.split(cut)), store=place(sink, tmp_path), piece_tokens=16)
    assert lengths == [16, 16, 16, 2]
    whole = model.memorize(TEXT, piece_tokens=16)
    assert torch.equal(memory.landmarks, whole.landmarks) and torch.equal(memory.documents[0].tokens, TEXT)
    assert torch.equal(memory.part(0, 12).k, whole.part(0, 12).k)


@pytest.mark.parametrize("sink", SINKS)
def test_every_sink_reads_compiled_where_that_pays(model, tmp_path, monkeypatch, sink):
    calls = []

    def traced(function):
        def run(*arguments):
            calls.append(function.__name__)
            return function(*arguments)

        return run

    monkeypatch.setattr(reading_loop, "_is_compiled", lambda device, step: step == 16)
    for module in (pieces, reading):
        monkeypatch.setattr(module, "compiled", traced)
    text = document(150)
    memory = model.memorize(text, store=place(sink, tmp_path), piece_tokens=16)
    # layers once the windows are full; the last piece is shorter
    assert calls.count("run_encoder") == 9 and calls.count("run_layer") >= model.config.num_lower_layers
    torch.testing.assert_close(memory.landmarks, model.memorize(text).landmarks)


def test_ids_of_any_integer_type_are_read_and_none_wraps_around():
    for kind in (np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint32, np.int64, np.uint64, np.dtype(">i4")):
        ids = np.array([3, 1, 4], dtype=kind)
        found = as_tokens(ids)
        assert found.dtype == torch.int32 and found.tolist() == [3, 1, 4]
    large = torch.tensor([2**32 + 3, -(2**33)])
    assert as_tokens(large).tolist() == as_tokens(large.numpy()).tolist() == [2**31 - 1, -1]
    assert as_tokens(np.array([2**63 + 5], dtype=np.uint64)).tolist() == [-1]


def test_a_memory_keeps_tokens_of_its_own(model):
    for text in (TEXT.long(), TEXT.int().clone(), TEXT.int().clone().numpy()):
        memory = model.memorize(text, piece_tokens=64)
        text[:] = 0
        assert memory.documents[0].tokens.tolist() == TEXT.tolist()


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("piece", [64, 16])
def test_a_stream_may_fill_one_buffer_again_and_again(model, tmp_path, sink, piece):
    def stream():
        buffer = torch.empty(10, dtype=torch.int32)
        for part in TEXT.split(10):
            yield buffer.copy_(part)

    memory = model.memorize(stream(), store=place(sink, tmp_path), piece_tokens=piece)
    assert memory.documents[0].tokens.tolist() == TEXT.tolist()
    assert torch.equal(memory.landmarks, model.memorize(TEXT, piece_tokens=piece).landmarks)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_pieces_of_the_length_that_compiles_and_its_multiples_are_compiled_on_a_gpu(kind):
    found = [reading_loop._is_compiled(torch.device(kind), step) for step in (2**16, 2**17, 2**17 + 64, 2**18)]
    assert found == ([False, True, False, True] if kind == "cuda" else [False] * 4)


@pytest.mark.parametrize("sink", SINKS)
def test_a_stream_is_read_as_it_comes(model, tmp_path, sink):
    given, most = [], []

    def stream():
        for piece in TEXT.split(5):
            given.append(len(piece))
            yield piece

    def look(done, total):
        assert total is None
        most.append(sum(given) - done)

    model.memorize(stream(), store=place(sink, tmp_path), piece_tokens=8, progress=look)
    assert len(most) > 5 and max(most) <= 8 + 5


@pytest.mark.parametrize("sink", SINKS)
def test_progress_goes_on_from_document_to_document(model, tmp_path, sink):
    seen = []
    model.memorize(
        [TEXT, TEXT[:20]], store=place(sink, tmp_path), piece_tokens=25, progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(25, 70), (50, 70), (70, 70)]


@pytest.mark.parametrize("sink", SINKS)
def test_a_bad_document_is_refused_before_the_first_is_read(model, tmp_path, sink):
    with pytest.raises(ValueError, match="token ids must be 0"):
        model.memorize([TEXT, [10**6]], store=place(sink, tmp_path), progress=lambda *_: pytest.fail("was read"))
    assert not list(tmp_path.iterdir())


def test_a_stream_is_appended_and_added_like_a_text(model, tmp_path):
    memory = model.memorize(TEXT[:10], close=False)
    append(model, memory, iter(TEXT[10:].split(3)), document=0)
    assert torch.equal(memory.documents[0].tokens, TEXT)
    torch.testing.assert_close(memory.landmarks, model.memorize(TEXT).landmarks, rtol=1e-10, atol=1e-11)
    with Library.create(model, tmp_path / "a.hsa", **EXACT) as library:
        library.add(iter(TEXT.split(9)), name="book", **SMALL)
        with pytest.raises(ValueError, match="is empty"):
            library.add(iter([]), name="nothing")
    assert_holds(tmp_path / "a.hsa", model, [TEXT])


def killed_stream(model, path):
    def kill(done, _):
        if done >= 35:
            raise KeyboardInterrupt

    with Library.create(model, path, **EXACT) as library:
        with pytest.raises(KeyboardInterrupt):
            library.add(iter(TEXT.split(9)), name="book", progress=kill, **SMALL)
        assert str(library.half_read) == "'book' is half-read (28 of unknown tokens)"


def test_a_killed_stream_given_again_goes_on_where_it_was(model, tmp_path):
    path = tmp_path / "a.hsa"
    killed_stream(model, path)
    seen = []
    with Library.open(model, path) as library:
        with pytest.raises(ValueError, match="is half-read"):
            library.add(iter(document(50, seed=4).split(9)), name="book", **SMALL)
        library.add(iter(TEXT.split(11)), name="book", progress=lambda done, _: seen.append(done), **SMALL)
        assert library.half_read is None
    assert seen == [35, 42, 49, 50]
    assert_holds(path, model, [TEXT])


def test_a_killed_stream_can_be_closed_and_says_so(model, tmp_path):
    path = tmp_path / "a.hsa"
    killed_stream(model, path)
    with Library.open(model, path) as library:
        library.close_document()
        assert library.documents[0].metadata == {"closed_early": "unknown"}
    with MemoryFile.open(path) as file:
        assert file.documents[0].num_tokens == 28


def test_the_model_reads_on_while_a_file_is_written(model, tmp_path, monkeypatch):
    """The writer gets its first rows only when a later piece has been read: one after the other they would wait."""
    read, later, pieces = reading.DocumentReader.read, threading.Event(), []

    def noted(self, tokens):
        pieces.append(len(tokens))
        if len(pieces) == 3:
            later.set()
        return read(self, tokens)

    splice = MemoryWriter.splice_chunks

    def waiting(self, *arguments):
        assert later.wait(HANG_SECONDS)
        splice(self, *arguments)

    monkeypatch.setattr(reading.DocumentReader, "read", noted)
    monkeypatch.setattr(MemoryWriter, "splice_chunks", waiting)
    with Library.create(model, tmp_path / "a.hsa", **EXACT) as library:
        library.add(TEXT, **SMALL)
    assert_holds(tmp_path / "a.hsa", model, [TEXT])


@pytest.mark.parametrize("piece", range(1, 8))
def test_an_error_of_the_writer_comes_back_and_later_rows_are_not_written(model, tmp_path, monkeypatch, piece):
    calls, splice = [], MemoryWriter.splice_chunks

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == piece:
            raise MemoryFileError("no space left")
        splice(self, *arguments)

    with Library.create(model, tmp_path / "a.hsa", **EXACT) as library:
        monkeypatch.setattr(MemoryWriter, "splice_chunks", failing)
        with pytest.raises(MemoryFileError, match="no space left"):
            library.add(TEXT, name="x", **SMALL)
        assert len(calls) == piece
        monkeypatch.undo()
        assert sum(document.num_tokens for document in library.documents) == 14 * ((piece - 1) // 2)
        library.add(TEXT, name="x", **SMALL)
    assert_holds(tmp_path / "a.hsa", model, [TEXT])
