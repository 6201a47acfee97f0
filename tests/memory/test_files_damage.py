"""Damaged memory files: everything is found by verify, and nothing damaged is ever returned."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from hsa_ultralong.memory import Column, MemoryFile, MemoryFileError, MemorySpec, MemoryWriter, verify_memory
from hsa_ultralong.memory.files.shard import PAGE_BYTES, shard_layout
from hsa_ultralong.memory.files.verification import verify_file
from tests.memory.test_files_model import COLUMNS, S, add_document, build, rows, same_bytes, set_mark, state_of

# About 40 KiB a chunk, so that shards have several pages.
LARGE = MemorySpec(S, {**COLUMNS, "keys_values": Column((2, S, 5, 512), torch.bfloat16)}, fingerprint="f" * 64)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Two shards of about 3 and 1 MiB, four documents, the last one open."""
    path = tmp_path_factory.mktemp("damage") / "a.hsa"
    with MemoryWriter.create(path, LARGE) as writer:
        for number in range(3):
            add_document(writer, f"d{number}", list(range(30 * number, 30 * number + 25)))
        writer.commit()
        add_document(writer, "open", list(range(200, 230)), close=False, mark=7)
        writer.commit()
    return path


def flip(path: Path, offset: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ (1 << bit)]))


def owners(path: Path, name: str, offset: int) -> set[int]:
    """The chunks, in document order, that own the byte, and -1 for the header."""
    with MemoryFile.open(path) as file:
        record = next(record for record in file.manifest.shards if record.file == name)
        layout = shard_layout(file.spec, record.num_chunks)
        if offset < len(layout.header):
            return {-1}
        column = max((c for c in layout.offsets if layout.offsets[c] <= offset), key=lambda c: layout.offsets[c])
        row = (offset - layout.offsets[column]) // layout.row_bytes[column]
        chunks, position = set(), 0
        for document in file.documents:
            for shard, first, count in document.extents:
                if shard == record.number and first <= row < first + count:
                    chunks.add(position + row - first)
                position += count
        return chunks


def check_that_no_answer_is_wrong(path: Path, name: str, touched: set[int]) -> str:
    """Opening refuses, or each read of a touched chunk does, and every other read is right. Returns which."""
    try:
        file = MemoryFile.open(path)
    except MemoryFileError as error:
        assert Path(name).name in str(error) and "\n" not in str(error)
        return "refused"
    with file:
        refused = set()
        numbers = [n for d in range(3) for n in range(30 * d, 30 * d + 25)] + list(range(200, 230))
        for column in file.spec.columns:
            # A range of several pages, with the damage in one of them.
            first = min(max(0, max(touched, default=0) - 30), len(numbers) - 32)
            try:
                value = file.read(column, first, first + 32)
            except MemoryFileError as error:
                assert name in str(error)
            else:
                assert same_bytes(value, rows(numbers[first : first + 32], file.spec)[column])
            for chunk in touched.union(random.Random(0).sample(range(len(numbers)), 12)):
                number = numbers[chunk]
                try:
                    value = file.fetch(column, torch.tensor([chunk]))
                except MemoryFileError as error:
                    assert (name in str(error) and "concerned: 'd" in str(error)) or "'open'" in str(error)
                    refused.add(chunk)
                else:
                    assert same_bytes(value, rows([number], file.spec)[column])
        assert touched <= refused
    return "fetch"


def test_a_hundred_flipped_bits_are_all_found_and_none_reaches_an_answer(large, tmp_path):
    path = tmp_path / "a.hsa"
    shutil.copytree(large, path)
    names = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and f.name != "writer.lock")
    assert len(names) == 6
    generator, seen = random.Random(0), Counter()
    for number in range(100):
        # Half of them anywhere in the shards, half spread over the small files.
        name = generator.choice(
            [n for n in names if n.startswith("shards/") and "pages" not in n] * (number % 2) or names
        )
        offset, bit = generator.randrange((path / name).stat().st_size), generator.randrange(8)
        is_shard = name.endswith(".safetensors") and name.startswith("shards/")
        touched = owners(path, name, offset) if is_shard else {-1}
        flip(path / name, offset, bit)
        damages = verify_memory(path)
        assert [damage.file for damage in damages] == [name], (name, offset, bit)
        if is_shard:
            assert damages[0].page == offset // PAGE_BYTES or touched == {-1}
            assert damages[0].documents
        how = check_that_no_answer_is_wrong(path, name, touched)
        assert how == "refused" or touched != {-1}
        seen[how] += 1
        flip(path / name, offset, bit)
    assert verify_memory(path) == []
    assert seen["refused"] > 20 and seen["fetch"] > 20


def test_a_flip_after_opening_is_found_by_the_first_fetch_and_by_verify(large, tmp_path):
    path = tmp_path / "a.hsa"
    shutil.copytree(large, path)
    with MemoryFile.open(path) as file:
        first, _ = file.chunk_range(2)
        flip(path / "shards/000001.safetensors", (path / "shards/000001.safetensors").stat().st_size - 5000, 3)
        file.fetch("keys_values", torch.tensor([0]))
        with pytest.raises(MemoryFileError, match=r"shards/000001.safetensors, page 2: .* concerned: .*'d2'"):
            file.fetch("keys_values", torch.tensor([first + 24, 0]))
        assert [(damage.file, damage.page) for damage in verify_file(file)] == [("shards/000001.safetensors", 2)]


