"""Library when something fails: a kill at any step, a failing model, bad input; the last commit stays and goes on."""

import os
import shutil
import signal

import pytest
import torch

from hsa_ultralong.inference import Library
from hsa_ultralong.memory import MemoryFile, MemoryFileError, verify_memory
from hsa_ultralong.nn.chunk_encoder import ChunkEncoder
from hsa_ultralong.testing.factories import tiny_model
from tests.inference.test_library import EXACT, assert_holds, bits, document, loaded
from tests.memory.test_files_crash import die_at, in_child

SMALL = {"piece_tokens": 7, "commit_tokens": 14}


def add(library):
    library.add(document(40, seed=4), name="new", **SMALL)


def extend(library):
    if library.documents[-1].num_tokens == 13:
        library.extend(document(9, seed=5), close=True, piece_tokens=7)


def edit(library):
    if library.tokens(0)[5] != 36:
        library.edit(0, 5, 8, [36, 36])


def replace(library):
    library.replace(0, document(33, seed=6))


def merge(library):
    if len(library.documents) < 3:
        library.merge([library.writer.path.with_name("other.hsa")])


SLOW = [pytest.param(change, marks=pytest.mark.slow) for change in (add, extend, replace)]


@pytest.mark.parametrize("change", [edit, merge, *SLOW], ids=lambda change: change.__name__)
def test_killed_at_any_step_a_change_is_whole_or_absent_and_a_rerun_gives_the_same_bits(tmp_path, change):
    model, start = tiny_model(), tmp_path / "start"
    start.mkdir()
    with Library.create(model, start / "a.hsa", **EXACT) as library:
        library.add(document(30), name="book")
        library.add(document(13, seed=1), name="notes")
    with Library.create(model, start / "other.hsa", **EXACT) as library:
        library.add(document(17, seed=3), name="other")

    def work(path):
        with Library.open(model, path) as library:
            done = change is add and len(library.documents) > 2 and not library.documents[2].is_open
            if not done:
                change(library)

    shutil.copytree(start, tmp_path / "whole")
    before = bits(start / "a.hsa")
    work(tmp_path / "whole" / "a.hsa")
    expected = bits(tmp_path / "whole" / "a.hsa")
    step, is_killed = 0, True
    while is_killed:
        run = tmp_path / "run"
        shutil.copytree(start, run)

        def action(step=step, path=run / "a.hsa"):
            die_at(step)
            work(path)

        status = in_child(action)
        is_killed = os.WIFSIGNALED(status)
        assert status in (0, signal.SIGKILL), f"step {step}"
        assert verify_memory(run / "a.hsa") == []
        found = bits(run / "a.hsa")
        if change is add:
            # what was committed on the way is the beginning of the text
            text = document(40, seed=4).tolist()
            assert found[0][:2] == before[0] and all(part == text[: len(part)] for part in found[0][2:])
        else:
            assert found in (before, expected), f"step {step}"
        work(run / "a.hsa")
        assert bits(run / "a.hsa") == expected, f"step {step}"
        shutil.rmtree(run)
        step += 1
    assert step > 10


