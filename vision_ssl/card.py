"""The model card of weights: their facts as the README.md of a repository."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .report import RESUBSTITUTION

_METHODS = {
    "simclr": "[SimCLR](https://arxiv.org/abs/2002.05709)",
    "mae": "[MAE](https://arxiv.org/abs/2111.06377)",
}


def model_card(
    repo: str, config: Mapping[str, Any], *, scores: Sequence[Mapping[str, Any]], picture: str | None
) -> str:
    """Write the card of weights as markdown, with the metadata that the Hub reads.

    Args:
        repo: `owner/name`.
        config: Its `config.json`.
        scores: What was measured: `data`, `protocol`, `accuracy`, `interval`, `macro_f1`, `n_train`, `n_val`.
        picture: File of the curves beside the card, if there is one.
    """
    card = config.get("vision_ssl", {})
    sections = [
        _metadata(card),
        f"# {repo.partition('/')[2]}",
        _summary(config, card),
        _loading(repo, config["architecture"]),
        _training(card, picture),
        _scores(scores),
        _recipe(card),
        f"## Licence\n\n{_licence(card)}",
        _hashes(card),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def origin_of(card: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the card of a run keeps of the card of the weights that it starts from.

    Args:
        card: Of those weights, which may be somebody else's: what is not of its kind is left out.
        name: What they were asked for by, if their card has no name.

    Returns:
        Of `name`, `data` (what they were pretrained on), `epochs` and `minutes` (with those before), and `licence`,
        what is known.
    """
    data = card.get("data")
    facts = {
        "name": card.get("name", name),
        "data": data.get("name") if isinstance(data, dict) else None,
        "licence": card.get("licence"),
    }
    known: dict[str, Any] = {"name": name} | {key: value for key, value in facts.items() if isinstance(value, str)}
    parts = [card.get("training"), *([card["origin"]] if "origin" in card else [])]
    for cost in ("epochs", "minutes"):
        spent = [part.get(cost) if isinstance(part, dict) else None for part in parts]
        if all(isinstance(number, int | float) for number in spent):
            known[cost] = sum(spent)
    return known


def describe_origin(card: Mapping[str, Any]) -> str:
    """What pretraining started from, in a few words."""
    origin = card.get("origin")
    if origin is None:
        return card["training"]["init"] or "random weights"
    seen = f"{origin['epochs']:g} epochs of {origin['data']}" if {"epochs", "data"} <= origin.keys() else None
    return f"{origin['name']} ({seen or origin.get('data', 'of unknown data')})"


def _licence(card: Mapping[str, Any]) -> str:
    stated = card.get("licence", "Whoever published these weights has not stated one.")
    origin = card.get("origin", {})
    if "licence" not in origin:
        return str(stated)
    return f"{stated}\n\nPretraining started from {origin['name']}, whose licence is: {origin['licence']}"


def _metadata(card: Mapping[str, Any]) -> str:
    name = re.match(r"[A-Za-z-]+(\d+\.\d+)?", card.get("licence", ""))
    tags = ["image-feature-extraction", "timm", "vision_ssl", "self-supervised-learning", card.get("method")]
    lines = [
        "library_name: timm",
        "pipeline_tag: image-feature-extraction",
        *([f"license: {name[0].lower()}"] if name else []),
        "tags:",
        *(f"- {tag}" for tag in tags if tag),
    ]
    return "\n".join(["---", *lines, "---"])


def _summary(config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    method = _METHODS.get(card.get("method", ""), "an unknown method")
    channels, size, _ = config["pretrained_cfg"]["input_size"]
    patch = config.get("model_args", {}).get("patch_size")
    patches = f" with patches of {patch} px" if patch else ""
    return (
        f"An image encoder, pretrained without labels by {method}: `{config['architecture']}`{patches}. It takes "
        f"images of {size} x {size} px with {channels} channels, and gives features (B, {config['num_features']})."
    )


def _loading(repo: str, architecture: str) -> str:
    ours = "_3x3" in architecture  # registered with timm by importing this package
    return f"""## How to load it

```python
import vision_ssl

encoder = vision_ssl.load("hf:{repo}")
features = encoder(encoder.preprocess(picture)[None])
```

With timm{", which finds this architecture once `vision_ssl` is imported" if ours else " alone"}:

```python
import timm{", vision_ssl" if ours else ""}

encoder = timm.create_model("hf-hub:{repo}", pretrained=True)
```

With torch.hub, from a clone of vision_ssl that need not be installed:

```python
encoder = torch.hub.load("path/of/the/clone", "encoder", "hf:{repo}", source="local")
```"""


def _training(card: Mapping[str, Any], picture: str | None) -> str:
    data, training = card.get("data"), card.get("training")
    facts: dict[str, Any] = {}
    if data:
        facts["data"] = f"{data['name']}, {data['images']:,} images" if "images" in data else data["name"]
        facts["digest of the images"] = data.get("digest")
    if training:
        state = "" if training["finished"] else "; stopped before its end"
        facts["epochs"] = f"{training['epochs']:.4g} ({training['steps']:,} steps){state}"
        facts["time"] = f"{training['minutes']:,} minutes on {training['hardware']}, {training['precision']}"
        facts["seed"] = training["seed"]
        facts["started from"] = describe_origin(card)
        facts["made by"] = (
            f"vision_ssl {training['vision_ssl']}, commit {training['commit']}, torch {training['torch']}"
        )
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    table = "\n".join(["| | |", "|---|---|", *rows]) if rows else "Nothing is known about it."
    drawn = f"\n\n![Loss, learning rate and accuracy over the steps]({picture})" if picture else ""
    return f"## Training\n\n{table}{drawn}"


def _scores(scores: Sequence[Mapping[str, Any]]) -> str:
    if not scores:
        return "## Scores\n\nNone were measured."
    lines = [
        "| data | protocol | accuracy (%), 95 % interval | macro F1 | fitted on | scored on |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for score in sorted(scores, key=lambda score: score["protocol"] == RESUBSTITUTION):  # a training accuracy: last
        low, high = score["interval"]
        lines.append(
            f"| {score['data']} | {score['protocol']} | {score['accuracy']:.1f} ({low:.1f} to {high:.1f}) "
            f"| {score['macro_f1']:.3f} | {score['n_train']:,} | {score['n_val']:,} |"
        )
    return "## Scores\n\n" + "\n".join(lines)


def _recipe(card: Mapping[str, Any]) -> str:
    if "recipe" not in card:
        return ""
    return f"## Recipe\n\n```json\n{json.dumps(card['recipe'], indent=2, ensure_ascii=False)}\n```"


def _hashes(card: Mapping[str, Any]) -> str:
    if not card.get("sha256"):
        return ""
    rows = [f"| {file} | `{digest}` |" for file, digest in card["sha256"].items()]
    return "## Files\n\n" + "\n".join(["| file | SHA-256 |", "|---|---|", *rows])
