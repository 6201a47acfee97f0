"""`make smol`: what is missing or another file is said in one line; else source and difference become a model."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_smol", ROOT / "scripts" / "make_smol.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = []
    monkeypatch.setattr(module, "hsa", lambda *words: calls.append([str(word) for word in words]))
    module.calls, module.runs = calls, []
    monkeypatch.setattr(module, "run", lambda *words: module.runs.append(words))
    return module


@pytest.fixture
def difference(tmp_path):
    file = tmp_path / "difference.safetensors"
    file.write_bytes(b"learnt")
    file.with_suffix(".sha256").write_text(hashlib.sha256(b"learnt").hexdigest())
    return file


def test_a_missing_or_other_difference_stops_before_any_work(script, difference, tmp_path):
    with pytest.raises(SystemExit, match="is missing: the difference of SmolLM2"):
        script.main(["--difference", str(tmp_path / "none.safetensors")])
    difference.write_bytes(b"other")
    with pytest.raises(SystemExit, match="is another file"):
        script.main(["--difference", str(difference)])
    assert script.calls == script.runs == []


def test_source_and_difference_become_a_model_that_is_asked(script, difference, tmp_path, monkeypatch):
    source = tmp_path / "cache" / script.GGUF
    source.parent.mkdir()
    source.write_bytes(b"weights")
    words = ["--difference", str(difference), "--cache", str(source.parent), "-o", str(tmp_path / "smol")]
    with pytest.raises(SystemExit, match="is another file"):
        script.main(words)
    monkeypatch.setattr(script, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    script.main([*words, "--question", "Who?"])
    convert, ask = script.calls
    assert convert == ["convert", str(source), "--apply", str(difference), "-o", str(tmp_path / "smol")]
    assert (
        ask[:2] == ["ask", "Who?"] and "--hide" not in ask and ask[ask.index("--model") + 1] == str(tmp_path / "smol")
    )


def test_a_model_that_is_there_is_asked_without_its_source_unless_it_is_of_another_difference(
    script, difference, tmp_path, monkeypatch
):
    monkeypatch.setattr(script, "fetched", lambda cache: pytest.fail("fetched again"))
    words = ["--difference", str(difference), "-o", str(tmp_path)]
    (tmp_path / "config.json").touch()
    for made_of in (None, {"sha256": "0"}):
        (tmp_path / "conversion.json").write_text(json.dumps({"difference": made_of}))
        with pytest.raises(SystemExit, match="was not made of"):
            script.main(words)
    (tmp_path / "conversion.json").write_text(
        json.dumps({"difference": {"sha256": hashlib.sha256(b"learnt").hexdigest()}})
    )
    script.main(words)
    ((verb, question, hide, hidden, *_),) = script.calls
    assert (verb, question, hide) == ("ask", script.QUESTION, "--hide") and "14 March 1911" in hidden


def test_a_difference_that_ships_is_small_and_is_the_one_that_is_named(script):
    if script.DIFFERENCE.is_file():
        script.require_difference(script.DIFFERENCE)
        assert script.DIFFERENCE.stat().st_size <= 13 * 2**20
