"""Conversations from files: the template, what the loss counts, and rows packed of them."""

import json

import numpy as np
import pytest
import torch

from hsa_ultralong.data import (
    MixtureConfig,
    MixtureDataset,
    TokenShards,
    build_shards,
    chat_prompt,
    collate,
    conversation_pieces,
)
from hsa_ultralong.data.chat import parse_messages
from hsa_ultralong.testing.factories import tiny_model

CHUNK = 16


def message(role, content):
    return {"role": role, "content": content}


def conversation(i):
    turns = [message("user", f"Question {i}, (what) is it?"), message("assistant", f"It is number {i}.")]
    if i % 3 == 0:
        turns = [
            message("system", "Answer in few words."),
            *turns,
            message("user", "Sure?"),
            message("assistant", "1 yes"),
        ]
    return turns


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": conversation(i)}) + "\n" for i in range(30)))
    return path


@pytest.fixture(scope="module")
def chat_shards(chat_file, corpus_file, tokenizer, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("shards") / "out"
    return build_shards(corpus_file, tokenizer, out_dir, chats=[chat_file], validation_fraction=0.2)


def text(pieces):
    return "".join(piece for piece, _ in pieces)


def test_the_template_is_plain_text_and_answers_are_what_the_loss_counts():
    pieces = conversation_pieces(conversation(0))
    assert text(pieces) == (
        "Answer in few words.\nUser: Question 0, (what) is it?\nAssistant: It is number 0.\n"
        "User: Sure?\nAssistant: 1 yes"
    )
    assert [piece for piece, is_label in pieces if is_label] == [" It is number 0.", " 1 yes"]


def test_a_prompt_is_how_the_conversation_of_the_same_messages_begins(tokenizer):
    messages = conversation(3)
    for count in (2, 4):
        whole = tokenizer.encode(text(conversation_pieces(messages[: count + 1])))
        prompt = tokenizer.encode(chat_prompt(messages[:count]))
        assert whole[: len(prompt)] == prompt and len(whole) > len(prompt)
    assert chat_prompt([message("user", "Hi")]) == "User: Hi\nAssistant:"


def test_conversations_follow_the_documents_with_a_byte_per_token_for_the_loss(
    chat_shards, shards, tokenizer, documents
):
    assert chat_shards.num_conversations == 30 and chat_shards.num_documents == len(documents) + 30
    assert np.array_equal(chat_shards.data[: shards.num_tokens], shards.data)
    assert [chat_shards.documents(split).tolist() for split in ("train", "validation")] == [
        shards.documents(split).tolist() for split in ("train", "validation")
    ]
    assert chat_shards.manifest["format_version"] == 2
    sides = [chat_shards.conversations(split) for split in ("train", "validation")]
    assert sorted(np.concatenate(sides)) == list(range(8, 38)) and min(map(len, sides)) >= 1
    for i in range(8, 38):
        tokens, mask = chat_shards.tokens(i), chat_shards.loss_mask(i)
        pieces = conversation_pieces(conversation(i - 8))
        assert tokens.tolist() == [*tokenizer.encode(text(pieces)), tokenizer.eos_token_id]
        assert tokenizer.decode(tokens[mask]) == text(p for p in pieces if p[1]) + "<|eos|>"
    with pytest.raises(ValueError, match="is no conversation"):
        chat_shards.loss_mask(2)


def sft_rows(shards, tokenizer, count, **options):
    config = MixtureConfig({"sft": 1.0}, **{"seq_len": 256, "chunk_size": CHUNK, "seed": 1, **options})
    return [MixtureDataset(shards, tokenizer, config)[i] for i in range(count)]


def test_rows_hold_whole_conversations_of_their_split_with_labels_on_answers_only(chat_shards, tokenizer):
    known = {tuple(chat_shards.tokens(i).tolist()): i for i in chat_shards.conversations("train")}
    for row in sft_rows(chat_shards, tokenizer, 20):
        assert row.kind == "sft" and row.isolated and row.segment_ids.max() >= 1
        for i in range(row.segment_ids.max() + 1):
            inside = np.flatnonzero(row.segment_ids == i)
            assert inside[0] % CHUNK == 0 and (np.diff(inside) == 1).all()
            mask = chat_shards.loss_mask(known[tuple(row.input_ids[inside].tolist())])
            assert ((row.labels[inside] >= 0) == mask).all()
            assert (row.labels[inside][mask] == row.input_ids[inside][mask]).all()
            # the eos of the document is counted, though it is no word of an answer
            assert (row.answer_mask[inside][:-1] == mask[:-1]).all() and not row.answer_mask[inside[-1]]
        assert (row.labels[row.segment_ids < 0] == -100).all()


def test_a_packed_row_costs_what_its_conversations_cost_alone(chat_shards, tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), chunk_size=CHUNK)
    batch = collate(sft_rows(chat_shards, tokenizer, 2))
    assert batch["isolated"].tolist() == [True, True]
    names = ("input_ids", "labels", "segment_ids")
    packed = model(**{n: batch[n] for n in names}, isolate_documents=batch["isolated"], num_items_in_batch=1).loss
    alone = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for document in range(int(batch["segment_ids"][row].max()) + 1):
            inside = batch["segment_ids"][row] == document
            ids, labels = (batch[name][row : row + 1, inside] for name in ("input_ids", "labels"))
            alone += model(ids, labels=labels, use_cache=False, num_items_in_batch=1).loss
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)


