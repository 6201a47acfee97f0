"""Data: tokenizer, text files, token shards, needles, training rows and their mixtures."""

from hsa_ultralong.data.build import build_shards, sample_text
from hsa_ultralong.data.chat import chat_prompt, conversation_pieces
from hsa_ultralong.data.evaluation_words import EVALUATION_ADJECTIVES, EVALUATION_NOUNS, EVALUATION_WORDS
from hsa_ultralong.data.mixture import ROW_KINDS, MixtureConfig, MixtureDataset, StepSampler, collate
from hsa_ultralong.data.needles import Needle, evaluation_needles, make_needle, sample_needles
from hsa_ultralong.data.rows import NeedleOptions, Row, RowLayout, needles_row, self_copy_row, text_row
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.seeds import namespaced_rng
from hsa_ultralong.data.shards import TokenShards
from hsa_ultralong.data.sources import Source, read_sources, source_files
from hsa_ultralong.data.text import DOCUMENT_SEPARATOR, iter_documents, read_text, text_files
from hsa_ultralong.data.tokenizer import (
    PieceTokenizer,
    load_tokenizer,
    special_token_ids,
    tokenizer_fingerprint,
    train_tokenizer,
)

__all__ = [
    "DOCUMENT_SEPARATOR",
    "EVALUATION_ADJECTIVES",
    "EVALUATION_NOUNS",
    "EVALUATION_WORDS",
    "ROW_KINDS",
    "DocumentSampler",
    "MixtureConfig",
    "MixtureDataset",
    "Needle",
    "NeedleOptions",
    "PieceTokenizer",
    "Row",
    "RowLayout",
    "Source",
    "StepSampler",
    "TokenShards",
    "build_shards",
    "chat_prompt",
    "collate",
    "conversation_pieces",
    "evaluation_needles",
    "iter_documents",
    "load_tokenizer",
    "make_needle",
    "namespaced_rng",
    "needles_row",
    "read_text",
    "read_sources",
    "sample_needles",
    "sample_text",
    "self_copy_row",
    "source_files",
    "special_token_ids",
    "text_files",
    "text_row",
    "tokenizer_fingerprint",
    "train_tokenizer",
]
