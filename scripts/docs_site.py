"""What MkDocs does not do by itself: pages from files outside docs/, the commands, the API, and links between them.

Loaded by mkdocs.yml. Links are resolved as they stand in the repository: to a page they lead to it, to a picture they
bring it along, and what has no page (code, raw numbers) is named by its path. Nothing is fetched and torch is not
imported. tests/test_docs_site.py.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# file of the project -> page of the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "checkpoints/nano/README.md": "model-card.md",
    "hsa_ultralong/eval/tasks/README.md": "evaluation-tasks.md",
    **{
        f"hsa_ultralong/ops/{name}/README.md": f"operators/{name}.md"
        for name in ("hsa", "chunk_topk", "chunk_gather", "sliding_window", "linear_cross_entropy", "swiglu")
    },
}
# page -> title and the objects that it documents
API = {
    "api/index.md": (
        "API: one import",
        [
            f"hsa_ultralong.{name}"
            for name in (
                *("default_checkpoint", "models.HSAForCausalLM"),
                *("inference.memorize", "inference.append", "inference.close_document", "inference.edit"),
                *("inference.last_logits", "inference.ask", "inference.Answer", "inference.DecodingEngine"),
                *("inference.Library", "inference.rebuild", "inference.share_out", "inference.open_shared"),
                *("inference.as_question", "inference.conversation.Conversation", "memory.ChunkMemory"),
            )
        ],
    ),
    "api/memory.md": (
        "API: memories",
        [
            f"hsa_ultralong.memory.{name}"
            for name in ("open_memory", "Memory", "StoredMemory", "TieredStore", "save_memory", "verify_memory")
        ],
    ),
    "api/serve.md": (
        "API: serving",
        [
            f"hsa_ultralong.serve.{name}"
            for name in ("app.build_app", "answers.Answers", "memories.Memories", "worker.Worker")
        ],
    ),
    "api/eval.md": (
        "API: evaluation",
        [
            f"hsa_ultralong.eval.{name}"
            for name in (
                *("needles.run_needles", "suite.run_suite", "suite.SuiteRun", "suite_summary.summary_records"),
                *("readers.Reader", "tasks.sample.Task", "tasks.sample.Sample", "tasks.material.Material"),
            )
        ],
    ),
    "api/models.md": (
        "API: models",
        [
            f"hsa_ultralong.models.{name}"
            for name in ("HSAConfig", "HSAModel", "HSACache", "presets.preset", "convert.convert_model")
        ],
    ),
    "api/ops.md": (
        "API: operators",
        [
            f"hsa_ultralong.ops.{name}"
            for name in (
                *("hsa_attention", "chunk_topk", "combine_topk", "ScoredChunks", "ChunkVisibility"),
                *("sliding_window_attention", "linear_cross_entropy", "swiglu_fp8"),
            )
        ],
    ),
    "api/data.md": (
        "API: data",
        [
            f"hsa_ultralong.data.{name}"
            for name in ("MixtureConfig", "MixtureDataset", "PackingCollator", "train_tokenizer", "load_tokenizer")
        ],
    ),
    "api/train.md": ("API: training", [f"hsa_ultralong.train.{name}" for name in ("StageConfig", "TrainConfig")]),
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FOREIGN_PICTURE = re.compile(r"!\[([^\]]*)\]\(https?://[^()\s]+\)")
_LIST = re.compile(r"([-*]|\d+\.) ")


def page_of(path: str) -> str | None:
    """The page of the site that holds a file of the project."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") and (ROOT / path).is_file() else None


def with_links(text: str, source: str, page: str, pictures: set[str]) -> str:
    """The text of file `source` with every link as page `page` of the site needs it; adds pictures to bring along."""

    def link(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path.endswith((".png", ".svg")):
            pictures.add(path)
            goal: str | None = path.removeprefix("docs/")
        else:
            goal = page_of(path)
        if goal is None:
            return words if words.startswith("`") or "/" in words else f"{words} (`{path}`)"
        relative = posixpath.relpath(goal, posixpath.dirname(page) or ".")
        return f"{mark}[{words}]({relative}{'#' + anchor if anchor else ''})"

    # badges come from the net; a page of the site loads nothing, so their words stand there
    return outside_code(text, lambda part: _LINK.sub(link, _FOREIGN_PICTURE.sub(r"\1", part)))


def outside_code(text: str, change: Any) -> str:
    """Apply `change` to the parts of the text that are no fenced code."""
    parts = re.split(r"(^[ ]*```.*?^[ ]*```[^\n]*$)", text, flags=re.M | re.S)
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))


