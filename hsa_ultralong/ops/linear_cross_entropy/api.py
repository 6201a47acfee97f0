"""Cross entropy of a linear head without storing the logits of a long sequence."""

from __future__ import annotations

import torch

from hsa_ultralong.ops._common import choose_impl, require_shape
from hsa_ultralong.ops.linear_cross_entropy.reference import linear_cross_entropy_reference
from hsa_ultralong.ops.linear_cross_entropy.torch_chunked import linear_cross_entropy_chunked

_BACKENDS = {"reference": linear_cross_entropy_reference, "torch": linear_cross_entropy_chunked}


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    impl: str = "auto",
) -> torch.Tensor:
    """Sum over tokens of -log softmax(hidden @ weight^T)[label].

    Args:
        hidden: (N, M), under autocast taken in its dtype, as a linear layer would. weight: (V, M).
        labels: (N,) int64, already shifted; `ignore_index` counts nothing.
        impl: "auto", "torch" or "reference".

    Returns:
        Scalar fp32 (fp64 for fp64 inputs), the sum; divide by the number of labels for the mean.

    Raises:
        ValueError: on shapes that do not fit or an unknown impl.
    """
    require_shape("hidden", hidden, (None, None))
    require_shape("weight", weight, (None, hidden.shape[1]))
    require_shape("labels", labels, (hidden.shape[0],))
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    backend = _BACKENDS[choose_impl("linear_cross_entropy", impl, tuple(_BACKENDS), "torch")]
    return backend(hidden, weight, labels, ignore_index=ignore_index)
