from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest

from hsa_ultralong.data import (
    EVALUATION_WORDS,
    TokenShards,
    build_shards,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from hsa_ultralong.data.build import _validation_documents, split_pieces


def test_every_document_is_stored_as_bos_tokens_eos(shards, tokenizer, documents):
    assert shards.num_documents == len(documents)
    for i, document in enumerate(documents):
        assert shards.tokens(i).tolist() == [*tokenizer.encode(document), tokenizer.eos_token_id]
    assert shards.num_tokens == sum(len(shards.tokens(i)) for i in range(len(documents)))
    assert shards.data.dtype == np.uint16


def test_tokens_of_pieces_are_tokens_of_the_whole(tokenizer, documents):
    text = documents[1] + "\n\n  é漢 don't  1 a\n\tb " * 50
    pieces = split_pieces(text, 100)
    assert len(pieces) > 50 and "".join(pieces) == text
    joined = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]
    assert joined == tokenizer.encode(text, add_special_tokens=False)


def test_padding_and_truncation_left_behind_by_others_do_not_reach_the_shards(shards, corpus_file, tokenizer, tmp_path):
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    again = build_shards(corpus_file, tokenizer, tmp_path / "out")
    assert np.array_equal(again.data, shards.data)


def test_splits_are_disjoint_cover_all_and_follow_the_text(shards, corpus_file, tokenizer, documents, tmp_path):
    train, validation = shards.documents("train"), shards.documents("validation")
    assert sorted([*train, *validation]) == list(range(len(documents))) and len(validation) >= 1
    turned = tmp_path / "turned.txt"
    turned.write_text("\x1e\n".join(reversed(documents)), encoding="utf-8")
    again = build_shards(turned, tokenizer, tmp_path / "out", validation_fraction=0.2)
    held_out = {documents[i] for i in validation}
    assert {documents[::-1][i] for i in again.documents("validation")} == held_out


def test_either_split_has_a_document_if_two_differ():
    hashes = np.array([1 << 60, 1 << 63, 1 << 63], dtype=np.uint64)
    assert _validation_documents(hashes, 0.001) == [0]
    assert _validation_documents(hashes, 0.99) == [0]
    assert _validation_documents(hashes, 0.0) == []
    assert _validation_documents(hashes[1:], 0.5) == []


def test_word_bank_has_plain_words_and_no_evaluation_word(shards, documents):
    assert len(shards.words) > 50
    assert all(word.isalpha() and word.islower() and 4 <= len(word) <= 10 for word in shards.words)
    assert "amber" in documents[0] and not EVALUATION_WORDS.intersection(shards.words)


def test_progress_counts_bytes_of_text_and_tokens(corpus_file, tokenizer, documents, tmp_path):
    seen: list[tuple[int, int]] = []
    shards = build_shards(corpus_file, tokenizer, tmp_path / "out", progress=lambda *counts: seen.append(counts))
    assert seen == sorted(seen)
    assert seen[-1] == (sum(len(document.encode()) for document in documents), shards.num_tokens)


def test_the_folder_holds_its_tokenizer_and_nothing_else(corpus_file, tokenizer, tmp_path):
    shards = build_shards(corpus_file, tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tokenizer_fingerprint(load_tokenizer(shards.path / "tokenizer")) == tokenizer_fingerprint(tokenizer)
    names = {"tokens.bin", "documents.npy", "words.txt", "manifest.json", "tokenizer"}
    assert {path.name for path in shards.path.iterdir()} == names and shards.manifest["format_version"] == 1


def test_folders_of_the_first_version_are_read(shards, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(shards.path, old)
    fields = {
        name: value for name, value in shards.manifest.items() if name not in ("num_conversations", "bad_records")
    }
    (old / "manifest.json").write_text(json.dumps(fields))
    opened = TokenShards.open(old)
    assert opened.documents("train").tolist() == shards.documents("train").tolist()
    assert opened.num_conversations == 0 and len(opened.conversations("train")) == 0


def test_build_refuses_an_occupied_directory_and_a_wrong_fraction(corpus_file, tokenizer, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="exists already"):
        build_shards(corpus_file, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="below 1"):
        build_shards(corpus_file, tokenizer, tmp_path / "out", validation_fraction=1.0)


def test_open_refuses_damage_and_another_tokenizer(shards, tokenizer, documents, tmp_path):
    TokenShards.open(shards.path, tokenizer)
    with pytest.raises(ValueError, match="another tokenizer"):
        TokenShards.open(shards.path, train_tokenizer(documents[:2], 300))
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        TokenShards.open(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(shards.path, copy)
    with (copy / "tokens.bin").open("ab") as file:
        file.write(b"xx")
    with pytest.raises(ValueError, match=r"tokens.bin has .* build the shards again"):
        TokenShards.open(copy)
    (copy / "manifest.json").write_text(json.dumps({**shards.manifest, "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        TokenShards.open(copy)


def test_shards_pickle_as_their_path(shards):
    data = pickle.dumps(shards)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).tokens(0), shards.tokens(0))


def test_wrong_split_and_index_are_refused(shards):
    with pytest.raises(ValueError, match="split must be one of"):
        shards.documents("test")
    with pytest.raises(ValueError, match="document index"):
        shards.tokens(99)
