"""Nano beside rivals of its size: the same rows in the same order, steps, rates and optimiser; attention differs."""

from __future__ import annotations

from hsa_ultralong.train import FULL_COVERAGE, StageConfig, TrainConfig


def twins() -> TrainConfig:
    """`hsa train twins --set twin=NAME --data SHARDS --device cuda --export models/NAME`, a run for each of hsa,
    full_rope, window, window_sinks, nsa, moba and linear_hybrid (or any other of hsa_ultralong/baselines/README.md);
    `--set seed=1` for another seed, with `-o runs/twins-NAME-1` and a model folder of its own. On a GPU nsa and moba
    take `--set 'twin_options={"sparse_impl":"triton"}'`.

    One GPU with 80 GiB, 98M tokens; 2 to 11 minutes on an H200 with other work beside; what came out:
    docs/evidence-suites.md. Then `hsa eval models/hsa models/full_rope ... --suite
    recall --lengths 2K..64K --setting prompt -o runs/twins-recall` reads all of them alike, and without `--setting`
    the model through its memory. SHARDS: `hsa data corpus.txt --tokenizer checkpoints/nano -o SHARDS`.

    Steps of a stage take rows of several lengths in turn: a row asks in its last half only, and after rows of 8K alone
    full attention, which can tell how far it is from the first token, had lost its recall at 2K (docs/log.md).
    The first stage has short rows, where retrieval emerges; the second goes to 8K, the rate falling to zero.
    K is full coverage for hsa, as in `nano`; rivals that choose keep chunk_topk = 32 chunks, their own word for it.
    """
    return TrainConfig(
        preset="nano",
        twin="hsa",
        stages=[
            StageConfig(
                name="warmup",
                seq_len=2048,
                shapes=((1024, 0), (2048, 0)),
                tokens=58_982_400,
                batch_tokens=65_536,
                learning_rate=2e-3,
                mixture={"text": 0.3, "self_copy": 0.3, "needles": 0.4},
                warmup_steps=100,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="long",
                seq_len=8192,
                shapes=((8192, 0), (2048, 0), (8192, 0), (4096, 0)),
                tokens=39_321_600,
                batch_tokens=131_072,
                micro_batch_rows=8,
                learning_rate=1e-3,
                mixture={"text": 0.4, "self_copy": 0.2, "needles": 0.4},
                warmup_steps=20,
                schedule="linear",
                long_documents=True,
                chunk_topk=FULL_COVERAGE,
            ),
        ],
        probe_lengths=(1024, 2048, 4096, 8192, 32_768),
        mfu=0.08,
    )