def with_blank_lines(text: str) -> str:
    """Lists and tables that follow a line of text, which GitHub takes as such, get the blank line that MkDocs needs."""

    def change(part: str) -> str:
        lines: list[str] = []
        for line in part.split("\n"):
            before = lines[-1] if lines else ""
            begins = (_LIST.match(line) and not _LIST.match(before) and not before.startswith("  ")) or (
                line.startswith("|") and not before.startswith("|")
            )
            if begins and before.strip():
                lines.append("")
            # items of a list go on with two blanks, nested ones begin there: Markdown in Python counts four
            lines.append(re.sub(r"^ {2,3}(?=\S)", "    ", line))
        return "\n".join(lines)

    return outside_code(text, change)


def command_page() -> str:
    """Every command with its options, from the typer application itself."""
    sys.path.insert(0, str(ROOT))
    try:
        import typer

        from hsa_ultralong.cli.main import app
    finally:
        sys.path.pop(0)
    lines = ["# Commands", "", "`hsa COMMAND --help` shows the same. `python -m hsa_ultralong` is `hsa`.", ""]

    def write(name: str, command: Any) -> None:
        lines.extend([f"## `{name}`", "", *_described(command.help or ""), ""])
        rows = [row for row in map(_option, command.params) if row]
        if rows:
            lines.extend(["| option | what | default |", "|---|---|---|", *rows, ""])
        for child, inner in getattr(command, "commands", {}).items():
            write(f"{name} {child}", inner)

    write("hsa", typer.main.get_command(app))
    return "\n".join(lines)


def _described(text: str) -> list[str]:
    prose, _, examples = text.replace("\b", "").partition("Examples:")
    shown = [line.strip() for line in examples.strip().splitlines() if line.strip()]
    prose = prose.strip().replace("<", "&lt;").replace("*", "\\*")
    return [prose, *(["", "```bash", *shown, "```"] if shown else [])]


def _option(parameter: Any) -> str:
    if getattr(parameter, "hidden", False) or "--help" in parameter.opts:
        return ""
    words = (getattr(parameter, "help", None) or "").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    default = parameter.default
    plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    return f"| {names} | {words} | {f'`{default}`' if plain else 'required' if parameter.required else ''} |"


def api_page(title: str, names: list[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)]) + "\n"


def generated() -> tuple[dict[str, str], set[str]]:
    """Pages of the site that do not lie in docs/, and the pictures that all pages need."""
    pictures: set[str] = set()
    pages = {
        page: with_blank_lines(with_links((ROOT / source).read_text(encoding="utf-8"), source, page, pictures))
        for source, page in PAGES.items()
    }
    pages["cli.md"] = command_page()
    pages |= {page: api_page(title, names) for page, (title, names) in API.items()}
    for source in ROOT.glob("docs/*.md"):
        with_links(source.read_text(encoding="utf-8"), f"docs/{source.name}", source.name, pictures)
    return pages, pictures


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    pages, pictures = generated()
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    for picture in sorted(pictures):
        if not picture.startswith("docs/"):
            files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    name = page.file.src_uri
    if page.file.generated_by is not None:
        return markdown
    return with_blank_lines(with_links(markdown, f"docs/{name}", name, set()))


def build() -> None:
    """Build the site into site/, every warning an error, and refuse a page that loads something from elsewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    if code := subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode:
        sys.exit(code)
    loaded = re.compile(
        r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]*stylesheet"[^>]* href="(?:https?:)?//'
    )
    pages = sorted((ROOT / "site").rglob("*.html"))
    foreign = [str(page.relative_to(ROOT)) for page in pages if loaded.search(page.read_text(encoding="utf-8"))]
    if foreign:
        sys.exit(f"pages that load something from the net: {foreign}")
    print(f"{len(pages)} pages: open site/index.html")


if __name__ == "__main__":
    build()
