"""Write the tables of README.md from the cards and from the demo: `python benchmarks/update_readme.py DEMO_FOLDER`.

Each stands between two comments that name it; everything else in the file stays as it is.
"""

import re
import shutil
import sys
from pathlib import Path

from vision_ssl.registry import WEIGHTS

README = Path(__file__).parents[1] / "README.md"
DEMO_SCORES = Path(__file__).parent / "results" / "demo.md"


def models_table() -> str:
    """The packaged models with the scores of their cards."""
    lines = [
        "| name | encoder | input | features | epochs | linear: accuracy (%) | macro F1 | kNN, k = 20 (%) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for weights in WEIGHTS:
        config, card = weights.config, weights.card
        scores = {score["protocol"]: score for score in weights.own_scores}
        linear, knn = scores["linear"], scores["knn-20"]
        lines.append(
            f"| `{weights.name}` | {config['architecture']} | {config['pretrained_cfg']['input_size'][1]} px "
            f"| {config['num_features']} | {card['training']['epochs']:g} "
            f"| {linear['accuracy']:.1f} ({linear['interval'][0]:.1f} to {linear['interval'][1]:.1f}) "
            f"| {linear['macro_f1']:.3f} | {knn['accuracy']:.1f} |"
        )
    return "\n".join(lines)


def demo_scores() -> str:
    """What the demo printed when it last renewed the README."""
    return DEMO_SCORES.read_text(encoding="utf-8").strip()


def with_block(text: str, name: str, block: str) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- /name -->` replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"README.md has no block {name!r}: expected <!-- {name} --> and <!-- /{name} -->")
    return pattern.sub(lambda match: f"{match[1]}\n{block}\n\n{match[2]}", text)


def main(demo: Path) -> None:
    """Renew both tables."""
    text = with_block(README.read_text(encoding="utf-8"), "models", models_table())
    shutil.copyfile(demo / "scores.md", DEMO_SCORES)
    README.write_text(with_block(text, "demo", demo_scores()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
