"""Log-likelihoods of given texts under any causal language model: continuations in batches, and long rows in pieces.

Prompts and normalisations of short tasks are lm-eval's (short_tasks.py). tests/eval/test_likelihood.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from hsa_ultralong.inference import memorize
from hsa_ultralong.models import HSACache, HSAForCausalLM
from hsa_ultralong.models.cache_hsa import CACHE_NAME
from hsa_ultralong.models.remembering import continuation_cache

# tokens of a batch of short rows, and of a piece of a long one
_BATCH_TOKENS, _PIECE_TOKENS = 4096, 2048


class Scorable(NamedTuple):
    """Token ids: of what is given, and of what is to be scored behind it."""

    context: list[int]
    tokens: list[int]


class Likelihood(NamedTuple):
    """Nats of a continuation, and whether greedy decoding would give it."""

    log: float
    is_greedy: bool


def first_token(tokenizer: Any) -> int:
    """What stands before a text without context, as in lm-eval: the beginning-of-text token, or the end-of-text one.

    Raises:
        ValueError: if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has no token that begins or ends a text, which scoring a text needs")


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Scorable:
    """Encoded as one text and cut, as in lm-eval; blanks at the context's end belong to the continuation."""
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if not kept:
        return Scorable([first_token(tokenizer)], list(tokenizer(continuation, add_special_tokens=False).input_ids))
    whole, before = list(tokenizer(kept + continuation).input_ids), list(tokenizer(kept).input_ids)
    return Scorable(before, whole[len(before) :])


def score_continuations(
    model: Any, pairs: Sequence[Scorable], *, limit: int | None = None, batch_tokens: int = _BATCH_TOKENS
) -> list[Likelihood]:
    """The likelihood of each continuation; of a row longer than `limit` tokens the first ones are left out.

    Raises:
        ValueError: for a continuation without tokens, or longer than the limit.
    """
    for pair in pairs:
        if not pair.tokens or (limit is not None and len(pair.tokens) > limit):
            raise ValueError(f"a continuation must have 1 to {limit or 'any number of'} tokens, got {len(pair.tokens)}")
    rows = [[*pair.context, *pair.tokens] for pair in pairs]
    if limit is not None:
        rows = [row[-limit - 1 :] for row in rows]
    found: list[Likelihood] = [Likelihood(0.0, False)] * len(pairs)
    for batch in _batches([len(row) for row in rows], batch_tokens):
        longest = max(len(rows[i]) for i in batch) - 1
        ids = torch.zeros((len(batch), longest), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, i in enumerate(batch):
            ids[place, : len(rows[i]) - 1] = torch.tensor(rows[i][:-1])
            mask[place, : len(rows[i]) - 1] = 1
        # rows are padded at their end; what comes before the first scored place of any is not asked for
        before = min(len(rows[i]) - 1 - len(pairs[i].tokens) for i in batch)
        with torch.no_grad():
            logits = model(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), logits_to_keep=longest - before
            ).logits[:, before - longest :]  # of a model that gives all of them too
        for place, i in enumerate(batch):
            stop = len(rows[i]) - 1 - before
            wanted = torch.tensor(pairs[i].tokens, device=logits.device)
            own = logits[place, stop - len(wanted) : stop].float()  # (n, V)
            nats = F.cross_entropy(own, wanted, reduction="sum")
            found[i] = Likelihood(-float(nats), bool((own.argmax(-1) == wanted).all()))
    return found


def _batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Numbers of rows of like lengths, of at most so many tokens together."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def rolling_pairs(tokens: Sequence[int], first: int, size: int) -> list[Scorable]:
    """A text as rows of at most `size` tokens, each token scored once, as lm-eval's loglikelihood_rolling: a row begins
    with the last token of the one before; the last row reaches back so that it is full."""
    pairs = []
    for start in range(0, len(tokens), size):
        stop = min(start + size, len(tokens))
        begin = max(0, stop - size)
        before = first if begin == 0 else tokens[begin - 1]
        pairs.append(Scorable([before, *tokens[begin:start]], list(tokens[start:stop])))
    return pairs


def tail_losses(model: Any, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) fp32 nats of the last tokens of a text (n,), each given all before it.

    A model of this library reads the text into an open memory and goes on with it, which is exactly what its forward
    over the whole text gives; any other runs over the whole text.

    Raises:
        ValueError: if the text is not longer than `count`.
    """
    if not 0 < count < len(tokens):
        raise ValueError(f"needs 1 to {len(tokens) - 1} last tokens of {len(tokens)}, got {count}")
    begin = len(tokens) - count - 1
    cache = None
    if isinstance(model, HSAForCausalLM) and begin > 0:
        memory = memorize(model, tokens[:begin], close=False)
        cache, _ = continuation_cache(model, memory)
    if cache is None:
        return torch.cat(list(row_losses(model, tokens)))[-count:]
    return torch.cat(list(_losses(model, tokens[begin:], cache, _PIECE_TOKENS)))


def row_losses(model: Any, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Nats (n,) fp32 of every token of a text but the first, piece by piece, each given all before it."""
    cache = HSACache(model.config) if isinstance(model, HSAForCausalLM) else None
    yield from _losses(model, tokens, cache, _PIECE_TOKENS)


def _losses(model: Any, tokens: torch.Tensor, cache: Any, step: int) -> Iterator[torch.Tensor]:
    """Nats of all tokens but the first; without a cache that is given, the model makes its own if there are several
    pieces."""
    ids = tokens.long().to(model.device)
    for start in range(0, len(ids) - 1, step):
        stop = min(start + step, len(ids) - 1)
        given = {} if cache is None else {CACHE_NAME: cache}
        with torch.no_grad():
            outputs = model(
                input_ids=ids[None, start:stop], use_cache=stop < len(ids) - 1 or cache is not None, **given
            )
        cache = cache if cache is not None else getattr(outputs, CACHE_NAME, None)
        yield F.cross_entropy(outputs.logits[0].float(), ids[start + 1 : stop + 1], reduction="none").cpu()
