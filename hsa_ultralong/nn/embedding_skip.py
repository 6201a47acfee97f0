"""What stands at a token, beside what the lower decoder made of it: a linear map of its embedding (ours).

A pretrained layer's output says which word comes next more than which one stands there, and copying out of a memory
needs the latter. It goes to the memory alone: in the upper decoder of a converted model it cost language (docs/log.md,
2026-11-29). Called by models/modeling_hsa.py; tests/models/test_embedding_skip.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hsa_ultralong.nn.chunk_encoder import rms_normalize


class EmbeddingSkip(nn.Module):
    """Embeddings (B, T, M) -> scale * W (e / rms(e)), same shape and dtype; W is zero at first."""

    def __init__(self, hidden_size: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.zeros(hidden_size, hidden_size))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return F.linear(rms_normalize(embeddings).to(embeddings.dtype), self.weight) * self.scale
