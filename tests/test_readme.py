"""Every command and the Python example of README.md run as shown (make's two targets run in .ci/run)."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hsa_ultralong.testing.processes import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
COMMANDS = [line.removeprefix(".venv/bin/hsa ") for line in SHELL if line.startswith(".venv/bin/hsa ")]
# what a CPU can do in seconds of a run that takes a GPU minutes
SHORTER = {
    "train nano": "--until warmup --set warmup.tokens=1024 --set warmup.batch_tokens=1024 --set warmup.seq_len=1024 "
    "--set probe_rows=1 --device cpu"
}


def run(arguments, folder, stdin=None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        input=stdin,
    )


def hsa(line, folder, stdin=None):
    result = run(["-m", "hsa_ultralong.cli.main", *shlex.split(line)], folder, stdin)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_text_of_the_examples_does_not_hold_the_answers_itself():
    texts = set(
        re.findall(r"docs/[a-z_]+\.md", " ".join(COMMANDS) + "".join(re.findall(r"```python\n(.*?)```", README, re.S)))
    )
    assert texts
    for name in texts:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "4821937" not in text and "7301954" not in text


def test_the_readme_shows_the_main_commands():
    assert {line.split()[0] for line in COMMANDS} >= {"ask", "generate", "plan", "data", "train", "plot"}
    assert {"make quickstart", "make test"} <= set(SHELL)


def test_the_library_of_the_readme_is_built_extended_and_asked(tmp_path):
    lines = [line for line in SHELL if "lib.hsa" in line]
    assert [re.findall(r"hsa (\w+)", line)[0] for line in lines] == ["memorize", "memory", "ask", "memory"]
    shown = ""
    for line in lines:
        before, _, command = line.rpartition(".venv/bin/hsa ")
        text = shlex.split(before.rstrip("| "))[-1] if before else None
        shown = shown + hsa(command.replace(".data/lib.hsa", str(tmp_path / "lib.hsa")), ROOT, text)
    assert "7301954" in shown and "from standard input" in shown and "README.md" in shown


@pytest.mark.parametrize(
    "line",
    [line for line in COMMANDS if line.split()[0] in ("ask", "generate", "plan") and "lib.hsa" not in line],
)
def test_commands_of_the_readme_run(line):
    shown = hsa(line, ROOT)
    assert "4821937" in shown if line.startswith("ask") else shown


def test_training_commands_of_the_readme_run_in_order(tmp_path):
    text = "\n\x1e\n".join(
        (ROOT / "docs" / name).read_text(encoding="utf-8")
        for name in sorted(os.listdir(ROOT / "docs"))
        if name.endswith(".md")
    )
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    for line in COMMANDS:
        if line.split()[0] in ("data", "train", "plot"):
            more = next((extra for start, extra in SHORTER.items() if line.startswith(start)), "")
            hsa(f"{line} {more}", tmp_path)
    assert (tmp_path / "checkpoints" / "mine" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "nano" / "loss.png").is_file()


def test_the_python_example_of_the_readme_answers():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    result = run(["-c", code], ROOT)
    assert result.returncode == 0, result.stderr
    assert "7301954" in result.stdout
