"""The tokenizer of a GGUF file gives the tokens of the tokenizer that its fields were made from."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from hsa_ultralong.data.gguf_tokenizer import gguf_tokenizer
from hsa_ultralong.data.tokenizer import train_tokenizer

TEXTS = ["The code of the mill is 4821937.", "  Ünïcode\n\nlines, don't 12 34 567 <|bos|> end\t!"]


def fields_of(tokenizer, **changes):
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    fields = {
        "ggml.model": "gpt2", "ggml.pre": "smollm", "ggml.tokens": tokens, "ggml.merges": merges,
        "ggml.token_type": [3 if number in special else 1 for number in range(len(tokens))],
        "ggml.bos_token_id": tokenizer.bos_token_id, "ggml.eos_token_id": tokenizer.eos_token_id,
        "ggml.padding_token_id": tokenizer.pad_token_id, "ggml.add_bos_token": True, "chat_template": "{{ messages }}",
    }  # fmt: skip
    return {f"tokenizer.{key}": value for key, value in {**fields, **changes}.items()}


def test_a_byte_level_tokenizer_is_the_one_that_its_fields_were_made_from(tmp_path):
    source = train_tokenizer(TEXTS * 3, 300)
    found = gguf_tokenizer(fields_of(source))
    for text in TEXTS[:1]:
        assert found(text)["input_ids"] == source(text)["input_ids"]
        assert found.decode(found(text)["input_ids"], skip_special_tokens=True) == text
    # special tokens in a text are special here, as for other users of the file
    assert found(TEXTS[1])["input_ids"].count(found.bos_token_id) == 2
    found.save_pretrained(tmp_path)
    again = type(found).from_pretrained(tmp_path)
    assert again.chat_template == "{{ messages }}" and again(TEXTS[0])["input_ids"] == source(TEXTS[0])["input_ids"]
    assert (again.bos_token, again.eos_token, again.pad_token) == (source.bos_token, source.eos_token, source.pad_token)


def test_digits_are_cut_as_the_file_says():
    source = train_tokenizer(["aa"], 259)
    tokens = sorted(source.get_vocab(), key=source.get_vocab().get)
    merges = ["1 2", "3 4", "12 34", "Ġ 1"]
    fields = fields_of(source, **{"ggml.tokens": [*tokens, "12", "34", "1234", "Ġ1"], "ggml.merges": merges})
    for cut, wanted in (("smollm", 4), ("qwen2", 4), ("llama-bpe", 3), ("gpt-2", 1)):
        fields["tokenizer.ggml.pre"] = cut
        assert len(gguf_tokenizer(fields).tokenize("1234")) == wanted, cut


def test_a_sentence_piece_vocabulary_merges_by_score():
    base = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["\u2581", "a", "b", "c", "ab", "bc", "\u2581ab", "abc"]
    scores = [0.0] * (len(base) + 4) + [-1.0, -0.5, -2.0, -3.0]
    fields = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": base + pieces, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 8], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    found = gguf_tokenizer(fields)
    # "bc" comes first, so "\u2581ab" never does
    assert found.tokenize("abc") == ["\u2581", "abc"] and found.tokenize("abb") == ["\u2581ab", "b"]
    assert found("ab ü")["input_ids"][0] == 1 and found.decode(found("ab ü")["input_ids"][1:]) == "ab ü"
    plain = Tokenizer(
        models.BPE(json.loads(found.backend_tokenizer.to_str())["model"]["vocab"], [], byte_fallback=True)
    )
    plain.normalizer, plain.decoder = normalizers.Prepend("\u2581"), decoders.ByteFallback()
    assert found.tokenize("ü") == plain.encode("ü").tokens


REFUSED = {
    "no tokens": ({"ggml.tokens": []}, "lists no tokens"),
    "numbers for tokens": ({"ggml.tokens": [1, 2]}, "lists no tokens"),
    "another kind": ({"ggml.model": "t5"}, "is 't5', known are gpt2 and llama"),
    "another cut": ({"ggml.pre": "new"}, "pre is 'new', known are .*--tokenizer FOLDER"),
    "a token that is not there": ({"ggml.eos_token_id": 10_000}, "eos_token_id is 10000, there are"),
    "merges of unknown tokens": ({"ggml.merges": ["zz zz"]}, "cannot be built"),
    "text for a list": ({"ggml.merges": "a b"}, "merges must be of the kind list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_make_no_tokenizer_are_refused_in_one_line(name):
    changes, problem = REFUSED[name]
    with pytest.raises(ValueError, match=problem) as error:
        gguf_tokenizer(fields_of(train_tokenizer(TEXTS, 300), **changes))
    assert "\n" not in str(error.value)
