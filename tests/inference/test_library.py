"""Library: a memory file that is built, extended, edited and merged equals one built at once; kills lose nothing."""

import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsa_ultralong.inference import Library, last_logits
from hsa_ultralong.inference.editor import difference
from hsa_ultralong.memory import MemoryFile, MemoryFileError, verify_memory
from hsa_ultralong.memory.chunk_memory import ChunkMemory
from hsa_ultralong.testing.factories import random_tokens, tiny_model
from tests.inference.test_memory_states import assert_same_chunks

EXACT = {"key_values": "fp64", "landmarks": "fp64"}
CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0].to(torch.int32)


def loaded(path):
    return ChunkMemory.load(path, store="device", dtype=torch.float64)


def assert_holds(path, model, texts, close=True):
    """The file equals a memory of these texts built at once."""
    memory = loaded(path)
    assert [d.tokens.tolist() for d in memory.documents] == [text.tolist() for text in texts]
    if texts:
        assert_same_chunks(memory, model.memorize(texts, close=close))


def bits(path):
    """Everything that a memory holds, comparable bit for bit."""
    with MemoryFile.open(path) as file:
        columns = {name: file.read(name, 0, file.num_chunks) for name in file.spec.columns}
        used = torch.arange(file.spec.chunk_size) < columns["lengths"][:, None]
        pairs = columns.pop("keys_values").movedim(1, 2)[used]
        tokens = [file.document_tokens(d.id).tolist() for d in file.documents]
        return tokens, [pairs.tolist(), *(column.tolist() for column in columns.values())]


KINDS = ["add", "add open", "extend", "close", "edit", "replace", "delete", "merge", "compact", "reopen"]
NUMBERS = (st.integers(0, 5), st.integers(0, 30), st.integers(0, 12), st.integers(0, 12))
OPERATIONS = st.lists(st.tuples(st.sampled_from(KINDS), *NUMBERS), min_size=1, max_size=7)


class Changes:
    """A library and the texts that it should hold, through any operations."""

    def __init__(self, folder, model, **formats):
        self.folder, self.model, self.formats = folder, model, formats
        self.path, self.texts, self.is_open, self.ids = folder / "a.hsa", [], False, set()
        self.library = Library.create(model, self.path, **formats)

    def apply(self, number, kind, which, place, remove, put):
        library, texts = self.library, self.texts
        new = document(put, seed=number) if put else document(1)[:0]
        if kind in ("add", "add open") and put:
            self.is_open = kind == "add open"
            added = library.add(new, name=f"n{number}", piece_tokens=5, close=not self.is_open)
            # also after deletions, no id comes again
            assert added not in self.ids
            self.ids.add(added)
            texts.append(new)
        elif kind == "close":
            library.close_document()
            self.is_open = False
        elif kind == "compact":
            library.compact()
        elif kind == "reopen":
            library.close()
            self.library = Library.open(self.model, self.path)
        elif kind == "merge" and put:
            with Library.create(self.model, self.folder / "b.hsa", **self.formats) as second:
                second.add(new, name="merged")
            self.ids.update(library.merge([self.folder / "b.hsa"]))
            texts.append(new)
            self.is_open = False
            shutil.rmtree(self.folder / "b.hsa")
        elif texts:
            self.change(kind, which % len(texts), place, remove, new)

    def change(self, kind, which, place, remove, new):
        library, texts, id = self.library, self.texts, self.library.documents[which].id
        if kind == "extend" and len(new):
            self.is_open = place > 15
            library.extend(new, close=not self.is_open)
            texts[-1] = torch.cat((texts[-1], new))
        elif kind == "edit":
            start = min(place, len(texts[which]))
            stop = min(start + remove, len(texts[which]))
            changed = torch.cat((texts[which][:start], new, texts[which][stop:]))
            if len(changed):
                said = library.plan(id, start, stop, len(new))
                assert library.edit(id, start, stop, new) == said
                texts[which] = changed
        elif kind == "replace" and len(new):
            library.replace(id, new)
            texts[which] = new
        elif kind == "delete":
            library.delete(id)
            self.is_open = self.is_open and which < len(texts) - 1
            del texts[which]


@given(OPERATIONS)
def test_any_sequence_of_operations_equals_a_rebuild(operations):
    model = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        changes = Changes(Path(folder), model, **EXACT)
        changes.apply(99, "add", 0, 0, 0, 19)
        for number, operation in enumerate(operations):
            changes.apply(number, *operation)
        changes.library.close()
        assert_holds(changes.path, model, changes.texts, close=not changes.is_open)
        assert verify_memory(changes.path) == []
        if changes.is_open:
            found, rebuilt = loaded(changes.path), model.memorize(changes.texts, close=False)
            torch.testing.assert_close(last_logits(model, found, 1), last_logits(model, rebuilt, 1), **CLOSE)


@settings(max_examples=8)
@given(OPERATIONS)
def test_in_bf16_any_sequence_of_operations_equals_a_rebuild_to_a_rounding(operations):
    model, formats = tiny_model(dtype=torch.float32), {"key_values": "bf16", "landmarks": "bf16"}
    with tempfile.TemporaryDirectory() as folder:
        changes = Changes(Path(folder), model, **formats)
        changes.apply(99, "add", 0, 0, 0, 19)
        for number, operation in enumerate(operations):
            changes.apply(number, *operation)
        changes.library.close()
        if not changes.texts:
            return
        with Library.create(model, Path(folder) / "c.hsa", **formats) as library:
            for number, text in enumerate(changes.texts):
                library.add(text, close=not changes.is_open or number < len(changes.texts) - 1)
        found, rebuilt = loaded(changes.path), loaded(Path(folder) / "c.hsa")
        used = (torch.arange(found.chunk_size) < found.lengths[..., None]).flatten(1)
        # fp32 differs in its last bits, so that here and there a number is rounded to the neighbour in bf16
        near = {"rtol": 2**-7, "atol": 1e-5}
        for a, b in ((found.k[used], rebuilt.k[used]), (found.v[used], rebuilt.v[used])):
            torch.testing.assert_close(a, b, **near)
            assert (a != b).float().mean() < 0.02
        torch.testing.assert_close(found.landmarks, rebuilt.landmarks, **near)


def test_open_documents_grow_and_go_on_exactly(tmp_path):
    model, path = tiny_model(), tmp_path / "a.hsa"
    text = document(9)
    with Library.create(model, path, **EXACT) as library:
        library.add(text, close=False)
        for seed, count in enumerate((1, 2, 3, 17)):
            more = document(count, seed=seed)
            library.extend(more)
            text = torch.cat((text, more))
            assert_holds(path, model, [text], close=False)
            opened, rebuilt = loaded(path), model.memorize(text, close=False)
            torch.testing.assert_close(last_logits(model, opened, 2), last_logits(model, rebuilt, 2), **CLOSE)
        library.edit(0, 3, 5, document(6, seed=8))
        library.close_document()
        assert_holds(path, model, [torch.cat((text[:3], document(6, seed=8), text[5:]))])


# half an ulp of bf16, half a step of int8, and half an ulp of fp8, all of the largest number in a row
ROUNDING = {"bf16": 2**-8, "int8": 1 / 253, "fp8": 1 / 16}


