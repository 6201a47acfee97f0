"""A checkpoint of the authors' code computes here what it computes there: their layout, written out anew in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

from hsa_ultralong.models.accounting import count_parameters
from hsa_ultralong.models.authors import authors_config, read_authors

# the keys of the released configuration, small
KEYS = {
    "model_type": "hsa_swa", "vocab_size": 50, "hidden_size": 128, "intermediate_size": 96, "num_lower_layers": 2,
    "num_upper_layers": 4, "num_upper_groups": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_kv_heads": 1,
    "chunk_topk": 3, "retrieval_dim": 64, "chunk_size": 16, "encoder_layers": 1, "sliding_window": 24,
    "enable_softmax": True, "enable_qk_norm": True, "enable_enc_cls": True, "enable_pos_decay": True,
    "enable_gumbel_noise": True, "reset_residual": False, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "bos_token_id": 3, "eos_token_id": 3, "num_hidden_layers": 11, "hidden_act": "silu",
}  # fmt: skip
CASES = {
    "as released": {},
    "stick breaking": {"enable_softmax": False},
    "windows beside the memory": {"hsa_only": False, "hsa_sliding_window": 8},
    "stable encoder of two layers": {"enable_stable_enc": True, "encoder_layers": 2},
    "memory heads": {"num_kv_heads": 2},
    "one retrieval head for two": {"num_kv_heads": 2, "singlehead_retrieval": True},
    "standard residual": {"reset_hsa_residual": True},
    "saved by transformers": {"model_type": "flash_hsa", "head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
}


def tensors_of(keys, seed=0):
    """Random weights under the names and shapes of their modules."""
    generator = torch.Generator().manual_seed(seed)
    width, dim, found = keys["hidden_size"], 64, {}

    def add(name, *shape, scale=0.1, shift=0.0):
        found[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift

    def norm(name, size=width):
        add(f"{name}.weight", size, scale=0.2, shift=1.0)

    def attention(name, kv_heads, has_bias=False, has_norm=True):
        rows = {"q_proj": width, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
        for part, size in rows.items():
            add(f"{name}.{part}.weight", size, width)
            if has_bias:
                add(f"{name}.{part}.bias", size)
        add(f"{name}.o_proj.weight", width, width)
        if has_norm:
            norm(f"{name}.q_norm", dim)
            norm(f"{name}.k_norm", dim)

    def mlp(name, inner):
        for part, shape in (("gate_proj", (inner, width)), ("up_proj", (inner, width)), ("down_proj", (width, inner))):
            add(f"{name}.{part}.weight", *shape)

    def window(name, **options):
        norm(f"{name}.input_layernorm")
        norm(f"{name}.post_attention_layernorm")
        attention(f"{name}.self_attn", keys["num_key_value_heads"], **options)

    add("backbone.embeddings.weight", keys["vocab_size"], width, scale=1.0)
    found["lm_head.weight"] = found["backbone.embeddings.weight"].clone()
    norm("backbone.norm_f")
    number = 0
    for number in range(keys["num_lower_layers"]):
        window(f"backbone.layers.{number}")
        mlp(f"backbone.layers.{number}.mlp", keys["intermediate_size"])
    number += 1
    here = f"backbone.layers.{number}"
    for index in range(keys["encoder_layers"]):
        window(f"{here}.encoder.layers.{index}", has_bias=True, has_norm=bool(keys.get("enable_stable_enc")))
        mlp(f"{here}.encoder.layers.{index}.mlp", width * 8 // 3 // 64 * 64)
    norm(f"{here}.encoder.norm")
    memory = keys["num_kv_heads"] * dim
    add(f"{here}.proj_k.weight", memory, width)
    add(f"{here}.proj_v.weight", memory, width)
    norm(f"{here}.k_rmsnorm", dim)
    add(f"{here}.lmk_ln.weight", keys["retrieval_dim"], width)
    add(f"{here}.cls_emb", 1, 1, width)
    for _ in range(keys["num_upper_groups"]):
        number += 1
        norm(f"backbone.layers.{number}.pre_norm")
        add(f"backbone.layers.{number}.ln.weight", keys["retrieval_dim"], width)
        add(f"backbone.layers.{number}.pos_decay", 1, scale=0.5)
        number += 1
        here = f"backbone.layers.{number}"
        norm(f"{here}.pre_norm")
        norm(f"{here}.q_norm", dim)
        add(f"{here}.q_proj.weight", width, width)
        add(f"{here}.o_proj.weight", width, width, scale=0.5)
        norm(f"{here}._mlp_norm")
        mlp(f"{here}._mlp", keys["intermediate_size"])
        if not keys.get("hsa_only", True):
            norm(f"{here}.swa_prenorm")
            attention(f"{here}.attn", keys["num_key_value_heads"])
        for _ in range(keys["num_upper_layers"] // keys["num_upper_groups"]):
            number += 1
            window(f"backbone.layers.{number}")
            mlp(f"backbone.layers.{number}.mlp", keys["intermediate_size"])
    return found


class Theirs:
    """Their forward for one row, (T,) -> (T, V), with loops over tokens and heads where ours has operators."""

    def __init__(self, keys, tensors):
        self.keys, self.tensors = keys, tensors
        self.heads, self.kv_heads, self.size = keys["num_attention_heads"], keys["num_kv_heads"], keys["chunk_size"]

    def linear(self, name, x):
        bias = self.tensors.get(f"{name}.bias")
        return F.linear(x, self.tensors[f"{name}.weight"], bias)

    def norm(self, name, x, eps=1e-6):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.tensors[f"{name}.weight"]

    def mlp(self, name, x):
        return self.linear(
            f"{name}.down_proj", F.silu(self.linear(f"{name}.gate_proj", x)) * self.linear(f"{name}.up_proj", x)
        )

    def turned(self, x):
        places = torch.arange(x.shape[0], dtype=torch.float64)
        angle = places[:, None] * 10_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        cos, sin = (torch.cat((part, part), -1)[:, None] for part in (angle.cos(), angle.sin()))
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    def attention(self, name, x, allowed):
        q, k, v = (self.linear(f"{name}.{part}_proj", x).unflatten(-1, (-1, 64)) for part in "qkv")
        if f"{name}.q_norm.weight" in self.tensors:
            q, k = self.norm(f"{name}.q_norm", q), self.norm(f"{name}.k_norm", k)
        q, k = self.turned(q), self.turned(k)
        k, v = (part.repeat_interleave(self.heads // part.shape[1], 1) for part in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / 8
        scores = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return self.linear(f"{name}.o_proj", torch.einsum("hts,shd->thd", scores, v).flatten(-2))

    def layer(self, name, x, allowed):
        x = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x), allowed)
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.post_attention_layernorm", x))

    def window(self, length, width):
        ago = torch.arange(length)[:, None] - torch.arange(length)[None]
        return (ago >= 0) & (ago < width)

    def chunks(self, name, x):
        keys, values, landmarks = [], [], []
        for start in range(0, x.shape[0] - self.size + 1, self.size):
            h = torch.cat((x[start : start + self.size], self.tensors[f"{name}.cls_emb"][0]))
            for index in range(self.keys["encoder_layers"]):
                h = self.layer(f"{name}.encoder.layers.{index}", h, torch.ones(len(h), len(h), dtype=torch.bool))
            h = self.norm(f"{name}.encoder.norm", h)
            landmarks.append(self.linear(f"{name}.lmk_ln", h[-1]))
            keys.append(self.norm(f"{name}.k_rmsnorm", self.linear(f"{name}.proj_k", h[:-1]).unflatten(-1, (-1, 64))))
            values.append(self.linear(f"{name}.proj_v", h[:-1]).unflatten(-1, (-1, 64)))
        return keys, values, landmarks

    def weights(self, name, query, landmarks, seen):
        """Chunks of one retrieval head, most recent first, and their weights."""
        scores = torch.stack([query @ landmarks[i] for i in range(seen)]) / math.sqrt(len(query))
        chosen = sorted(scores.topk(min(self.keys["chunk_topk"], seen)).indices.tolist(), reverse=True)
        if self.keys["enable_softmax"]:
            decay = self.tensors[f"{name}.pos_decay"][0]
            picked = torch.stack([scores[i] + rank * decay for rank, i in enumerate(chosen)])
            return chosen, picked.softmax(-1)
        picked, rest = torch.stack([scores[i] for i in chosen]), 1.0
        weights = []
        for score in picked:
            weights.append(score.sigmoid() * rest)
            rest = rest * (1 - score.sigmoid())
        return chosen, torch.stack(weights)

    def hsa(self, retrieval, name, x, chunks, source):
        keys, values, landmarks = chunks
        one = self.keys.get("singlehead_retrieval") or self.kv_heads == 1
        query = self.linear(f"{retrieval}.ln", self.norm(f"{retrieval}.pre_norm", source))
        q = self.norm(
            f"{name}.q_norm", self.linear(f"{name}.q_proj", self.norm(f"{name}.pre_norm", x)).unflatten(-1, (-1, 64))
        )
        out = torch.zeros_like(q)
        for t in range(len(x)):
            if not (seen := t // self.size):
                continue
            for head in range(self.heads):
                memory = head // (self.heads // self.kv_heads)
                part = slice(None) if one else slice(*(len(query[t]) // self.kv_heads * (memory + i) for i in (0, 1)))
                chosen, weights = self.weights(retrieval, query[t][part], [mark[part] for mark in landmarks], seen)
                for i, weight in zip(chosen, weights, strict=True):
                    inner = (keys[i][:, memory] @ q[t, head] / 8).softmax(-1)
                    out[t, head] += weight * (inner @ values[i][:, memory])
        return self.linear(f"{name}.o_proj", out.flatten(-2))

    def __call__(self, ids):
        keys, x, number = self.keys, self.tensors["backbone.embeddings.weight"][ids], 0
        windows = self.window(len(ids), keys["sliding_window"])
        for number in range(keys["num_lower_layers"]):
            x = self.layer(f"backbone.layers.{number}", x, windows)
        number += 1
        chunks = self.chunks(f"backbone.layers.{number}", x)
        for _ in range(keys["num_upper_groups"]):
            retrieval, name = f"backbone.layers.{number + 1}", f"backbone.layers.{number + 2}"
            source = x
            if not keys.get("hsa_only", True):
                allowed = self.window(len(ids), keys["hsa_sliding_window"])
                x = x + self.attention(f"{name}.attn", self.norm(f"{name}.swa_prenorm", x), allowed)
            read = self.hsa(retrieval, name, x, chunks, source)
            passed = self.mlp(f"{name}._mlp", self.norm(f"{name}._mlp_norm", x + read))
            x = x + passed + (read if keys.get("reset_hsa_residual") else 0)
            number += 2
            for _ in range(keys["num_upper_layers"] // keys["num_upper_groups"]):
                number += 1
                x = self.layer(f"backbone.layers.{number}", x, windows)
        x = self.norm("backbone.norm_f", x, keys["layer_norm_epsilon"])
        return x @ self.tensors["lm_head.weight"].T


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_logits_are_theirs_to_fp64_rounding(case):
    keys = {**KEYS, **CASES[case]}
    tensors = tensors_of(keys)
    model = read_authors(keys, tensors)
    assert model.dtype == torch.float64 and not model.training
    assert count_parameters(model.config).total == sum(part.numel() for part in model.parameters())
    ids = torch.randint(50, (100,), generator=torch.Generator().manual_seed(1))
    expected = Theirs(keys, tensors)(ids)
    found = model(ids[None]).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # the memory takes part
    tensors = {name: part * (not name.endswith("proj_v.weight")) for name, part in tensors.items()}
    assert (read_authors(keys, tensors)(ids[None]).logits[0] - expected)[20:].abs().max() > 1e-2


def test_the_head_is_tied_if_it_equals_the_embedding():
    tensors = tensors_of(KEYS)
    assert read_authors({**KEYS, "tie_word_embeddings": False}, tensors).config.tie_word_embeddings
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    model = read_authors(KEYS, tensors)
    assert not model.config.tie_word_embeddings and torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_a_model_with_position_decay_says_that_its_memories_have_an_order():
    assert not authors_config(KEYS).is_composable
    assert authors_config({**KEYS, "enable_pos_decay": False}).is_composable


REFUSED = {
    "a missing size": ({"hidden_size": None}, "hidden_size must be a whole number"),
    "text": ({"num_upper_groups": "two"}, "num_upper_groups must be a whole number"),
    "softmax off by one": ({"enable_softmax1": True}, "enable_softmax1=True is not supported"),
    "landmarks normed": ({"enable_lmk_norm": True}, "enable_lmk_norm=True"),
    "no CLS": ({"enable_enc_cls": False}, "enable_enc_cls=False is not supported, True is"),
    "no encoder": ({"encoder_layers": 0}, "encoder_layers must be"),
    "queries without norm": ({"enable_qk_norm": False}, "enable_qk_norm=False"),
    "other frequencies": ({"rope_theta": 1e6}, "rope_theta=1000000.0 is not supported, 10000 is"),
    "another eps": ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05"),
    "uneven groups": ({"num_upper_layers": 5}, "multiple of num_upper_groups=2"),
    "other heads": ({"head_dim": 32}, "head_dim must be"),
    "biases": ({"attention_bias": True}, "attention_bias=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_our_model_does_not_do_is_refused_by_the_name_of_the_key(case):
    changes, problem = REFUSED[case]
    with pytest.raises(ValueError, match=problem) as error:
        authors_config({**KEYS, **changes})
    assert "\n" not in str(error.value)


def test_tensors_that_do_not_fit_are_refused_by_name():
    tensors = tensors_of(KEYS)
    name = "backbone.layers.2.lmk_ln.weight"
    with pytest.raises(ValueError, match=r"lacks backbone\.layers\.2\.lmk_ln\.weight"):
        read_authors(KEYS, {key: part for key, part in tensors.items() if key != name})
    with pytest.raises(ValueError, match=r"lmk_ln.weight of the checkpoint has the shape \(1,\)"):
        read_authors(KEYS, {**tensors, name: torch.ones(1)})
    with pytest.raises(ValueError, match=r"'backbone\.new' of the checkpoint has no place"):
        read_authors(KEYS, {**tensors, "backbone.new": torch.ones(1)})
