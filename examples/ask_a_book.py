"""Memorise a book, add a note, correct it, ask, and keep everything in a file: half a minute on two CPU cores.

    python examples/ask_a_book.py [--text FILE] [--tokens 262144]

Without --text the book is Newton's Opticks, which ships with the library. The shipped model recalls facts in forms that
it was trained on ("The locker number of the old library is 7301954."); ask it for nothing else.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hsa_ultralong import ChunkMemory, HSAForCausalLM, append, ask, default_checkpoint, edit, memorize
from hsa_ultralong.eval.haystack import opticks


def main(arguments: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file instead of the Opticks")
    parser.add_argument("--tokens", type=int, default=262_144, help="read so many tokens of it")
    options = parser.parse_args(arguments)

    model = HSAForCausalLM.from_pretrained(default_checkpoint(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text)["input_ids"])  # (T,), bos first

    def answered(memory: ChunkMemory) -> str:
        answer = ask(model, tokenizer, memory, "The locker number of the old library is")
        source = answer.sources[0]
        place = f"{source.name!r}, tokens {source.start}..{source.stop}"
        print(f"  {answer.text.strip()}   weight {answer.weight:.2f}, from {place}")
        return answer.text

    # the lower half of the model reads, 2,048 tokens at a time; a document ends when it is closed
    text = options.text.read_text(encoding="utf-8") if options.text else opticks()
    book = ids(text[: 8 * options.tokens])[: options.tokens]
    start = time.perf_counter()
    memory = memorize(model, book, names=["book"])
    print(f"{memory.num_tokens:,} tokens in {memory.num_chunks:,} chunks, {time.perf_counter() - start:.1f} s")

    # a note is one document more; nothing of the book is read again
    note = "I was in the hall. The locker number of the old library is 7301954."
    append(model, memory, ids(note), name="note")
    answers = [answered(memory)]

    # exact: the memory is now that of the changed text
    corrected = ids(note.replace("7301954", "2046813"))
    edit(model, memory, 0, len(ids(note)), corrected, document=1)
    answers.append(answered(memory))

    # a file holds it all; opened, its keys and values stay on the disk until they are looked up
    with tempfile.TemporaryDirectory() as folder:
        memory.save(Path(folder) / "book.hsa")
        answers.append(answered(ChunkMemory.load(Path(folder) / "book.hsa", store="file", dtype=torch.float32)))
    return answers


if __name__ == "__main__":
    main()
