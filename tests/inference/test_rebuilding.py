"""A memory read again by another model equals one memorised anew; until it is whole the old one stays."""

import errno
import os
import shutil
import signal

import pytest
import torch

from hsa_ultralong.inference import Library, rebuild, rebuilding
from hsa_ultralong.memory import MemoryFile, MemoryFileError, MemoryWriter, verify_memory
from hsa_ultralong.nn.chunk_encoder import ChunkEncoder
from hsa_ultralong.testing.factories import tiny_model
from tests.inference.test_library import EXACT, bits, document
from tests.memory.test_files_crash import die_at, in_child

TEXTS = [document(n, seed) for seed, n in enumerate((30, 13, 50, 4))]


def other_model(**options):
    torch.manual_seed(7)
    model = tiny_model(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def old():
    return tiny_model()


@pytest.fixture
def new():
    return other_model()


def fill(library, texts=TEXTS, close=True):
    for number, text in enumerate(texts):
        is_last = number == len(texts) - 1
        library.add(text, name=f"d{number}", metadata={"n": number}, close=close or not is_last)


@pytest.fixture
def path(old, tmp_path):
    path = tmp_path / "a.hsa"
    with Library.create(old, path, tokenizer="t", metadata={"model": "old", "x": 1}, **EXACT) as library:
        fill(library)
    return path


def records(path):
    with MemoryFile.open(path) as file:
        return [(d.id, d.name, d.metadata, d.num_tokens, d.is_open) for d in file.documents], file.build_state


def files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("close", [True, False])
def test_a_rebuilt_memory_equals_one_that_the_new_model_memorised(old, new, tmp_path, in_place, close):
    path, fresh = tmp_path / "a.hsa", tmp_path / "fresh.hsa"
    with Library.create(old, path, metadata={"model": "old", "x": 1}, **EXACT) as library:
        fill(library, close=close)
        library.delete("d1")
    with Library.create(new, fresh, **EXACT) as library:
        fill(library, close=close)
        library.delete("d1")
    before, old_bits = records(path), bits(path)
    output = None if in_place else tmp_path / "b.hsa"
    result = rebuild(new, path, output, metadata={"model": "new"})
    assert (result.num_documents, result.num_tokens, result.num_tokens_read) == (3, 84, 84)
    assert result.path == (path if in_place else output)
    assert bits(result.path) == bits(fresh) and records(result.path) == before
    assert verify_memory(result.path) == [] and not list(tmp_path.glob(".*"))
    with MemoryFile.open(result.path) as file:
        assert file.spec.metadata["model"] == "new" and file.spec.metadata["x"] == 1
        assert set(files(result.path)) == file.manifest.files() | {"manifest.json", "writer.lock"}
    if not in_place:
        assert bits(path) == old_bits
    with Library.open(new, result.path) as library, Library.open(new, fresh) as expected:
        assert library.add(TEXTS[1], name="more") == 4
        expected.add(TEXTS[1], name="more")
    assert bits(result.path) == bits(fresh)


def test_forms_are_kept_or_chosen(old, new, tmp_path):
    with Library.create(old, tmp_path / "a.hsa", key_values="int8", landmarks="int8") as library:
        fill(library)
    rebuild(new, tmp_path / "a.hsa", tmp_path / "b.hsa")
    rebuild(new, tmp_path / "a.hsa", tmp_path / "c.hsa", key_values="fp8", landmarks="bf16")
    for name, forms in (("b", ("int8", "int8")), ("c", ("fp8", "bf16"))):
        with MemoryFile.open(tmp_path / f"{name}.hsa") as file:
            assert tuple(file.spec.metadata["formats"].values()) == forms
        with Library.create(new, tmp_path / "f.hsa", key_values=forms[0], landmarks=forms[1]) as library:
            fill(library)
        assert bits(tmp_path / f"{name}.hsa") == bits(tmp_path / "f.hsa")
        shutil.rmtree(tmp_path / "f.hsa")


def test_a_model_of_another_shape_can_take_over(old, path, tmp_path):
    wide = tiny_model(chunk_size=8, hidden_size=16, num_attention_heads=2)
    with Library.create(wide, tmp_path / "fresh.hsa", **EXACT) as library:
        fill(library)
    rebuild(wide, path)
    assert bits(path) == bits(tmp_path / "fresh.hsa")
    with pytest.raises(MemoryFileError, match=r"another model.*hsa memory rebuild .*a\.hsa --model"):
        Library.open(old, path)


def test_a_half_read_document_stays_half_read_and_is_finished_by_the_new_model(old, new, tmp_path):
    path = tmp_path / "a.hsa"

    def killed(done, _):
        if done >= 35:
            raise KeyboardInterrupt

    with Library.create(old, path, **EXACT) as library:
        library.add(TEXTS[0], name="d0")
        with pytest.raises(KeyboardInterrupt):
            library.add(TEXTS[2], name="d2", piece_tokens=7, commit_tokens=14, progress=killed)
    rebuild(new, path)
    with Library.open(new, path) as library, Library.create(new, tmp_path / "fresh.hsa", **EXACT) as fresh:
        assert (library.half_read.document.num_tokens, library.half_read.num_tokens) == (28, 50)
        library.add(TEXTS[2], name="d2")
        fresh.add(TEXTS[0], name="d0")
        fresh.add(TEXTS[2], name="d2")
    assert torch.tensor(bits(path)[1][1]).allclose(torch.tensor(bits(tmp_path / "fresh.hsa")[1][1]))
    with pytest.raises(ValueError, match="half-read"):
        with Library.open(new, path) as library, pytest.raises(KeyboardInterrupt):
            library.add(TEXTS[2], name="d3", piece_tokens=7, commit_tokens=14, progress=killed)
        rebuild(old, path, retokenize=lambda tokens, _: tokens)


@pytest.mark.parametrize("in_place", [True, False])
def test_killed_at_any_step_the_old_memory_is_whole_until_the_new_one_is(path, new, tmp_path, in_place, monkeypatch):
    monkeypatch.setattr(rebuilding, "_COMMIT_TOKENS", 20)
    start, output = tmp_path / "start", None if in_place else "b.hsa"
    start.mkdir()
    path.rename(start / "a.hsa")

    def work(folder):
        return rebuild(new, folder / "a.hsa", None if output is None else folder / output)

    shutil.copytree(start, tmp_path / "whole")
    before = bits(start / "a.hsa")
    expected = bits(work(tmp_path / "whole").path)
    step, is_killed = 0, True
    while is_killed:
        run = tmp_path / "run"
        shutil.copytree(start, run)

        def action(step=step, run=run):
            die_at(step)
            work(run)

        status = in_child(action)
        is_killed = os.WIFSIGNALED(status)
        assert status in (0, signal.SIGKILL), f"step {step}"
        assert verify_memory(run / "a.hsa") == []
        assert bits(run / "a.hsa") in ((before, expected) if in_place else (before,)), f"step {step}"
        result = work(run) if in_place or not (run / "b.hsa").exists() else None
        assert bits(run / (output or "a.hsa")) == expected, f"step {step}"
        assert not list(run.glob(".*")) and (result is None or result.num_documents == 4)
        shutil.rmtree(run)
        step += 7
    assert step > 50


def test_a_rebuild_that_fails_goes_on_where_it_was(path, new, tmp_path, monkeypatch):
    monkeypatch.setattr(rebuilding, "_COMMIT_TOKENS", 1)
    forward, calls = ChunkEncoder.forward, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("out of memory")
        return forward(self, *arguments)

    before = bits(path)
    monkeypatch.setattr(ChunkEncoder, "forward", failing)
    with pytest.raises(RuntimeError):
        rebuild(new, path)
    monkeypatch.setattr(ChunkEncoder, "forward", forward)
    assert bits(path) == before and (tmp_path / ".a.hsa.rebuild").is_dir()
    assert 0 < rebuild(new, path).num_tokens_read < 97
    assert rebuild(new, path).num_tokens_read == 0 and not (tmp_path / ".a.hsa.rebuild").exists()


@pytest.mark.parametrize("output", [None, "b.hsa"])
def test_the_error_of_a_rebuild_names_what_it_keeps_and_a_refusal_before_keeps_nothing(
    path, new, tmp_path, monkeypatch, output
):
    monkeypatch.setattr(rebuilding, "_COMMIT_TOKENS", 1)
    target, kept = output and tmp_path / output, tmp_path / f".{output or 'a.hsa'}.rebuild"

    def refused(at):
        def retokenize(tokens, label):
            if at in label:
                raise ValueError(f"{label} is no text")
            return tokens

        with pytest.raises(ValueError, match=f"{at}' is no text") as error:
            rebuild(new, path, target, retokenize=retokenize)
        return str(error.value)

    assert "is kept" not in refused("d0") and not kept.exists()
    assert f"what was read is kept in {kept}: the same command goes on" in refused("d2")
    assert 0 < rebuild(new, path, target).num_tokens_read < 97 and not kept.exists()


def test_what_changed_in_the_old_memory_since_a_killed_rebuild_is_read_again(path, old, new, tmp_path, monkeypatch):
    monkeypatch.setattr(rebuilding, "take_over", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rebuild(new, path)
    monkeypatch.undo()
    with Library.open(old, path) as library:
        library.edit("d1", 2, 3, [1, 2])
        library.delete("d2")
    with Library.create(new, tmp_path / "fresh.hsa", **EXACT) as fresh:
        fill(fresh)
        fresh.edit("d1", 2, 3, [1, 2])
        fresh.delete("d2")
    result = rebuild(new, path)
    assert result.num_tokens_read == 14 + 4
    assert bits(path)[0] == bits(tmp_path / "fresh.hsa")[0]
    # of another model: begun anew
    monkeypatch.setattr(rebuilding, "take_over", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rebuild(old, path)
    monkeypatch.undo()
    assert rebuild(tiny_model(chunk_size=8), path).num_tokens_read == 30 + 14 + 4


def test_readers_keep_the_old_memory_and_writers_are_refused_while_it_is_rebuilt(path, old, new, tmp_path):
    before, seen = bits(path), []

    def look(done, _):
        seen.append(done)
        with pytest.raises(MemoryFileError, match="being written"):
            Library.open(old, path)
        with pytest.raises(MemoryFileError, match="being written"):
            rebuild(new, path)
        assert bits(path) == before

    snapshot = MemoryFile.open(path)
    rebuild(new, path, progress=look)
    assert seen == sorted(seen) and seen[-1] == 97
    assert snapshot.read("keys_values", 0, snapshot.num_chunks).shape[0] == snapshot.num_chunks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": "other"}, "--old-tokenizer"),
        ({"tokenizer": ""}, "token ids must be"),
        ({"key_values": "fp4"}, "fp4"),
        ({"output": "full"}, "exists already"),
    ],
)
def test_a_refused_rebuild_leaves_nothing_and_changes_nothing(path, old, tmp_path, options, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    before, there = bits(path), files(tmp_path)
    small = other_model(vocab_size=20)
    output = tmp_path / options.pop("output") if "output" in options else None
    with pytest.raises(ValueError, match=words):
        rebuild(small, path, output, **{"tokenizer": "t", **options})
    assert bits(path) == before and files(tmp_path) == there


def test_token_ids_of_another_tokenizer_are_translated(path, new, tmp_path):
    asked = []

    def retokenize(tokens, label):
        asked.append(label)
        return tokens.flip(0).tolist()

    rebuild(new, path, tokenizer="u", retokenize=retokenize)
    with Library.create(new, tmp_path / "fresh.hsa", **EXACT) as library:
        fill(library, [text.flip(0) for text in TEXTS])
    assert bits(path) == bits(tmp_path / "fresh.hsa") and asked == ["'d0'", "'d1'", "'d2'", "'d3'"]
    with MemoryFile.open(path) as file:
        assert file.spec.tokenizer == "u"


def test_shards_are_copied_where_there_are_no_links(path, new, tmp_path, monkeypatch):
    rebuild(new, path, tmp_path / "b.hsa")

    def no_link(*_, **__):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    rebuild(new, path)
    assert bits(path) == bits(tmp_path / "b.hsa") and verify_memory(path) == []
    with MemoryWriter.open(path) as writer:
        assert writer.compact() >= 0
