"""lm-evaluation-harness beside ours: its model type, and the same short tasks. Needs the extra `eval`."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("lm_eval")

from hsa_ultralong.eval.short_tasks import SHORT, score_items
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.testing.tokenizers import byte_level

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=len(byte_level())).float().eval()


class Request:
    def __init__(self, *args):
        self.args = args


def test_an_answer_through_a_memory_is_that_of_the_whole_prompt(model):
    from hsa_ultralong.eval.lm_eval_model import HSALM

    tokenizer = byte_level()
    reader = HSALM(model, tokenizer=tokenizer)
    for prompt in ("a", "The sky is", "Sheep sleep. " * 30):
        ids = torch.tensor([reader.tok_encode(prompt)])
        with torch.no_grad():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9,
                                  pad_token_id=0, eos_token_id=None)  # fmt: skip
        wanted = tokenizer.decode(made[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
        (found,) = reader.generate_until([Request(prompt, {"until": [], "max_gen_toks": 9})], disable_tqdm=True)
        assert found == wanted
        if len(wanted) > 3:
            stopped = Request(prompt, {"until": [wanted[2]], "max_gen_toks": 9})
            (cut,) = reader.generate_until([stopped], disable_tqdm=True)
            assert cut == wanted.split(wanted[2])[0]
    with pytest.raises(ValueError, match="decodes greedily"):
        reader.generate_until([Request("a", {"do_sample": True})], disable_tqdm=True)
    with pytest.raises(ValueError, match="no argument 'parallelize'"):
        HSALM(model, tokenizer=tokenizer, parallelize=True)


def test_likelihoods_behind_long_contexts_are_those_of_one_forward(model, monkeypatch):
    from hsa_ultralong.eval import lm_eval_model

    pairs = [(("", ""), list(range(1, n)), [3, 5, 8]) for n in (4, 30, 90)]
    reader = lm_eval_model.HSALM(model, tokenizer=byte_level())
    wanted = reader._loglikelihood_tokens(pairs, disable_tqdm=True)
    monkeypatch.setattr(lm_eval_model, "_SHORT", 1)
    for (log, is_greedy), (other, same) in zip(
        reader._loglikelihood_tokens(pairs, disable_tqdm=True), wanted, strict=True
    ):
        assert log == pytest.approx(other, rel=1e-4)
        assert is_greedy == same


def _yaml(folder, name, text):
    (folder / f"{name}.yaml").write_text(text)


def test_short_tasks_give_the_numbers_of_lm_eval(model, tmp_path):
    """The same files, by lm-eval's own HFLM and scoring, with the prompts of its tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = byte_level()
    rows = [{"query": f"Question: is {i * 7} odd?", "choices": ["no", "yes, it is", "who knows"], "gold": i % 3}
            for i in range(12)]  # fmt: skip
    words = [{"context": f"Sheep {i} sleeps and then it", "continuation": "snores"} for i in range(6)]
    options = [{"context_options": [f"Ann saw Eva {i} so Ann", f"Ann saw Eva {i} so Eva"], "continuation": "left.",
                "gold": i % 2} for i in range(8)]  # fmt: skip
    for name, data in (("arc_easy", rows), ("lambada_openai", words), ("winogrande", options)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, data)) + "\n")

    def head(name):
        where = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / name}.jsonl\n"
        return f"task: own_{name}\n{where}test_split: test\n"

    metrics = "metric_list:\n" + "".join(
        f"  - metric: {metric}\n    aggregation: mean\n    higher_is_better: true\n" for metric in ("acc", "acc_norm")
    )
    choice = "output_type: multiple_choice\n"
    _yaml(tmp_path, "arc_easy", head("arc_easy") + choice + 'doc_to_text: "{{query}}\\nAnswer:"\ndoc_to_target: gold\n'
          'doc_to_choice: "{{choices}}"\n' + metrics)  # fmt: skip
    _yaml(tmp_path, "winogrande", head("winogrande") + choice + "doc_to_text: gold\ndoc_to_target: continuation\n"
          'doc_to_choice: "{{context_options}}"\n' + metrics)  # fmt: skip
    _yaml(tmp_path, "lambada_openai", head("lambada_openai") + "output_type: loglikelihood\n"
          'doc_to_text: "{{context}}"\ndoc_to_target: "{{\' \' + continuation}}"\nmetric_list:\n'
          "  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
          "  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n")  # fmt: skip
    names = [f"own_{name}" for name in ("arc_easy", "winogrande", "lambada_openai")]
    reader = HFLM(pretrained=model, tokenizer=tokenizer, max_length=2048)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    wanted = simple_evaluate(reader, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
    tasks = {task.name: task for task in SHORT}
    for name in ("arc_easy", "winogrande", "lambada_openai"):
        found = score_items(tasks[name], tasks[name].items(tmp_path), model, tokenizer)
        share = sum(record["score"] for record in found) / len(found)
        assert share == pytest.approx(wanted[f"own_{name}"]["acc,none"]), name
        if name == "arc_easy":
            norm = sum(record["scores"]["acc_norm"] for record in found) / len(found)
            assert norm == pytest.approx(wanted["own_arc_easy"]["acc_norm,none"])
        if name == "lambada_openai":
            nats = torch.tensor([record["nats"] for record in found]).mean()
            assert float(nats.exp()) == pytest.approx(wanted["own_lambada_openai"]["perplexity,none"], rel=1e-3)
