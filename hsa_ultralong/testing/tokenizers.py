"""Small tokenizers of two makes, for tests that need one of each kind."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_CHAT = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes as GPT-2 writes them, a beginning-of-text token before every text, a chat template."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bare = Tokenizer(models.BPE(vocabulary, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(["<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"])
    bare.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bare.token_to_id("<|bos|>"))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<|bos|>", eos_token="<|end|>")
    fast.chat_template = _CHAT
    return fast


def sentence_piece() -> PreTrainedTokenizerFast:
    """Characters with SentencePiece's blank, nothing before a text, no chat template."""
    characters = ["<unk>", "▁", "\n", *(chr(i) for i in range(33, 127))]
    bare = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(characters)}, [], unk_token="<unk>"))
    bare.normalizer = normalizers.Replace(" ", "▁")
    bare.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")