@pytest.mark.parametrize("landmarks", ["bf16", "int8"])
@pytest.mark.parametrize("key_values", ["bf16", "int8", "fp8"])
def test_formats_of_two_and_of_one_byte_round_the_same_memory(tmp_path, key_values, landmarks):
    model, text = tiny_model(), document(50)
    with Library.create(model, tmp_path / "a.hsa", key_values=key_values, landmarks=landmarks) as library:
        library.add(text, piece_tokens=7)
    exact, memory = model.memorize(text), loaded(tmp_path / "a.hsa")
    used = (torch.arange(exact.chunk_size) < exact.lengths[..., None]).flatten(1)
    for a, b, format in (
        (exact.k[used], memory.k[used], key_values),
        (exact.v[used], memory.v[used], key_values),
        (exact.landmarks, memory.landmarks, landmarks),
    ):
        assert ((a - b).abs() <= 1.001 * ROUNDING[format] * a.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("commits", range(5))
def test_an_interrupted_add_goes_on_and_gives_the_same_bits(tmp_path, monkeypatch, commits):
    model, text = tiny_model(), document(60)
    options = {"name": "book", "metadata": {"a": 1}, "piece_tokens": 7, "commit_tokens": 14}
    with Library.create(model, tmp_path / "whole.hsa", **EXACT) as library:
        library.add(text, **options)
    with Library.create(model, tmp_path / "cut.hsa", **EXACT) as library:
        commit, done = library.writer.commit, []

        def fail(*arguments):
            if len(done) == commits:
                raise OSError("no space left on device")
            done.append(1)
            return commit(*arguments)

        monkeypatch.setattr(library.writer, "commit", fail)
        if commits < 5:
            with pytest.raises(OSError):
                library.add(text, **options)
        monkeypatch.undo()
        assert sum(d.num_tokens for d in library.documents) == 14 * commits
        library.add(text, **options)
    assert bits(tmp_path / "cut.hsa") == bits(tmp_path / "whole.hsa")


def test_another_text_of_the_same_name_does_not_go_on_with_the_interrupted_one(tmp_path):
    model = tiny_model()
    with Library.create(model, tmp_path / "a.hsa", **EXACT) as library:
        library.add(document(20), name="x", close=False)
        library.add(document(30, seed=5), name="x")
    assert_holds(tmp_path / "a.hsa", model, [document(20), document(30, seed=5)])


def test_a_failed_change_leaves_the_last_commit_and_a_usable_library(tmp_path, monkeypatch):
    model, path = tiny_model(), tmp_path / "a.hsa"
    texts = [document(20), document(11, seed=1)]
    with Library.create(model, path, **EXACT) as library:
        for text in texts:
            library.add(text)
        monkeypatch.setattr(type(model.model.chunk_encoder), "forward", lambda *_: 1 / 0)
        for change in (
            lambda: library.add(document(9)),
            lambda: library.extend(document(9)),
            lambda: library.edit(0, 3, 4, [1, 2]),
            lambda: library.replace(1, document(15, seed=4)),
        ):
            with pytest.raises(ZeroDivisionError):
                change()
        monkeypatch.undo()
        assert_holds(path, model, texts)
        library.extend(document(9), close=True)
    assert_holds(path, model, [texts[0], torch.cat((texts[1], document(9)))])


def test_parts_built_by_two_processes_merge_into_what_one_builds(tmp_path):
    model = tiny_model()
    texts = [document(n, seed) for seed, n in enumerate((13, 30, 8, 21))]
    children = []
    for part in range(2):
        child = os.fork()
        if child == 0:
            with Library.create(model, tmp_path / f"{part}.hsa", **EXACT) as library:
                for text in texts[2 * part : 2 * part + 2]:
                    library.add(text)
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    with Library.open(model, tmp_path / "0.hsa") as library:
        library.merge([tmp_path / "1.hsa"])
    assert_holds(tmp_path / "0.hsa", model, texts)


def changes(model, path):
    """One pass over building, appending, editing and merging; each step does nothing if it is done already."""
    with Library.create(model, path / "a.hsa", exist_ok=True, **EXACT) as library:
        done = len(library.documents)
        finished = done > 1 or (done == 1 and not library.documents[0].is_open)
        if not finished:
            library.add(document(60), name="book", piece_tokens=7, commit_tokens=14)
        if len(library.documents) < 2:
            library.add(document(23, seed=1), name="notes", piece_tokens=7, commit_tokens=14)
        notes = library.documents[1]
        if notes.is_open:
            library.add(document(23, seed=1), name="notes", piece_tokens=7, commit_tokens=14)
        if library.documents[1].num_tokens == 23:
            library.extend(document(9, seed=2), close=True, piece_tokens=7)
        if library.tokens(0)[5] != 36:
            library.edit(0, 5, 8, [36, 36])
        if len(library.documents) < 3:
            library.merge([path / "b.hsa"])
        library.compact()


def test_fifty_kills_at_random_moments_lose_nothing(tmp_path):
    model = tiny_model()
    with Library.create(model, tmp_path / "b.hsa", **EXACT) as library:
        library.add(document(17, seed=3), name="other")
    whole = tmp_path / "whole"
    whole.mkdir()
    shutil.copytree(tmp_path / "b.hsa", whole / "b.hsa")
    changes(model, whole)
    expected, start = bits(whole / "a.hsa"), time.monotonic()
    shutil.rmtree(whole / "a.hsa")
    changes(model, whole)
    seconds = time.monotonic() - start
    assert bits(whole / "a.hsa") == expected
    rng, kills, rounds = random.Random(0), 0, 0
    while kills < 50:
        rounds += 1
        assert rounds < 200
        place = tmp_path / f"r{rounds}"
        place.mkdir()
        shutil.copytree(tmp_path / "b.hsa", place / "b.hsa")
        # one memory is killed again and again until a run comes to its end
        for _ in range(100):
            child = os.fork()
            if child == 0:
                try:
                    changes(model, place)
                    os._exit(0)
                finally:
                    os._exit(1)
            time.sleep(rng.uniform(0, 0.7 * seconds))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL), status
            if status == 0:
                break
            kills += 1
            if (place / "a.hsa" / "manifest.json").exists():
                MemoryFile.open(place / "a.hsa").close()
        assert bits(place / "a.hsa") == expected
        shutil.rmtree(place)


def test_refusals_are_one_clear_error(tmp_path):
    model, path = tiny_model(), tmp_path / "a.hsa"
    with Library.create(model, path, **EXACT) as library:
        library.add(document(9), name="x")
        library.add(document(9), name="x")
        with pytest.raises(ValueError, match=r"2 documents are named 'x'; use one of the ids \[0, 1\]"):
            library.document("x")
        with pytest.raises(ValueError, match="'y' does not exist; the memory holds 'x', 'x'"):
            library.delete("y")
        with pytest.raises(MemoryFileError, match="writ"):
            Library.open(model, path)
        for bad in ([], [99], [[1, 2], [3, 4]]):
            with pytest.raises(ValueError):
                library.add(bad)
    with pytest.raises(MemoryFileError, match="another model"):
        Library.open(tiny_model(hidden_size=16, num_attention_heads=2), path)
    with pytest.raises(MemoryFileError):
        Library.create(model, path, **EXACT)
    with pytest.raises(ValueError, match="unknown format 'fp4'"):
        Library.create(model, tmp_path / "b.hsa", key_values="fp4")
    assert not (tmp_path / "b.hsa").exists()


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_the_difference_of_two_texts_turns_one_into_the_other(old, new):
    before, after = (torch.tensor(x, dtype=torch.int32) for x in (old, new))
    start, stop, count = difference(before, after)
    assert [*old[:start], *new[start : start + count], *old[stop:]] == new
    assert stop - start <= len(old) and (old != new or (start, stop, count) == (len(old), len(old), 0))
