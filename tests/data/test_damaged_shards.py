"""Damage of token shards is one line, when they are opened or while they are read; never another token or a crash."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest

from hsa_ultralong.data import MixtureConfig, MixtureDataset, TokenShards, token_file
from hsa_ultralong.data.token_file import VERIFIED_FILE
from hsa_ultralong.files.checksum import file_record
from hsa_ultralong.files.strict_json import sealed

FILES = ("tokens.bin", "documents.npy", "words.txt", "manifest.json")


@pytest.fixture
def folder(shards, tmp_path):
    return shutil.copytree(shards.path, tmp_path / "shards")


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files whose every byte was read."""
    names = []
    blocks = token_file.TokenFile._blocks

    def counted(self):
        names.append(self.path.name)
        return blocks(self)

    monkeypatch.setattr(token_file.TokenFile, "_blocks", counted)
    return names


def manifest_of(folder):
    content = json.loads((folder / "manifest.json").read_text())
    del content["sha256"]
    return content


def reseal(folder, **changes):
    """The manifest with the right checksums of the files as they are."""
    content = manifest_of(folder)
    content["files"] = {name: file_record(folder / name) for name in content["files"]}
    (folder / "manifest.json").write_bytes(sealed({**content, **changes}))


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_refused_in_one_line(folder, name):
    file = folder / name
    data, bits = file.read_bytes(), random.Random(name)
    for _ in range(60):
        bit = bits.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="build the shards again") as caught:
            TokenShards.open(folder)
        assert "\n" not in str(caught.value)
    file.write_bytes(data)
    assert TokenShards.open(folder).num_documents > 0


def test_files_are_hashed_once_and_again_when_they_change(folder, hashed):
    TokenShards.open(folder)
    assert hashed == ["tokens.bin"] and (folder / VERIFIED_FILE).is_file()
    TokenShards.open(folder)
    # as another process, which knows what lies in the folder only
    token_file._verified.clear()
    TokenShards.open(folder)
    assert hashed == ["tokens.bin"]
    (folder / "tokens.bin").touch()
    TokenShards.open(folder)
    assert len(hashed) == 2
    (folder / VERIFIED_FILE).write_text('{"tokens.bin": [[1], "x", []]}')
    token_file._verified.clear()
    TokenShards.open(folder)
    assert len(hashed) == 3


def test_a_folder_that_cannot_be_written_is_hashed_once_a_process_and_workers_need_not(folder, hashed, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(token_file, "write_whole", refused)
    opened = TokenShards.open(folder)
    again = pickle.dumps(TokenShards.open(folder))
    assert hashed == ["tokens.bin"] and not (folder / VERIFIED_FILE).exists()
    token_file._verified.clear()
    assert np.array_equal(pickle.loads(again).tokens(1), opened.tokens(1))
    assert hashed == ["tokens.bin"]


@pytest.mark.parametrize("how", ["cut", "emptied", "vanished", "beyond the vocabulary"])
def test_a_file_that_changes_under_a_running_job_is_one_line_and_no_crash(folder, tokenizer, how):
    dataset = MixtureDataset(TokenShards.open(folder), tokenizer, MixtureConfig(weights={"text": 1.0}, seq_len=1024))
    before = [dataset[i].input_ids for i in range(20)]
    if how == "vanished":
        # what is open stays readable
        shutil.rmtree(folder)
        assert all(np.array_equal(dataset[i].input_ids, row) for i, row in enumerate(before))
        return
    if how == "beyond the vocabulary":
        (folder / "tokens.bin").write_bytes(b"\xff" * (folder / "tokens.bin").stat().st_size)
    else:
        os.truncate(folder / "tokens.bin", 4096 if how == "cut" else 0)
    words = "its numbers are below 600" if how == "beyond the vocabulary" else "was cut short while it was in use"
    with pytest.raises(OSError, match=words):
        for i in range(20):
            dataset[i]


def test_tokens_beyond_the_vocabulary_are_refused_when_opened_with_the_right_checksums_too(folder):
    data = np.fromfile(folder / "tokens.bin", dtype="<u2")
    data[len(data) // 2] = 600
    data.tofile(folder / "tokens.bin")
    reseal(folder)
    with pytest.raises(ValueError, match="holds 600, but its numbers are below 600"):
        TokenShards.open(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_documents": 10**25}, "num_documents must be"),
        ({"num_documents": 7}, "does not fit"),
        ({"num_documents": "8"}, "num_documents must be"),
        ({"num_tokens": 5}, "does not fit"),
        ({"num_words": 1}, "does not fit"),
        ({"dtype": "|O"}, "dtype must be"),
        ({"dtype": "<u4"}, "does not fit|no multiple"),
        ({"vocab_size": 0}, "vocab_size must be"),
        ({"files": []}, "files must be"),
        ({"files": {"../../secret": {"bytes": 1, "sha256": "0" * 64}}}, "files must be"),
        ({"num_conversations": 3}, "files must be|conversations"),
        ({"validation_documents": [99]}, "must ascend below"),
        ({"validation_documents": [3, 3]}, "must ascend below"),
        ({"validation_documents": ["a"]}, r"validation_documents\[0\] must be a whole number"),
        ({"validation_fraction": float("nan")}, "validation_fraction must be"),
        ({"tokenizer_fingerprint": None}, "tokenizer_fingerprint must be"),
        ({"format_version": True}, "format_version must be"),
        ({"format_version": [1]}, "format version"),
        ({"more": 1}, "unknown field 'more'"),
    ],
)
def test_manifests_that_make_no_sense_are_refused_with_the_right_checksum_too(folder, changes, words):
    (folder / "manifest.json").write_bytes(sealed({**manifest_of(folder), **changes}))
    with pytest.raises(ValueError, match=words):
        TokenShards.open(folder)


@pytest.mark.parametrize("damage", ["object", "huge", "falling", "no array", "empty"])
def test_offsets_that_make_no_sense_are_refused_before_memory_is_taken(folder, damage):
    file = folder / "documents.npy"
    offsets = np.load(file)
    if damage == "object":
        np.save(file, np.array([{}] * len(offsets)), allow_pickle=True)
    elif damage == "huge":
        shape = f"({len(offsets)},)".encode()
        file.write_bytes(file.read_bytes().replace(shape, b"(2305843009213693951,)"[: len(shape)]))
    elif damage == "falling":
        np.save(file, offsets[[0, 2, 1, *range(3, len(offsets))]])
    else:
        file.write_bytes(b"" if damage == "empty" else b"\x93NUMPY" + b"\xff" * 200)
    reseal(folder)
    with pytest.raises(ValueError, match=r"documents\.npy"):
        TokenShards.open(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_place_of_a_file_is_refused_and_does_not_hang(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=name):
        TokenShards.open(folder)


def test_files_that_are_links_are_read(folder, tmp_path):
    shutil.move(folder / "tokens.bin", tmp_path / "disk")
    (folder / "tokens.bin").symlink_to(tmp_path / "disk")
    assert TokenShards.open(folder).num_tokens > 0
