"""A needle study that goes on after a kill: its folder, and the results in it. tests/eval/test_needle_run.py."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.eval.metadata import peak_host_bytes
from hsa_ultralong.eval.needles import LengthResult, NeedleSample, NeedleStudy
from hsa_ultralong.eval.recorded_run import RecordedRun, model_settings, tokens_digest
from hsa_ultralong.eval.report import sample_record
from hsa_ultralong.files.fields import NUMBER, NUMBER_OR_NULL, TEXT, flag, is_finite, that, whole

_SAMPLE = [field.name for field in fields(NeedleSample)]
_READING = ("read_seconds", "distinct_chunks", "memory_bytes", "store", "task")


class NeedleRun(RecordedRun):
    """The run of `hsa eval needles`; a record also says what reading its length in its form cost."""

    FIELDS = {
        "length": whole(1), "index": whole(), "form": TEXT, "store": TEXT, "task": TEXT, "haystack": TEXT,
        "prompt": TEXT, "expected": TEXT, "answered": TEXT, "correct": flag, "found": flag, "depth": NUMBER,
        "weight": NUMBER, "margin": NUMBER_OR_NULL, "logits_error": NUMBER_OR_NULL,
        "distinct_chunks": whole(), "memory_bytes": whole(),
        "read_seconds": that(lambda value: is_finite(value) and value > 0, "a number above 0"),
    }  # fmt: skip

    def __init__(
        self, folder: Path, model: Any, name: str, *, forms: list[str], store: str, task: str, samples: int, seed: int
    ) -> None:
        """
        Args:
            name: of the model, for the records. task: "s_niah", "s_niah_authors", "mk_niah" or "notes". The rest as in
                `run_forms`.

        Raises:
            ValueError: as `RecordedRun`.
        """
        settings = {**model_settings(model), "forms": forms, "store": store, "task": task, "samples": samples}
        super().__init__(folder, {**settings, "seed": seed})
        self.name = name

    def known(self, text: torch.Tensor) -> list[LengthResult]:
        """What was found in a text (n,) of this length so far, a result for each form.

        Raises:
            ValueError: it was another text.
        """
        return self.known_of(len(text), tokens_digest(text))

    def known_of(self, length: int, digest: str) -> list[LengthResult]:
        """As `known`, of a text of so many tokens that `digest` tells from another."""
        self.haystack = digest
        here = [record for record in self.records if record["length"] == length]
        if any(record["haystack"] != self.haystack for record in here):
            raise ValueError(f"{self.folder} holds {length:,} tokens of another text; give another folder")
        return [result for result in self.results() if result.length == length]

    def keep(self, result: LengthResult) -> None:
        """Keep the last sample of a result, which is of the text that `known` was last asked about."""
        reading = {name: getattr(result, name) for name in _READING}
        record = sample_record(result, result.samples[-1], self.name, self.settings["topk"])
        self.add([{**record, **reading, "haystack": self.haystack}])

    def results(self) -> list[LengthResult]:
        """Of all lengths and forms, in the order in which they were begun."""
        found: dict[tuple[int, str], LengthResult] = {}
        for record in self.records:
            key = record["length"], record["form"]
            samples = found[key].samples if key in found else []
            samples.append(NeedleSample(**{name: record[name] for name in _SAMPLE}))
            reading = {name: record[name] for name in _READING}
            found[key] = LengthResult(length=record["length"], samples=samples, form=record["form"], **reading)
        return list(found.values())

    def study(self) -> NeedleStudy:
        return NeedleStudy(self.results(), self.settings["topk"], self.settings["seed"], peak_host_bytes())
