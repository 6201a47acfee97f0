"""state.json of a checkpoint cannot lie: a flipped bit or a made-up number is refused, and what to use is named."""

import json
import random
import shutil

import pytest

from hsa_ultralong.files.strict_json import sealed
from hsa_ultralong.train.state import list_checkpoints, read_state


@pytest.fixture(scope="module")
def saved(tiny_runs, tmp_path_factory):
    """The two checkpoints of a run of two stages."""
    run = tmp_path_factory.mktemp("run")
    config = tiny_runs.config(tiny_runs.stage(tokens=512), tiny_runs.stage("long", tokens=256), checkpoint_minutes=0.0)
    tiny_runs.trainer(run, config).train()
    return list_checkpoints(run)


@pytest.fixture
def newest(saved, tmp_path):
    for path in saved:
        shutil.copytree(path, tmp_path / "checkpoints" / path.name)
    return tmp_path / "checkpoints" / saved[-1].name


def content(path):
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    return state


def test_every_flipped_bit_is_refused_and_the_checkpoint_before_is_named(newest, saved):
    file = newest / "state.json"
    data = file.read_bytes()
    bits = random.Random(0).sample(range(8 * len(data)), 600)
    for bit in bits:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=f"delete .* to go on from {saved[-2].name}"):
            read_state(newest)
    file.write_bytes(data)
    assert read_state(newest)["global_step"] == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": -1}, "step must be a whole number"),
        ({"step": True}, "step must be"),
        ({"global_step": 10**30}, "global_step must be"),
        ({"global_step": 4}, "folder's name"),
        ({"step": 2}, "contradict"),
        ({"stage_index": 0}, "contradict"),
        ({"stage_index": 7}, "contradict"),
        ({"tokens_seen": 1}, "contradict"),
        ({"stages": "warmup"}, "stages must be a list"),
        ({"stages": [1, 2]}, r"stages\[0\] must be a stage's name"),
        ({"optimizer": ["adamw"]}, "optimizer must be one of adamw, muon"),
        ({"files": {}}, "files must be an object of 1"),
        ({"files": {"../x.safetensors": {"bytes": 1, "sha256": "0" * 64}}}, "files: a key must be the name"),
        ({"files": {"x.safetensors": {"bytes": -1, "sha256": "0" * 64}}}, "files.x.safetensors.bytes must be"),
        ({"meter": {"loss": ["\x1b[31m"]}}, r"meter.loss\[0\] must be a number"),
        ({"guard": {"recent": [1.0], "high": "a"}}, "guard.high must be"),
        ({"guard": []}, "guard must be"),
        ({"more": 1}, "unknown field 'more'"),
        ({"format": 2}, "does not go with a checksum"),
        ({"format": 9}, "has format 9, this version reads 2 and 3"),
    ],
)
def test_values_that_make_no_sense_are_refused_with_the_right_checksum_too(newest, changes, words):
    (newest / "state.json").write_bytes(sealed({**content(newest), **changes}))
    with pytest.raises(ValueError, match=words) as caught:
        read_state(newest)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"format": 3}', "\x00" * 50, "null"])
def test_what_is_no_state_is_refused_in_one_line(newest, text):
    (newest / "state.json").write_text(text)
    with pytest.raises(ValueError, match="cannot be read"):
        read_state(newest)


def test_a_checkpoint_of_an_earlier_version_without_a_checksum_goes_on_with_a_notice(
    newest, saved, tiny_runs, tmp_path, caplog
):
    state = content(newest)
    (newest / "state.json").write_text(json.dumps({**state, "format": 2}, indent=1))
    config = tiny_runs.config(tiny_runs.stage(tokens=512), tiny_runs.stage("long", tokens=256))
    with caplog.at_level("WARNING", logger="hsa_ultralong"):
        resumed = tiny_runs.trainer(tmp_path, config)
    assert (resumed.global_step, resumed.stage_index) == (3, 2)
    assert "has no checksum" in caplog.text
    (newest / "state.json").write_text(json.dumps({**state, "format": 2, "stage_index": -1}))
    with pytest.raises(ValueError, match="stage_index must be"):
        tiny_runs.trainer(tmp_path, config)


def test_a_file_that_is_no_part_of_a_checkpoint_is_refused(newest, tiny_runs, tmp_path):
    (weights,) = newest.glob("*.safetensors")
    shutil.copy(weights, newest / "shard-99.safetensors")
    with pytest.raises(ValueError, match=r"shard-99\.safetensors is no part of it"):
        tiny_runs.trainer(tmp_path)


def test_links_in_place_of_a_checkpoint_or_of_its_files_are_not_followed(newest, tiny_runs, tmp_path):
    config = tiny_runs.config(tiny_runs.stage(tokens=512), tiny_runs.stage("long", tokens=256))
    (weights,) = newest.glob("*.safetensors")
    shutil.move(weights, tmp_path / "outside")
    weights.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="missing, truncated or corrupt"):
        tiny_runs.trainer(tmp_path, config)
    shutil.move(newest, tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="symbolic link"):
        tiny_runs.trainer(tmp_path, config)


def rewrite(newest, change):
    """Change the stored tensors, with checksums that are right."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from hsa_ultralong.files.checksum import file_record

    (file,) = newest.glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, file, metadata)
    (newest / "state.json").write_bytes(sealed({**content(newest), "files": {file.name: file_record(file)}}))


@pytest.mark.parametrize("damage", ["nan", "lacks a moment", "of another shape", "of nobody", "no safetensors"])
def test_tensors_that_do_not_fit_are_refused_with_the_right_checksums_too(newest, tiny_runs, tmp_path, damage):
    name = "optimizer/exp_avg/model.norm.weight"

    def change(tensors):
        if damage == "nan":
            tensors["model.norm.weight"][3] = float("nan")
        elif damage == "lacks a moment":
            del tensors[name]
        elif damage == "of another shape":
            tensors[name] = tensors[name].repeat(1000)
        else:
            tensors["optimizer/exp_avg/nothing"] = tensors[name].clone()

    # a stage that is under way has an optimiser's state
    shutil.rmtree(tmp_path / "checkpoints")
    config = tiny_runs.config(tiny_runs.stage(tokens=1024))
    tiny_runs.trainer(tmp_path, config).train(max_minutes=0)
    (newest,) = list_checkpoints(tmp_path)
    if damage == "no safetensors":
        from hsa_ultralong.files.checksum import file_record

        (file,) = newest.glob("*.safetensors")
        file.write_bytes(b"\xff" * 4096)
        (newest / "state.json").write_bytes(sealed({**content(newest), "files": {file.name: file_record(file)}}))
    else:
        rewrite(newest, change)
    words = {"nan": "not finite .model.norm.weight", "no safetensors": "cannot be read", "of nobody": "cannot be read"}
    with pytest.raises(ValueError, match=words.get(damage, "does not fit the model")) as caught:
        tiny_runs.trainer(tmp_path, config)
    assert "\n" not in str(caught.value)
