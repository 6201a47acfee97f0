"""What a run starts from: a model folder, the source that it was converted from, the difference of an earlier run; and
the difference that it leaves. Called by cli/train.py; tests/train/test_init_from.py, test_difference.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hsa_ultralong.cli.terminal import echo

if TYPE_CHECKING:
    from hsa_ultralong.train import TrainConfig, Trainer

CONVERSION = "conversion.json"


class Start(NamedTuple):
    """Paths that the command names."""

    init_from: Path | None = None
    teacher: Path | None = None
    from_difference: Path | None = None
    export_difference: Path | None = None


def take_shape(config: TrainConfig, init_from: Path, run: Path) -> None:
    """The model is that of the folder; once the run has a checkpoint, that of the run."""
    from hsa_ultralong.cli.common import require_model_folder
    from hsa_ultralong.files.strict_json import read_json
    from hsa_ultralong.models import HSAConfig, HSAForCausalLM
    from hsa_ultralong.train.state import list_checkpoints

    if config.has_twin:
        raise ValueError(
            "--init-from starts from the weights of a model of this library, a twin from none: leave it out"
        )
    config.fresh = conversion_of(init_from).get("initialised", [])
    if list_checkpoints(run) and (run / "config.json").is_file():
        base = read_json(run / "config.json").get("base")
        if isinstance(base, dict) and base:
            config.start_from(HSAConfig.from_dict(base))
            return
    require_model_folder(init_from)
    config.start_from(HSAForCausalLM.check_folder(init_from))


def conversion_of(folder: Path | None) -> dict[str, Any]:
    """What `hsa convert` noted of a folder; empty if it did not make it."""
    from hsa_ultralong.files.strict_json import read_json

    return read_json(folder / CONVERSION) if folder is not None and (folder / CONVERSION).is_file() else {}


def require_untrained(about: dict[str, Any], folder: Path | None, option: str) -> None:
    """A difference counts from what the source gave, so a folder that holds more would lose it.

    Raises:
        ValueError: the folder was trained, or made with --apply.
    """
    if about.get("difference") or about.get("is_trained"):
        raise ValueError(
            f"{option}: {folder} holds trained weights, which a difference from its source would leave out: name the "
            "folder of hsa convert without --apply; a run goes on from what was learned by --from-difference"
        )


def check_start(config: TrainConfig, start: Start) -> None:
    """What is named fits together, before any work.

    Raises:
        ValueError: it does not.
    """
    from hsa_ultralong.files.checksum import file_record
    from hsa_ultralong.train.difference import require_same_source

    about = check_differences(start)
    if start.teacher is not None and not any(stage.needs_teacher for stage in config.stages):
        raise ValueError("--teacher goes with a recipe that learns from it (convert_align, convert_memory ...)")
    if config.old_rate != 1 and not config.fresh:
        raise ValueError(f"old_rate needs --init-from with a folder of hsa convert (its {CONVERSION}); set old_rate=1")
    if config.freeze_source and not config.fresh:
        raise ValueError(f"freeze_source needs --init-from with a folder of hsa convert (its {CONVERSION})")
    _check_questions(config)
    _check_sentences(config)
    _check_chats(config)
    if start.teacher is not None and "source_files" in about:
        from hsa_ultralong.cli.convert_source import open_source

        found = {file.name: file_record(file) for file in open_source(start.teacher).files}
        require_same_source(about["source_files"], found, str(start.teacher))


def check_differences(start: Start) -> dict[str, Any]:
    """The folder and the differences that are named belong together; returns what `hsa convert` noted of the folder.

    Raises:
        ValueError: they do not.
    """
    from hsa_ultralong.cli.places import require_file
    from hsa_ultralong.train.difference import read_difference, require_same_source

    about = conversion_of(start.init_from)
    for option, path in (
        ("--from-difference", start.from_difference),
        ("--export-difference", start.export_difference),
    ):
        if path is not None and "source_files" not in about:
            raise ValueError(f"{option} needs --init-from with a folder of hsa convert (its {CONVERSION})")
        if path is not None:
            require_untrained(about, start.init_from, option)
    if start.from_difference is not None:
        _, conversion = read_difference(start.from_difference)
        require_same_source(conversion["source_files"], about["source_files"], str(start.init_from))
        if conversion["options"] != about["options"]:
            raise ValueError(f"{start.from_difference} belongs to a model that was converted with other options")
    if start.export_difference is not None:
        require_file(start.export_difference, "--export-difference", (".safetensors",))
    return about


def _check_questions(config: TrainConfig) -> None:
    from hsa_ultralong.data.mixture import WITH_QUESTIONS
    from hsa_ultralong.data.questions import read_questions

    asking = [stage.name for stage in config.stages if WITH_QUESTIONS & set(stage.mixture)]
    if asking and not config.questions:
        raise ValueError(f"stage {asking[0]!r} asks questions over passages: name files of them with --questions FILE")
    if config.questions and not asking:
        raise ValueError(f"--questions goes with rows of {' or '.join(sorted(WITH_QUESTIONS))}, which no stage has")
    for path in config.questions:
        read_questions(Path(path))


def _check_sentences(config: TrainConfig) -> None:
    from hsa_ultralong.data.mixture import WITH_QUESTIONS
    from hsa_ultralong.data.questions import read_sentences

    answering = [stage for stage in config.stages if stage.data_options.get("p_sentence")]
    asking = [stage.name for stage in answering if WITH_QUESTIONS & set(stage.mixture)]
    if config.sentences and not asking:
        raise ValueError(
            "--sentences goes with rows of questions of which some are answered in a sentence: give a stage p_sentence "
            "in its data_options"
        )
    if asking and not config.sentences:
        raise ValueError(
            f"stage {asking[0]!r} answers in sentences: name files of them with --sentences FILE (hsa write sentences)"
        )
    if config.sentences and not read_sentences(config.sentences):
        raise ValueError(f"{', '.join(config.sentences)}: no sentence")


def _check_chats(config: TrainConfig) -> None:
    from hsa_ultralong.data.conversations import read_conversations

    speaking = [stage.name for stage in config.stages if "chat" in stage.mixture]
    if speaking and not config.chats:
        raise ValueError(
            f"stage {speaking[0]!r} has rows of conversations: name files of them with --chat FILE, or leave chat out "
            f"of --set {speaking[0]}.mixture=..."
        )
    for path in config.chats:
        read_conversations(Path(path))


def load_teacher(start: Start) -> Any:
    """transformers' model of --teacher; None without."""
    if start.teacher is None:
        return None
    from hsa_ultralong.cli.convert_source import open_source

    return open_source(start.teacher).load()


