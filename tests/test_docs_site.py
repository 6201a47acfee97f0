"""The site has a page for everything that is to be read, and what it generates follows the project."""

import importlib.util
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from hsa_ultralong.testing.processes import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
docs_site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs_site)


def navigation():
    settings = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return {key: pages for entry in yaml.safe_load(settings)["nav"] for key, pages in entry.items()}


def test_the_site_has_five_parts_and_every_page_has_its_place():
    nav = navigation()
    assert list(nav) == ["Start", "Guides", "Concepts", "Reference", "Evidence"]
    placed = [page for pages in nav.values() for page in pages]
    written = {page.name for page in ROOT.glob("docs/*.md")}
    made = {*docs_site.PAGES.values(), *docs_site.API, "cli.md"}
    assert sorted(placed) == sorted(written | made)
    assert all((ROOT / source).is_file() for source in docs_site.PAGES)
    assert {source for source in docs_site.PAGES if source.startswith("hsa_ultralong/ops/")} == {
        str(page.relative_to(ROOT)) for page in ROOT.glob("hsa_ultralong/ops/*/README.md")
    }


def test_every_object_of_the_api_pages_exists_and_the_public_ones_are_there():
    documented = set()
    for _, names in docs_site.API.values():
        for name in names:
            module, _, attribute = name.rpartition(".")
            assert getattr(import_module(module), attribute) is not None
            documented.add(attribute)
    public = set(import_module("hsa_ultralong").__all__) - {"__version__"}
    assert public <= documented


def test_the_page_of_commands_has_every_command_and_option():
    page = docs_site.command_page()
    for words in ("hsa ask", "hsa memory append", "hsa eval needles", "hsa bench ops", "hsa train"):
        assert f"## `{words}`\n" in page
    assert "`--show-sources`" in page and "`--freeze-memory`" in page


def test_links_lead_to_pages_pictures_come_along_and_other_files_are_named():
    pictures = set()
    text = "[a](docs/memory.md#edit) ![b](docs/images/x.png) [c](results/d) [e](https://f.g) `[h](i.md)`"
    shown = docs_site.with_links(text.replace("`[h](i.md)`", ""), "README.md", "index.md", pictures)
    assert shown.strip() == "[a](memory.md#edit) ![b](images/x.png) c (`results/d`) [e](https://f.g)"
    assert pictures == {"docs/images/x.png"}
    inside = docs_site.with_links("[a](../README.md)\n```\n[x](y.md)\n```\n", "docs/faq.md", "faq.md", pictures)
    assert inside == "[a](index.md)\n```\n[x](y.md)\n```\n"


def test_lists_and_tables_below_a_line_are_set_apart():
    assert docs_site.with_blank_lines("Kinds:\n- a\n- b\n\n|x|\n") == "Kinds:\n\n- a\n- b\n\n|x|\n"


@pytest.mark.slow
def test_the_site_builds_without_a_warning():
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "scripts/docs_site.py"], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
