"""A model type of lm-evaluation-harness that reads the prompt through a memory: `hsa`.

    python -m hsa_ultralong.eval.lm_eval_model --model hsa --model_args pretrained=FOLDER --tasks ...

Importing this module registers the type; run as above it is lm_eval itself. A prompt becomes an open document of a
memory (the lower half of the model, linear in the length) and the answer goes on with it, which is exactly what the
model would compute for the whole prompt, so prompts of a million tokens run. tests/eval/test_lm_eval.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from hsa_ultralong.eval.likelihood import Scorable, first_token, rolling_pairs, score_continuations
from hsa_ultralong.inference import DecodingEngine, memorize
from hsa_ultralong.inference.ask import end_tokens
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.remembering import continuation_cache

# contexts up to which a likelihood is scored in a batch of plain rows
_SHORT = 2048
_ROLLING_TOKENS = 2048


@register_model("hsa")
class HSALM(TemplateLM):
    """lm-eval's interface over a model of this library."""

    backend = "causal"

    def __init__(
        self, pretrained: Any = None, *, tokenizer: Any = None, device: str | None = None, dtype: str = "auto",
        batch_size: int | str = 1, max_batch_size: int | None = None, max_gen_toks: int = 256, **others: Any,
    ) -> None:  # fmt: skip
        """
        Args:
            pretrained: a model folder, or a model with `tokenizer`. device: "cpu" or "cuda". dtype: "auto", "float32"
                or "bfloat16".

        Raises:
            ValueError: for arguments that this model type does not have.
        """
        super().__init__()
        if others:
            known = "pretrained, tokenizer, device, dtype, max_gen_toks"
            raise ValueError(f"the model type hsa has no argument {next(iter(others))!r}; it takes {known}")
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if isinstance(pretrained, HSAForCausalLM):
            self.model, self.tokenizer = pretrained, tokenizer
        else:
            from transformers import AutoTokenizer

            kind: Any = dtype if dtype == "auto" else getattr(torch, dtype)
            self.model = HSAForCausalLM.from_pretrained(Path(pretrained), dtype=kind).to(place).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or pretrained)
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return first_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", ""))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        found: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **options)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Scorable(list(context), list(tokens)) for _, context, tokens in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        short = [i for i, pair in enumerate(pairs) if len(pair.context) <= _SHORT]
        scored = score_continuations(self.model, [pairs[i] for i in short])
        for i, one in zip(short, scored, strict=True):
            found[i] = (one.log, one.is_greedy)
        for i in tqdm(sorted({*range(len(pairs))} - {*short}), disable=disable_tqdm):
            found[i] = self._long(pairs[i])
        return found

    def _long(self, pair: Scorable) -> tuple[float, bool]:
        """The likelihood behind a context that is memorised."""
        memory = memorize(self.model, pair.context[:-1], close=False)
        cache, _ = continuation_cache(self.model, memory)
        ids = torch.tensor([pair.context[-1:] + pair.tokens[:-1]], device=self.model.device)
        with torch.no_grad():
            logits = self.model(ids, past_key_values=cache).logits[0].float()
        wanted = torch.tensor(pair.tokens, device=logits.device)
        log = -torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        return float(log), bool((logits.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in tqdm(requests, disable=disable_tqdm):
            (text,) = request.args
            tokens = self.tok_encode(text, add_special_tokens=False)
            pairs = rolling_pairs(tokens, first_token(self.tokenizer), _ROLLING_TOKENS)
            found.append(sum(one.log for one in score_continuations(self.model, pairs)))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in tqdm(requests, disable=disable_tqdm)]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise ValueError("the model type hsa decodes greedily; give do_sample=False or temperature=0")
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        most = int(options.get("max_gen_toks", self.max_gen_toks))
        tokens = self.tok_encode(context)
        # the last token is read together with the answer, so that its logits are known
        memory = None if len(tokens) < 2 else memorize(self.model, tokens[:-1], close=False)
        room = 2 * self.model.config.chunk_size + most + 1
        engine = DecodingEngine(self.model, memory, max_tokens=room)
        stream = engine.stream(
            [torch.tensor(tokens[-1:])], most, stop_tokens=end_tokens(self.model), continue_document=memory is not None
        )
        answer: list[int] = []
        text = ""
        for step in stream:
            assert step.tokens[0] is not None
            answer.append(step.tokens[0])
            text = self.tokenizer.decode(answer, skip_special_tokens=True)
            if any(stop and stop in text for stop in until):
                break
        for stop in until:
            text = text.split(stop)[0] if stop else text
        return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.exit(cli_evaluate())
