import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vision_ssl import cli, hub
from vision_ssl.data import ImageSet, open_images
from vision_ssl.encoders import resolve_encoder
from vision_ssl.errors import DataError, RecipeError
from vision_ssl.extra import gallery
from vision_ssl.extra.charts import Line, line_chart
from vision_ssl.extra.compare_page import HEADINGS, PAIR_HEADINGS, Compared, write_comparison
from vision_ssl.extra.history import probe_chart
from vision_ssl.extra.measured import Samples, open_samples
from vision_ssl.extra.report_page import Scores, write_report
from vision_ssl.features import Features, extract
from vision_ssl.pretrain import Run
from vision_ssl.probe import linear
from vision_ssl.recipes import MAE
from vision_ssl.report import Report, paired_bootstrap

HOSTILE = ("<script>alert(1)<b>", "\"' onload='x' & co")  # names that a file system allows
TINY_MAE = MAE(
    encoder="vit_tiny",
    image_size=24,
    patch_size=8,
    batch_size=8,
    epochs=2,
    decoder_dim=16,
    decoder_depth=1,
    decoder_heads=2,
)
VOID = {"img", "meta", "wbr"}


def make_images(folder: Path, classes: tuple[str, ...], each: int, *, contrast: int = 120) -> Path:
    """Two splits of noisy images, brighter from class to class; of little contrast, they are hard to tell apart."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(each):
                pixels = rng.normal(60 + contrast * label / len(classes), 40, size=(26, 26, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


@dataclass
class Page(HTMLParser):
    """A page as a browser would read it; a tag that is not closed in its place fails."""

    text: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    headings: list[tuple[str, str]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.label = ""
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if attributes.get("role") == "region":
            self.label = str(attributes["aria-label"])
        if tag == "tr":
            self.tables.setdefault(self.label, []).append([])
        if tag in {"th", "td", "h1", "h2", "h3"}:
            self.words = []

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in {"th", "td"}:
            self.tables[self.label][-1].append("".join(self.words))
        if tag in {"h1", "h2", "h3"}:
            self.headings.append((tag, "".join(self.words)))

    @property
    def sections(self) -> list[str]:
        return [words for tag, words in self.headings if tag == "h2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), HOSTILE, 12, contrast=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "mae"
    TINY_MAE.train(images, out=out, device="cpu", precision="fp32")
    with (out / "metrics.jsonl").open("a") as file:  # what a look at the encoder may have measured
        look = {"step": 6, "epoch": 2.0, "knn_accuracy": 50.0, "linear_accuracy": 60.0, "effective_rank": 7.0}
        file.write(json.dumps(look) + "\n")
    (out / "probe_curve.csv").write_text("epoch,loss,accuracy,val_accuracy\n1,0.6,70,60\n2,0.5,80,65\n")
    return out


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet without recipe or metrics."""
    torch.manual_seed(0)
    spec = resolve_encoder("resnet18", image_size=24, stem="3x3-nopool")
    folder = tmp_path_factory.mktemp("foreign") / "resnet"
    hub.save(folder, spec.build(), spec, card={})
    return folder


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, run: Path, images: Path) -> tuple[Path, Scores]:
    out = tmp_path_factory.mktemp("pages") / "report.html"
    return out, write_report(str(run), images, out, per_class=10)


@pytest.fixture(scope="module")
def foreign_page(tmp_path_factory: pytest.TempPathFactory, foreign: Path) -> Path:
    """Of 21 classes, more than a confusion matrix shows as a table."""
    folder = tmp_path_factory.mktemp("many")
    classes = tuple(f"class {number:02}" for number in range(21))
    write_report(str(foreign), make_images(folder / "images", classes, 3), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, run: Path, foreign: Path, images: Path) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("pages") / "compare.html"
    return out, write_comparison([str(run), str(foreign)], images, out)


@pytest.fixture(params=["reported", "foreign_page", "compared"])
def path(request: pytest.FixtureRequest) -> Path:
    """Each page in turn."""
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, Path) else Path(found[0])


@pytest.fixture
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_every_picture_has_a_text(page: Page) -> None:
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    charts = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert all(attributes["alt"] for attributes in pictures)
    assert charts
    assert all(attributes.get("aria-label") or attributes.get("aria-hidden") == "true" for attributes in charts)


