"""A conversation over a memory; what is said can become memory itself, in a file that the next conversation opens.

Called by cli/chat_partners.py and programs; tests/inference/test_conversation.py.
"""

from __future__ import annotations

import re
import time
from typing import Any

import torch

from hsa_ultralong.inference.ask import AnswerStream
from hsa_ultralong.inference.library import Library
from hsa_ultralong.inference.prompts import Prompt, as_question, has_chat_template, prompt_ids
from hsa_ultralong.inference.reader import append, memorize
from hsa_ultralong.memory.chunk_memory import ChunkMemory, Memory
from hsa_ultralong.memory.opening import open_memory
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.wrapped import unwrapped

_TURN = re.compile(r"turn (\d+)")


def turn_text(text: str, answer: str) -> str:
    """A turn as it is remembered."""
    return f"User: {text.strip()}\nAssistant: {answer.strip()}"


def next_turn(names: list[str]) -> str:
    """The name of the turn after those among some documents."""
    return f"turn {1 + max((int(found[1]) for found in map(_TURN.fullmatch, names) if found), default=0)}"


class Conversation:
    """Turns of a person and a model.

    With a chat template the turns so far stand in the prompt, the oldest left out where they would pass
    `context_tokens`. Without one every message is asked by itself, as `hsa ask` does.

    Attributes:
        memory: what answers read, remembered turns included; None if there is nothing yet.
        messages: the turns so far. num_left_out: of these, not in the last prompt.
    """

    def __init__(
        self,
        model: HSAForCausalLM,
        tokenizer: Any,
        memory: Memory | None = None,
        *,
        library: Library | None = None,
        system: str | None = None,
        max_new_tokens: int = 256,
        context_tokens: int = 8192,
        reread: int = 0,
        reread_tokens: int | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            library: the memory file that turns are added to, open for writing; answers read what it holds already.
            context_tokens: of a prompt and its answer. options: num_sources and unsure_below of `ask`.

        Raises:
            ValueError: a system message without a chat template, or memories that cannot be put together.
        """
        self.model, self.tokenizer, self.memory, self.library = unwrapped(model), tokenizer, memory, library
        as_question("?", tokenizer, system=system)
        self.system, self.max_new_tokens, self.context_tokens = system, max_new_tokens, context_tokens
        self.reread, self.reread_tokens, self.options = reread, reread_tokens, options
        self.messages: list[dict[str, str]] = []
        self.num_left_out = 0
        if library is not None and library.documents:
            weight = self.model.model.embed_tokens.weight
            said = open_memory(library.writer.path, store="device", device=weight.device, dtype=weight.dtype)
            self.memory = said if memory is None else ChunkMemory.concat([memory, said])
        elif library is not None and memory is not None:
            # what grows is a copy
            self.memory = memory.to()

    def prompt(self, text: str) -> tuple[Prompt, int]:
        """What a message is asked as, and the tokens that are left for passages.

        Raises:
            ValueError: it does not fit beside its answer.
        """
        asked, kept = as_question(text, self.tokenizer, system=self.system), self.messages
        while True:
            turns = asked if isinstance(asked, str) else [*asked[:-1], *kept, asked[-1]]
            room = self.context_tokens - self.max_new_tokens - len(prompt_ids(self.tokenizer, turns))
            if room >= 0 or isinstance(asked, str) or not kept:
                break
            kept = kept[2:]
        if room < 0:
            raise ValueError(
                f"the message and an answer of {self.max_new_tokens:,} tokens pass the {self.context_tokens:,} of a "
                f"prompt by {-room:,}; put long text into a memory"
            )
        self.num_left_out = len(self.messages) - len(kept) if has_chat_template(self.tokenizer) else 0
        return turns, room

    def stream(self, text: str) -> AnswerStream:
        """The answer to a message, to iterate over; `keep` makes both part of the conversation.

        Raises:
            ValueError: what `ask` refuses.
        """
        prompt, room = self.prompt(text)
        has_memory = self.memory is not None and self.memory.num_chunks_of_all > 0
        options = dict(self.options)
        if self.reread and has_memory:
            given = room if self.reread_tokens is None else min(room, self.reread_tokens)
            options |= {"reread": self.reread, "reread_tokens": max(1, given)}
        return AnswerStream(
            self.model, self.tokenizer, self.memory, prompt, max_new_tokens=self.max_new_tokens, **options
        )

    def keep(self, text: str, answer: str) -> str | None:
        """Add a turn; with a library it is on disk, and is read by what is asked next, when this returns its name.

        Raises:
            ValueError, OSError: it could not be written; the file holds what it held.
        """
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        if self.library is None:
            return None
        # names of special tokens that somebody writes are text
        tokens = torch.tensor(self.tokenizer(turn_text(text, answer), split_special_tokens=True)["input_ids"])
        name = next_turn([document.name for document in self.library.documents])
        said = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.library.add(tokens, name=name, metadata={"said": said})
        if self.memory is None:
            self.memory = memorize(self.model, tokens, names=[name])
        else:
            append(self.model, self.memory, tokens, name=name)
        return name

    def clear(self) -> None:
        """Begin anew; what was remembered stays."""
        self.messages, self.num_left_out = [], 0
