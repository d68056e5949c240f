"""Turn a finished run into packaged weights.

    python benchmarks/package_weights.py RUN NAME RESULTS... --label LABEL --licence SENTENCE

Copies the weights and the metrics (of a long run, thinned) into `vision_ssl/weights/NAME`, or those of a large model
by `--clone` into `weights/NAME`, which is not part of the package, in several files if one is larger than a host of
repositories takes; adds measured scores and the licence to the card, and prints the entry for
`vision_ssl/registry.py`.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro
from huggingface_hub import save_torch_state_dict

from vision_ssl.config import CONFIG_FILE
from vision_ssl.locate import ENCODER_FILE, file_hash
from vision_ssl.registry import CLONED, PACKAGED
from vision_ssl.storage import load_tensors, save_json

LARGEST = 90_000_000  # bytes of a file of weights; GitHub refuses more than 100 MiB
STEPS = 2000  # of a run whose metrics are packaged, at most: enough for its curves


@dataclass
class Arguments:
    """What to package.

    Attributes:
        run: A finished run.
        name: `architecture.tag`.
        results: Files of `benchmarks/evaluate.py` that measured this run.
        label: What the results call it.
        licence: A sentence for the card.
        clone: Keep it out of the package, in clones alone.
    """

    run: tyro.conf.Positional[Path]
    name: tyro.conf.Positional[str]
    results: tyro.conf.Positional[tuple[Path, ...]]
    label: str
    licence: str
    clone: bool = False


def main(arguments: Arguments) -> None:
    """Write the folder, and print the registry's entry."""
    weights, target = arguments.run / "weights", (CLONED if arguments.clone else PACKAGED) / arguments.name
    target.mkdir(parents=True)
    config = json.loads((weights / CONFIG_FILE).read_text())
    card = config["vision_ssl"]
    card |= {"name": arguments.name, "licence": arguments.licence, "scores": []}
    for path in arguments.results:
        results = json.loads(path.read_text())
        for score in results["scores"]:
            if score.pop("features") == arguments.label:
                card["scores"].append({"data": results["data"], **score})
    hashes = dict(card["sha256"])
    for file in card["sha256"]:
        if file == ENCODER_FILE and (weights / file).stat().st_size > LARGEST:
            del hashes[file]
            hashes |= sharded(weights / file, target, LARGEST)
        else:
            shutil.copyfile(weights / file, target / file)
    (target / "metrics.jsonl").write_text(thinned((arguments.run / "metrics.jsonl").read_text()))
    save_json(target / CONFIG_FILE, config)
    print(f'Weights("{arguments.name}", "...", {json.dumps(hashes, indent=4)})')


def sharded(path: Path, target: Path, most: int) -> dict[str, str]:
    """Divide an encoder's file among several in a folder, of at most so many bytes each, beside an index.

    Returns:
        The hash of each file, the index too, by name.
    """
    tensors, _ = load_tensors(path)
    save_torch_state_dict(tensors, target, max_shard_size=most)  # in place of what is there of an encoder
    return {file.name: file_hash(file) for file in sorted(target.glob("model*.safetensors*"))}


def thinned(metrics: str) -> str:
    """One step in so many, the last, and all looks at the encoder, which have no loss."""
    lines = metrics.splitlines(keepends=True)
    entries = [json.loads(line) for line in lines]
    every, last = math.ceil(sum("loss" in entry for entry in entries) / STEPS), entries[-1]["step"]
    kept = ["loss" not in entry or entry["step"] % every == 0 or entry["step"] == last for entry in entries]
    return "".join(line for line, keep in zip(lines, kept, strict=True) if keep)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
