"""What each rival's attention must compute: a mask written out over all pairs of tokens, one softmax, fp64, no cache.

Shares no code with hsa_ultralong.baselines but the weights of the layer that it is given.
"""

from __future__ import annotations

import math

import torch


def rotate(x, places, theta=10_000.0):
    """x (T, H, D) turned at places (T,), pairs (j, j + D / 2) as complex numbers."""
    half = x.shape[-1] // 2
    angle = places.double()[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def heads_of(layer, x):
    """q, k, v (T, Hq, D) of one row x (T, M), normed, not rotated, keys and values once a query head."""

    def part(projection, norm):
        made = (x @ projection.weight.T).unflatten(-1, (-1, layer.head_dim))
        if norm is None or not hasattr(norm, "weight"):
            return made
        return made / (made.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    q, k, v = part(layer.q_proj, layer.q_norm), part(layer.k_proj, layer.k_norm), part(layer.v_proj, None)
    group = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def softmax_over(scores, mask):
    """(H, T, N) scores, mask the same or (T, N); rows without any key are 0."""
    return scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0)


def scores_of(q, k):
    return torch.einsum("thd,nhd->htn", q, k) / math.sqrt(q.shape[-1])


def mixed(layer, weights, v):
    return torch.einsum("htn,nhd->thd", weights, v).flatten(1) @ layer.o_proj.weight.T


def pairs(length):
    t, j = torch.arange(length)[:, None], torch.arange(length)
    return t, j


def full_rope(layer, x, config):
    q, k, v = heads_of(layer, x)
    t, j = pairs(len(x))
    places = torch.arange(len(x))
    return mixed(layer, softmax_over(scores_of(rotate(q, places), rotate(k, places)), j <= t), v)


def full_nope(layer, x, config):
    q, k, v = heads_of(layer, x)
    t, j = pairs(len(x))
    return mixed(layer, softmax_over(scores_of(q, k), j <= t), v)


def window(layer, x, config):
    q, k, v = heads_of(layer, x)
    t, j = pairs(len(x))
    places = torch.arange(len(x))
    mask = (j <= t) & (t - j < config.sliding_window)
    return mixed(layer, softmax_over(scores_of(rotate(q, places), rotate(k, places)), mask), v)


def window_sinks(layer, x, config):
    """Every token makes a list of what it reads and numbers it from 0."""
    q, k, v = heads_of(layer, x)
    out = []
    for t in range(len(x)):
        recent = list(range(max(0, t - config.sliding_window + 1), t + 1))
        read = [j for j in range(config.num_sinks) if j < recent[0]] + recent
        places = torch.arange(len(read))
        keys, query = rotate(k[read], places), rotate(q[t : t + 1], places[-1:])
        weights = (torch.einsum("hd,nhd->hn", query[0], keys) / math.sqrt(q.shape[-1])).softmax(-1)
        out.append(torch.einsum("hn,nhd->hd", weights, v[read]).flatten())
    return torch.stack(out) @ layer.o_proj.weight.T


def of_chunks(chosen, length, size):
    """(H, T, N) mask from chosen[head][t], sets of chunks."""
    mask = torch.zeros(len(chosen), length, length, dtype=torch.bool)
    for head, rows in enumerate(chosen):
        for t, chunks in enumerate(rows):
            for chunk in chunks:
                mask[head, t, chunk * size : min((chunk + 1) * size, t + 1)] = True
    return mask


def best(scores, count):
    """Keys of the largest values of a dictionary."""
    return set(sorted(scores, key=scores.get, reverse=True)[: max(count, 0)])


def moba(layer, x, config):
    q, k, v = heads_of(layer, x)
    size, places = config.chunk_size, torch.arange(len(x))
    q, k = rotate(q, places), rotate(k, places)
    chosen = []
    for head in range(q.shape[1]):
        rows = []
        for t in range(len(x)):
            scores = {i: (q[t, head] @ k[i * size : (i + 1) * size, head].mean(0)).item() for i in range(t // size)}
            rows.append({t // size} | best(scores, config.chunk_topk - 1))
        chosen.append(rows)
    return mixed(layer, softmax_over(scores_of(q, k), of_chunks(chosen, len(x), size)), v)


def compressed_choice(q, blocks, config, pool):
    """chosen[key-value head][t]: sets of chunks; q (T, Hq, D), blocks (C, Hkv, D)."""
    size, stride, chunk = config.compression_size, config.compression_stride, config.chunk_size
    group, chosen = q.shape[1] // blocks.shape[1], []
    for head in range(blocks.shape[1]):
        rows = []
        for t in range(len(q)):
            own = t // chunk
            fixed = [own - i for i in range(config.num_local_chunks) if own >= i]
            fixed += [i for i in range(config.num_initial_chunks) if i <= own and i not in fixed]
            count = config.chunk_topk - min(config.chunk_topk, config.num_local_chunks + config.num_initial_chunks)
            seen = [i for i in range(len(blocks)) if i * stride + size <= t + 1]
            total = dict.fromkeys(range(own), 0.0)
            for h in range(head * group, (head + 1) * group):
                weights = (blocks[seen, head] @ q[t, h] / math.sqrt(q.shape[-1])).softmax(0) if seen else []
                if h == head * group:
                    summed = torch.zeros(len(seen), dtype=torch.float64)
                if seen:
                    summed = summed + weights
            for weight, i in zip(summed.tolist(), seen, strict=True):
                strides = range(i * stride, i * stride + size, stride)
                for j in total:
                    shared = sum(j * chunk <= place < (j + 1) * chunk for place in strides)
                    total[j] = total[j] + shared * weight if pool == "sum" else max(total[j], weight * bool(shared))
            others = {j: total[j] for j in total if j not in fixed}
            rows.append(set(fixed[: config.chunk_topk]) | best(others, count))
        chosen.append(rows)
    return chosen


def nsa(layer, x, config):
    size, stride, length = config.compression_size, config.compression_stride, len(x)
    group = layer.q_proj.out_features // (layer.k_proj.out_features // 3)
    raw_q = (x @ layer.q_proj.weight.T).unflatten(-1, (-1, layer.head_dim))
    q = raw_q / (raw_q.square().mean(-1, keepdim=True) + layer.q_norm.eps).sqrt() * layer.q_norm.weight
    raw_k = (x @ layer.k_proj.weight.T).unflatten(-1, (3, -1, layer.head_dim))
    k = raw_k / (raw_k.square().mean(-1, keepdim=True) + layer.k_norm.eps).sqrt() * layer.k_norm.weight
    v = (x @ layer.v_proj.weight.T).unflatten(-1, (3, -1, layer.head_dim))
    places = torch.arange(length)
    q = rotate(q, places)

    def compress(part, network):
        made = []
        for first in range(0, length - size + 1, stride):
            mean = (network.weights[:, None, None] * (part[first : first + size] + network.places[:, None])).sum(0)
            hidden = torch.nn.functional.silu(mean @ network.up_proj.weight.T)
            made.append(mean + hidden @ network.down_proj.weight.T)
        return torch.stack(made) if made else part[:0]

    block_k, block_v = compress(k[:, 0], layer.compress_keys), compress(v[:, 0], layer.compress_values)
    block_k = rotate(block_k, stride * torch.arange(len(block_k)))
    chosen = compressed_choice(q, block_k, config, "sum")
    t, j = pairs(length)
    ends = stride * torch.arange(len(block_k)) + size
    masks = [
        (ends <= t + 1),
        of_chunks(chosen, length, config.chunk_size).repeat_interleave(group, 0),
        (j <= t) & (t - j < config.sliding_window),
    ]
    keys = [block_k, rotate(k[:, 1], places), rotate(k[:, 2], places)]
    gates = (x @ layer.gate_proj.weight.T).sigmoid().unflatten(-1, (3, -1))
    out = 0
    for number, (key, value, mask) in enumerate(zip(keys, [block_v, v[:, 1], v[:, 2]], masks, strict=True)):
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        weights = softmax_over(scores_of(q, key), mask) if len(key) else torch.zeros(q.shape[1], length, 0).double()
        out = out + gates[:, number, :, None] * torch.einsum("htn,nhd->thd", weights, value)
    return out.flatten(1) @ layer.o_proj.weight.T


def infllm_v2(layer, x, config):
    q, k, v = heads_of(layer, x)
    size, stride, places = config.compression_size, config.compression_stride, torch.arange(len(x))
    q, k = rotate(q, places), rotate(k, places)
    group = q.shape[1] // config.num_key_value_heads
    means = [k[first : first + size, ::group].mean(0) for first in range(0, len(x) - size + 1, stride)]
    blocks = torch.stack(means) if means else k[:0, ::group]
    chosen = compressed_choice(q, blocks, config, "max")
    mask = of_chunks(chosen, len(x), config.chunk_size).repeat_interleave(group, 0)
    t, j = pairs(len(x))
    mask = mask | ((t < config.dense_tokens) & (j <= t))
    return mixed(layer, softmax_over(scores_of(q, k), mask), v)


def gated_delta(layer, x, config):
    """The recurrence, a token at a time."""
    mixed = torch.cat([x @ p.weight.T for p in (layer.q_proj, layer.k_proj, layer.v_proj)], -1)
    padded = torch.cat((torch.zeros(3, mixed.shape[1], dtype=x.dtype), mixed))
    mixed = torch.stack([(padded[t : t + 4] * layer.convolution.T).sum(0) for t in range(len(x))])
    mixed = torch.nn.functional.silu(mixed).unflatten(-1, (3, -1, layer.head_dim))
    q, k, v = (mixed[:, i] for i in range(3))
    q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
    decay = (
        -layer.log_rate.exp() * torch.nn.functional.softplus(x @ layer.decay_proj.weight.T + layer.step_bias)
    ).exp()
    strength = (x @ layer.strength_proj.weight.T).sigmoid()
    out = []
    for head in range(q.shape[1]):
        state, rows = torch.zeros(layer.head_dim, layer.head_dim, dtype=x.dtype), []
        for t in range(len(x)):
            key = k[t, head]
            state = decay[t, head] * (state - strength[t, head] * torch.outer(key, key @ state))
            state = state + strength[t, head] * torch.outer(key, v[t, head])
            rows.append(q[t, head] @ state / math.sqrt(layer.head_dim))
        out.append(torch.stack(rows))
    out = torch.stack(out, 1)
    out = out / (out.square().mean(-1, keepdim=True) + layer.o_norm.eps).sqrt() * layer.o_norm.weight
    gate = torch.nn.functional.silu(x @ layer.gate_proj.weight.T).view_as(out)
    return (out * gate).flatten(1) @ layer.o_proj.weight.T


def by_landmarks(layer, x, config, *, window, topk, summaries):
    """Places one by one: what is local, the chunks before, one softmax of scores and mass."""
    q, k, v = heads_of(layer, x)
    size, places, scale = config.chunk_size, torch.arange(len(x)), 1 / math.sqrt(layer.head_dim)
    q, k = rotate(q, places), rotate(k, places)
    query, chunks = summaries(q, k)
    group, out = q.shape[1] // config.num_key_value_heads, []
    for n in range(len(x)):
        begin = max(0, (n - window + 1) // size)
        local = [j for j in range(begin * size, n + 1) if j % size != size - 1]
        scores = [[query[n, h] @ key[h] * scale + bias[h] for h in range(q.shape[1])] for key, bias in chunks[:begin]]
        near = [k[local, h] @ q[n, h] * scale for h in range(q.shape[1])]
        mass = [one.logsumexp(0) for one in near]
        row = []
        for kv in range(config.num_key_value_heads):
            heads = range(kv * group, (kv + 1) * group)
            share = {}
            for c in range(begin):
                share[c] = max(
                    (scores[c][h] - torch.stack([*(scores[d][h] for d in range(begin)), mass[h]]).logsumexp(0)).item()
                    for h in heads
                )
            kept = sorted(best(share, topk))
            for h in heads:
                weights = torch.stack([*(scores[c][h] for c in kept), mass[h]]).softmax(0)
                total = weights[-1] * (near[h].softmax(0) @ v[local, h])
                for weight, c in zip(weights, kept):
                    inside = slice(c * size, (c + 1) * size - 1)
                    total = total + weight * ((k[inside, h] @ q[n, h] * scale).softmax(0) @ v[inside, h])
                row.append(total)
        out.append(torch.cat(row))
    return torch.stack(out) @ layer.o_proj.weight.T


def landmark(layer, x, config):
    size = config.chunk_size

    def summaries(q, k):
        ends = range(size - 1, len(x), size)
        return q, [(k[n], torch.zeros(q.shape[1], dtype=x.dtype)) for n in ends]

    topk = len(x) if layer.training else config.chunk_topk
    return by_landmarks(layer, x, config, window=1, topk=topk, summaries=summaries)


def hils(layer, x, config):
    size = config.chunk_size
    raw = x @ layer.q_proj.weight.T + x @ layer.query_down.weight.T @ layer.query_up.weight.T
    raw = raw.unflatten(-1, (-1, layer.head_dim))
    query = raw / (raw.square().mean(-1, keepdim=True) + layer.query_norm.eps).sqrt() * layer.query_norm.weight
    query = rotate(query, torch.arange(len(x)))

    def summaries(q, k):
        chunks = []
        for n in range(size - 1, len(x), size):
            keys = k[n - size + 1 : n]
            p = (torch.einsum("hd,shd->hs", query[n], keys) / math.sqrt(layer.head_dim)).softmax(-1)
            chunks.append((torch.einsum("hs,shd->hd", p, keys), -(p * p.log()).sum(-1)))
        return query, chunks

    window = config.sliding_window
    return by_landmarks(layer, x, config, window=window, topk=config.chunk_topk, summaries=summaries)


DENSE = {
    "landmark": landmark, "hils": hils,
    "gated_delta": gated_delta,
    "nsa": nsa, "infllm_v2": infllm_v2,
    "full_rope": full_rope, "full_nope": full_nope, "window": window, "window_sinks": window_sinks, "moba": moba,
}  # fmt: skip
