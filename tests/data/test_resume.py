"""Interrupted builds go on where they stood, and end with the files of an uninterrupted one."""

import hashlib
import json
import random
import shutil

import pytest

from hsa_ultralong.data import TokenShards, build_shards, train_tokenizer
from hsa_ultralong.data import build as build_module
from hsa_ultralong.data.partial import PartialBuild, partial_folder, partial_tokenizer


class Killed(BaseException):
    pass


@pytest.fixture
def inputs(tmp_path, documents, monkeypatch):
    """A text file, a table with bad records between good ones, and conversations; small batches."""
    monkeypatch.setattr(build_module, "_BATCH_CHARACTERS", 1500)
    text = tmp_path / "a.txt"
    text.write_text("\x1e\n".join(documents), encoding="utf-8")
    rows = [json.dumps({"text": documents[i % 8][: 400 + i]}) for i in range(12)]
    for place, bad in ((1, "{"), (5, '{"text": ""}'), (6, "[]"), (15, "tail")):
        rows.insert(place, bad)
    table = tmp_path / "b.jsonl"
    table.write_text("\n".join(rows), encoding="utf-8")
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "".join(
            json.dumps(
                {"messages": [{"role": "user", "content": d[:300]}, {"role": "assistant", "content": d[300:800]}]}
            )
            + "\n"
            for d in documents
        )
    )
    return [text, table], [chats]


def build(inputs, tokenizer, out_dir, **options):
    paths, chats = inputs
    return build_shards(
        paths, tokenizer, out_dir, chats=chats, max_bad=9, validation_fraction=0.2, checkpoint_seconds=0, **options
    )


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stop_at(step, seen):
    def progress(num_bytes, num_tokens):
        seen.append((num_bytes, num_tokens))
        if len(seen) == step:
            raise Killed

    return progress


def test_a_build_interrupted_anywhere_ends_the_same(inputs, tokenizer, tmp_path):
    seen = []
    whole = build(inputs, tokenizer, tmp_path / "whole", progress=lambda *counts: seen.append(counts))
    assert len(seen) > 12 and whole.manifest["bad_records"]["count"] == 4
    out_dir = tmp_path / "cut"
    for step in (1, 4, 4, 3):
        again = []
        with pytest.raises(Killed):
            build(inputs, tokenizer, out_dir, progress=stop_at(step, again))
        # it began where the last one stood, and made the same batches
        assert again == seen[:step]
        seen = seen[step:]
        assert not out_dir.exists() and partial_tokenizer(out_dir) is not None
    build(inputs, tokenizer, out_dir)
    assert contents(out_dir) == contents(whole.path)
    assert not partial_folder(out_dir).exists()


@pytest.mark.parametrize(("method", "documents_kept"), [("_encode", 3), ("_add", 1)])
def test_an_interruption_within_a_batch_goes_back_to_the_one_before(
    inputs, tokenizer, tmp_path, monkeypatch, method, documents_kept
):
    whole = build(inputs, tokenizer, tmp_path / "whole")
    calls = []
    original = getattr(build_module._Build, method)

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(build_module._Build, method, interrupted)
        with pytest.raises(Killed):
            build(inputs, tokenizer, tmp_path / "cut")
    saved = json.loads((partial_folder(tmp_path / "cut") / "state.json").read_text())
    assert saved["state"]["num_documents"] >= documents_kept
    assert contents(build(inputs, tokenizer, tmp_path / "cut").path) == contents(whole.path)


def test_what_was_written_after_the_last_checkpoint_is_cut_off(inputs, tokenizer, tmp_path):
    whole = build(inputs, tokenizer, tmp_path / "whole")
    out_dir, snapshot = tmp_path / "cut", tmp_path / "snapshot"

    def kill(num_bytes, num_tokens):
        # as a killed process leaves it: the checkpoint of an earlier batch, and files that have grown since
        if num_tokens > whole.num_tokens // 2 and not snapshot.exists():
            shutil.copytree(partial_folder(out_dir), snapshot)
            for name in ("tokens.bin", "lengths.bin", "hashes.bin", "labels.bin"):
                with (snapshot / name).open("ab") as file:
                    file.write(b"torn")

    build(inputs, tokenizer, out_dir, progress=kill)
    shutil.rmtree(out_dir)
    snapshot.rename(partial_folder(out_dir))
    assert json.loads((partial_folder(out_dir) / "state.json").read_text())["state"]["num_documents"] > 2
    build(inputs, tokenizer, out_dir)
    assert contents(out_dir) == contents(whole.path)


