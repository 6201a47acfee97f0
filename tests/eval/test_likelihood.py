"""Log-likelihoods in batches and in pieces equal those of one forward."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hsa_ultralong.eval.likelihood import (
    Scorable,
    encode_pair,
    first_token,
    rolling_pairs,
    row_losses,
    score_continuations,
    tail_losses,
)
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model
from hsa_ultralong.testing.tokenizers import byte_level


def llama(vocab_size: int = 37):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


MODELS = {"ours": lambda: tiny_model().eval(), "llama": llama}


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_continuations_scores_each_as_alone(name):
    model = MODELS[name]()
    rows = [random_tokens(1, length, seed=length)[0].tolist() for length in (3, 40, 17, 25, 9)]
    pairs = [Scorable(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows]
    for pair, found in zip(pairs, score_continuations(model, pairs, batch_tokens=60), strict=True):
        row = torch.tensor([[*pair.context, *pair.tokens]])
        with torch.no_grad():
            logits = model(row).logits[0, len(pair.context) - 1 : -1].float()
        wanted = torch.tensor(pair.tokens)
        assert found.log == pytest.approx(float(logits.log_softmax(-1)[range(len(wanted)), wanted].sum()), rel=1e-5)
        assert found.is_greedy == bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("gives_all", [False, True])
def test_logits_are_made_from_the_first_scored_place_of_a_batch_on(gives_all):
    model, asked = llama(), []
    pairs = [Scorable(list(range(1, 31)), [3, 4]), Scorable(list(range(1, 21)), [5, 6, 7])]
    wanted = [score_continuations(model, [pair])[0] for pair in pairs]

    class Watched:
        device = model.device

        def __call__(self, logits_to_keep, **given):
            asked.append(logits_to_keep)
            return model(**given, logits_to_keep=0 if gives_all else logits_to_keep)

    found = score_continuations(Watched(), pairs)
    assert asked == [31 - 19]
    assert [one.log for one in found] == pytest.approx([one.log for one in wanted])


def test_a_row_beyond_the_limit_loses_its_first_tokens_and_never_a_scored_one():
    model = llama()
    row = random_tokens(1, 60)[0].tolist()
    (cut,) = score_continuations(model, [Scorable(row[:50], row[50:])], limit=20)
    (short,) = score_continuations(model, [Scorable(row[39:50], row[50:])])
    assert cut.log == pytest.approx(short.log)
    for pair in (Scorable(row[:5], []), Scorable(row[:5], row[:21])):
        with pytest.raises(ValueError, match="1 to 20 tokens, got"):
            score_continuations(model, [pair], limit=20)


@pytest.mark.parametrize("options", sorted(MODEL_OPTIONS))
def test_the_last_losses_of_a_long_context_are_those_of_the_whole_forward(options, monkeypatch):
    from hsa_ultralong.eval import likelihood

    monkeypatch.setattr(likelihood, "_PIECE_TOKENS", 13)
    model = tiny_model(**MODEL_OPTIONS[options]).eval()
    row = random_tokens(1, 101, seed=3)[0]
    with torch.no_grad():
        whole = float(model(row[None], labels=row[None]).loss)
        logits = model(row[None]).logits[0, :-1].float()
    each = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
    for count in (1, 30, 99, 100):
        torch.testing.assert_close(tail_losses(model, row, count), each[-count:], rtol=1e-5, atol=1e-5)
    found = torch.cat(list(row_losses(model, row)))
    torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-5)
    assert float(found.mean()) == pytest.approx(whole, rel=1e-5)


def test_a_plain_model_gives_the_same_in_pieces(monkeypatch):
    from hsa_ultralong.eval import likelihood

    monkeypatch.setattr(likelihood, "_PIECE_TOKENS", 13)
    model, row = llama(), random_tokens(1, 101, seed=3)[0]
    with torch.no_grad():
        whole = float(model(row[None], labels=row[None]).loss)
    assert float(torch.cat(list(row_losses(model, row))).mean()) == pytest.approx(whole, rel=1e-5)
    assert len(tail_losses(model, row, 40)) == 40
    with pytest.raises(ValueError, match="1 to 100 last tokens of 101, got 101"):
        tail_losses(model, row, 101)


def test_a_text_is_cut_where_the_continuation_begins_and_blanks_go_with_it():
    tokenizer = byte_level()
    pair = encode_pair(tokenizer, "The sky is ", "blue")
    assert tokenizer.decode(pair.tokens) == " blue"
    assert tokenizer.decode(pair.context, skip_special_tokens=True) == "The sky is"
    assert encode_pair(tokenizer, "", "blue").context == [first_token(tokenizer)]


def test_rolling_rows_score_every_token_once_and_fill_the_last_row():
    tokens = list(range(1, 24))
    pairs = rolling_pairs(tokens, 0, 10)
    assert [token for pair in pairs for token in pair.tokens] == tokens
    assert pairs[0].context == [0]
    assert pairs[1].context == [10]
    assert [*pairs[2].context, *pairs[2].tokens] == tokens[12:]
    assert math.prod(len(pair.context) + len(pair.tokens) == 11 for pair in pairs) == 1
