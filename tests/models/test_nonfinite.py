"""A masked token whose embedding is not finite touches no real token, forward or backward."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.testing.factories import random_tokens, tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SICK = 36  # the one token whose embedding is not finite
MASKS = {
    "left": [[0] * 9 + [1] * 21, [1] * 30],
    "right": [[1] * 21 + [0] * 9, [1] * 30],
    "inside": [[1] * 10 + [0] * 7 + [1] * 13, [1] * 30],
}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", MASKS)
def test_a_masked_token_that_is_not_finite_changes_no_real_one(side, number):
    model = tiny_model().to(DEVICE).train()
    tokens = random_tokens(2, 30, vocab_size=36).to(DEVICE)
    mask = torch.tensor(MASKS[side], device=DEVICE)
    labels = tokens.masked_fill(mask == 0, -100)
    results = []
    for filler in (0, SICK):
        given = torch.where(mask == 1, tokens, filler)
        embedded = model.get_input_embeddings()(given).detach()
        if filler == SICK:
            embedded = embedded.masked_fill((mask == 0)[..., None], number)
        embedded.requires_grad_()
        out = model(inputs_embeds=embedded, attention_mask=mask, labels=labels)
        out.loss.backward()
        grads = [part.grad.clone() for part in model.parameters() if part.grad is not None]
        model.zero_grad()
        with torch.no_grad():
            logits = model(inputs_embeds=embedded, attention_mask=mask).logits
        results.append((out.loss.detach(), logits[mask == 1], embedded.grad[mask == 1], *grads))
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean)
