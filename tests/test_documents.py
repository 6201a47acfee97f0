"""Every code block of README.md and the guides runs as shown or, if it is marked, parses; every link leads somewhere.

Blocks run in the order of their page, in one folder that holds what they name, and in this process. A block that needs
a GPU, the net or hours is marked on the line above it: `<!-- parsed: why -->` (options and syntax are checked) or
`<!-- not run: why -->`. make's targets run in .ci/run.
"""

import importlib
import inspect
import io
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from hsa_ultralong.cli.main import app, main

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = ("hsa", "chunk_topk", "sliding_window", "linear_cross_entropy", "swiglu")
LINKED = [
    *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("hsa_ultralong/**/*.md")),
    *sorted(ROOT.glob("checkpoints/*/*.md")), *sorted(ROOT.glob("examples/**/*.md")),
]  # fmt: skip
PAGES = [str(page.relative_to(ROOT)) for page in LINKED]
# what a CPU can do in seconds of a run that takes a GPU minutes
SHORTER = {
    "train nano ": "--until warmup --set warmup.tokens=1024 --set warmup.batch_tokens=1024 --set warmup.seq_len=1024 "
    "--set probe_rows=1 --device cpu",
}
PACKAGED = ("make ", "cd ")


class Block(NamedTuple):
    language: str
    code: str
    mark: str  # "", "parsed" or "not run"
    line: int


