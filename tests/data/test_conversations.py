"""Rows of conversations in the source's own template: where the loss lies, what a teacher counts, what is refused."""

import json

import pytest
import torch

from hsa_ultralong.data import MixtureConfig, MixtureDataset, collate
from hsa_ultralong.data.chat import parse_messages
from hsa_ultralong.data.chat_form import ChatForm
from hsa_ultralong.data.conversations import open_conversations, read_conversations
from hsa_ultralong.data.tokenizer import PieceTokenizer
from hsa_ultralong.testing.tokenizers import byte_level
from hsa_ultralong.train.teaching import answer_tokens, text_tokens

# SmolLM2's, but for the words of its system message
TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(number, turns=3, system=False):
    first = [{"role": "system", "content": f"You are bot {number}."}] if system else []
    said = [({"role": "user", "content": f"Say {number} and {turn}, user."},
             {"role": "assistant", "content": f"Well {number} and {turn}!"}) for turn in range(turns)]  # fmt: skip
    return [*first, *(message for pair in said for message in pair)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    rows = [{"messages": talk(number, 1 + number % 4, number % 3 == 0)} for number in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def templated(tokenizer):
    import copy

    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = TEMPLATE
    return made


def rows(file, shards, tokenizer, count=6, **options):
    config = MixtureConfig({"chat": 1.0}, chunk_size=16, seed=5, chats=[str(file)], **{"seq_len": 512, **options})
    dataset = MixtureDataset(shards, tokenizer, config, num_rows=count)
    return [dataset[i] for i in range(count)]


@pytest.fixture(scope="module")
def same_shards(templated, corpus_file, tmp_path_factory):
    from hsa_ultralong.data import build_shards

    return build_shards(corpus_file, templated, tmp_path_factory.mktemp("templated") / "out")


def test_a_document_is_the_conversation_as_its_template_writes_it_and_the_loss_counts_the_answers(
    file, same_shards, templated
):
    seen, isolated = 0, set()
    for row in rows(file, same_shards, templated):
        isolated.add(row.isolated)
        written = set()
        for document in range(int(row.segment_ids.max()) + 1):
            inside = row.segment_ids == document
            ids, labels = row.input_ids[inside], row.labels[inside]
            text = templated.decode(ids[1:].tolist()).removesuffix(templated.eos_token)
            turns = text.split("<|im_start|>")[1:]
            assert all(part.startswith(("system\n", "user\n", "assistant\n")) for part in turns)
            said = [{"role": part.split("\n")[0], "content": part.split("\n", 1)[1].removesuffix("<|im_end|>\n")
                     .removesuffix("<|im_end|>")} for part in turns]  # fmt: skip
            whole = templated.apply_chat_template(said, tokenize=False)
            own = whole if said[0]["role"] == "system" else whole.split("<|im_end|>\n", 1)[1]
            assert text == own.removesuffix("\n")
            # the answers, each with the token that ends it, and eos
            answers = "".join(f"{part['content']}<|im_end|>" for part in said if part["role"] == "assistant")
            assert templated.decode(labels[labels >= 0].tolist()) in (answers, answers + templated.eos_token)
            assert "".join(part["content"] for part in said[-2:]) not in written
            written.add("".join(part["content"] for part in said[-2:]))
            seen += 1
        assert not row.answer_mask.any() and (row.evidence == -1).all()
    assert seen > 12 and isolated == {True, False}


def test_beside_a_teacher_every_token_counts_as_text(file, same_shards, templated):
    batch = collate(rows(file, same_shards, templated, 2))
    assert not answer_tokens(batch).any()
    segments = batch["segment_ids"]
    inside = (segments[:, 1:] >= 0) & (segments[:, 1:] == segments[:, :-1])
    assert torch.equal(text_tokens(batch), inside)


def test_a_conversation_longer_than_a_row_ends_with_an_answer_that_fits(tmp_path, same_shards, templated):
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"messages": talk(number, 60)}) for number in range(20)))
    for row in rows(path, same_shards, templated, 3, seq_len=256):
        used = int((row.segment_ids >= 0).sum())
        assert row.segment_ids.max() == 0 and 180 < used < 256
        assert row.labels[used - 1] == row.input_ids[used - 1] == templated.convert_tokens_to_ids("<|im_end|>")


def test_without_a_template_conversations_have_the_plain_form(file, shards, tokenizer):
    for row in rows(file, shards, tokenizer, 2):
        text = tokenizer.decode(row.input_ids.tolist())
        assert "User: Say " in text and "\nAssistant: Well " in text


def test_a_template_that_takes_no_system_message_says_so():
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE.replace(
        "{% for m", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% for m", 1
    )
    form = ChatForm.of(tokenizer)
    assert form.system is None
    with pytest.raises(ValueError, match="takes no system message"):
        form.conversation(PieceTokenizer(tokenizer), talk(1, 1, system=True), is_bare=True)


def test_pairs_and_turns_of_two_speakers_are_conversations(tmp_path):
    pair = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    frame = "Below is an instruction.\n\n### Instruction:\nWhy?\n\n### Response:\n"
    for row in (
        {"prompt": "Why?", "response": "So."}, {"prompt": frame, "response": "So."},
        {"instruction": "Why?", "output": "So."}, {"messages": "Ann: Why?\nBob: So."},
        {"instruction": "Why?", "instances": [{"input": "", "output": "So."}]},
    ):  # fmt: skip
        assert parse_messages(row, "messages", "x") == pair
    given = parse_messages({"instruction": "Add.", "input": "1 2", "output": "3"}, "messages", "x")
    assert given[0]["content"] == "Add.\n\n1 2"
    path = tmp_path / "persona.csv"
    said = "User 1: Hi\nUser 2: Hello: you\nthere\nUser 1: Bye\nUser 2: Yes"
    path.write_text(f'a,Best Generated Conversation\n1,"{said}"\n2,nothing\n')
    (found,) = read_conversations(path)
    assert [message["content"] for message in found] == ["Hi", "Hello: you\nthere", "Bye", "Yes"]
    assert [message["role"] for message in found] == ["user", "assistant"] * 2


def test_splits_share_no_conversation_and_what_is_none_is_refused(file, tmp_path, shards, tokenizer):
    train, held = (open_conversations((str(file),), split) for split in ("train", "validation"))
    assert len(train) + len(held) == 40 and held and not any(one in train for one in held)
    with pytest.raises(ValueError, match="--chat FILE"):
        MixtureDataset(shards, tokenizer, MixtureConfig({"chat": 1.0}, seq_len=512, chunk_size=16))
    with pytest.raises(ValueError, match=r"conversations are read from .*none\.jsonl"):
        read_conversations(tmp_path / "none.jsonl")
    (tmp_path / "turns.jsonl").write_text('{"turns": ["Why?"]}')
    with pytest.raises(ValueError, match="required an object with a list of messages"):
        read_conversations(tmp_path / "turns.jsonl")
    lone = [{"role": "assistant", "content": "Hi."}, {"role": "assistant", "content": "You?"}]
    (tmp_path / "lone.jsonl").write_text(json.dumps({"messages": lone}))
    with pytest.raises(ValueError, match="in no conversation do user and assistant speak in turn"):
        read_conversations(tmp_path / "lone.jsonl")
    with pytest.raises(ValueError, match="no turn of a conversation fits into seq_len=64"):
        path = tmp_path / "wide.jsonl"
        path.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"{n} word " * 90},
                        {"role": "assistant", "content": "x"}]}) for n in range(12)))  # fmt: skip
        rows(path, shards, tokenizer, 1, seq_len=64)
