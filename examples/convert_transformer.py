"""A pretrained transformer with a memory: what `hsa convert` does, and a look at what came of it.

    python examples/convert_transformer.py [FOLDER of a Llama, Mistral, Qwen2 or Qwen3 model] [-o models/converted]

Without FOLDER a tiny Llama with random weights is converted. On texts within the window the new model computes what the
source computes; its memory is silent until it is trained (docs/convert.md, convert_and_distill.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hsa_ultralong import memorize
from hsa_ultralong.models.convert import convert_model


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 512}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--window", type=int, default=64)
    options = parser.parse_args(arguments)

    source = AutoModelForCausalLM.from_pretrained(options.source) if options.source else tiny_llama()
    source = source.eval()
    conversion = convert_model(source, sliding_window=options.window)
    model = conversion.model.eval()
    config = model.config
    print(f"{config.num_lower_layers} lower layers, {config.num_upper_groups} groups of {config.group_sizes[0]}")

    # the memory is silent: within the window nothing changed
    ids = torch.randint(config.vocab_size, (1, options.window))
    with torch.no_grad():
        difference = float((model(ids).logits - source(ids).logits).abs().max())
    print(f"largest difference of the logits within the window: {difference:.1e}")

    # what the source could not do: memorise any length in linear time
    memory = memorize(model, torch.randint(config.vocab_size, (5_000,)))
    print(f"{memory.num_tokens:,} tokens in {memory.num_bytes:,} bytes")
    if options.output:
        model.save_pretrained(options.output)
        print(f"saved to {options.output}; train it: hsa train RECIPE --init-from {options.output}")
    return difference


if __name__ == "__main__":
    main()
