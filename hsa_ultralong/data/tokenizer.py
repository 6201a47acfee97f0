"""Byte-level BPE tokenizer: training, loading, and the fingerprint that ties token files to it.

Every digit is a token of its own, so that numbers are copied digit by digit. No text is ever normalised: decoding gives
back every byte. Special tokens written out in a text are read as plain text, so no document can inject them.
Called by ``hsa data`` and by everything that opens a model; tested in ``tests/data/test_tokenizer.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.files.fields import require_tokens_below
from hsa_ultralong.files.messages import reason
from hsa_ultralong.files.strict_json import read_json

BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
PAD_TOKEN = "<|pad|>"
SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# Pieces of text as the pre-tokenizer cuts them, for the ASCII letters, digits and punctuation of generated sentences.
_PIECE = re.compile(r"[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s")
_MAX_CACHED_PIECES = 200_000


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which every digit is its own token.

    ``<|bos|>`` = 0, ``<|eos|>`` = 1, ``<|pad|>`` = 2; ``add_special_tokens=True`` puts ``<|bos|>`` in front.

    Args:
        texts: strings to learn merges from, read once.
        vocab_size: upper bound on the number of tokens, at least 259 (256 bytes and three special tokens). Less text
            than it takes to find that many merges gives a smaller vocabulary.

    Returns:
        The tokenizer; save it with ``save_pretrained``.

    Raises:
        ValueError: ``vocab_size`` is too small, or ``texts`` holds no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes + 3 special tokens), got {vocab_size}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    num_characters = 0

    def counted() -> Iterable[str]:
        nonlocal num_characters
        for text in texts:
            num_characters += len(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    if num_characters == 0:
        raise ValueError("texts holds no text to train a tokenizer on; pass at least one non-empty string")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B", special_tokens=[(BOS_TOKEN, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a directory that ``save_pretrained`` wrote; never goes to the network.

    Raises:
        ValueError: the directory or its ``tokenizer.json`` is missing or unreadable, a bos, eos or pad token lacks, or
            a token is beyond the vocabulary of the model in the same directory.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"no tokenizer directory at {path}; pass a directory that holds tokenizer.json")
    if not (path / "tokenizer.json").is_file():
        raise ValueError(f"{path} holds no tokenizer.json; pass a directory written by tokenizer.save_pretrained(...)")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    # The backend raises a bare Exception on a damaged file, so nothing narrower can be caught; on some it panics.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path / 'tokenizer.json'} cannot be read as a tokenizer: {reason(error)}") from error
    special_token_ids(tokenizer)
    if (path / "config.json").is_file():
        vocab_size = read_json(path / "config.json").get("vocab_size")
        if isinstance(vocab_size, int):
            require_tokens_below(max(tokenizer.get_vocab().values(), default=-1), vocab_size, path)
    return tokenizer


def special_token_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int, int]:
    """Return the ids (bos, eos, pad) of a tokenizer, all of which training needs.

    Raises:
        ValueError: one of them is not set.
    """
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    missing = [
        name for name, token_id in zip(("bos_token", "eos_token", "pad_token"), ids, strict=True) if token_id is None
    ]
    if missing:
        raise ValueError(
            f"the tokenizer has no {', '.join(missing)}; set it, for example tokenizer.pad_token = '{PAD_TOKEN}'"
        )
    return int(ids[0]), int(ids[1]), int(ids[2])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 (64 hex digits) of the backend's canonical JSON.

    Padding and truncation are left out: they are settings of the last call, not of the vocabulary.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding", None)
    state.pop("truncation", None)
    canonical = json.dumps(state, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of the backend that neither pads nor truncates and reads special tokens in a text as text.

    The tokenizer's own backend keeps padding and truncation from whoever called it last.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


class PieceTokenizer:
    """Fast tokenisation of short generated sentences, by a cache of their words.

    A sentence is cut where the pre-tokenizer cuts it and each piece is tokenised once. If a probe shows that the
    tokenizer cuts otherwise, every sentence goes through the tokenizer itself: slower, the same result.

    Args:
        tokenizer: any fast tokenizer.
        words: words to tokenise ahead, with a leading space.
    """

    _PROBE = ("The code of the old-mill 12 red x9Kf fox is 4821937.", "\nQuestion: What is a b?\nAnswer: K7Q4 lane.\n")

    def __init__(self, tokenizer: PreTrainedTokenizerFast, words: Sequence[str] = ()) -> None:
        self._backend = plain_backend(tokenizer)
        self._cache: dict[str, list[int]] = {}
        self.is_exact = True
        for probe in self._PROBE:
            self.is_exact &= self.encode(probe) == self.encode_text(probe)
        if self.is_exact and words:
            pieces = [f" {word}" for word in words[:_MAX_CACHED_PIECES]]
            encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
            self._cache.update((piece, encoding.ids) for piece, encoding in zip(pieces, encodings, strict=True))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, an ASCII sentence without runs of white space, without special tokens."""
        if not self.is_exact:
            return self.encode_text(text)
        cache = self._cache
        ids: list[int] = []
        for piece in _PIECE.findall(text):
            piece_ids = cache.get(piece)
            if piece_ids is None:
                if len(cache) >= _MAX_CACHED_PIECES:
                    cache.clear()
                piece_ids = cache[piece] = self.encode_text(piece)
            ids += piece_ids
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of any text, without special tokens."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids
