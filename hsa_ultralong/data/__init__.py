"""Data: tokenizer, text files, token shards, needles, training rows and their mixtures."""

from hsa_ultralong.data.build import build_shards
from hsa_ultralong.data.chat import chat_prompt, conversation_pieces
from hsa_ultralong.data.evaluation_words import EVALUATION_ADJECTIVES, EVALUATION_NOUNS, EVALUATION_WORDS
from hsa_ultralong.data.input_file import InputFile
from hsa_ultralong.data.inputs import Spool, inputs_of, source_files, spool_of
from hsa_ultralong.data.mixture import ROW_KINDS, LengthsDataset, MixtureConfig, MixtureDataset, StepSampler, collate
from hsa_ultralong.data.needles import Needle, evaluation_needles, make_needle, sample_needles
from hsa_ultralong.data.packing import PackingCollator
from hsa_ultralong.data.rows import NeedleOptions, Row, RowLayout, needles_row, self_copy_row, text_row
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.samples import sample_text
from hsa_ultralong.data.seeds import namespaced_rng
from hsa_ultralong.data.shards import TokenShards
from hsa_ultralong.data.sources import Source, iter_texts, read_sources, read_text
from hsa_ultralong.data.text import DOCUMENT_SEPARATOR
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
    "InputFile",
    "LengthsDataset",
    "MixtureConfig",
    "MixtureDataset",
    "Needle",
    "NeedleOptions",
    "PackingCollator",
    "PieceTokenizer",
    "Row",
    "RowLayout",
    "Source",
    "Spool",
    "StepSampler",
    "TokenShards",
    "build_shards",
    "chat_prompt",
    "collate",
    "conversation_pieces",
    "evaluation_needles",
    "inputs_of",
    "iter_texts",
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
    "spool_of",
    "special_token_ids",
    "text_row",
    "tokenizer_fingerprint",
    "train_tokenizer",
]
