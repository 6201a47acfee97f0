"""The commands on a tiny random model: what they write, and that bad input ends in one line and exit code 2."""

import gc
import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from hsa_ultralong.cli.ask import _hide
from hsa_ultralong.cli.common import MAX_PROMPT_TOKENS, collect_as_usual, collect_rarely, load_model
from hsa_ultralong.cli.main import app
from hsa_ultralong.files.packed import pack
from hsa_ultralong.inference import as_question


def hsa(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("It was a bright cold day in April, and the clocks were striking. " * 40, encoding="utf-8")
    return path


def assert_one_clear_line(result, *words):
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ") and "Traceback" not in result.output
    for word in words:
        assert word in lines[0]


def test_garbage_is_looked_for_rarely_only_until_a_model_is_loaded(checkpoint):
    # a command that another test ran may have left it rare
    collect_as_usual()
    usual = gc.get_threshold()
    collect_rarely()
    assert gc.get_threshold()[0] > usual[0]
    load_model(checkpoint, "cpu", "fp32")
    assert gc.get_threshold() == usual


def test_quickstart_writes_report_records_and_map(checkpoint, tmp_path):
    out = tmp_path / "report"
    result = hsa(
        "quickstart", "--model", checkpoint, "-o", out, "--lengths", "1K,2K", "--needles", 2, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert set(report) == {"meta", "records"}
    assert {"command", "commit", "date", "hardware", "versions", "seed"} <= set(report["meta"])
    accuracy = [record for record in report["records"] if record.get("task") == "s_niah"]
    assert [record["length"] for record in accuracy] == [1024, 2048]
    assert all(record["samples"] == 2 and 0 <= record["ci_low"] <= record["ci_high"] <= 1 for record in accuracy)
    assert {"read_tokens_per_s", "peak_host_bytes"} <= {record.get("metric") for record in report["records"]}
    assert len((out / "records.jsonl").read_text().splitlines()) == 4
    assert (out / "needles.png").read_bytes().startswith(b"\x89PNG")
    assert "hsa ask --text" in result.stdout and "not converse" in result.stdout


def test_ask_answers_with_source_and_says_when_it_is_unsure(checkpoint, book):
    result = hsa("ask", "--text", book, "--model", checkpoint, "--json", "--sources", 2, "What is it?")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert 1 <= len(answer["sources"]) <= 2 and answer["sources"][0]["name"] == str(book)
    assert answer["weight"] == answer["sources"][0]["weight"]
    # this model has no line below which it is unsure
    assert answer["is_uncertain"] is None and answer["unsure_below"] is None
    shown = hsa("ask", "--text", book, "--model", checkpoint, "What is it?")
    assert "Unsure" not in shown.stdout and "does not say below which" in shown.stdout
    for below in (0, 1):
        drawn = hsa("ask", "--text", book, "--model", checkpoint, "--unsure-below", below, "What is it?")
        assert ("Unsure" in drawn.stdout) == (answer["weight"] < below) and "does not say" not in drawn.stdout
    refused = hsa("ask", "--text", book, "--model", checkpoint, "--unsure-below", 2, "What is it?")
    assert refused.exit_code == 2 and "unsure-below" in refused.output


def test_ask_reads_the_best_passages_again_and_says_which(checkpoint, book, tmp_path):
    options = ("ask", "--text", book, "--model", checkpoint, "--dtype", "fp32", "--reread", 3)
    found = json.loads(hsa(*options, "--json", "What is it?").stdout)
    starts = [one["start"] for one in found["reread"]]
    assert len(starts) == 3 and starts == sorted(starts) and all(one["passage"] for one in found["reread"])
    shown = hsa(*options, "--reread-tokens", 45, "What is it?").stdout
    assert re.search(r"Read again in the prompt, [12] passages? \(3 were asked for\): .*, tokens \d", shown)
    for words, message in (
        (("--reread-tokens", 1), "does not fit"),
        (("--reread", 0, "--reread-tokens", 9), "--reread-tokens goes with"),
        (("--system", "You"), "a system message needs a chat template"),
        (("--system", "You", "--plain"), "--plain leaves out"),
    ):
        assert_one_clear_line(hsa(*options, *words, "What is it?"), message)


def test_a_model_with_a_chat_template_is_asked_through_it(checkpoint, book, tmp_path, monkeypatch):
    import hsa_ultralong.inference as inference

    folder = tmp_path / "chat"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    (folder / "checksums.json").unlink(missing_ok=True)
    prompts = []
    real = inference.ask
    monkeypatch.setattr(inference, "ask", lambda *a, **o: prompts.append((a[3], o["max_new_tokens"])) or real(*a, **o))
    options = ("ask", "--text", book, "--model", folder, "--max-new-tokens", 2)
    assert hsa(*options, "--system", "You remember.", "Tell me.").exit_code == 0
    assert hsa(*options, "--plain", "What is it?").exit_code == 0
    system, user = {"role": "system", "content": "You remember."}, {"role": "user", "content": "Tell me."}
    assert prompts == [([system, user], 2), ("What is it?", 2)]


def test_ask_and_generate_read_what_people_have(checkpoint, tmp_path):
    sentences = "It was a bright cold day in April. " * 20
    (tmp_path / "a.csv").write_text(f"id,body\n1,{sentences}\n2,{sentences}\n")
    (tmp_path / "b.txt").write_bytes(("d\xe9j\xe0 vu. " + sentences).encode("cp1252"))
    options = ("--model", checkpoint, "--text-field", "body", "--encoding", "cp1252")
    answer = hsa("ask", "-t", tmp_path / "a.csv", "-t", tmp_path / "b.txt", *options, "--json", "--sources", 9, "It")
    assert answer.exit_code == 0, answer.output
    names = {source["name"] for source in json.loads(answer.stdout)["sources"]}
    assert names <= {f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:3", f"{tmp_path}/b.txt"} and names
    for go_on in ([], ["--continue"]):
        result = hsa("generate", "-t", tmp_path, *options, "--max-new-tokens", 2, *go_on, "It")
        assert result.exit_code == 0, result.output
    piped = CliRunner().invoke(app, ["ask", "-t", "-", "--model", str(checkpoint), "--json", "It"], input=sentences)
    assert json.loads(piped.stdout)["sources"][0]["name"] == "standard input"
    for words in (["ask", "-m", tmp_path], ["generate"], ["eval", "needles", "-o", tmp_path / "x"]):
        refused = hsa(*words, *(["It"] if words[0] != "eval" else []), "--encoding", "cp1252", "--model", checkpoint)
        assert_one_clear_line(refused, "--encoding", "--text")


def test_generate_with_and_without_a_text(checkpoint, book):
    for extra in (["def main():"], ["--text", book, "--continue"], ["--text", book, "A word"]):
        result = hsa("generate", "--model", checkpoint, "--max-new-tokens", 4, "--temperature", 0, *extra)
        assert result.exit_code == 0, result.output


def test_generate_is_reproducible_by_seed(checkpoint):
    runs = [
        hsa("generate", "x", "--model", checkpoint, "--max-new-tokens", 8, "--seed", seed).stdout for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_data_train_and_plot_run_end_to_end(tmp_path):
    words = ["alpha", "bravo", "delta", "gamma", "omega", "sigma", "theta", "kappa", "lambda", "zeta", "north", "south"]
    words += ["eastern", "western", "river", "mountain", "valley", "forest", "island", "bridge", "harbour", "castle"]
    text = "\n\x1e\n".join(" ".join(words[(i * j + j) % len(words)] for j in range(4000)) for i in range(4))
    corpus, shards, run = tmp_path / "corpus.txt", tmp_path / "shards", tmp_path / "run"
    corpus.write_text(text, encoding="utf-8")
    result = hsa("data", corpus, "-o", shards, "--vocab-size", 300, "--validation-fraction", 0.3)
    assert result.exit_code == 0, result.output
    small = ["--set", "warmup.tokens=4096", "--set", "long.tokens=2048", "--set", "probe_rows=1"]
    trained = hsa(
        "train", "debug", "--data", shards, "-o", run, "--device", "cpu", *small, "--export", tmp_path / "model"
    )
    assert trained.exit_code == 0, trained.output
    assert (tmp_path / "model" / "checksums.json").is_file()
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert any("loss" in record for record in records) and any("probe" in record for record in records)
    again = hsa("train", "debug", "--data", shards, "-o", run, "--device", "cpu", *small)
    assert "finished at step 3" in again.stdout
    assert hsa("plot", run).exit_code == 0
    measured = json.loads((run / "summary.json").read_text())
    assert measured["meta"]["hardware"] and {"tokens_per_s", "loss"} <= {one["metric"] for one in measured["records"]}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    answer = hsa("ask", "--text", corpus, "--model", tmp_path / "model", "The river")
    assert answer.exit_code == 0, answer.output


def test_plot_of_a_run_published_together_says_what_makes_a_folder_of_it(tmp_path):
    (tmp_path / "runs.jsonl.xz").touch()
    run = tmp_path / "run-hsa-0"
    assert_one_clear_line(hsa("plot", run), f"is made a folder by `python scripts/publish.py {run} -o FOLDER`")
    (tmp_path / "records.jsonl.xz").write_bytes(pack(b'{"run": "eval-hsa-0"}\n'))
    assert_one_clear_line(hsa("plot", run.parent), "holds several runs published together: draw one from a folder")


def test_dry_run_prints_the_resolved_recipe():
    result = hsa(
        "train", "nano", "--set", "warmup.tokens=1000000", "--set", "model.chunk_topk=16", "--dry-run", "--json"
    )
    resolved = json.loads(result.stdout)
    assert resolved["stages"][0]["tokens"] == 1_000_000 and resolved["model"] == {"chunk_topk": 16}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nanoo", "--dry-run"], ["nanoo", "nano"]),
        (["train", "nano", "--set", "warmup.token=3", "--dry-run"], ["warmup.token", "tokens"]),
        (["train", "nano", "--set", "warmup.tokens=many", "--dry-run"], ["warmup.tokens", "int"]),
        (["train", "nano", "--set", "model.chunk_topk=0", "--data", "nowhere"], []),
        (["train", "nano"], ["--data"]),
        (["train", "nano", "--data", "nowhere", "--freeze-memory"], ["--init-from"]),
        (["train", "nano", "--until", "end", "--dry-run"], ["end", "warmup"]),
        (["plan", "nanoo"], ["nanoo"]),
        (["plan", "nano", "--set", "chunk_top=3"], ["chunk_top"]),
        (["plan", "nano", "--set", "chunk_topk=0"], ["chunk_topk"]),
        (["plan", "nano", "--set", "num_attention_heads=3"], ["num_attention_heads"]),
        (["plot"], ["--all"]),
        (["plot", "nowhere"], ["nowhere"]),
        (["generate"], ["prompt"]),
        (["generate", "--continue"], ["--text"]),
        (["quickstart", "--lengths", "4Q"], ["4Q"]),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, words):
    assert_one_clear_line(hsa(*arguments), *words)


def test_bad_files_end_in_one_line(checkpoint, tmp_path, book):
    latin, empty = tmp_path / "latin.txt", tmp_path / "empty.txt"
    latin.write_bytes("caf\xe9 ".encode("latin-1") * 50)
    empty.write_text("")
    question = "What is it?"
    assert_one_clear_line(hsa("ask", "--text", tmp_path / "no.txt", "--model", checkpoint, question), "no.txt")
    assert_one_clear_line(hsa("ask", "--text", empty, "--model", checkpoint, question), "empty")
    assert_one_clear_line(hsa("ask", "--text", latin, "--model", checkpoint, question), "UTF-8")
    assert_one_clear_line(hsa("ask", "--text", book, "--model", tmp_path, question), "config.json")
    assert_one_clear_line(hsa("ask", "--text", book, "--model", checkpoint, " "), "empty")
    long = "word " * (MAX_PROMPT_TOKENS + 1)
    assert_one_clear_line(hsa("ask", "--text", book, "--model", checkpoint, long), str(MAX_PROMPT_TOKENS))
    assert_one_clear_line(hsa("ask", "--text", book, "--model", checkpoint, "--dtype", "int4", question), "--dtype")
    assert_one_clear_line(hsa("data", empty, "-o", tmp_path / "shards"), "empty")
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path, book, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        weights.unlink()
    else:
        weights.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    assert_one_clear_line(hsa("ask", "--text", book, "--model", folder, "What is it?"), "model.safetensors")


def test_a_checkpoint_without_a_weight_is_refused(checkpoint, tmp_path, book):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "partial"
    shutil.copytree(checkpoint, folder)
    (folder / "checksums.json").unlink()
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "query_proj" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert_one_clear_line(hsa("ask", "--text", book, "--model", folder, "What is it?"), "query_proj")


def test_hiding_keeps_words_whole_and_questions_get_their_form():
    assert _hide("one two three", "X.", 0.5) == "one two X. three"
    assert _hide("one", "X.", 1.0) == "one X."
    assert as_question("Where?") == "Question: Where?\nAnswer:"
    assert as_question("The code is") == "The code is"
