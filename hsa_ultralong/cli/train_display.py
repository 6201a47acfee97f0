"""What `hsa train` shows while it trains: a progress bar on a terminal, a line a record elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hsa_ultralong.cli.terminal import progress

if TYPE_CHECKING:
    from hsa_ultralong.train import TrainConfig, Trainer


class Display:
    """Progress bar over the stages up to `until` (None: all) with loss, tokens/s and needle accuracy; nothing unless
    `is_shown`."""

    def __init__(self, config: TrainConfig, is_shown: bool, until: str | None = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            "{task.fields[note]}",
        )
        self.progress = progress(*columns, err=False, disable=not is_shown)
        last = len(config.stages) if until is None else config.stage(until) + 1
        steps = sum(stage.num_steps for stage in config.stages[:last])
        self.task = self.progress.add_task("training", total=steps, note="")
        self.needles, self.probe_kind = "", config.probe_kind

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, trainer: Trainer) -> None:
        self.progress.update(self.task, completed=trainer.global_step)
        if trainer.resumed_from is not None:
            self.progress.console.print(f"going on from {trainer.resumed_from}", highlight=False, soft_wrap=True)

    def show(self, record: dict[str, Any]) -> None:
        if "probe" in record:
            self.needles = f"{self.probe_kind}@{record['probe']['length']} {record['probe']['needle_accuracy']:.2f}"
            self.progress.console.print(
                f"step {record['global_step']}: {self.needles}, answer loss {record['probe']['answer_loss']:.3f}"
            )
            return
        note = f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tok/s  {self.needles}"
        self.progress.update(self.task, completed=record["global_step"], description=record["stage"], note=note)
        if not self.progress.console.is_terminal:
            self.progress.console.print(f"{record['stage']} step {record['global_step']}: {note}", highlight=False)
