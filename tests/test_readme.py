import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_what_was_measured() -> None:
    functions = runpy.run_path(str(ROOT / "benchmarks" / "update_readme.py"))
    blocks = functions["blocks"]()
    assert list(blocks) == ["models", "protocols", "reproduced", "demo", "speed", "gpu", "scale"]
    for name, block in blocks.items():
        assert functions["with_block"](README, name, block) == README, name


def test_files_that_it_names_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link).exists()] == []
