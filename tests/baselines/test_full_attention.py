"""The full-attention twin: what its name says, and as many parameters as the model without its memory."""

import torch
import torch.nn.functional as F

from hsa_ultralong.baselines import FullAttentionLM
from hsa_ultralong.bench.training import full_attention_twin
from hsa_ultralong.models.presets import preset


def tiny(**changes):
    torch.manual_seed(0)
    options = {
        "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e4,
    }  # fmt: skip
    return FullAttentionLM(**{**options, **changes}).double()


def test_every_token_reads_all_before_it_and_none_after():
    model = tiny()
    ids = torch.randint(37, (1, 20))

    def outputs(tokens):
        found = []
        handle = model.norm.register_forward_hook(lambda module, inputs, out: found.append(out))
        model(tokens, tokens)
        handle.remove()
        return found[0][0]

    before = outputs(ids)
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 37
    moved = (outputs(changed) - before).abs().amax(-1) > 0
    assert not moved[:7].any() and moved[7:].all()


def test_loss_is_the_mean_of_the_labels_and_checkpointing_changes_nothing():
    model = tiny().train()
    ids = torch.randint(37, (2, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    states = []
    handle = model.norm.register_forward_hook(lambda module, inputs, out: states.append(out))
    loss = model(ids, labels)
    handle.remove()
    logits = states[0][:, :-1] @ model.embed_tokens.weight.T
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100))
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing = True
    model(ids, labels).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-12, atol=1e-14)


def test_the_twin_has_the_window_layers_and_no_memory():
    config = preset("debug")
    twin = full_attention_twin(config)
    window_layers = config.num_lower_layers + config.num_upper_groups * (config.num_layers_per_group - 1)
    assert len(twin.layers) == window_layers
