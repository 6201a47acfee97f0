"""The tokenizer of a GGUF file, which holds its vocabulary, merges and chat template as fields.

How text is cut into words before merging is stated by a name only (`tokenizer.ggml.pre`); those of the Llama, Mistral
and Qwen families are known here. Called by `hsa convert`; tests/data/test_gguf_tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.files.messages import reason, shown

_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3, _QWEN2 = _LETTERS + r"|\p{N}{1,3}" + _LINES, _LETTERS + r"|\p{N}" + _LINES
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# name of a cut -> its pattern; "" is that of GPT-2, and "digits" the same after every digit is cut off
_CUTS = {
    "gpt-2": "", "default": "", "smollm": "digits", "starcoder": "digits", "refact": "digits", "command-r": "digits",
    "llama3": _LLAMA3, "llama-v3": _LLAMA3, "llama-bpe": _LLAMA3, "smaug-bpe": _LLAMA3, "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2, "tekken": _TEKKEN,
}  # fmt: skip
_CONTROL, _OWN = 3, 4
_BLANK = "\u2581"
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def gguf_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer, with chat template, that a file's fields describe.

    Raises:
        ValueError: naming the field, if one is missing or damaged, or the kind or cut is not known here.
    """

    def field(name: str, kind: type, default: Any = None) -> Any:
        value = fields.get(f"tokenizer.{name}", default)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"tokenizer.{name} must be of the kind {kind.__name__}, got {shown(value)}")
        return value

    tokens, kind = field("ggml.tokens", list), field("ggml.model", str)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError("tokenizer.ggml.tokens lists no tokens; give a tokenizer with --tokenizer FOLDER")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"tokenizer.ggml.model is {shown(kind)}, known are gpt2 and llama; give one with --tokenizer FOLDER"
        )
    cut, kinds = field("ggml.pre", str, "default"), field("ggml.token_type", list, [])
    if kind == "gpt2" and cut not in _CUTS:
        raise ValueError(
            f"tokenizer.ggml.pre is {shown(cut)}, known are {', '.join(_CUTS)}; give a tokenizer with --tokenizer "
            "FOLDER"
        )
    try:
        if kind == "gpt2":
            backend = _byte_level(tokens, field("ggml.merges", list, []), cut)
        else:
            scores = field("ggml.scores", list, [])
            backend = _sentence_piece(tokens, scores, field("ggml.add_space_prefix", bool, True))
        for number, token in enumerate(tokens):
            if (mark := kinds[number] if number < len(kinds) else 0) in (_CONTROL, _OWN):
                added = AddedToken(token, normalized=False, special=mark == _CONTROL)
                (backend.add_special_tokens if added.special else backend.add_tokens)([added])
    # the backend raises a bare Exception
    except Exception as error:
        raise ValueError(f"the tokenizer cannot be built: {reason(error)}") from error
    named = {}
    for ours, theirs in _SPECIAL.items():
        place = field(f"ggml.{theirs}_token_id", int)
        if place is not None and not 0 <= place < len(tokens):
            raise ValueError(f"tokenizer.ggml.{theirs}_token_id is {place}, there are {len(tokens):,} tokens")
        named[ours] = None if place is None else tokens[place]
    _add_ends(backend, named, field("ggml.add_bos_token", bool, kind == "llama"))
    template = field("chat_template", str)
    extra = {"chat_template": template} if template else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **{k: v for k, v in named.items() if v}, **extra
    )


def _byte_level(tokens: list[str], merges: list[str], cut: str) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    pattern = _CUTS[cut]
    parts: list[Any] = []
    if pattern == "digits":
        parts = [pre_tokenizers.Digits(individual_digits=True)]
    elif pattern:
        parts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    has_own = pattern not in ("", "digits")
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not has_own))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(tokens: list[str], scores: list[float], has_prefix: bool) -> Tokenizer:
    """Pairs are merged whose token has the highest score first."""
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores):,} numbers for {len(tokens):,} tokens")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = []
    for token, score in zip(tokens, scores, strict=True):
        cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
        found = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
        found.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        pairs += [(score, pair) for pair in found]
    pairs.sort(key=lambda entry: -entry[0])
    model = models.BPE(
        vocab=vocabulary, merges=[pair for _, pair in pairs], byte_fallback=True, fuse_unk=True,
        unk_token="<unk>" if "<unk>" in vocabulary else None,
    )  # fmt: skip
    backend = Tokenizer(model)
    before = [normalizers.Prepend(_BLANK)] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _BLANK)])
    after = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return backend


def _add_ends(backend: Tokenizer, named: Mapping[str, str | None], has_bos: bool) -> None:
    bos = named["bos_token"]
    if has_bos and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
