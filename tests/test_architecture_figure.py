"""The figure of the architecture names files that exist, and the committed one says what the script draws."""

import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "draw_architecture.py"


def script():
    spec = importlib.util.spec_from_file_location("draw_architecture", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(svg):
    """Every text of the figure."""
    return re.findall(r"<text [^>]*>(.*?)</text>", svg.read_text(encoding="utf-8"))


def test_every_file_named_in_the_figure_exists():
    drawing = script()
    named = [
        file for box in [drawing.GROUP, *drawing.BOXES.values()] for line in box.files for file in line.split(", ")
    ]
    assert len(named) > 10
    assert not [file for file in named if not (ROOT / "hsa_ultralong" / file).exists()]


def test_the_figure_is_drawn_alike_every_time_and_the_committed_one_says_the_same(tmp_path):
    drawing = script()
    for name in ("a", "b"):
        drawing.write(tmp_path / name)
    assert (tmp_path / "a/architecture.svg").read_bytes() == (tmp_path / "b/architecture.svg").read_bytes()
    # other versions of matplotlib may place a letter elsewhere; what is said must be the same
    assert len(words(tmp_path / "a/architecture.svg")) > 30
    assert words(tmp_path / "a/architecture.svg") == words(ROOT / "docs/images/architecture.svg"), "run make report"
