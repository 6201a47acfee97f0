"""Chunk encoder: a bidirectional layer over 64 tokens + CLS gives the memory its keys, values and landmarks.

Paper sec. 3.1 and paper facts A.2, B.2: CLS is one learned vector placed after the tokens (local position S); keys are
normed, values linear; the landmark is a projection of the CLS output (or of the mean token output). Landmarks are
stored minus a constant centre of the model (fact 10). Called by models/modeling_hsa.py; tests/nn/test_chunk_encoder.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hsa_ultralong.nn.mlp import SwiGLU
from hsa_ultralong.nn.rotary import RotaryTable, apply_rotary, rotary_table

_CENTER_MOMENTUM = 0.99
Total = Callable[[torch.Tensor], torch.Tensor]


def rms_normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / rms(x) over the last dimension, computed and returned in fp32 (fp64 kept)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


class EncoderLayer(nn.Module):
    """Bidirectional pre-norm layer inside one chunk, (N, S + 1, M) -> same; rotary positions 0..S are local."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        use_qk_norm: bool,
        rms_norm_eps: float,
        use_qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim, self.group = head_dim, num_attention_heads // num_key_value_heads
        self.input_norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=use_qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=use_qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=use_qkv_bias)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if use_qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if use_qk_norm else nn.Identity()
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        self.mlp = SwiGLU(hidden_size=hidden_size, intermediate_size=intermediate_size)

    def forward(self, x: torch.Tensor, rotary: RotaryTable, mask: torch.Tensor | None) -> torch.Tensor:
        """mask: (N, 1, 1, S + 1) bool, True at keys that hold a token, or None when all do."""
        normed = self.input_norm(x)
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(normed).view(heads))
        k = self.k_norm(self.k_proj(normed).view(heads))
        v = self.v_proj(normed).view(heads)
        q, k = (apply_rotary(part, rotary).to(v.dtype) for part in (q, k))
        # the queries that share keys as rows of one head: no order among tokens counts, and nothing is repeated
        q = q.unflatten(2, (-1, self.group)).transpose(1, 2).flatten(2, 3)  # (N, Hkv, (S + 1) * G, D)
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        out = out.unflatten(2, (-1, self.group)).transpose(1, 2)  # (N, S + 1, Hkv, G, D)
        x = x + self.o_proj(out.flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class ChunkEncoder(nn.Module):
    """Lower-decoder outputs of whole chunks -> keys, values, landmarks."""

    landmark_center: torch.Tensor

    def __init__(
        self,
        *,
        layers: list[EncoderLayer],
        hidden_size: int,
        chunk_size: int,
        head_dim: int,
        num_memory_heads: int,
        num_retrieval_heads: int,
        retrieval_dim: int,
        landmark_source: str,
        normalize_landmarks: bool,
        center_landmarks: bool,
        use_qk_norm: bool,
        rope_theta: float,
        rms_norm_eps: float,
        rope_scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.chunk_size, self.head_dim = chunk_size, head_dim
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.num_retrieval_heads = num_retrieval_heads
        self.landmark_source, self.normalize_landmarks = landmark_source, normalize_landmarks
        self.center_landmarks = center_landmarks
        self.layers = nn.ModuleList(layers)
        self.cls = nn.Parameter(torch.randn(hidden_size) * 0.02)
        self.norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        self.k_proj = nn.Linear(hidden_size, num_memory_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_memory_heads * head_dim, bias=False)
        self.k_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if use_qk_norm else nn.Identity()
        self.landmark_proj = nn.Linear(hidden_size, retrieval_dim, bias=False)
        center = torch.zeros(num_retrieval_heads, retrieval_dim // num_retrieval_heads)
        self.register_buffer("landmark_center", center)

    def forward(
        self,
        hidden: torch.Tensor,
        lengths: torch.Tensor | None = None,
        total: Total | None = None,
        *,
        fixed_center: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden: (B, C, S, M) lower-decoder outputs, or (B, C, S, 2M) with what is added to them.
            lengths: (B, C) int32 tokens in each chunk; None = all full.
            total: sum of a tensor over the processes that retrieve each other's chunks: they need one centre.
            fixed_center: leave the centre as it is in training too: other chunks were stored with it.

        Returns:
            k and v (B, C*S, Hkv, D), landmarks (B, C, Hr, R), all in the dtype of `hidden`'s projections. Slots of
            k and v beyond a short chunk's length hold arbitrary finite numbers: readers mask them by `lengths`.
        """
        k, v, raw = self.project(hidden, lengths)
        if fixed_center and self.center_landmarks:
            return k, v, (raw - self.landmark_center).to(v.dtype)
        return k, v, self.center(raw, lengths, total).to(v.dtype)

    def project(
        self, hidden: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `forward`, but for the centre: landmarks (B, C, Hr, R) in fp32, normalised if the model does so."""
        size, dtype, device = hidden.shape[2], hidden.dtype, hidden.device
        rotary = rotary_table(size + 1, self.head_dim, self.rope_theta, device, dtype, self.rope_scaling)
        return self.run(hidden, lengths, rotary)

    def run(
        self, hidden: torch.Tensor, lengths: torch.Tensor | None, rotary: RotaryTable
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `project` returns, as one part that may be compiled."""
        x, present = self.inputs(hidden, lengths)
        for layer in self.layers:
            x = layer(x, rotary, None if present is None else present[:, None, None])
        return self.outputs(x, present, *hidden.shape[:2])

    def inputs(self, hidden: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the layers read, (B*C, S + 1, M), and where a token stands, (B*C, S + 1) bool, or None: everywhere."""
        width = len(self.cls)
        if hidden.shape[-1] != width:
            hidden = hidden[..., :width] + hidden[..., width:]
        size = hidden.shape[2]
        # by way of rows, so that the gradient comes whole: a slice of the layers' would be copied by slower kernels
        x = hidden.flatten(0, 2).unflatten(0, (-1, size))  # (N, S, M)
        cls = self.cls.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat((x, cls), dim=1)  # (N, S + 1, M)
        if lengths is None:
            return x, None
        slots = torch.arange(size + 1, device=x.device)
        present = (slots < lengths.reshape(-1, 1)) | (slots == size)  # (N, S + 1)
        # slots without a token may hold anything, and a masked key still meets a weight of zero
        return torch.where(present[..., None], x, 0.0), present

    def outputs(
        self, x: torch.Tensor, present: torch.Tensor | None, batch: int, num_chunks: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `project` returns, from what its layers give, (B*C, S + 1, M)."""
        x = self.norm(x)
        tokens = x[:, :-1]  # (N, S, M)
        heads = (batch, num_chunks * tokens.shape[1], -1, self.head_dim)
        k, v = self.k_norm(self.k_proj(tokens).view(heads)), self.v_proj(tokens).view(heads)
        landmarks = self._landmarks(x, present).view(batch, num_chunks, self.num_retrieval_heads, -1)
        return k.to(v.dtype), v, landmarks

    def _landmarks(self, x: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
        """(N, S + 1, M) -> (N, Hr, R) fp32."""
        if self.landmark_source == "cls":
            summary = x[:, -1]
        elif present is None:
            summary = x[:, :-1].mean(1)
        else:
            keep = present[:, :-1, None].to(x.dtype)
            summary = (x[:, :-1] * keep).sum(1) / keep.sum(1).clamp_min(1)
        landmarks = self.landmark_proj(summary).unflatten(-1, (self.num_retrieval_heads, -1))  # (N, Hr, R)
        return rms_normalize(landmarks) if self.normalize_landmarks else landmarks.to(self.landmark_center.dtype)

    def center(
        self, landmarks: torch.Tensor, lengths: torch.Tensor | None = None, total: Total | None = None
    ) -> torch.Tensor:
        """Landmarks (B, C, Hr, R) of `project` minus the centre, which in training first moves to their mean."""
        if not self.center_landmarks:
            return landmarks
        if self.training and landmarks.shape[1]:
            with torch.no_grad():
                every = landmarks.flatten(0, 1)  # (N, Hr, R)
                # one landmark that is not finite must not stay in the buffer for ever
                is_counted = every.isfinite().flatten(1).all(1)  # (N,)
                if lengths is not None:
                    is_counted = is_counted & (lengths.reshape(-1) > 0)
                every = torch.where(is_counted[:, None, None], every, 0.0)
                sums = torch.cat((every.sum(0).flatten(), is_counted.sum().to(every.dtype)[None]))
                sums = sums if total is None else total(sums)
                mean = (sums[:-1] / sums[-1].clamp_min(1)).view_as(self.landmark_center)
                self.landmark_center.lerp_(mean.to(self.landmark_center.dtype), 1 - _CENTER_MOMENTUM)
        return landmarks - self.landmark_center