def test_nothing_is_fetched_or_run(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "audio", "video", "b"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            target = attributes.get(name)
            assert target is None or target.startswith("data:image/png;base64," if tag == "img" else "#")
    assert "http" not in re.sub(r"http-equiv", "", page.text)
    assert not re.search(r"url\(|@import", page.text)


def test_headings_are_in_order(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_contents_lead_to_the_sections(page: Page) -> None:
    ids = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert [attributes["href"] for tag, attributes in page.elements if tag == "a"] == [f"#{name}" for name in ids]
    assert len(set(ids)) == len(page.sections)


def test_report_has_the_numbers_of_its_probes(reported: tuple[Path, Scores]) -> None:
    path, scores = reported
    assert list(scores) == ["pretrained", "untrained", "raw pixels, 16 px"]
    table = Page(path.read_text()).tables["Scores"]
    expected = [
        [
            f"{report.protocol}, {label}",
            f"{report.accuracy:.1f}",
            f"{report.interval[0]:.1f} to {report.interval[1]:.1f}",
            f"{report.macro_f1:.3f}",
            "-" if report.train_accuracy is None else f"{report.train_accuracy:.1f}",
        ]
        for number in range(2)
        for label, report in ((label, reports[number]) for label, reports in scores.items())
    ]
    assert table[1:] == expected


def test_report_measures_what_a_probe_measures(reported: tuple[Path, Scores], run: Path, images: Path) -> None:
    encoder = Run(run).encoder
    samples = open_samples(encoder, images, 10)
    assert len(samples.train) == len(samples.val) == 20
    report = linear(extract(encoder, samples.train), extract(encoder, samples.val))
    ours = reported[1]["pretrained"][0]
    assert ours.predictions.tolist() == report.predictions.tolist()
    assert ours.val_digest == samples.val.digest


def test_report_of_a_run_has_all_its_sections(reported: tuple[Path, Scores]) -> None:
    page = Page(reported[0].read_text())
    assert page.sections == [
        *("Scores", "Neighbours", "Classes", "Confusions", "Map", "Reconstructions", "Glimpses", "Training"),
        "Provenance",
    ]
    charts = [str(attributes["aria-label"]) for tag, attributes in page.elements if attributes.get("role") == "img"]
    assert charts[3:] == [
        *("training loss", "learning rate", "accuracy while training", "effective rank", "accuracy of a probe"),
    ]


def test_report_without_recipe_and_curves(foreign_page: Path) -> None:
    page = Page(foreign_page.read_text())
    assert page.sections == ["Scores", "Neighbours", "Classes", "Confusions", "Map", "Glimpses", "Provenance"]
    assert [row[0] for row in page.tables["Scores"][1:]] == [
        *("linear, pretrained", "linear, raw pixels, 16 px", "knn-20, pretrained", "knn-20, raw pixels, 16 px"),
    ]


def test_names_of_classes_are_text(reported: tuple[Path, Scores]) -> None:
    page = Page(reported[0].read_text())
    assert sorted(row[0] for row in page.tables["Classes"][1:]) == sorted(HOSTILE)
    alts = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    assert all(any(str(alt).startswith((name, f"query: {name}")) for name in HOSTILE) for alt in alts)


def test_matrix_counts_confusions(reported: tuple[Path, Scores]) -> None:
    path, scores = reported
    report = scores["pretrained"][0]
    table = Page(path.read_text()).tables["Confusion matrix"]
    pairs = Counter(zip(report.targets.tolist(), report.predictions.tolist(), strict=True))
    assert [row[1:] for row in table[1:]] == [[str(pairs[row, column]) for column in range(2)] for row in range(2)]
    assert table[0][1:] == [row[0] for row in table[1:]] == sorted(HOSTILE)


def test_confusion_is_not_its_transpose() -> None:
    labels = np.array([0, 0, 1, 2]), np.array([1, 1, 1, 0])
    report = Report.score(
        "linear",
        labels[1],
        labels[0],
        "abc",
        train_accuracy=None,
        n_train=1,
        settings={},
        seed=0,
        train_digest="",
        val_digest="",
    )
    assert report.confusion().tolist() == [[0, 2, 0], [0, 1, 0], [1, 0, 0]]


def test_many_classes_are_a_picture_and_pairs(foreign_page: Path) -> None:
    page = Page(foreign_page.read_text())
    assert "Confusion matrix" not in page.tables
    alts = [str(attributes["alt"]) for tag, attributes in page.elements if tag == "img"]
    assert sum(alt.startswith("confusion matrix of 21 classes") for alt in alts) == 1
    counts = [int(row[2]) for row in page.tables["Most confused classes"][1:]]
    assert counts == sorted(counts, reverse=True)
    assert len(page.tables["Best classes"]) == len(page.tables["Worst classes"]) == 6


def test_neighbours_are_the_nearest(reported: tuple[Path, Scores], run: Path, images: Path) -> None:
    encoder = Run(run).encoder
    samples = open_samples(encoder, images, 10)
    train, val = extract(encoder, samples.train), extract(encoder, samples.val)
    assert train.labels is not None
    queries = [0, 10]  # the first of each class
    nearest = (F.normalize(val.features[queries]) @ F.normalize(train.features).T).argsort(descending=True)[:, :8]
    expected = [
        f"{train.classes[train.labels[index]]}, {'right' if train.labels[index] == label else 'wrong'}"
        for label, row in enumerate(nearest)
        for index in row
    ]
    page = Page(reported[0].read_text())
    alts = [str(attributes["alt"]) for tag, attributes in page.elements if tag == "img"]
    assert [alt for alt in alts if alt.endswith((", right", ", wrong"))] == expected


def test_neighbours_are_near_by_their_direction() -> None:
    pixels = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    labels, classes, paths = torch.tensor([0, 1, 0]), ("a", "b"), ("0", "1", "2")
    images = ImageSet(pixels, labels, classes, paths, "images", "0")
    features = torch.tensor([[1.0, 0.1], [5.0, 5.0], [0.0, 1.0]])
    train, val = (Features(rows, labels, classes, paths, "0", "e") for rows in (features, torch.eye(3)[:, :2]))
    figure = Page(gallery.neighbours(Samples(images, images), train, val))
    alts = [str(attributes["alt"]) for tag, attributes in figure.elements if tag == "img"]
    assert alts[:4] == ["query: a", "a, right", "b, wrong", "a, right"]


def test_page_is_the_same_each_time(reported: tuple[Path, Scores], run: Path, images: Path, tmp_path: Path) -> None:
    write_report(str(run), images, tmp_path / "again.html", per_class=10)
    assert (tmp_path / "again.html").read_bytes() == reported[0].read_bytes()


def test_samples_are_all_images_where_there_are_no_more(run: Path, images: Path) -> None:
    encoder = Run(run).encoder
    samples = open_samples(encoder, images, 12)
    assert samples.val.digest == open_images(images, size=24, split="val").digest
    few = open_samples(encoder, images, 2).train
    assert few.labels is not None
    assert few.labels.tolist() == [0, 0, 1, 1]
    everything = open_images(images, size=24).paths
    places = [everything.index(path) for path in few.paths]
    assert places == sorted(places)
    assert places != [0, 1, 12, 13]  # drawn, not the first
    with pytest.raises(RecipeError, match="per_class=1: expected at least 2"):
        open_samples(encoder, images, 1)


def test_comparison(compared: tuple[Path, str], run: Path, foreign: Path, images: Path) -> None:
    path, markdown = compared
    page = Page(path.read_text())
    reports = []
    for name in (run, foreign):
        encoder = hub.load(name)
        reports.append(linear(*(extract(encoder, images, split=split) for split in ("train", "val"))))
    training = Run(run).encoder.card["training"]
    rows = [
        [
            str(name),
            architecture,
            parameters,
            time,
            f"{report.train_accuracy:.1f}",
            f"{report.accuracy:.1f}",
            f"{report.interval[0]:.1f} to {report.interval[1]:.1f}",
            f"{report.macro_f1:.3f}",
        ]
        for name, architecture, parameters, time, report in (
            (run, "vit_tiny_patch16_224", "5.4 M", f"{60 * training['minutes'] / 2:.0f} s", reports[0]),
            (foreign, "resnet18_3x3_nopool", "11.2 M", "-", reports[1]),
        )
    ]
    difference = paired_bootstrap(*reports)
    assert difference.points != 0
    low, high = difference.interval
    chance = "yes" if low <= 0 <= high else "no"
    pair = [str(run), str(foreign), f"{difference.points:+.1f}", f"{low:+.1f} to {high:+.1f}", chance]
    assert page.tables == {"Scores": [list(HEADINGS), *rows], "Differences": [list(PAIR_HEADINGS), pair]}
    for row in (*rows, pair):
        assert f"| {' | '.join(row)} |" in markdown.split("\n")


@pytest.mark.parametrize(
    ("training", "expected"),
    [({"minutes": 81.8, "epochs": 4.0}, "20.4 min"), ({"minutes": 1.0, "epochs": 2}, "30 s"), ({}, "-")],
)
def test_time_an_epoch(training: dict[str, float], expected: str, reported: tuple[Path, Scores]) -> None:
    card = {"training": training}
    assert Compared("a", "resnet18", 11_200_000, card, reported[1]["pretrained"][0]).row[2:4] == ("11.2 M", expected)


def test_curve_of_probes(run: Path) -> None:
    epochs = np.array([1.0, 2.0])
    lines = [
        Line("training", epochs, np.array([70.0, 80.0]), 0),
        Line("validation", epochs, np.array([60.0, 65.0]), 1),
    ]
    labels = {"x_label": "epoch", "y_label": "accuracy (%)"}
    assert probe_chart(str(run)) == line_chart("accuracy of a probe", lines, **labels, from_zero=True)


def test_comparison_of_training_losses(foreign: Path, run: Path, images: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    (other / "probe_curve.csv").unlink()
    write_comparison([str(run), str(other)], images, tmp_path / "page.html", per_class=2)
    labels = [
        str(attributes.get("aria-label"))
        for tag, attributes in Page((tmp_path / "page.html").read_text()).elements
        if tag == "svg"
    ]
    assert "validation accuracy of a probe (%)" in labels
    assert "training loss of mae" in labels


@pytest.mark.parametrize("names", [[], ["a"], ["a", "a"]])
def test_comparison_wants_two_names(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected at least two, each of them once"):
        write_comparison(names, "fashion-mnist-mini", tmp_path / "page.html")


def test_damaged_curve_is_named(run: Path, images: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "probe_curve.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(DataError, match=r"probe_curve.csv is damaged: KeyError\('accuracy'\)"):
        write_report(str(copy), images, tmp_path / "page.html")


def test_commands(run: Path, foreign: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report.html"
    cli.main(["report", str(run), "--data", str(images), "-o", str(out), "--per-class", "4", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "pretrained, linear: " in printed
    assert printed.endswith(f"\n{out}\n")
    assert "fitted on 8" in printed
    assert out.is_file()
    compared = tmp_path / "compare.html"
    cli.main(["compare", str(run), str(foreign), "--data", str(images), "-o", str(compared), "--device", "cpu"])
    assert capsys.readouterr().out.startswith("| model | architecture |")
    assert compared.is_file()


def test_unlabelled_images_are_refused_in_a_line(run: Path, images: Path, tmp_path: Path) -> None:
    flat = next((images / "train").iterdir())
    for command in (["report", str(run)], ["compare", str(run), "simclr_resnet18"]):
        with pytest.raises(SystemExit) as leaving:
            cli.main([*command, "--data", str(flat), "-o", str(tmp_path / "page.html")])
        assert isinstance(leaving.value.code, str)
        assert re.match(r"error: source .* looked for labels .*found 12 images without$", leaving.value.code)
    assert not (tmp_path / "page.html").exists()


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    home = tmp_path_factory.mktemp("browser")

    def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
        flags = [
            *("--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--virtual-time-budget=3000"),
            "--no-sandbox",  # which root cannot have; the pages are our own
            *("--enable-logging=stderr", f"--user-data-dir={home}", "--dump-dom"),
        ]
        command = [str(BROWSER), *flags, *options, page.as_uri()]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=120, env=os.environ | {"HOME": str(home)}
        )

    return browse


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
@pytest.mark.parametrize("dark", [False, True])
def test_no_page_is_wider_than_the_window(
    dark: bool,
    reported: tuple[Path, Scores],
    foreign_page: Path,
    compared: tuple[Path, str],
    browse: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    measure = (
        "<script>parent.postMessage([innerWidth, document.scrollingElement.scrollWidth, "
        "matchMedia('(prefers-color-scheme: dark)').matches, getComputedStyle(document.body).backgroundColor], '*')"
        "</script></body>"
    )
    widths = (360, 1280)
    frames = []
    for number, path in enumerate((reported[0], foreign_page, compared[0])):
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())  # it forbids scripts
        (tmp_path / f"{number}.html").write_text(text.replace("</body>", measure))
        # A frame may be narrower than a window, which a browser keeps above 500 pixels.
        frames += [f'<iframe src="{number}.html" width="{width}" height="800"></iframe>' for width in widths]
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<!doctype html><style>:root { color-scheme: light dark }</style><pre></pre><script>"
        "onmessage = ({data}) => document.querySelector('pre').append(JSON.stringify(data) + '\\n')</script>"
        + "".join(frames)
    )
    dom = browse(outer, f"--blink-settings=preferredColorScheme={0 if dark else 1}").stdout
    found = re.search(r"<pre>(.*?)</pre>", dom, re.DOTALL)
    assert found
    measured = [json.loads(line) for line in found[1].splitlines()]
    assert sorted(width for width, *_ in measured) == sorted(3 * widths)
    assert [row for row in measured if row[1] > row[0]] == []
    paper = "rgb(20, 21, 23)" if dark else "rgb(255, 255, 255)"
    assert {(row[2], row[3]) for row in measured} == {(dark, paper)}


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
def test_browser_has_nothing_to_complain_about(
    path: Path, browse: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = browse(path)
    assert "<h1>" in done.stdout
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