@pytest.mark.parametrize("calls", range(7))
def test_a_model_that_fails_in_the_middle_of_a_text_leaves_what_was_committed(tmp_path, monkeypatch, calls):
    model, text, forward, done = tiny_model(), document(50), ChunkEncoder.forward, []
    with Library.create(model, tmp_path / "whole.hsa", **EXACT) as library:
        library.add(document(9, seed=1), name="first")
        library.add(text, name="x", **SMALL)

    def failing(self, *arguments):
        done.append(1)
        if len(done) > calls:
            raise RuntimeError("out of memory")
        return forward(self, *arguments)

    with Library.create(model, tmp_path / "a.hsa", **EXACT) as library:
        library.add(document(9, seed=1), name="first")
        monkeypatch.setattr(ChunkEncoder, "forward", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            library.add(text, name="x", **SMALL)
        monkeypatch.undo()
        assert verify_memory(tmp_path / "a.hsa") == []
        committed = 14 * (calls // 2)
        assert [d.num_tokens for d in library.documents] == [9] + [committed] * (committed > 0)
        assert library.documents == library.writer.snapshot().documents
        library.add(text, name="x", **SMALL)
    assert bits(tmp_path / "a.hsa") == bits(tmp_path / "whole.hsa")


def test_a_failed_change_does_not_close_the_open_document(tmp_path, monkeypatch):
    model, path = tiny_model(), tmp_path / "a.hsa"
    with Library.create(model, path, **EXACT) as library:
        library.add(document(10), close=False)
        before = bits(path)
        monkeypatch.setattr(ChunkEncoder, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            library.add(document(30, seed=1))
        monkeypatch.undo()
        with pytest.raises(MemoryFileError, match=r"b\.hsa does not exist"):
            library.merge([tmp_path / "b.hsa"])
        with pytest.raises(ValueError, match="piece_tokens"):
            library.add(document(30, seed=1), piece_tokens=0)
        assert library.documents[0].is_open and bits(path) == before
        library.extend(document(7, seed=2), close=True)
    assert_holds(path, model, [torch.cat((document(10), document(7, seed=2)))])


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("length", [8, 9, 3])
def test_extending_by_nothing_is_refused_and_changes_nothing(tmp_path, length, close):
    model, path = tiny_model(), tmp_path / "a.hsa"
    with Library.create(model, path, **EXACT) as library:
        with pytest.raises(ValueError, match="no document to extend"):
            library.extend([1])
        library.add(document(length), name="a", close=close)
        for also in (True, False):
            with pytest.raises(ValueError, match="'a' cannot be extended by nothing"):
                library.extend([], close=also)
    assert_holds(path, model, [document(length)], close=close)


@pytest.mark.parametrize("more", [1, 4, 7, 30])
@pytest.mark.parametrize("length", [1, 4, 39, 40])
def test_extending_a_closed_document_equals_one_longer_document(tmp_path, length, more):
    model, path = tiny_model(), tmp_path / "a.hsa"
    with Library.create(model, path, **EXACT) as library:
        library.add(document(5, seed=9))
        library.add(document(length), name="a", metadata={"x": 1})
        library.extend(document(more, seed=1), close=True, piece_tokens=6)
        assert (library.document("a").id, library.document("a").metadata) == (1, {"x": 1})
    assert_holds(path, model, [document(5, seed=9), torch.cat((document(length), document(more, seed=1)))])


def test_staged_documents_can_be_changed_before_they_are_committed(tmp_path):
    model, path = tiny_model(), tmp_path / "a.hsa"
    texts = [document(n, seed) for seed, n in enumerate((9, 14, 6))]
    with Library.create(model, path, **EXACT) as library:
        for number, text in enumerate(texts):
            library.add(text, name=f"n{number}", commit=False)
        assert MemoryFile.open(path).documents == ()
        library.replace("n1", document(20, seed=7))
        for text in (document(5, seed=8), document(8, seed=9)):
            library.add(text, commit=False)
        library.extend(document(3, seed=10), close=True)
        library.add(document(4, seed=11), commit=False)
        library.delete("n0")
        with pytest.raises(ValueError, match="commit=False is for whole documents"):
            library.add(document(9), close=False, commit=False)
    extended = torch.cat((document(8, seed=9), document(3, seed=10)))
    expected = [document(20, seed=7), texts[2], document(5, seed=8), extended, document(4, seed=11)]
    assert_holds(path, model, expected)


def test_what_was_never_committed_is_dropped_by_a_failure_and_by_closing(tmp_path, monkeypatch):
    model, path = tiny_model(), tmp_path / "a.hsa"
    with Library.create(model, path, **EXACT) as library:
        library.add(document(9), name="kept")
        library.add(document(8), name="staged", commit=False)
        monkeypatch.setattr(ChunkEncoder, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            library.add(document(30, seed=1), commit=False)
        monkeypatch.undo()
        assert [d.name for d in library.documents] == ["kept"]
        library.add(document(8), name="staged", commit=False)
    assert_holds(path, model, [document(9)])


def test_a_damaged_part_is_not_merged(tmp_path):
    model, path = tiny_model(), tmp_path / "a.hsa"
    texts = [document(n, seed) for seed, n in enumerate((9, 30, 12))]
    for name, text in zip("abc", texts, strict=True):
        with Library.create(model, tmp_path / f"{name}.hsa", **EXACT) as library:
            library.add(text, name=name)
    shard = next((tmp_path / "c.hsa").rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    before = bits(path)
    with Library.open(model, path) as library:
        with pytest.raises(MemoryFileError, match="'c'"):
            library.merge([tmp_path / "b.hsa", tmp_path / "c.hsa"])
        assert len(library.documents) == 1 and bits(path) == before
        # parts are read only, so nothing was lost there
        assert library.merge([tmp_path / "b.hsa", path]) == [1, 2]
    assert_holds(path, model, [texts[0], texts[1], texts[0]])


def test_documents_are_found_by_name_and_id_and_ids_never_come_again(tmp_path):
    model, path = tiny_model(), tmp_path / "a.hsa"
    with Library.create(model, path, **EXACT) as library:
        assert [library.add(document(5, seed), name=name) for seed, name in enumerate(("x", "", "x", "0"))] == [
            0,
            1,
            2,
            3,
        ]
        library.delete(3)
        library.delete("")
        library.replace(2, document(6, seed=9), metadata={"b": [1, 2]})
        assert library.add(document(5), name="y", metadata={"c": None}) == 4
    with Library.open(model, path) as library:
        assert [(d.id, d.name, d.metadata) for d in library.documents] == [
            (0, "x", {}), (2, "x", {"b": [1, 2]}), (4, "y", {"c": None})
        ]  # fmt: skip
        assert library.document("y").id == 4 and library.tokens(2).tolist() == document(6, seed=9).tolist()
        library.delete(4)
        assert library.add(document(5), name="z") == 5
    assert [d.name for d in loaded(path).documents] == ["x", "x", "z"]


def test_a_model_that_depends_on_order_may_build_and_edit_but_not_merge_or_delete_in_the_middle(tmp_path):
    model, path = tiny_model(fusion="stick_breaking"), tmp_path / "a.hsa"
    texts = [document(n, seed) for seed, n in enumerate((9, 14, 6))]
    with Library.create(model, path, **EXACT) as library:
        for text in texts:
            library.add(text)
        library.edit(1, 3, 4, [1, 2, 3])
        for refused in (lambda: library.delete(0), lambda: library.merge([path])):
            with pytest.raises(MemoryFileError, match="order"):
                refused()
        library.delete(2)
    assert_holds(path, model, [texts[0], torch.cat((texts[1][:3], torch.tensor([1, 2, 3]).int(), texts[1][4:]))])
