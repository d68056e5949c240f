"""Write the tables of README.md from cards and measurements: `python benchmarks/update_readme.py [DEMO_FOLDER]`.

Each stands between two comments that name it; everything else in the file stays as it is. With the folder that the
demo wrote, its scores are taken from there.
"""

import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vision_ssl.registry import WEIGHTS, Weights

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"
DEMO_SCORES = RESULTS / "demo.md"
REPRODUCED = RESULTS / "reproduce"
STUDIES = Path(__file__).parent / "studies.json"
SCORES = (  # columns of the table of reproduced figures: heading, protocol, figure
    ("linear: training (%)", "linear", "train_accuracy"),
    ("validation (%)", "linear", "accuracy"),
    ("macro F1", "linear", "macro_f1"),
    ("study B's probe: training (%)", "linear-sgd-study-b", "train_accuracy"),
    ("validation (%)", "linear-sgd-study-b", "accuracy"),
    ("macro F1", "linear-sgd-study-b", "macro_f1"),
    ("kNN, k = 20 (%)", "knn-20", "accuracy"),
    ("k = 5 (%)", "knn-5", "accuracy"),
    ("fine-tuned (%)", "finetune", "accuracy"),
    ("resubstitution (%), a training accuracy", "resubstitution", "accuracy"),
)
EVALUATED = "tiny-imagenet-200"
# What a protocol calls its score, and how that is shown.
PROTOCOLS = (
    ("linear", "accuracy", "{:.1f} %"),
    ("linear-sgd-study-b", "accuracy", "{:.1f} %"),
    ("fewshot-5", "accuracy", "{:.1f} %"),
    ("knn-20", "accuracy", "{:.1f} %"),
    ("knn-5-unweighted-euclidean", "accuracy", "{:.1f} %"),
    ("retrieval", "mean_average_precision", "{:.3f}"),
    ("cluster", "nmi", "{:.3f}"),
    ("resubstitution", "accuracy", "{:.1f} %"),
)
SPEED_GROUPS = ("augment", "photographs", "pipeline", "loss", "step", "extract", "decode", "probe")


