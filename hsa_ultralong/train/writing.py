"""A source answers many prompts: batches of similar length, padded on the left, every answer on disk as it comes.

What was answered before a kill is not asked again: answers are found by portion, round and number. Called by
cli/write.py with the rounds of data/self_written.py; tests/train/test_writing.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.data.self_written import Said, SourcePrompt
from hsa_ultralong.files.regular import append_text, read_regular

logger = logging.getLogger(__name__)
_MOST_ROWS = 1024
_LARGEST_PARTIAL = 2**31


class Partial:
    """The answers so far of a command: a header in the first line, then a line an answer.

    Raises:
        ValueError: what lies there is of another command, naming what differs.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.found = path, dict[str, Said]()
        wanted = json.loads(json.dumps(header))
        lines = read_regular(path, _LARGEST_PARTIAL).split(b"\n") if path.exists() else [b""]
        # lines[-1] is what stands behind the last line feed
        if len(lines) > 2:
            self._read(lines, wanted)
        else:
            path.unlink(missing_ok=True)
            append_text(path, json.dumps(wanted) + "\n")

    def _read(self, lines: list[bytes], wanted: dict[str, Any]) -> None:
        advice = f"finish that one with the same command, or remove {self.path}"
        try:
            header = json.loads(lines[0])
            for line in lines[1:-1]:
                key, text, is_whole = json.loads(line)
                self.found[key] = Said(text, is_whole)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged; remove it to begin again") from error
        if header != wanted:
            names = [name for name in wanted if not isinstance(header, dict) or header.get(name) != wanted[name]]
            raise ValueError(f"{self.path} holds answers of another command ({', '.join(names)} differ): {advice}")
        if lines[-1]:
            # the line that a kill cut off
            with self.path.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines[:-1]))

    def add(self, answers: dict[str, Said]) -> None:
        """Append answers by their names."""
        append_text(self.path, "".join(json.dumps([key, *said]) + "\n" for key, said in answers.items()))
        self.found |= answers


class SourceWriter:
    """A `Scribe` (data/self_written.py) by a transformer.

    Args:
        model: of transformers, on its device.
        prompt_ids: token ids of what is asked.
        ends: tokens that end an answer.
        batch_tokens: most tokens of a batch, padding and answers included; halved where they do not fit into memory.
        temperature: 0 takes the likeliest token each time, else it is sampled, by `seed`, batch for batch.
        on_answers: told the number of answers as they come.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt_ids: Callable[[Any, Any], list[int]],
        ends: Sequence[int],
        partial: Partial,
        *,
        batch_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        on_answers: Callable[[str, int, int], None] = lambda name, done, total: None,
    ) -> None:
        self._model, self._tokenizer, self._prompt_ids = model, tokenizer, prompt_ids
        self._ends, self._partial = list(ends), partial
        self._batch_tokens, self._temperature, self._seed = batch_tokens, temperature, seed
        self._on_answers = on_answers
        self.path, self.portion = partial.path, 0
        self.num_prompts = self.num_read = self.num_written = 0

    def _ids(self, prompt: SourcePrompt) -> list[int]:
        begin = self._tokenizer(prompt.begin, add_special_tokens=False)["input_ids"] if prompt.begin else []
        return [*self._prompt_ids(self._tokenizer, prompt.asked), *begin]

    def size(self, prompt: SourcePrompt) -> int:
        """Tokens of a prompt."""
        return len(self._ids(prompt))

    def ask(self, name: str, prompts: Sequence[SourcePrompt], max_new_tokens: int) -> list[Said]:
        """An answer to each prompt, those of similar length beside each other, the longest first.

        Raises:
            ValueError: a prompt with its answer is longer than the model reads.
        """
        ids = [self._ids(prompt) for prompt in prompts]
        most = getattr(self._model.config, "max_position_embeddings", None)
        longest = max(map(len, ids), default=0) + max_new_tokens
        if most and longest > most:
            raise ValueError(f"a prompt with its answer takes {longest:,} tokens, the source reads at most {most:,}")
        # of another prompt there is no answer
        keys = [self._key(name, number, one) for number, one in enumerate(ids)]
        left = [i for i in range(len(ids)) if keys[i] not in self._partial.found]
        left.sort(key=lambda i: -len(ids[i]))
        done = len(ids) - len(left)
        self._on_answers(name, done, len(ids))
        while left:
            width = len(ids[left[0]]) + max_new_tokens
            part = left[: max(1, min(_MOST_ROWS, self._batch_tokens // width))]
            try:
                said = self._answer([ids[i] for i in part], max_new_tokens, keys[part[0]])
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self._batch_tokens = len(part) // 2 * width
                torch.cuda.empty_cache()
                logger.warning("a batch did not fit into memory; going on with %d tokens", self._batch_tokens)
                continue
            self._partial.add(
                {keys[i]: Said(prompts[i].begin + text, whole) for i, (text, whole) in zip(part, said, strict=True)}
            )
            left, done = left[len(part) :], done + len(part)
            self._on_answers(name, done, len(ids))
        return [self._partial.found[key] for key in keys]

    def _key(self, name: str, number: int, ids: list[int]) -> str:
        digest = hashlib.sha256(str(ids).encode()).hexdigest()[:12]
        return f"{self.portion}/{name}/{number}/{digest}"

    @torch.inference_mode()
    def _answer(self, rows: list[list[int]], max_new_tokens: int, key: str) -> list[tuple[str, bool]]:
        width, pad, place = max(map(len, rows)), self._tokenizer.pad_token_id, self._model.device
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=place)  # (B, T)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=place)  # (B, T)
        options: dict[str, Any] = {"do_sample": False}
        if self._temperature:
            options = {"do_sample": True, "temperature": self._temperature, "top_k": 0, "top_p": 0.95}
            torch.manual_seed(int(hashlib.sha256(f"{self._seed}/{key}".encode()).hexdigest()[:15], 16))
        made = self._model.generate(
            tokens, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=self._ends,
            **options,
        )[:, width:].tolist()  # fmt: skip
        answers: list[tuple[str, bool]] = []
        for row in made:
            end = next((place for place, token in enumerate(row) if token in self._ends), None)
            kept = row[:end]
            answers.append((self._tokenizer.decode(kept, skip_special_tokens=True), end is not None))
            self.num_written += len(kept)
        self.num_prompts += len(rows)
        self.num_read += sum(map(len, rows))
        return answers