@pytest.mark.parametrize("name", ["shards/000001.safetensors", "shards/000002.pages.json", "manifest.json"])
@pytest.mark.parametrize("cut", [1, 1000, None])
def test_truncated_or_missing_files_are_refused_with_one_line(large, tmp_path, name, cut):
    path = tmp_path / "a.hsa"
    shutil.copytree(large, path)
    if cut is None:
        (path / name).unlink()
    else:
        os.truncate(path / name, max(0, (path / name).stat().st_size - cut))
    with pytest.raises(MemoryFileError) as refused:
        MemoryFile.open(path)
    assert Path(name).name in str(refused.value) and "\n" not in str(refused.value)
    if name != "manifest.json":
        with pytest.raises(MemoryFileError, match=Path(name).name) as refused:
            MemoryWriter.open(path).close()
        assert [damage.file for damage in verify_memory(path)] == [name]


def test_a_missing_continuation_is_refused(large, tmp_path):
    path = tmp_path / "a.hsa"
    shutil.copytree(large, path)
    next(path.glob("continuation-*")).unlink()
    with pytest.raises(
        MemoryFileError, match=r"continuation-000002.safetensors: is missing; document concerned: 'open'"
    ):
        MemoryFile.open(path)


def test_a_file_cut_while_it_is_open_gives_an_error(large, tmp_path):
    path = tmp_path / "a.hsa"
    shutil.copytree(large, path)
    with MemoryFile.open(path) as file:
        file.fetch("keys_values", torch.tensor([74]))
        os.truncate(path / "shards/000001.safetensors", 5000)
        with pytest.raises(MemoryFileError, match="truncated"):
            file.fetch("keys_values", torch.tensor([74]))


def test_a_message_names_three_documents_and_counts_the_others(tmp_path):
    path = build(tmp_path / "a.hsa", [])
    with MemoryWriter.open(path) as writer:
        for number in range(15):
            add_document(writer, f"n{number}", [number])
        writer.commit()
    # In the column of keys and values, which is one page with everything else.
    flip(path / "shards/000001.safetensors", (path / "shards/000001.safetensors").stat().st_size // 2, 0)
    with pytest.raises(MemoryFileError, match="concerned: 'n0', 'n1', 'n2' and 12 more"):
        MemoryFile.open(path)


def test_damaged_documents_can_be_deleted_and_compacted_away(large, tmp_path):
    path = tmp_path / "a.hsa"
    shutil.copytree(large, path)
    # Page 1 holds keys and values of the second document and no other column.
    flip(path / "shards/000001.safetensors", 2 * PAGE_BYTES - 100, 0)
    damage = verify_memory(path)[0]
    assert damage.page == 1 and damage.document_ids == (1, 2) and damage.documents == ("'d1'", "'d2'")
    with MemoryWriter.open(path) as writer:
        before = writer.documents
        writer.splice_chunks(1, 0, 1, None, 24 * S)
        with pytest.raises(MemoryFileError, match=r"page 1: .* delete these documents and compact"):
            writer.compact()
        assert [document.id for document in writer.documents] == [document.id for document in before]
        for id in damage.document_ids:
            writer.delete_document(id)
        writer.compact()
    assert verify_memory(path) == []
    assert len(MemoryFile.open(path).documents) > 1


@pytest.mark.parametrize("doing", ["merge", "export"])
def test_merging_and_exporting_verify_every_byte_first(large, tmp_path, doing):
    from hsa_ultralong.memory import export_memory

    path = tmp_path / "a.hsa"
    shutil.copytree(large, path)
    with MemoryWriter.open(path) as writer:
        writer.close_document(3)
        writer.commit()
    target = tmp_path / "b.hsa"
    with MemoryFile.open(path) as file, MemoryWriter.create(tmp_path / "c.hsa", LARGE) as writer:
        flip(path / "shards/000001.safetensors", 2 * PAGE_BYTES + 100, 0)
        with pytest.raises(MemoryFileError, match=r"refused, .*000001.safetensors, page 2"):
            writer.merge([file]) if doing == "merge" else export_memory(file, target)
        assert writer.documents == ()
    assert not target.exists()
    assert list((tmp_path / "c.hsa" / "shards").iterdir()) == []


def test_a_damaged_memory_is_not_written_to_its_readers(tmp_path):
    path = build(tmp_path / "a.hsa", [[1, 2]], is_open=True)
    before = state_of(path)
    data = (path / "manifest.json").read_bytes()
    flip(path / "manifest.json", len(data) // 2, 1)
    for opening in (MemoryFile.open, MemoryWriter.open):
        with pytest.raises(MemoryFileError, match=r"manifest\.json is damaged"):
            opening(path)
    # Nothing was cleaned up on the word of a damaged manifest.
    (path / "manifest.json").write_bytes(data)
    assert state_of(path) == before


def test_verify_reports_its_progress(large):
    calls: list[tuple[int, int]] = []
    assert verify_memory(large, lambda done, total: calls.append((done, total))) == []
    assert calls[-1][0] == calls[-1][1] > 3 * PAGE_BYTES
    assert calls == sorted(calls)


def test_a_superseded_snapshot_is_verified_through_its_own_files(large, tmp_path):
    path = tmp_path / "a.hsa"
    shutil.copytree(large, path)
    file = MemoryFile.open(path)
    with MemoryWriter.open(path) as writer:
        writer.delete_document(0)
        writer.compact()
        set_mark(writer, 8)
        writer.commit()
    assert not (path / "shards/000001.safetensors").exists()
    assert verify_file(file) == []
