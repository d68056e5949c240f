import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_what_was_measured() -> None:
    functions = runpy.run_path(str(ROOT / "benchmarks" / "update_readme.py"))
    assert functions["with_block"](README, "models", functions["models_table"]()) == README
    assert functions["with_block"](README, "demo", functions["demo_scores"]()) == README
    assert functions["with_block"](README, "speed", functions["speed_table"]()) == README
    assert functions["with_block"](README, "scale", functions["scale_table"]()) == README


def test_files_that_it_names_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link).exists()] == []
