"""Encoders in the forms that other programs load: transformers, ONNX, torch.export."""

import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from .. import hub
from ..errors import MissingExtraError, WeightsError
from ..locate import locate
from ..recipes import MAE
from ..restore import load, recipe_of
from ..storage import check_new_folder, save_json, save_tensors, write_whole

Format = Literal["transformers", "onnx", "torch.export"]

# Largest difference from the encoder that counts as rounding, in shares of the largest feature.
_ROUNDING = 1e-4

# From our names, which are timm's, to those in the files of facebook/vit-mae-base.
_BLOCK = (
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
_ENCODER = (
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"^norm\.", "layernorm."),
)
_DECODER = (
    (r"^embed\.", "decoder_embed."),
    (r"^blocks\.", "decoder_layers."),
    (r"^norm\.", "decoder_norm."),
    (r"^pixels\.", "decoder_pred."),
    (r"^position$", "decoder_pos_embed"),
)


def export(name: str | os.PathLike[str], out: str | os.PathLike[str], *, format: Format) -> Path:
    """Write an encoder for other programs, with its card, which has the preprocessing under `input`.

    Args:
        name: As for `load`.
        out: Folder to write to; new, or empty.
        format: `transformers`: a ViTMAEForPreTraining if the weights hold a decoder, otherwise a ViTModel.
            `onnx`: `model.onnx`, from images (batch, C, S, S) to pooled features (batch, D).
            `torch.export`: the same as `model.pt2`. The last two are run, and compared with the encoder.

    Returns:
        The file that holds the weights.

    Raises:
        WeightsError: The weights are unknown or damaged, or this format has no form for them.
        MissingExtraError: The packages of ONNX are not installed.
        CheckpointError: `out` holds something, or the disk refuses.
    """
    directory = Path(out)
    check_new_folder(directory)
    encoder = hub.load(name)
    write = {"transformers": _transformers, "onnx": _onnx, "torch.export": _torch_export}[format]
    path = write(name, encoder, directory)
    size, mean, std = encoder.preprocess.size, encoder.preprocess.mean, encoder.preprocess.std
    shape = ["batch", len(mean), size, size]
    save_json(directory / "card.json", encoder.card | {"input": {"shape": shape, "mean": list(mean), "std": list(std)}})
    return path


def _example(encoder: hub.Encoder, batch: int) -> Tensor:
    size = encoder.preprocess.size
    return torch.randn(batch, len(encoder.preprocess.mean), size, size, generator=torch.Generator().manual_seed(batch))


@torch.no_grad()
def _check(encoder: hub.Encoder, exported: Callable[[Tensor], Tensor], path: Path) -> None:
    """Compare features of several batches; the sizes differ from that of the example, which must not be fixed."""
    for batch in (1, 3):
        images = _example(encoder, batch)
        expected = encoder(images)
        error = ((exported(images) - expected).abs().max() / expected.abs().max()).item()
        if not error < _ROUNDING:
            raise WeightsError(f"{path} would differ from the encoder by {error:.1e} of the largest feature: not kept")


def _torch_export(name: str | os.PathLike[str], encoder: hub.Encoder, directory: Path) -> Path:
    program = torch.export.export(encoder, (_example(encoder, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},))

    def write(beside: Path) -> None:
        with beside.open("wb") as file:  # to a path, torch would want the suffix .pt2
            torch.export.save(program, file)
        with beside.open("rb") as file:
            _check(encoder, torch.export.load(file).module(), path)

    path = directory / "model.pt2"
    write_whole(path, write)
    return path


def _onnx(name: str | os.PathLike[str], encoder: hub.Encoder, directory: Path) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(package)
        except ImportError as error:
            raise MissingExtraError(package, "onnx") from error
    import onnxruntime

    def write(beside: Path) -> None:
        torch.onnx.export(
            encoder,
            (_example(encoder, 2),),
            beside,
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        session = onnxruntime.InferenceSession(beside.read_bytes(), providers=["CPUExecutionProvider"])
        _check(encoder, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), path)

    path = directory / "model.onnx"
    write_whole(path, write)
    return path


def _transformers(name: str | os.PathLike[str], encoder: hub.Encoder, directory: Path) -> Path:
    if not hasattr(encoder, "blocks"):
        raise WeightsError(f"{str(name)!r} is a ResNet: expected a ViT for format='transformers'")
    recipe = recipe_of(name) if "recipe" in encoder.card else None
    config = _vit_config(encoder)
    if isinstance(recipe, MAE) and locate(name).has_head():
        model = cast(Any, load(name, part="full"))
        # Rows come before columns in our decoder's table, and after them in MAE's own, but a table is a table.
        decoder = model.head.state_dict() | {"position": model.head.position}
        tensors = _renamed(encoder.state_dict(), _ENCODER, "vit.") | _renamed(decoder, _DECODER, "decoder.")
        config |= {
            "architectures": ["ViTMAEForPreTraining"],
            "model_type": "vit_mae",
            "mask_ratio": recipe.mask_ratio,
            "norm_pix_loss": recipe.norm_pix,
            "decoder_hidden_size": recipe.decoder_dim,
            "decoder_num_hidden_layers": recipe.decoder_depth,
            "decoder_num_attention_heads": recipe.decoder_heads,
            "decoder_intermediate_size": 4 * recipe.decoder_dim,
        }
    else:
        tensors = _renamed(encoder.state_dict(), _ENCODER, "")
    path = directory / "model.safetensors"
    save_tensors(path, tensors)
    save_json(directory / "config.json", config)
    return path


def _vit_config(encoder: hub.Encoder) -> dict[str, Any]:
    blocks = cast(Any, encoder).blocks
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": encoder.num_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": blocks[0].norm1.eps,
        "qkv_bias": True,
        "image_size": encoder.preprocess.size,
        "patch_size": cast(Any, encoder).patch_embed.patch_size[0],
        "num_channels": len(encoder.preprocess.mean),
    }


def _renamed(tensors: dict[str, Tensor], rules: tuple[tuple[str, str], ...], prefix: str) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        for ours, theirs in _BLOCK:
            name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[prefix + name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows
        else:
            renamed[prefix + name] = tensor
    return renamed