def start_from(trainer: Trainer, start: Start, tokens: Any) -> dict[str, Any]:
    """Weights of the folder and of the difference, unless the run has its own; which tokens end an answer, in any
    case. Returns what the run does not train of the difference that it begins with, for `write_change`: the file may
    be gone by then."""
    from transformers import GenerationConfig

    from hsa_ultralong.cli.common import load_checkpoint
    from hsa_ultralong.train.difference import fitted, kept_tensors, read_difference, require_small, with_difference

    begun = {} if start.from_difference is None else read_difference(start.from_difference)[0]
    kept = kept_tensors(begun, trainer.model)
    if start.export_difference is not None:
        require_small(trainer.model, kept)
    folder = start.init_from
    if folder is None:
        return kept
    if trainer.resumed_from is None:
        _require_same_tokenizer(folder, tokens)
        weights = load_checkpoint(folder, "auto").state_dict()
        if begun:
            weights = fitted(with_difference(weights, begun), trainer.model)
        trainer.initialize_from(weights)
    if (folder / "generation_config.json").is_file():
        trainer.model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return kept


def keep_conversion(start: Start, export: Path) -> None:
    """What the source was, beside an exported model: a later run may learn from it too."""
    from hsa_ultralong.eval.metadata import write_json

    if about := conversion_of(start.init_from):
        write_json(export / CONVERSION, {**about, "is_trained": True})


def write_change(trainer: Trainer, start: Start, kept: dict[str, Any]) -> None:
    """The file of --export-difference; every process calls it, with what `start_from` returned."""
    if start.export_difference is None:
        return
    from hsa_ultralong.train.difference import difference_tensors, write_difference

    tensors = {**kept, **difference_tensors(trainer.model)}
    if trainer.is_first:
        write_difference(start.export_difference, tensors, conversion_of(start.init_from), trainer.model.config)
        echo(f"difference written to {start.export_difference}")


def _require_same_tokenizer(init_from: Path, tokens: Any) -> None:
    """The same number must mean the same token to the weights and to the rows."""
    from hsa_ultralong.data import load_tokenizer, tokenizer_fingerprint

    if not (init_from / "tokenizer.json").is_file():
        return
    if tokenizer_fingerprint(load_tokenizer(init_from)) != tokenizer_fingerprint(tokens):
        raise ValueError(
            f"{init_from} has another tokenizer than the shards, the same number means another token to each: build "
            f"the shards with hsa data --tokenizer {init_from}"
        )