def blocks(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    form = re.compile(r"(?:^<!-- ([a-z ]+): [^\n]+ -->\n)?^[ ]*```(\w*)[^\n]*\n(.*?)^[ ]*```", re.M | re.S)
    return [
        Block(match[2], match[3], match[1] or "", text[: match.start()].count("\n") + 1)
        for match in form.finditer(text)
    ]


def commands(block):
    lines = block.code.replace("\\\n", " ").splitlines()
    return [" ".join(line.split("  #")[0].split()) for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with all that the pages name: texts, tables, conversations, the pages themselves and the model."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "nano").symlink_to(ROOT / "checkpoints" / "nano")
    (tmp_path / "docs").mkdir()
    # a few of the pages: to read them all would take longer and show no more
    for name in ("README.md", "docs/paper_facts.md", "docs/faq.md"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    pages = [page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("docs/*.md"))]
    (tmp_path / "corpus.txt").write_text("\n\x1e\n".join(pages), encoding="utf-8")
    (tmp_path / "notes.md").write_text("A note.", encoding="utf-8")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text(pages[0], encoding="utf-8")
    (tmp_path / "old-texts").mkdir()
    (tmp_path / "old-texts" / "letter.txt").write_bytes(("Déjà vu. " * 300).encode("cp1252"))
    (tmp_path / "articles.jsonl").write_text('{"body": "An article."}\n' * 300, encoding="utf-8")
    turn = '[{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here, as before."}]'
    (tmp_path / "chats.jsonl").write_text(f'{{"messages": {turn}}}\n' * 300, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line, monkeypatch, capsys):
    """Run one line of a bash block, `echo ... | hsa ...` and `cat ... | hsa ...` included; what it printed."""
    feeding, _, command = line.rpartition("| ")
    words = shlex.split(command.replace(".venv/bin/hsa", "hsa"))
    assert words[0] == "hsa", f"only make and hsa are run; mark the block: {line}"
    text = ""
    if feeding:
        program, *names = shlex.split(feeding)
        found = [path for name in names for path in sorted(Path().glob(name))] if program == "cat" else []
        text = "".join(path.read_text(encoding="utf-8") for path in found) if found else names[0]
    more = next((extra for start, extra in SHORTER.items() if f"{shlex.join(words[1:])} ".startswith(start)), "")
    monkeypatch.setattr(sys, "argv", [*words, *shlex.split(more)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    shown = capsys.readouterr()
    assert code == 0, f"{line}\n{shown.out}\n{shown.err}"
    return shown.out


def parse_request(words):
    """The server has such a path, and takes such a body."""
    pytest.importorskip("fastapi")
    from hsa_ultralong.serve import protocol

    (path,) = (word.partition("/v1/")[2] for word in words if "/v1/" in word)
    kinds = {"memories": protocol.NewMemory, "chat/completions": protocol.ChatCompletion}
    kinds[path].model_validate_json(words[words.index("-d") + 1])


def parse(line):
    """The options of a line exist and take such values."""
    line = line.replace("-m hsa_ultralong ", "hsa ")
    if line.startswith("curl "):
        return parse_request(shlex.split(line))
    words = shlex.split(line[line.index("hsa ") :])[1:]
    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if "--suite" in words or "--tasks" in words:  # `hsa eval` without a command is `hsa eval suite`
        command = command.commands["suite"]
    assert not getattr(command, "commands", {}), f"no such command: {line}"
    command.make_context("hsa", words)


@pytest.mark.parametrize("name", [name for name in PAGES if any(b.language == "bash" for b in blocks(name))])
def test_the_commands_of_the_page_run(name, workplace, monkeypatch, capsys):
    shown = ""
    for block in blocks(name):
        for line in commands(block) if block.language == "bash" and block.mark != "not run" else ():
            if block.mark == "parsed":
                parse(line)
            elif not line.startswith(PACKAGED):
                shown += run(line, monkeypatch, capsys)
    code = "".join(block.code for block in blocks(name) if block.language == "bash" and not block.mark)
    assert "4821937" in shown or "4821937" not in code
    assert ("7301954" in shown and "from standard input" in shown) or "7301954" not in code
    if name == "README.md":
        assert (workplace / "checkpoints" / "mine" / "model.safetensors").is_file()
        assert (workplace / "runs" / "nano" / "loss.png").is_file()


@pytest.mark.parametrize("name", [name for name in PAGES if any(b.language == "python" for b in blocks(name))])
def test_the_python_of_the_page_runs_in_order(name, workplace, capsys):
    scope = {"__name__": "page"}
    for block in blocks(name):
        if block.language == "python":
            if block.mark != "not run":
                code = compile("\n" * block.line + block.code, name, "exec")
            if not block.mark:
                exec(code, scope)
    shown = capsys.readouterr().out
    if "7301954" in "".join(block.code for block in blocks(name) if block.language == "python"):
        assert "7301954" in shown


def test_every_operator_for_users_shows_how_it_is_called():
    for name in OPERATORS:
        assert any(block.language == "python" for block in blocks(f"hsa_ultralong/ops/{name}/README.md")), name


def test_every_block_says_what_it_is_and_every_mark_is_known():
    for name in PAGES:
        for block in blocks(name):
            assert block.language in ("bash", "python", "text", ""), f"{name}:{block.line}"
            assert block.mark in ("", "parsed", "not run"), f"{name}:{block.line}"


def test_the_readme_shows_the_main_commands():
    lines = [line.replace(".venv/bin/", "") for block in blocks("README.md") for line in commands(block)]
    shown = {line.rpartition("| ")[2].split()[1] for line in lines if "hsa " in line}
    assert shown >= {"ask", "memorize", "memory", "generate", "plan", "data", "train", "plot"}
    assert {"make quickstart", "make test"} <= {" ".join(line.split()[:2]) for line in lines}


# part of README's file map that a reader looks for -> what the files that it names must hold
LOOKED_FOR = {
    "lower and upper decoder": ("def run_lower", "def run_upper", "class UpperGroup"),
    "chunk encoder, and the landmark": ("class ChunkEncoder", "landmark_center"),
    "retrieval": ("class ChunkRetriever",),
    "both fusions": ("def softmax_fusion", "def stick_breaking_fusion"),
    "memory that all layers share": ("class ChunkMemory",),
    "memory file format": ("class MemorySpec",),
    "memorise; edit; ask": ("def memorize", "def edit", "def ask"),
    "decoding, one CUDA graph": ("class DecodingEngine", "CUDAGraph"),
    "balance of experts": ("def update_router_bias",),
    "warm-up and mid-training": ('name="warmup"', 'name="long"', 'name="anneal"'),
}


def test_the_file_map_leads_to_the_parts_that_readers_look_for():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", text[text.index("## File map") : text.index("## Citation")], re.M)
    named = {part: [ROOT / "hsa_ultralong" / file for file in re.findall(r"`([^`]+)`", files)] for part, files in rows}
    assert not [str(file) for files in named.values() for file in files if not file.exists()]
    for wanted, held in LOOKED_FOR.items():
        (files,) = (files for part, files in named.items() if wanted in part and (wanted != "retrieval" or ";" in part))
        sources = [page for file in files for page in ([file] if file.is_file() else sorted(file.glob("*.py")))]
        code = "".join(page.read_text(encoding="utf-8") for page in sources)
        assert all(what in code for what in held), f"{wanted}: {[what for what in held if what not in code]}"


def test_the_signatures_of_the_architecture_are_those_of_the_code():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    code = text[text.index("## Public signatures") :].split("```")[1]
    parts = [importlib.import_module(f"hsa_ultralong{part}") for part in ("", ".ops", ".models", ".data", ".inference")]
    checked = set()
    for name, inside in re.findall(
        r"^(?:memory = )?([A-Z]\w*\.\w+|[A-Za-z]\w*)\(([^)]*(?:\([^)]*\)[^)]*)*)\)", code, re.M
    ):
        owner, _, method = name.partition(".")
        found = next(getattr(part, owner) for part in parts if hasattr(part, owner))
        found = getattr(found, method) if method else found
        parameters = inspect.signature(found).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            words = [word.split("=")[0].strip() for word in re.sub(r'"[^"]*"', "", inside).split(",")]
            assert {word for word in words if word.isidentifier()} <= set(parameters), name
            checked.add(name)
    assert {"memorize", "append", "ask", "hsa_attention", "chunk_topk", "HSACache", "PackingCollator"} <= checked


def test_the_layout_of_the_architecture_names_every_file_and_no_other():
    package = ROOT / "hsa_ultralong"
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| folder of `hsa_ultralong/` |") :].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `([\w/.]+)` \| (.*) \|$", table, re.M))
    named = {}
    for place, what in rows.items():
        folder = package / place if place.endswith("/") else (package / place).parent
        assert (package / place).exists(), place
        files = {path for name in re.findall(r"`([\w*/]+\.py)`", what) for path in folder.glob(name)}
        wanted = [name for name in re.findall(r"`([\w/]+(?:\.py|/))`", what) if place != "ops/"]
        assert not [name for name in wanted if not (folder / name).exists()], place
        named[place] = files | ({package / place} if not place.endswith("/") else set())
    known = set().union(*named.values())
    # what every folder or operator has, and folders that have a page or a docstring of their own
    usual = ("__init__.py", "__main__.py", "api.py", "reference.py")
    apart = {package / "memory" / "files", package / "eval" / "tasks", package / "recipes"}
    files = [path for path in package.rglob("*.py") if path.name not in usual and not apart & set(path.parents)]
    assert not sorted(str(path.relative_to(package)) for path in set(files) - known)


def test_the_text_of_the_examples_does_not_hold_the_answers_itself():
    text = (ROOT / "docs" / "paper_facts.md").read_text(encoding="utf-8")
    assert "4821937" not in text and "7301954" not in text


def slug(heading):
    """The anchor that GitHub and the site give a heading."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^[ ]*```.*?^[ ]*```", "", text, flags=re.M | re.S))


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = page.parent / path if path else page
        assert goal.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", goal.read_text(encoding="utf-8"), re.M)
            assert anchor in {slug(heading) for heading in headings}, f"{page.name}: {target}"


def test_pages_named_in_the_code_exist():
    files = [path for folder in ("hsa_ultralong", "scripts", "examples") for path in (ROOT / folder).rglob("*.py")]
    for path in [*files, ROOT / "Makefile", ROOT / "pyproject.toml"]:
        for name in re.findall(r"\bdocs/[\w-]+\.md", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)}: {name}"
