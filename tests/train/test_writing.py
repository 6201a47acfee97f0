"""A source answers in batches as alone and goes on after a kill; `hsa write` leaves files that training reads."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.data.conversations import read_conversations
from hsa_ultralong.data.self_written import Said, SourcePrompt
from hsa_ultralong.inference.prompts import prompt_ids
from hsa_ultralong.train.writing import Partial, SourceWriter

PROMPTS = [
    SourcePrompt("The mill"),
    SourcePrompt("Somebody built the mill of Tavora long ago", " and"),
    SourcePrompt("It ground barley for"),
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def model(shards_folder):
    tokenizer = shards_folder[1]
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.4, **sizes, **ids))
    return made.eval()


def writer(model, tokenizer, path, header=None, **options):
    partial = Partial(path, header or {"kind": "test"})
    options = {"batch_tokens": 64, **options}
    return SourceWriter(model, tokenizer, prompt_ids, [tokenizer.eos_token_id], partial, **options)


def test_a_batch_gives_the_answers_that_each_prompt_gets_alone(model, shards_folder, tmp_path):
    tokenizer = shards_folder[1]
    together = writer(model, tokenizer, tmp_path / "a", batch_tokens=4096).ask("r", PROMPTS, 6)
    apart = writer(model, tokenizer, tmp_path / "b", batch_tokens=1).ask("r", PROMPTS, 6)
    assert together == apart and together[1].text.startswith(" and")
    ids = torch.tensor([prompt_ids(tokenizer, "The mill")])
    alone = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    assert together[0].text == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def test_what_was_answered_before_a_kill_is_not_asked_again(model, shards_folder, tmp_path):
    tokenizer, path = shards_folder[1], tmp_path / "partial"
    first = writer(model, tokenizer, path).ask("r", PROMPTS, 6)
    # the last line was cut off
    path.write_bytes(path.read_bytes()[:-9])
    again = writer(model, tokenizer, path)
    assert again.ask("r", PROMPTS, 6) == first and again.num_prompts == 1
    # another prompt in the place of one, and another portion, have no answer yet
    again.ask("r", [SourcePrompt("Nobody"), *PROMPTS[1:]], 6)
    assert again.num_prompts == 2
    again.portion = 1
    again.ask("r", PROMPTS, 6)
    assert again.num_prompts == 5


def test_answers_of_another_command_are_not_gone_on_with(model, shards_folder, tmp_path):
    path = tmp_path / "partial"
    Partial(path, {"kind": "a", "seed": 1})
    # nothing is lost
    Partial(path, {"kind": "a", "seed": 2}).add({"0": Said("x", True)})
    with pytest.raises(ValueError, match=r"another command \(seed differ"):
        Partial(path, {"kind": "a", "seed": 1})
    path.write_text("no JSON\nat all\n")
    with pytest.raises(ValueError, match="is damaged; remove it"):
        Partial(path, {"kind": "a"})


def test_sampling_is_a_function_of_the_seed(model, shards_folder, tmp_path):
    one, two, other = (
        writer(model, shards_folder[1], tmp_path / name, temperature=1.0, seed=seed).ask("r", PROMPTS, 8)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == two != other


def test_a_batch_that_does_not_fit_into_memory_is_halved(model, shards_folder, tmp_path, monkeypatch):
    made = writer(model, shards_folder[1], tmp_path / "a", batch_tokens=4096)
    wanted = writer(model, shards_folder[1], tmp_path / "b").ask("r", PROMPTS, 4)
    answer = made._answer

    def small(rows, *arguments):
        if len(rows) > 1:
            raise torch.OutOfMemoryError("no room")
        return answer(rows, *arguments)

    monkeypatch.setattr(made, "_answer", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert made.ask("r", PROMPTS, 4) == wanted


def test_a_prompt_that_the_source_cannot_read_is_refused(model, shards_folder, tmp_path):
    with pytest.raises(ValueError, match="the source reads at most"):
        writer(model, shards_folder[1], tmp_path / "a").ask("r", [SourcePrompt("mill " * 2000)], 8)


@pytest.fixture
def source(model, shards_folder, tmp_path):
    folder = tmp_path / "source"
    model.save_pretrained(folder)
    shards_folder[1].save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    talks = [[{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": "no"}] for i in range(8)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return folder


def run(*words):
    return CliRunner().invoke(app, ["write", *map(str, words)])


def test_hsa_write_makes_conversations_and_says_what_it_kept(source, tmp_path, monkeypatch):
    # a random model does not end its answers
    monkeypatch.setattr(
        "hsa_ultralong.data.self_written._why_no_answer", lambda said: "" if said.text.strip() else "empty"
    )
    out = tmp_path / "out" / "own.jsonl"
    words = ("chat", source, tmp_path / "talks.jsonl", "-o", out, "--device", "cpu", "--answer-tokens", 8, "--json")
    done = run(*words)
    assert done.exit_code == 0, done.output
    meta = json.loads(done.stdout)
    found = read_conversations(out)
    assert meta["kept"] == len(found) and meta["kept"] + sum(meta["dropped"].values()) == meta["asked"]
    assert all(talk[0]["content"].startswith("Say") and talk[1]["content"] != "no" for talk in found)
    assert meta["source"]["model.safetensors"]["sha256"] and meta["metadata"]["commit"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["own.jsonl", "own.jsonl.meta.json"]
    again = run(*words)
    assert again.exit_code == 2 and "exists already" in again.output


def test_hsa_write_refuses_what_does_not_go_together(source, tmp_path):
    talks = tmp_path / "talks.jsonl"
    for words, why in (
        (("chat", source, talks, "-o", tmp_path / "a.json"), "must end in .jsonl"),
        (("chat", source, talks, "-o", tmp_path / "a.jsonl", "--per-passage", 2), "--per-passage goes with"),
        (("questions", source, talks, "-o", tmp_path / "a.json"), "no file of NQ with passages"),
        (("sentences", source, talks, "-o", tmp_path / "a.jsonl", "--turns", 2), "--turns goes with hsa write chat"),
        (("chat", tmp_path, talks, "-o", tmp_path / "a.jsonl", "--device", "cpu"), "no model folder"),
    ):
        done = run(*words)
        assert done.exit_code == 2 and why in done.output, done.output
        assert not list(tmp_path.glob("a.*"))
    (source / "chat_template.jinja").unlink()
    done = run("chat", source, talks, "-o", tmp_path / "a.jsonl", "--device", "cpu")
    assert done.exit_code == 2 and "has no chat template" in done.output


def test_sentences_and_rows_that_have_them_go_together(shards_folder, tmp_path):
    (tmp_path / "s.jsonl").write_text(json.dumps({"passage": "ab", "question": "Who?", "sentence": "It was she."}))
    asked = {"context": "It was she.", "qas": [{"id": "1", "question": "Who?", "answers": [{"text": "she"}]}]}
    (tmp_path / "q.json").write_text(json.dumps({"data": [{"paragraphs": [asked]}]}))
    rows = ["--set", "warmup.mixture={'passage_questions': 1.0}", "--questions", tmp_path / "q.json"]
    taught = ["--set", "warmup.data_options={'p_sentence': 0.5}"]
    for more, why in (
        (["--sentences", tmp_path / "s.jsonl"], "--sentences goes with rows of questions"),
        ([*rows, "--sentences", tmp_path / "s.jsonl"], "--sentences goes with rows of questions"),
        ([*rows, *taught], "name files of them with --sentences"),
        ([*rows, *taught, "--sentences", tmp_path / "q.json"], "no file of hsa write sentences"),
    ):
        words = ["train", "debug", "--data", shards_folder[0], "-o", tmp_path / "run", "--device", "cpu", *more]
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 2 and why in " ".join(done.output.split()), done.output
        assert not (tmp_path / "run").exists()