def models_table() -> str:
    """The packaged models with the scores of their cards."""
    lines = [
        "| name | in | encoder | input | features | epochs | linear: accuracy (%) | macro F1 | kNN, k = 20 (%) "
        "| linear, all labels (%) | kNN, k = 20, all labels (%) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for weights in WEIGHTS:
        config, card = weights.config, weights.card
        epochs = with_those_before(card["training"]["epochs"], card.get("origin"), "epochs")
        scores = {score["protocol"]: score for score in weights.own_scores}
        linear, knn = scores["linear"], scores["knn-20"]
        lines.append(
            f"| `{weights.name}` | {'the package' if weights.is_packaged else 'a clone'} | {config['architecture']} "
            f"| {config['pretrained_cfg']['input_size'][1]} px | {config['num_features']} | {epochs} "
            f"| {linear['accuracy']:.1f} ({linear['interval'][0]:.1f} to {linear['interval'][1]:.1f}) "
            f"| {linear['macro_f1']:.3f} | {knn['accuracy']:.1f} | {' | '.join(with_all_labels(weights))} |"
        )
    return "\n".join(lines)


def with_all_labels(weights: Weights) -> list[str]:
    """Accuracies (%) of linear probe and kNN, fitted on all training images; dashes where that was not measured."""
    path = RESULTS / f"{EVALUATED}.all-labels.{weights.name.partition('.')[0]}.json"
    if not path.exists():
        return ["-", "-"]
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    own = {score["protocol"]: score["accuracy"] for score in scores if score["features"] == weights.name}
    return [shown(own.get(protocol), "{:.1f}") for protocol in ("linear", "knn-20")]


def with_those_before(
    spent: float | None, origin: dict[str, Any] | None, cost: str, pattern: Callable[[float], str] = "{:g}".format
) -> str:
    """Epochs or minutes of pretraining, after those of the weights that it started from; a dash where unknown."""
    costs = [*([origin[cost]] if origin and cost in origin else []), spent]
    return " + ".join("-" if value is None else pattern(value) for value in costs)


def demo_scores() -> str:
    """What the demo printed when it last renewed the README."""
    return DEMO_SCORES.read_text(encoding="utf-8").strip()


def reproduced_tables(folder: Path = REPRODUCED) -> str:
    """What `benchmarks/reproduce.py` measured, beside the figures of two earlier studies."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    studies = json.loads(STUDIES.read_text(encoding="utf-8"))
    models = {record["model"]["name"]: record["model"] for record in records}
    costs = [
        [
            f"`{model['name']}`",
            model["architecture"],
            f"{model['image_size']} px",
            f"{model['parameters'] / 1e6:.1f} M",
            with_those_before(model["epochs"], model.get("origin"), "epochs"),
            "-" if model["minutes"] is None else minutes(model["minutes"] / model["epochs"]),
            with_those_before(model["minutes"], model.get("origin"), "minutes", minutes),
            shown(model["hardware"], "{}"),
        ]
        for model in models.values()
    ]
    scores = []
    for record in records:
        for classes in dict.fromkeys(score["classes"] for score in record["scores"]):
            found = {score["protocol"]: score for score in record["scores"] if score["classes"] == classes}
            figures = [score_shown(found.get(protocol), figure) for _, protocol, figure in SCORES]
            fitted = f"{found['linear']['n_train']:,}"
            scores.append([f"`{record['model']['name']}`", record["data"], str(classes), fitted, *figures])
    quoted = [
        [
            f"{study['model']} ({study['study']})",
            study["architecture"],
            f"{study['image_size']} px",
            shown(study["parameters"], "{:.1f} M"),
            str(study["epochs"]),
            study["time_an_epoch"] or "-",
            study["protocol"],
            shown(study["train_accuracy"], "{:.1f}"),
            shown(study["accuracy"], "{:.1f}"),
            shown(study["macro_f1"], "{:.3f}"),
        ]
        for study in studies["studies"]
    ]
    facts = ["architecture", "input", "parameters", "epochs", "an epoch"]
    paragraphs = [
        table(["model", *facts, "in all", "hardware"], costs),
        table(["model", "data", "classes", "fitted on", *(heading for heading, _, _ in SCORES)], scores),
        "As the two studies state theirs:",
        table(["model (study)", *facts, "protocol", "training (%)", "validation (%)", "macro F1"], quoted),
        studies["why_they_differ"],
    ]
    return "\n\n".join(paragraphs)


def protocols_table(folder: Path = REPRODUCED) -> str:
    """The same encoders under several protocols, on all classes of one data set."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{EVALUATED}.*.json"))]
    rows = []
    for protocol, figure, pattern in PROTOCOLS:
        means = []
        for record in records:
            most = max(score["classes"] for score in record["scores"])
            found = {score["protocol"]: score for score in record["scores"] if score["classes"] == most}
            values = {**found[protocol]["further"], "accuracy": found[protocol]["accuracy"]}[figure]
            means.append(statistics.mean(values))
        rows.append([f"`{protocol}`", figure.replace("_", " "), *(pattern.format(mean) for mean in means)])
    names = [f"`{record['model']['name']}`" for record in records]
    return table(["protocol", "figure", *names], rows)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: object, pattern: str) -> str:
    """A value that may be missing."""
    return "-" if value is None else pattern.format(value)


def minutes(value: float) -> str:
    """Minutes, in the unit that fits."""
    return f"{60 * value:.0f} s" if value < 2 else f"{value:.1f} min" if value < 120 else f"{value / 60:.1f} h"


def score_shown(score: dict[str, Any] | None, figure: str) -> str:
    """A figure of a protocol; fine-tuning has epochs and images of its own."""
    if score is None:
        return "-"
    value = spread(score[figure], figure)
    if score["protocol"] != "finetune":
        return value
    return f"{value} ({score['settings'][0]['epochs_done']} epochs of {score['n_train']:,} images)"


