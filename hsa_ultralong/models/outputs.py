"""What the models return: transformers' outputs, and what was retrieved. tests/models/test_retrieval_output.py."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hsa_ultralong.nn.chunk_retriever import Retrieval


@dataclass
class HSAModelOutput(BaseModelOutputWithPast):
    """As in transformers, and, with `output_retrieval`:

    retrieval: a Retrieval per upper group, from the memory up: indices int32 (-1 = empty slot), fusion weights and
        scores fp32 (-inf), each (B, n, Hr, K) for the n tokens asked for, K as far as there are chunks. Indices count
        through the memories in order: the cache's memory, the pool, the rows' own chunks; `offsets` says where each
        begins. A masked token repeats the last real one's, and is empty before the first.
    """

    retrieval: tuple[Retrieval, ...] | None = None


@dataclass
class HSACausalLMOutput(CausalLMOutputWithPast):
    """As in transformers, and `retrieval` as in HSAModelOutput, of the tokens that `logits_to_keep` names."""

    retrieval: tuple[Retrieval, ...] | None = None
