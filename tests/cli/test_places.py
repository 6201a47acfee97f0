"""Outputs are checked before the work, an interrupted study keeps what it has, refused commands leave nothing."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.cli.places import removed_on_failure, require_file, require_folder


def hsa(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_places_that_cannot_be_written_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "nowhere")
    require_folder(tmp_path / "a" / "b" / "c")
    require_folder(tmp_path / "full")
    require_file(tmp_path / "a" / "b.PNG", suffixes=(".png",))
    for path, is_new, message in (
        (file, False, "is no folder"),
        (file / "below", False, "is no folder"),
        (tmp_path / "loop", False, "is no folder"),
        (tmp_path / "full", True, "exists already"),
    ):
        with pytest.raises(ValueError, match=message):
            require_folder(path, is_new=is_new)
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "a.txt", "must end in .png"),
        (file / "b.png", "is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            require_file(path, suffixes=(".png",))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_places_without_permission_are_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written"):
        require_folder(tmp_path / "a")
    tmp_path.chmod(0o700)


def test_a_folder_in_the_making_goes_with_its_failure(tmp_path):
    place = tmp_path / "a" / "b" / "new"
    with pytest.raises(KeyboardInterrupt), removed_on_failure(place):
        place.mkdir(parents=True)
        (place / "part").write_text("x")
        raise KeyboardInterrupt
    assert tree(tmp_path) == []
    with removed_on_failure(place):
        place.mkdir(parents=True)
    assert place.is_dir()


def commands(text, checkpoint):
    return {
        "quickstart": ["quickstart", "--model", checkpoint],
        "data": ["data", text, "--tokenizer", checkpoint],
        "eval": ["eval", "needles", "--model", checkpoint],
        "average": ["average", checkpoint, checkpoint],
        "convert": ["convert", checkpoint],
        "bench ops": ["bench", "ops", "--device", "cpu"],
        "bench memory": ["bench", "memory", "--device", "cpu", "--model", checkpoint],
        "bench training": ["bench", "training", "--device", "cpu", "--preset", "debug"],
        "plot": ["plot", text.parent / "run", text.parent / "run"],
    }


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "given"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "log.jsonl").write_text("")
    (folder / "book.txt").write_text("It was a bright cold day in April. " * 40)
    return folder / "book.txt"


@pytest.mark.parametrize("name", commands(__import__("pathlib").Path("x/y"), ""))
def test_every_command_checks_its_output_before_the_work(text, checkpoint, tmp_path, monkeypatch, name):
    from hsa_ultralong.cli import common

    def work(*_, **__):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(common, "load_model", work)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    for output in (text, text / "below"):
        target = output.with_suffix(".png") if name == "plot" and output == text else output
        if target.suffix == ".png":
            target.mkdir()
            before = tree(tmp_path)
        result = hsa(*commands(text, checkpoint)[name], "-o", target)
        lines = result.stderr.strip().splitlines()
        assert result.exit_code == 2 and len(lines) == 1 and "--output" in lines[0], result.output + result.stderr
        assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "{bad}", "--max-bad", 0, "--tokenizer", "{model}", "-o", "{new}/shards"],
        ["data", "{bad}", "--max-bad", 0, "--vocab-size", 3, "-o", "{new}/shards"],
        ["data", "{text}", "--tokenizer", "{new}", "-o", "{new}/shards"],
        ["eval", "needles", "--forms", "own,klingon", "-o", "{new}/study"],
        ["eval", "needles", "--store", "cloud", "-o", "{new}/study"],
        ["eval", "needles", "--wording", "mine", "-o", "{new}/study"],
        ["eval", "needles", "--wording", "authors", "--notes", "-o", "{new}/study"],
        ["eval", "needles", "--lengths", "64K", "--model", "{new}", "-o", "{new}/study"],
        ["eval", "needles", "--lengths", "4", "--model", "{model}", "--device", "cpu", "-o", "{new}/study"],
        ["quickstart", "--lengths", "16M", "--model", "{model}", "--device", "cpu", "-o", "{new}/report"],
        ["average", "{model}", "{model}", "--weights", "1", "-o", "{new}/model"],
        ["average", "{model}", "{model}", "--weights", "nan,1", "-o", "{new}/model"],
        ["average", "{model}", "{new}", "-o", "{new}/model"],
        ["convert", "{model}", "-o", "{new}/model"],
        ["bench", "ops", "--ops", "klingon", "--device", "cpu", "-o", "{new}/bench"],
        ["bench", "memory", "--preset", "klingon", "--device", "cpu", "-o", "{new}/bench"],
        ["plot", "{run}", "{run}", "-o", "{new}/a.txt"],
        ["plot", "--all", "-o", "{new}/a.png"],
    ],
)
def test_refused_commands_leave_nothing_behind(text, checkpoint, tmp_path, monkeypatch, arguments):
    (text.parent / "bad.txt").write_bytes(b"caf\xe9")
    monkeypatch.chdir(tmp_path)
    names = {
        "bad": text.parent / "bad.txt",
        "text": text,
        "model": checkpoint,
        "new": tmp_path / "new",
        "run": text.parent / "run",
    }
    before = tree(tmp_path)
    result = hsa(*(str(argument).format(**names) for argument in arguments))
    assert result.exit_code == 2, result.output + result.stderr
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", ["eval", "quickstart"])
def test_an_interrupted_study_keeps_what_it_has(checkpoint, tmp_path, monkeypatch, command):
    from hsa_ultralong.eval import needles

    asked, ask = [], needles.ask

    def interrupted(*arguments, **options):
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return ask(*arguments, **options)

    monkeypatch.setattr(needles, "ask", interrupted)
    words = ["eval", "needles"] if command == "eval" else ["quickstart", "--controls", 0]
    options = ("--model", checkpoint, "--device", "cpu", "--lengths", "1K,2K", "--needles", 2)
    result = hsa(*words, *options, "-o", tmp_path / "study")
    assert result.exit_code == 130 and "so far" in result.stderr, result.output + result.stderr
    records = [json.loads(line) for line in (tmp_path / "study" / "records.jsonl").read_text().splitlines()]
    assert [record["length"] for record in records] == [1024] * 2 + [2048]
    name = "summary.json" if command == "eval" else "report.json"
    summary = json.loads((tmp_path / "study" / name).read_text())["records"]
    assert [one["samples"] for one in summary if "samples" in one] == [2, 1]
    assert (tmp_path / "study" / "needles.png").is_file()


def test_a_bare_name_is_a_folder_of_models_or_checkpoints_unless_it_is_one_itself(tmp_path, monkeypatch):
    from hsa_ultralong.cli.common import model_folder

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"neither smol, nor models/smol, nor checkpoints/smol"):
        model_folder(Path("smol"))
    for place in ("checkpoints", "models"):
        (tmp_path / place / "smol").mkdir(parents=True)
        (tmp_path / place / "smol" / "config.json").write_text("{}")
        assert model_folder(Path("smol")) == Path(place) / "smol"
    (tmp_path / "smol").mkdir()
    for named in ("smol", ".", "other/smol"):
        assert model_folder(Path(named)) == Path(named)
