import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vision_ssl

PACKAGE = Path(vision_ssl.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
}
MAY_IMPORT_EXTRA = ("extra.commands", "pretrain")  # inside functions

# Top to bottom: a module imports only from the lines below its own.
LEVELS = """
__main__
cli
commands extra.commands
extra.compare_page extra.convert extra.export extra.push extra.report_page extra.tracking
extra.gallery extra.heads extra.history extra.infer extra.pickles
extra.charts extra.glimpses extra.layouts extra.measured extra.pictures
extra.html
demo
curve restore
recipes
pretrain
diagnosis monitor
finetuning
probe
attentive clustering fewshot leakage linear_crops linear_sgd retrieval
neighbours
pairs
features
pooling
plots card comparison
report
simclr mae views
engine
hub
locate
config remote registry
encoders
color
augment
data
named
arrays folders
cache
decode
checkpoint
storage
cpu distributed device logistic optim signals spread
options
presets
errors
"""
LEVEL = {name: level for level, line in enumerate(LEVELS.split("\n")) for name in line.split()}


def imported_modules(tree: ast.AST, folder: str = "vision_ssl") -> Iterator[str]:
    """Modules of the package that code in one of its folders imports when it runs, inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue  # annotations may name what is above
        if isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder.split(".")
            base = above[: len(above) + 1 - node.level] if node.level else []
            parts = [[*base, *filter(None, (node.module or "").split(".")), alias.name] for alias in node.names]
        else:
            yield from imported_modules(node, folder)
            continue
        for package, *names in parts:
            if package == "vision_ssl" and names and names[0] != "__version__":
                name = ".".join(names[:2]) if names[0] == "extra" else names[0]
                yield vision_ssl._EXPORTS.get(name, name)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import torch, vision_ssl.data", ["data"]),
        ("from .cache import a, b", ["cache", "cache"]),
        ("from . import cache, __version__", ["cache"]),
        ("from vision_ssl.cache import a", ["cache"]),
        ("from vision_ssl import load", ["restore"]),
        ("def f():\n    if x:\n        from .hub import load", ["hub"]),
        ("if TYPE_CHECKING:\n    from .hub import load", []),
    ],
)
def test_reader_of_imports(code: str, expected: list[str]) -> None:
    assert list(imported_modules(ast.parse(code))) == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from ..hub import load", ["hub"]),
        ("from .. import hub", ["hub"]),
        ("from .heads import a, b", ["extra.heads", "extra.heads"]),
        ("from . import heads", ["extra.heads"]),
    ],
)
def test_reader_of_imports_in_a_folder(code: str, expected: list[str]) -> None:
    assert list(imported_modules(ast.parse(code), "vision_ssl.extra")) == expected


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_downward(name: str) -> None:
    below = {other for other in LEVEL if LEVEL[other] > LEVEL[name]}
    allowed = below | ({other for other in LEVEL if other.startswith("extra.")} if name in MAY_IMPORT_EXTRA else set())
    assert set(imported_modules(ast.parse(MODULES[name].read_text()), folder_of(name))) <= allowed


def folder_of(name: str) -> str:
    return ".".join(["vision_ssl", *name.split(".")[:-1]])


@pytest.mark.parametrize("name", MAY_IMPORT_EXTRA)
def test_extras_are_imported_when_they_are_used(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    at_once = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    modules = imported_modules(ast.Module(at_once, []), folder_of(name))
    assert not any(module.startswith("extra") for module in modules)


def test_every_module_has_one_level() -> None:
    assert sorted(LEVELS.split()) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_small_and_named_for_their_purpose(name: str) -> None:
    assert name not in {"util", "utils", "helpers", "common", "misc"}
    lines = MODULES[name].read_text().count("\n")
    assert lines <= 400


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", ["vision_ssl", "vision_ssl.recipes", "vision_ssl.plots"])
def test_import_stays_light(module: str) -> None:
    loaded = json.loads(run_python(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"))
    assert module in loaded
    assert not {"torch", "timm", "matplotlib"} & set(loaded)


def test_timm_finds_our_architectures_after_the_import() -> None:
    assert run_python("import timm, vision_ssl; print(timm.is_model('resnet18_3x3'))") == "True\n"


def test_public_names() -> None:
    assert vision_ssl.__all__ == [
        "__version__",
        "MAE",
        "SimCLR",
        "load",
        "list_models",
        "extract",
        "Features",
        "evaluate",
        "compare",
        "finetune",
        "Report",
        "open_images",
        "ImageSet",
        "Preprocess",
    ]
    assert set(vision_ssl.__all__) <= set(dir(vision_ssl))


@pytest.mark.parametrize("name", vision_ssl._EXPORTS)
def test_public_name_is_found_and_no_module_hides_it(name: str) -> None:
    assert getattr(vision_ssl, name).__name__ == name
    assert name not in MODULES


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'vision_ssl' has no attribute 'lode'"):
        vision_ssl.lode  # noqa: B018  looking the name up is the test


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == vision_ssl._EXPORTS