def spread(values: Sequence[float], figure: str) -> str:
    """Mean over seeds, with the standard deviation where there are several."""
    if not values:
        return "-"
    digits = 3 if figure == "macro_f1" else 1
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def speed_table() -> str:
    """Our time and each peer's, from the benchmarks of `make bench`."""
    groups = [speed_results(group) for group in SPEED_GROUPS]
    lines = ["| work | vision_ssl | peer | its time | ratio |", "|---|--:|---|--:|--:|"]
    for group in groups:
        for row in group["rows"]:
            ours, theirs, ratio = row["ours_seconds"]["median"], row["peer_seconds"]["median"], row["ratio"]
            lines.append(
                f"| {row['work']} | {duration(ours)} | {row['peer']} | {duration(theirs)} "
                f"| {ratio['median']:.1f} ({ratio['min']:.1f} to {ratio['max']:.1f}) |"
            )
    for row in speed_results("startup")["rows"][2:]:  # after those of torch and timm themselves
        ours, ratio = row["seconds"]["median"], row["ratio"]
        torch = duration(ours - row["seconds_more"]["median"])
        shown = f"{1 / ratio['median']:.2g} ({1 / ratio['max']:.2g} to {1 / ratio['min']:.2g})"
        lines.append(f"| `{row['work']}` in a new process | {duration(ours)} | `import torch` | {torch} | {shown} |")
    machines = sorted({f"{group['machine']}, torch {group['torch']}, commit {group['commit']}" for group in groups})
    return "\n".join([*lines, "", f"Measured on: {'; '.join(machines)}."])


def gpu_table() -> str:
    """Images a second on a GPU, from `benchmarks/throughput.py`."""
    rows = speed_results("throughput")["rows"]
    lines = []
    for row in rows:
        speed = row["images_per_second"]
        figures = (f"{speed[which]:,.0f}" for which in ("median", "min", "max"))
        aim = shown(row.get("asked_for"), "{:,}")
        lines.append([row["work"], "{} ({} to {})".format(*figures), aim, row["commit"]])
    places = sorted({f"{row['machine']}, torch {row['torch']}" for row in rows})
    return f"{table(['work', 'images a second', 'aim', 'commit'], lines)}\n\nMeasured on: {'; '.join(places)}."


def scale_table() -> str:
    """Time and peak memory against the number of images."""
    rows = speed_results("scale")["rows"]
    sizes = sorted({row["images"] for row in rows})
    lines = [
        "| stage | " + " | ".join(f"{size:,} images" for size in sizes) + " |",
        "|---|" + "--:|" * len(sizes),
    ]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = {row["images"]: row for row in rows if row["stage"] == stage}
        cells = [f"{duration(own[size]['seconds'])}, {own[size]['peak_mb'] / 1e3:.1f} GB" for size in sizes]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed_results(group: str) -> dict[str, Any]:
    """What `benchmarks/bench_<group>.py` wrote."""
    results: dict[str, Any] = json.loads((RESULTS / "speed" / f"{group}.json").read_text(encoding="utf-8"))
    return results


def duration(seconds: float) -> str:
    """Three digits, in seconds or milliseconds."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def with_block(text: str, name: str, block: str) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- /name -->` replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no block {name!r}: expected <!-- {name} --> and <!-- /{name} -->")
    return pattern.sub(lambda match: f"{match[1]}\n{block}\n\n{match[2]}", text)


def blocks() -> dict[str, str]:
    """Everything in the README that comes from measurements."""
    return {
        "models": models_table(),
        "protocols": protocols_table(),
        "reproduced": reproduced_tables(),
        "demo": demo_scores(),
        "speed": speed_table(),
        "gpu": gpu_table(),
        "scale": scale_table(),
    }


def main(demo: Path | None) -> None:
    """Renew the tables."""
    text = README.read_text(encoding="utf-8")
    if demo is not None:
        shutil.copyfile(demo / "scores.md", DEMO_SCORES)
    for name, block in blocks().items():
        text = with_block(text, name, block)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
