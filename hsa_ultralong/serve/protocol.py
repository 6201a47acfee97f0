"""Requests of the API, as types: what is unknown is refused, what is not supported says what to do instead.

The names are those of OpenAI's API (completions, chat completions); `memory`, `reread`, `reread_tokens`, `sources`,
`top_k` and `unsure_below` are ours. Called by app.py; tests/serve/test_hostile.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

_NOTHING: tuple[Any, ...] = (None, {}, [], False, 0, 0.0)
# fields of OpenAI's API that change answers and are not supported: values that ask for nothing, besides none at all
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((1,), "use n"),
    "echo": ((), "send the prompt back yourself"),
    "suffix": (("",), "write the prompt so that the answer is its end"),
    "logit_bias": ((), "leave it out"),
    "presence_penalty": ((), "leave it out"),
    "frequency_penalty": ((), "leave it out"),
    "tools": ((), "leave it out"),
    "tool_choice": (("none", "auto"), "leave it out"),
    "functions": ((), "leave it out"),
    "function_call": (("none", "auto"), "leave it out"),
    "response_format": (({"type": "text"},), "ask for text"),
    "modalities": ((["text"],), "ask for text"),
    "audio": ((), "ask for text"),
    "prediction": ((), "leave it out"),
    "reasoning_effort": (("none",), "leave it out"),
    "web_search_options": ((), "leave it out"),
}
# fields that are labels for the service's own books and change no answer
_LABELS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")


def _whole(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half a surrogate pair is no text")
    return text


class StreamOptions(BaseModel):
    """include_usage: a last event holds the numbers of tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Answering(BaseModel):
    """What completions and chat completions share."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int | None, Field(ge=0, lt=2**63)] = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    memory: str | list[str] | None = None
    sources: Annotated[int, Field(ge=0, le=64)] = 0
    unsure_below: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    reread: Annotated[int, Field(ge=0, le=64)] = 0
    reread_tokens: Annotated[int | None, Field(ge=1)] = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_counts(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name, (neutral, advice) in _UNSUPPORTED.items():
            is_asked = name in value and value[name] not in (*_NOTHING, *neutral)
            if is_asked and name not in cls.model_fields:
                raise ValueError(f"{name} is not supported; {advice}")
        dropped = {*_UNSUPPORTED, *_LABELS} - set(cls.model_fields)
        return {name: one for name, one in value.items() if name not in dropped and one is not None}

    @model_validator(mode="after")
    def _fits(self) -> Answering:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if len(self.stops()) > 16 or any(not 1 <= len(one) <= 256 for one in self.stops()):
            raise ValueError("stop takes up to 16 strings of 1 to 256 characters")
        if self.reread_tokens is not None and not self.reread:
            raise ValueError("reread_tokens is the room of passages in the prompt: say how many, reread: 4")
        if self.n > 1 and self.temperature == 0:
            raise ValueError("n > 1 needs a temperature above 0: without one all answers are the same")
        return self

    def stops(self) -> list[str]:
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop

    def memories(self) -> list[str]:
        return [] if self.memory is None else [self.memory] if isinstance(self.memory, str) else self.memory


class Completion(Answering):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str]
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    def texts(self) -> list[str]:
        """Prompts that are to be tokenised; none where token ids are given."""
        given = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [one for one in given if isinstance(one, str)]

    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def wanted_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletion(Answering):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    def texts(self) -> list[str]:
        """What is to be tokenised at least; a template may leave other turns out."""
        return ["".join(one.text() for one in self.messages if one.role == "user")]

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def wanted_tokens(self) -> int:
        given = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return 128 if given is None else given

    @model_validator(mode="after")
    def _chat_fits(self) -> ChatCompletion:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are one limit: give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class NewDocument(BaseModel):
    """A text to memorise."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(max_length=1024)] = "text"


class NewMemory(BaseModel):
    """POST /v1/memories: one text, or documents; stream: progress as events."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: str
    text: Annotated[str | None, Field(min_length=1)] = None
    documents: Annotated[list[NewDocument] | None, Field(min_length=1)] = None
    stream: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> NewMemory:
        if (self.text is None) == (self.documents is None):
            raise ValueError("give text, or documents: [{name, text}]")
        return self

    def pairs(self) -> list[tuple[str, str]]:
        if self.text is not None:
            return [("text", self.text)]
        return [(one.name, one.text) for one in self.documents or []]


class MoreDocuments(BaseModel):
    """POST /v1/memories/ID/documents."""

    model_config = ConfigDict(extra="forbid", strict=True)
    documents: Annotated[list[NewDocument], Field(min_length=1)]
    stream: bool = False

    def pairs(self) -> list[tuple[str, str]]:
        return [(one.name, one.text) for one in self.documents]


class Change(BaseModel):
    """PUT /v1/memories/ID/documents/NUMBER: another text for all of it, or for tokens start..stop."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: Annotated[str, AfterValidator(_whole)]
    start: Annotated[int | None, Field(ge=0)] = None
    stop: Annotated[int | None, Field(ge=0)] = None

    @model_validator(mode="after")
    def _whole_range(self) -> Change:
        if (self.start is None) != (self.stop is None):
            raise ValueError("give start and stop, or neither")
        if self.start is None and not self.text:
            raise ValueError("text is empty; delete the document instead")
        return self

    def span(self) -> tuple[int, int] | None:
        return None if self.start is None or self.stop is None else (self.start, self.stop)


class Merge(BaseModel):
    """POST /v1/memories/ID/merge: the memories whose documents are added."""

    model_config = ConfigDict(extra="forbid", strict=True)
    memories: Annotated[list[str], Field(min_length=1)]
