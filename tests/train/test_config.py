"""Stages and runs: what they refuse, what `--set` reaches, and how a step's rows are shared out."""

import json

import pytest

from hsa_ultralong.train import apply_overrides, as_dict


def test_overrides_reach_the_run_its_model_its_stages_and_its_processes(tiny_runs):
    config = apply_overrides(
        tiny_runs.config(tiny_runs.stage(), tiny_runs.stage("long")),
        ["seed=3", "weight_decay=0", "betas=(0.8, 0.9)", "compile=true", "model.chunk_topk=16", "model.fusion=softmax",
         "long.tokens=512", "warmup.schedule=cosine", "long.learning_rate=1", "long.long_documents=True",
         "warmup.mixture={'text': 1.0}", "parallel.shard=8", "parallel.activation_checkpointing=full",
         "probe_lengths=(128, 512)", "long.gumbel_noise=true", "warmup.pool_memory=compete", "long.pool_memory=True",
         "optimizer=muon", "wandb=mine"],
    )  # fmt: skip
    assert (config.seed, config.weight_decay, config.betas, config.compile) == (3, 0.0, (0.8, 0.9), True)
    assert config.model == {"chunk_topk": 16, "fusion": "softmax"}
    assert (config.parallel.shard, config.parallel.activation_checkpointing) == (8, "full")
    assert (config.probe_lengths, config.optimizer, config.wandb) == ((128, 512), "muon", "mine")
    warmup, long = config.stages
    assert (warmup.schedule, warmup.mixture, warmup.tokens) == ("cosine", {"text": 1.0}, 768)
    assert (long.tokens, long.learning_rate, long.long_documents, long.num_steps) == (512, 1.0, True, 2)
    assert isinstance(long.learning_rate, float)
    assert (warmup.pool_memory, long.pool_memory, long.gumbel_noise) == ("compete", "attended", True)
    assert json.loads(json.dumps(as_dict(config)))["parallel"]["shard"] == 8


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "key=value"),
        ("sed=3", "unknown key 'sed'; did you mean 'seed'?"),
        ("colour=3", "unknown key 'colour'; choose one of preset, seed"),
        ("model=debug", "unknown key"),
        ("parallel=3", "unknown key"),
        ("stages=[]", "unknown key"),
        ("long.tokens=3", "unknown stage 'long'; this recipe has warmup"),
        ("warmup.token=3", "unknown key 'warmup.token'"),
        ("parallel.shards=3", "unknown key 'parallel.shards'"),
        ("seed=true", "must be of type int"),
        ("seed=1.5", "must be of type int"),
        ("warmup.tokens=1.5", "must be of type int"),
        ("compile=1", "must be of type bool"),
        ("betas=0.9", r"must be of type tuple, got '0.9'; write 'betas=\[1, 2\]'"),
        ("betas=(0.9,)", "two numbers"),
        ("betas=(0.9, 1.0)", "two numbers"),
        ("seed=-1", "seed must be >= 0"),
        ("clip_norm=0", "clip_norm must be > 0"),
        ("log_every=0", "log_every must be >= 1"),
        ("probe_every=0", "probe_every must be >= 1"),
        ("probe_lengths=(12, 'x')", "probe_lengths must be numbers of tokens"),
        ("keep_checkpoints=-1", "keep_checkpoints must be >= 0"),
        ("optimizer=sgd", "optimizer must be one of"),
        ("on_spike=ignore", "on_spike must be one of"),
        ("parallel.activation_checkpointing=some", "activation_checkpointing must be one of"),
        ("parallel.context=0", "context must be >= 1"),
        ("warmup.tokens=0", "tokens must be >= 1"),
        ("warmup.seq_len=100", "multiple of seq_len"),
        ("warmup.micro_batch_rows=-1", "micro_batch_rows must be >= 0"),
        ("warmup.micro_batch_rows=3", "multiple of micro_batch_rows"),
        ("warmup.sliding_window=-1", "sliding_window must be >= 0"),
        ("warmup.learning_rate=-1", "learning_rate must be >= 0"),
        ("warmup.schedule=step", "schedule must be one of"),
        ("warmup.pool_memory=some", "pool_memory must be one of"),
        ("warmup.gumbel_noise=3", "must be of type bool or NoneType"),
    ],
)
def test_overrides_that_cannot_work_say_why(tiny_runs, assignment, message):
    with pytest.raises(ValueError, match=message):
        apply_overrides(tiny_runs.config(), [assignment])


def test_segments_and_pools_exclude_each_other(tiny_runs):
    with pytest.raises(ValueError, match="piece_tokens does not go with pool_memory"):
        tiny_runs.stage(piece_tokens=32, pool_memory=True)


def test_rows_of_a_step_are_shared_out_evenly_or_refused(tiny_runs):
    one = tiny_runs.stage(batch_tokens=128 * 12)
    assert [one.forward_rows(world) for world in (1, 2, 3, 12)] == [12, 6, 4, 1]
    assert tiny_runs.stage(batch_tokens=128 * 12, micro_batch_rows=2).forward_rows(3) == 2
    for world, rows in ((5, 0), (24, 0), (4, 6)):
        with pytest.raises(ValueError, match=f"12 rows a step cannot be shared out over {world} processes"):
            tiny_runs.stage(batch_tokens=128 * 12, micro_batch_rows=rows).forward_rows(world)


def test_several_values_are_written_in_either_brackets(tiny_runs):
    for text in ("[64, 128]", "(64, 128)"):
        assert apply_overrides(tiny_runs.config(), [f"probe_lengths={text}"]).probe_lengths == (64, 128)