def test_a_build_that_never_began_leaves_nothing(inputs, tokenizer, tmp_path, monkeypatch):
    def fail(*_):
        raise Killed

    monkeypatch.setattr(build_module._Build, "_encode", fail)
    with pytest.raises(Killed):
        build(inputs, tokenizer, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_other_inputs_do_not_go_on_with_an_interrupted_build(inputs, tokenizer, documents, tmp_path):
    out_dir = tmp_path / "cut"
    with pytest.raises(Killed):
        build(inputs, tokenizer, out_dir, progress=stop_at(3, []))
    with pytest.raises(ValueError, match="had other inputs, tokenizer or options"):
        build(inputs, train_tokenizer(documents[:2], 300), out_dir)
    with (inputs[0][0]).open("a") as file:
        file.write("more")
    with pytest.raises(ValueError, match=r"remove .*\.cut\.partial to start again"):
        build(inputs, tokenizer, out_dir)
    (partial_folder(out_dir) / "tokens.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        build(inputs, tokenizer, out_dir)


def test_more_bad_records_than_allowed_stop_a_build_that_can_go_on(inputs, tokenizer, tmp_path):
    whole = build(inputs, tokenizer, tmp_path / "whole")
    paths, chats = inputs
    with pytest.raises(ValueError, match=r"more than 2 bad records, the last one: .*b\.jsonl, line 7"):
        build_shards(paths, tokenizer, tmp_path / "out", chats=chats, max_bad=2, validation_fraction=0.2)
    assert partial_folder(tmp_path / "out").exists()
    shards = build(inputs, tokenizer, tmp_path / "out")
    assert contents(shards.path) == contents(whole.path)
    messages = TokenShards.open(shards.path).manifest["bad_records"]["first"]
    assert [message.split("b.jsonl, ")[1].split(":")[0] for message in messages] == [f"line {n}" for n in (2, 6, 7, 16)]


def test_two_processes_do_not_build_the_same_folder(inputs, tokenizer, tmp_path):
    held = PartialBuild(tmp_path / "out", {})
    with pytest.raises(ValueError, match=r"is being built .* by process \d+"):
        build(inputs, tokenizer, tmp_path / "out")
    held.discard()
    build(inputs, tokenizer, tmp_path / "out")


def test_the_state_of_a_build_shows_every_flipped_bit(inputs, tokenizer, tmp_path):
    out_dir = tmp_path / "cut"
    with pytest.raises(Killed):
        build(inputs, tokenizer, out_dir, progress=stop_at(3, []))
    file = partial_folder(out_dir) / "state.json"
    data, bits = file.read_bytes(), random.Random(0)
    for _ in range(40):
        bit = bits.randrange(8 * len(data))
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"is damaged .* remove that folder to start again"):
            build(inputs, tokenizer, out_dir)
    file.write_bytes(data)
    build(inputs, tokenizer, out_dir)


@pytest.mark.parametrize("name", ["tokens.bin", "labels.bin", "lengths.bin", "hashes.bin"])
def test_what_a_build_has_made_so_far_shows_every_flipped_bit(inputs, tokenizer, tmp_path, name):
    out_dir = tmp_path / "cut"
    with pytest.raises(Killed):
        build(inputs, tokenizer, out_dir, progress=stop_at(12, []))
    file = partial_folder(out_dir) / name
    data = bytearray(file.read_bytes())
    assert data
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"is damaged .{name} is corrupt"):
        build(inputs, tokenizer, out_dir)


@pytest.mark.parametrize(
    "name", [".", "lock", "tokens.bin", "state.json", "state.json.tmp", "tokenizer", "tokenizer/tokenizer.json"]
)
def test_a_build_writes_through_no_link(inputs, tokenizer, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    folder = partial_folder(tmp_path / "out")
    if name == ".":
        folder.symlink_to(outside)
    else:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(outside if name == "tokenizer" else outside / "mine")
    if name == "state.json.tmp" or name.startswith("tokenizer"):
        build(inputs, tokenizer, tmp_path / "out")
    else:
        with pytest.raises(ValueError, match="symbolic link"):
            build(inputs, tokenizer, tmp_path / "out")
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("mine", "mine")]
