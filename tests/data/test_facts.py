"""Rows for converted models: facts that are asked stand in the row, spans are quoted, answers alone are answers."""

from pathlib import Path

import numpy as np
import pytest

from hsa_ultralong.data import MixtureConfig, MixtureDataset
from hsa_ultralong.data import facts as facts_module
from hsa_ultralong.data.chat_form import ChatForm
from hsa_ultralong.data.facts import sample_facts
from hsa_ultralong.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|bos|>system\nBe brief.<|eos|>\n"
    "{% endif %}<|bos|>{{ message['role'] }}\n{{ message['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)
WORDS = [a + b for a in ("amber", "copper", "hollow", "velvet", "marble") for b in ("fox", "mill", "gate", "reed")]


def rows(shards, tokenizer, kind, count=12, seq_len=1024):
    config = MixtureConfig({kind: 1.0}, seq_len=seq_len, chunk_size=16, seed=3)
    dataset = MixtureDataset(shards, tokenizer, config, num_rows=count)
    return [dataset[i] for i in range(count)]


def spans(mask):
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
    return edges.reshape(-1, 2).tolist()


def test_every_answer_of_chat_facts_was_stated_before(shards, tokenizer):
    seen = set()
    for row in rows(shards, tokenizer, "chat_facts", 20):
        assert row.kind == "chat_facts" and not row.isolated
        for start, stop in spans(row.answer_mask):
            answer = tokenizer.decode(row.input_ids[start:stop].tolist()).strip()
            assert answer and answer in tokenizer.decode(row.input_ids[: start - 8].tolist())
            assert (row.labels[start:stop] == row.input_ids[start:stop]).all()
        seen.add(int(row.segment_ids.max()))
    # questions continue the text, or are a document of their own
    assert seen == {0, 1}


def test_a_span_stands_twice_and_the_second_time_is_the_answer(shards, tokenizer):
    for row in rows(shards, tokenizer, "span_copy"):
        ((start, stop),) = spans(row.answer_mask)
        span = row.input_ids[start - 8 : stop].tolist()
        text = row.input_ids[: start - 8].tolist()
        assert any(text[i : i + len(span)] == span for i in range(len(text) - len(span) + 1))
        assert 1024 // 8 <= len(span) <= 1024 // 3


def test_questions_have_the_form_of_the_chat_template_and_begin_with_its_system_message_or_without():
    tokenizer = train_tokenizer(["system user assistant Hello Be brief a b c"], 300)
    plain = ChatForm.of(tokenizer)
    assert tokenizer.decode(plain.before) == "\nUser: " and plain.blank == " "
    tokenizer.chat_template = TEMPLATE
    # special tokens of the template must be special tokens
    tokenizer.split_special_tokens = False
    form = ChatForm.of(tokenizer)
    assert [tokenizer.decode(part) for part in (form.before, form.between, form.after)] == [
        "<|bos|>user\n", "<|eos|>\n<|bos|>assistant\n", "<|eos|>\n",
    ]  # fmt: skip
    assert form.before[0] == tokenizer.bos_token_id and form.after[0] == tokenizer.eos_token_id and form.blank == ""
    assert "system" in tokenizer.decode(form.opening) and "system" not in tokenizer.decode(form.first)


def test_documents_count_the_sentence_forms_beside_the_grammar():
    attributes = sum(map(len, facts_module._ATTRIBUTES.values()))
    things, deeds = attributes * len(facts_module._FRAMES), len(facts_module._DEEDS)
    for name in ("data", "own-memory"):
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert f"{things + deeds} others" in page
        assert f"{len(facts_module._FRAMES)} frames over {attributes} attributes of things, {deeds} deeds" in page


def test_there_are_hundreds_of_sentence_forms_and_no_question_twice():
    rng = np.random.default_rng(0)
    facts = sample_facts(rng, 400, WORDS)
    assert len({fact.question for fact in facts}) == 400
    assert all(fact.answer in fact.statement for fact in facts)
    plain = [[word for word in fact.statement.split() if word.islower() and word not in WORDS] for fact in facts]
    forms = {" ".join(words) for words in plain}
    assert len(forms) > 150


@pytest.mark.parametrize("kind", ["chat_facts", "span_copy"])
def test_a_row_is_a_function_of_its_number(shards, tokenizer, kind):
    once, again = rows(shards, tokenizer, kind, 3), rows(shards, tokenizer, kind, 3)
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(once, again, strict=True))


def test_names_are_of_an_open_vocabulary_and_a_third_of_the_spans_are_shuffled(shards, tokenizer):
    facts = sample_facts(np.random.default_rng(1), 2000, WORDS)
    names = [fact.answer for fact in facts if fact.answer[:1].isupper() and fact.answer.replace(" ", "").isalpha()]
    assert len(set(names)) > 0.9 * len(names) > 300
    assert len({name[:4] for name in names}) > 200
    assert any(fact.answer.isdigit() and len(fact.answer) > 14 for fact in facts)
    text = np.concatenate([shards.tokens(number) for number in range(len(shards.offsets) - 1)]).tolist()
    known = set(zip(text, text[1:], text[2:], strict=False))
    shuffled = 0
    for row in rows(shards, tokenizer, "span_copy", 60):
        ((start, stop),) = spans(row.answer_mask)
        ids = row.input_ids[start:stop].tolist()
        told = np.mean([part in known for part in zip(ids, ids[1:], ids[2:], strict=False)])
        shuffled += told < 0.5
    assert 8 <= shuffled <= 34
