import re
import runpy
from pathlib import Path

from vision_ssl.registry import Weights

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_what_was_measured() -> None:
    functions = runpy.run_path(str(ROOT / "benchmarks" / "update_readme.py"))
    blocks = functions["blocks"]()
    assert list(blocks) == ["models", "protocols", "reproduced", "demo", "speed", "gpu", "scale"]
    for name, block in blocks.items():
        assert functions["with_block"](README, name, block) == README, name


def test_figures_that_were_not_measured_are_dashes() -> None:
    functions = runpy.run_path(str(ROOT / "benchmarks" / "update_readme.py"))
    newer = Weights("mae_vit_tiny.a_later_tag", "", {})
    assert functions["with_all_labels"](newer) == ["-", "-"]
    assert functions["with_all_labels"](Weights("another.tag", "", {})) == ["-", "-"]


def test_files_that_it_names_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link).exists()] == []