def test_folders_of_conversations_alone_train_and_plain_ones_say_what_is_missing(
    chat_file, shards, tokenizer, tmp_path
):
    alone = build_shards([], tokenizer, tmp_path / "chats", chats=[chat_file.parent])
    assert alone.num_conversations == alone.num_documents == 30 and alone.words == ()
    assert sft_rows(TokenShards.open(alone.path), tokenizer, 1)[0].kind == "sft"
    with pytest.raises(ValueError, match="holds no document"):
        MixtureDataset(alone, tokenizer, MixtureConfig({"sft": 0.5, "text": 0.5}, seq_len=256, chunk_size=CHUNK))
    with pytest.raises(ValueError, match=r"holds no conversation; build the shards with hsa data --chat FILE"):
        sft_rows(shards, tokenizer, 1)
    with pytest.raises(ValueError, match=r"at most seq_len=16 tokens \(the shortest has"):
        sft_rows(alone, tokenizer, 1, seq_len=16)
    with pytest.raises(ValueError, match=r"conversations are read from .*got .*a\.txt"):
        (tmp_path / "a.txt").write_text("a")
        build_shards([], tokenizer, tmp_path / "other", chats=[tmp_path / "a.txt"])


def test_conversations_too_long_for_a_row_are_left_out_with_a_warning(chat_shards, tokenizer, caplog):
    lengths = [len(chat_shards.tokens(i)) for i in chat_shards.conversations("train")]
    limit = -(-min(lengths) // CHUNK) * CHUNK
    for row in sft_rows(chat_shards, tokenizer, 3, seq_len=limit):
        assert row.segment_ids.max() == 0
    assert sum(length > limit for length in lengths) > 0 and "are left out" in caplog.text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "required an object with a list of messages in 'messages', got list"),
        ({"text": "x"}, "got fields text"),
        ({"messages": "x"}, "required an object with a list of messages"),
        (
            {"messages": [{"role": "poet", "content": "x"}]},
            "message 1 has role 'poet', known are system, user, assistant",
        ),
        ({"messages": ["x"]}, "message 1 has role None"),
        ({"messages": [message("user", "x"), message("assistant", " ")]}, "message 2 has no text in 'content'"),
        ({"messages": [message("user", 3)]}, "message 1 has no text"),
        ({"messages": [message("user", "a\ud800"), message("assistant", "b")]}, "half of a character pair"),
        ({"messages": [message("user", "x")]}, "the assistant says nothing"),
    ],
)
def test_bad_conversations_are_named(row, reason):
    with pytest.raises(ValueError, match=f"c.jsonl, line 3: .*{reason}"):
        parse_messages(row, "messages", "c.jsonl, line 3")


def test_what_the_user_says_last_is_left_out_as_nobody_answers():
    messages = [message("user", "a"), message("assistant", " b\n"), message("user", "c")]
    expected = [message("user", "a"), message("assistant", "b")]
    assert parse_messages({"messages": messages}, "messages", "x") == expected
