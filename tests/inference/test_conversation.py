"""A conversation: what is in the prompt, what is remembered, and what the next conversation knows."""

import pytest
import torch

from hsa_ultralong.inference import Library, ask
from hsa_ultralong.inference.conversation import Conversation, next_turn, turn_text
from hsa_ultralong.memory import ChunkMemory
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.testing.tokenizers import byte_level, sentence_piece


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=300, chunk_size=8).float()


def said(talk, text):
    stream = talk.stream(text)
    for _ in stream:
        pass
    return stream.answer, talk.keep(text, stream.answer.text)


def memory_of(model, tokenizer, *texts):
    return model.memorize([torch.tensor(tokenizer(text)["input_ids"]) for text in texts])


def test_with_a_chat_template_the_turns_so_far_stand_in_the_prompt(model):
    tokenizer = byte_level()
    talk = Conversation(model, tokenizer, memory_of(model, tokenizer, "A fox. " * 9), system="Be.", max_new_tokens=3)
    first, _ = said(talk, "Who?")
    asked = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Who?"}]
    assert first == ask(model, tokenizer, talk.memory, asked, max_new_tokens=3)
    second, _ = said(talk, "Why?")
    asked += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Why?"}]
    assert second == ask(model, tokenizer, talk.memory, asked, max_new_tokens=3)
    talk.clear()
    assert said(talk, "Who?")[0] == first


def test_the_oldest_turns_are_left_out_where_the_prompt_is_full_and_a_message_that_is_too_long_is_refused(model):
    talk = Conversation(model, byte_level(), max_new_tokens=2, context_tokens=40)
    talk.messages = [{"role": role, "content": "x" * 8} for role in ("user", "assistant") * 3]
    prompt, room = talk.prompt("y" * 6)
    assert [one["content"][0] for one in prompt] == ["x", "x", "y"] and talk.num_left_out == 4 and room >= 0
    with pytest.raises(ValueError, match="pass the 40 of a prompt by"):
        talk.prompt("y" * 60)


def test_without_a_chat_template_every_message_is_asked_by_itself(model):
    tokenizer = sentence_piece()
    talk = Conversation(model, tokenizer, max_new_tokens=2)
    first, _ = said(talk, "Who?")
    assert said(talk, "Who?")[0] == first and talk.prompt("Who?")[0] == "Question: Who?\nAnswer:"
    with pytest.raises(ValueError, match="needs a chat template"):
        Conversation(model, tokenizer, system="Be.")


def test_what_is_said_is_memory_at_once_and_in_the_next_conversation(model, tmp_path):
    tokenizer, path = byte_level(), tmp_path / "talk.hsa"
    base = memory_of(model, tokenizer, "A fox. " * 9)
    with Library.create(model, path, key_values="fp32", landmarks="fp32") as library:
        talk = Conversation(model, tokenizer, base, library=library, max_new_tokens=2, reread=1)
        answer, name = said(talk, "I am <|end|> here.")
        assert name == "turn 1" and talk.memory.num_tokens > base.num_tokens
        assert base.documents[-1].name == ""  # the caller's memory is as it was
        said(talk, "And?")
    on_disk = ChunkMemory.load(path)
    texts = [tokenizer.decode(one.tokens.tolist()).removeprefix("<|bos|>") for one in on_disk.documents]
    assert texts[0] == turn_text("I am <|end|> here.", answer.text) and len(texts) == 2
    # no token of the template was said
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in on_disk.documents[0].tokens.tolist()
    with Library.open(model, path) as library:
        later = Conversation(model, tokenizer, base, library=library, max_new_tokens=2)
        assert [one.name for one in later.memory.documents] == ["", "turn 1", "turn 2"]
        torch.testing.assert_close(later.memory.landmarks, talk.memory.landmarks)
        assert said(later, "What?")[1] == "turn 3"


def test_the_first_turn_of_a_memory_of_its_own_is_answered_without_one(model, tmp_path):
    with Library.create(model, tmp_path / "talk.hsa") as library:
        talk = Conversation(model, byte_level(), library=library, max_new_tokens=2, reread=2)
        answer, _ = said(talk, "Hello there, who are you?")
        assert answer.sources == [] and answer.reread == []
        assert len(said(talk, "And now?")[0].reread) == 2


def test_turns_are_numbered_after_those_that_are_there():
    assert next_turn([]) == "turn 1" and next_turn(["turn 2", "notes", "turn 10", "turn x"]) == "turn 11"
