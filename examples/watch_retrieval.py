"""Which chunks of the past does each word of a question read? Seconds on a CPU.

    python examples/watch_retrieval.py

A text with one fact is memorised. The question runs through the model with `output_retrieval=True`, and for every token
the chunk with the largest fusion weight is shown, of the group that is surest.
"""

from __future__ import annotations

import torch
from transformers import AutoTokenizer

from hsa_ultralong import HSACache, HSAForCausalLM, default_checkpoint, memorize
from hsa_ultralong.eval.haystack import opticks

FACT = " The secret code of the silver lantern is 4821937."
QUESTION = "Question: What is the secret code of the silver lantern?\nAnswer:"


def main(tokens: int = 16_384) -> tuple[int, int]:
    """Returns the chunk that holds the fact and the one that the last token of the question reads most."""
    model = HSAForCausalLM.from_pretrained(default_checkpoint(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())

    text = tokenizer(opticks()[: 8 * tokens])["input_ids"][:tokens]
    middle = len(text) // 2
    text[middle:middle] = tokenizer(FACT, add_special_tokens=False)["input_ids"]
    memory = memorize(model, torch.tensor(text), names=["Opticks"])
    hidden = middle // model.config.chunk_size
    print(f"the fact begins in chunk {hidden} of {memory.num_chunks}")

    ids = torch.tensor(tokenizer(QUESTION)["input_ids"])[None]  # (1, T)
    # what `generate(memory=...)` makes for a prompt: empty windows beside a memory that all rows read
    cache = HSACache(model.config, memory=memory)
    with torch.no_grad():
        outputs = model(ids, past_key_values=cache, output_retrieval=True)

    read = -1
    for position, token in enumerate(ids[0].tolist()):
        # every group: indices and weights (B, T, Hr, K); -1 is an empty slot
        best = max(
            (
                (float(weight), int(index))
                for group in outputs.retrieval
                for index, weight in zip(
                    group.indices[0, position].flatten(), group.weights[0, position].flatten(), strict=True
                )
                if index >= 0
            ),
            default=(0.0, -1),
        )
        read = best[1]
        bar = "#" * round(20 * best[0])
        print(f"{tokenizer.decode([token])!r:>14}  chunk {best[1]:>4}  {best[0]:.2f} {bar}")
    return hidden, read


if __name__ == "__main__":
    main()
