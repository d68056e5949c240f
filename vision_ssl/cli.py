"""The command line. Its options are the recipes' fields; torch is imported by the commands that need it."""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, cast

import tyro

from . import commands
from .commands import SourcePath
from .errors import RecipeError, VisionSSLError
from .extra import commands as extra
from .options import FineTuning, RunOptions
from .presets import FINE_TUNING, PRESETS
from .recipes import MAE, METHODS, Recipe, SimCLR

COMMANDS: dict[str, Callable[..., None]] = {
    "list": commands.list_command,
    "info": commands.info_command,
    "demo": commands.demo_command,
    "extract": commands.extract_command,
    "probe": commands.probe_command,
    "knn": commands.knn_command,
    "finetune": commands.finetune_command,
    "leaks": commands.leaks_command,
    "reconstruct": commands.reconstruct_command,
    "plot": commands.plot_command,
    "report": extra.report_command,
    "compare": extra.compare_command,
    "track": extra.track_command,
    "import": extra.import_command,
    "export": extra.export_command,
    "push": extra.push_command,
}


@dataclass(kw_only=True)
class _Training:
    """What every training command takes beside its recipe.

    Attributes:
        source: A folder of images, a known layout, or a torchvision name such as `cifar10`.
        preset: Named settings to start from; the options below change single ones.
    """

    source: SourcePath
    preset: str
    options: RunOptions


@dataclass(kw_only=True)
class _TrainSimCLR(_Training):
    """Pretrain an encoder with SimCLR."""

    recipe: SimCLR


@dataclass(kw_only=True)
class _TrainMAE(_Training):
    """Pretrain an encoder with MAE."""

    recipe: MAE


def _train_command(preset: str) -> Callable[[Any], None]:
    """The command `train`, whose defaults are those of a preset."""

    def default(method: str) -> dict[str, Any]:
        # The other method may not know this preset: its defaults are then never used.
        recipe = METHODS[method].preset(preset) if preset in PRESETS[method] else METHODS[method]()
        return {"source": tyro.MISSING, "preset": preset, "recipe": recipe, "options": RunOptions()}

    def train(method: Any) -> None:
        """Pretrain an encoder on your own images: `train simclr PATH` or `train mae PATH`."""
        recipe = cast(Recipe, method.recipe)
        if method.preset not in PRESETS[recipe.method]:
            known = ", ".join(PRESETS[recipe.method])
            raise RecipeError(f"preset={method.preset!r} is unknown to {recipe.method}: expected one of {known}")
        recipe.train(method.source, **vars(method.options))

    train.__annotations__["method"] = (
        Annotated[_TrainSimCLR, tyro.conf.subcommand("simclr", default=_TrainSimCLR(**default("simclr")))]
        | Annotated[_TrainMAE, tyro.conf.subcommand("mae", default=_TrainMAE(**default("mae")))]
    )
    return train


def main(arguments: list[str] | None = None) -> None:
    """Run one command; an error that we foresaw is one line on stderr, and exit status 1."""
    given = sys.argv[1:] if arguments is None else arguments
    early = argparse.ArgumentParser("vision-ssl", add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    preset = early.parse_known_args(given)[0].preset
    # The defaults of options are those of the preset, if the command knows it; otherwise the command refuses it.
    tuning = FineTuning.of(preset if preset in FINE_TUNING else "mae")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS
            | {
                "train": _train_command(preset or "small-64"),
                "finetune": partial(commands.finetune_command, settings=tuning),
            },
            prog="vision-ssl",
            description="Pretrained SimCLR and MAE encoders: load, pretrain, measure.",
            args=given,
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        )
    except (VisionSSLError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
