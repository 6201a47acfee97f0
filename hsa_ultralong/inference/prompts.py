"""What a model is asked: a text as it stands, a question in the form that the model knows, or turns of a conversation.

Called by ask.py, conversation.py, serve/answers.py and commands; tests/inference/test_prompts.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# a text, read as it stands; or messages {"role": "system" | "user" | "assistant", "content": text}, through the
# tokenizer's chat template
Prompt = str | Sequence[Mapping[str, str]]


def has_chat_template(tokenizer: Any) -> bool:
    """Whether messages can be put to the model of this tokenizer."""
    return bool(getattr(tokenizer, "chat_template", None))


def as_question(prompt: str, tokenizer: Any = None, *, system: str | None = None) -> Prompt:
    """What a person typed, in the form that the model was trained on.

    With a chat template it is a message of the user, after a `system` message where one is given. Without one a bare
    question becomes "Question: ...\\nAnswer:", and anything else stays, the beginning of a sentence.

    Raises:
        ValueError: a system message for a tokenizer without a chat template.
    """
    prompt = prompt.strip()
    if has_chat_template(tokenizer):
        first = [] if system is None else [{"role": "system", "content": system}]
        return [*first, {"role": "user", "content": prompt}]
    if system is not None:
        raise ValueError("a system message needs a chat template, and this tokenizer has none; leave it out")
    return f"Question: {prompt}\nAnswer:" if prompt.endswith("?") else prompt


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; the names of special tokens that stand in a message are text.

    Raises:
        ValueError: a prompt that is empty or no Unicode text, messages without a chat template, or ones that the
            template refuses.
    """
    for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
        if text.encode(errors="ignore").decode() != text:
            raise ValueError("the prompt is no text: it holds bytes that are no UTF-8, or half of a surrogate pair")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty; ask something like 'The secret code of the amber falcon is'")
        return list(tokenizer(prompt)["input_ids"])
    if not prompt or not prompt[-1]["content"].strip():
        raise ValueError("the prompt is empty: the last message says nothing")
    if not has_chat_template(tokenizer):
        raise ValueError("messages need a chat template, and this tokenizer has none; give the prompt as one text")
    try:
        if any(name in message["content"] for message in prompt for name in tokenizer.get_added_vocab()):
            return _in_pieces(tokenizer, prompt)
        made = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)
    except Exception as error:
        if not type(error).__module__.startswith("jinja2"):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"the model's chat template refuses this conversation: {reason}") from error
    return list(made["input_ids"])


def _in_pieces(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The template around the messages, whose words are read as plain text."""
    marks = [f"Content{number}Mark" for number in range(len(messages))]
    bare = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    rest = str(tokenizer.apply_chat_template(bare, tokenize=False, add_generation_prompt=True))
    ids: list[int] = []
    for message, mark in zip(messages, marks, strict=True):
        before, found, rest = rest.partition(mark)
        if not found:
            raise ValueError(
                "a message holds the name of a special token, and this chat template changes messages, so that it "
                "could not be told from the token; leave the name out"
            )
        ids += tokenizer(before, add_special_tokens=False)["input_ids"]
        ids += tokenizer(message["content"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, *tokenizer(rest, add_special_tokens=False)["input_ids"]]


def passages_text(passages: Sequence[str]) -> str:
    """What stands before a question that is to be answered from these texts: each with a blank line after it."""
    return "".join(f"{passage.strip()}\n\n" for passage in passages)


def with_passages(prompt: Prompt, passages: Sequence[str]) -> Prompt:
    """The prompt with texts in front of it, or of its last message, a blank line after each."""
    before = passages_text(passages)
    if isinstance(prompt, str):
        return before + prompt
    return [*prompt[:-1], {**prompt[-1], "content": before + prompt[-1]["content"]}]
