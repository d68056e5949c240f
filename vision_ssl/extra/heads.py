"""Projectors and decoders of other programs, where they are the same networks as ours."""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from ..encoders import EncoderSpec, feature_dim
from ..hub import misfits
from ..mae import TransformerDecoder
from ..simclr import SimCLRModel
from .layouts import DECODER, PROJECTORS, Found, Layout

# In a decoder: what reads its channels, by the second dimension of a weight, and what never meets them.
_READS = ("attn.qkv.weight", "mlp.fc1.weight", "pixels.weight")
_APART = ("attn.qkv.bias", "mlp.fc1.bias", "pixels.bias")

# Counters of batches, on which no output depends; old files lack them.
MAY_LACK = r".*num_batches_tracked$"


@dataclass(frozen=True)
class Head:
    """A head that was found in a file.

    Attributes:
        module: The head, as ours.
        found: Where it was found.
        description: What it is, for people.
        facts: What its card says of it.
        note: What the file does not tell about it; empty if there is no such thing.
    """

    module: nn.Module
    found: Found
    description: str
    facts: dict[str, Any]
    note: str = ""


def find_projector(tensors: dict[str, Tensor], encoder: nn.Module) -> Head | None:
    """The projector in a file; None if there is none, or it is another network than SimCLR's."""
    for layout in PROJECTORS:
        found = _only(layout, tensors)
        if found is None:
            continue
        own, norm = found.tensors, "1.weight" in found.tensors
        linear = [own[name] for name in ("0.weight", "3.weight" if norm else "2.weight") if name in own]
        if len(linear) < 2 or not all(tensor.ndim == 2 for tensor in linear):
            continue
        hidden, dim = map(len, linear)
        head = SimCLRModel(encoder, hidden=hidden, dim=dim, norm=norm, temperature=1.0).head
        if not misfits(own, head, may_lack=MAY_LACK):
            head.load_state_dict(own, strict=False)
            description = f"{layout.label} projector, {hidden} to {dim}{' with BatchNorm' if norm else ''}"
            return Head(head, found, description, {"method": "simclr"})
    return None


def find_decoder(
    tensors: dict[str, Tensor], encoder: nn.Module, spec: EncoderSpec, settings: dict[str, Any]
) -> Head | None:
    """The decoder of an MAE in a file; None if there is none, or it is another network than ours.

    Its card gets a recipe of what is known, so that `reconstruct` works with it.

    Args:
        tensors: All that the file holds.
        encoder: Its encoder, a ViT.
        spec: The encoder's description.
        settings: What else the file says: `decoder_num_attention_heads` and `norm_pix_loss`, which no shape tells,
            are by default one for 32 channels and True, as published.
    """
    found = _only(DECODER, tensors)
    if found is None or not {"position", "pixels.bias"} <= found.tensors.keys():
        return None
    own = dict(found.tensors)
    position, dim = own.pop("position"), own["embed.weight"].shape[:1].numel()
    assumed = {"decoder_num_attention_heads": max(1, dim // 32), "norm_pix_loss": True}
    known = {name: settings[name] for name, value in assumed.items() if type(settings.get(name)) is type(value)}
    heads, norm_pix = (assumed | known).values()
    depth = sum(name.endswith(".norm1.weight") for name in own)
    if heads < 1 or dim % (4 * heads) or not depth:
        return None
    decoder = TransformerDecoder(
        width=feature_dim(encoder),
        grid=spec.image_size // spec.args["patch_size"],
        pixels=own["pixels.bias"].numel(),
        dim=dim,
        depth=depth,
        heads=heads,
    )
    if misfits(own, decoder):
        return None
    ours = cast(Tensor, decoder.position)
    if same_table(position, swap_halves(ours, -1)):
        own = _columns_last(own)
    elif not same_table(position, ours):
        return None
    decoder.load_state_dict(own)
    recipe = {
        "method": "mae",
        "encoder": spec.name,
        "image_size": spec.image_size,
        "channels": spec.channels,
        "patch_size": spec.args["patch_size"],
        "norm_pix": norm_pix,
        "decoder_dim": dim,
        "decoder_depth": depth,
        "decoder_heads": heads,
    }
    guesses = {
        "decoder_num_attention_heads": f"its {heads} attention heads",
        "norm_pix_loss": "that it predicts pixels normalised within their patch",
    }
    open_questions = [guess for name, guess in guesses.items() if name not in known]
    note = f"of the decoder, the file does not tell {' and '.join(open_questions)}: assumed" if open_questions else ""
    facts = {"method": "mae", "recipe": recipe}
    return Head(decoder, found, f"MAE's decoder, {dim} wide, {depth} blocks of {heads} heads", facts, note)


def same_table(first: Tensor, second: Tensor) -> bool:
    """Whether two tables are one but for rounding, to float16 too; sines and cosines are no larger than 1."""
    return first.shape == second.shape and bool(((first.float() - second).abs() < 1e-3).all())


def swap_halves(tensor: Tensor, axis: int) -> Tensor:
    """Exchange the first half of the channels along an axis with the second."""
    return tensor.roll(tensor.shape[axis] // 2, dims=axis)


def _columns_last(decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Exchange the halves of a decoder's channels in all that reads or writes them.

    MAE's own code encodes the column of a patch in the first half of the channels, and its row in the second; ours
    begins with the row. A transformer does not care how its channels are ordered, so it computes the same.
    """
    swapped = {}
    for name, tensor in decoder.items():
        axis = 1 if name.endswith(_READS) else -1 if name == "mask_token" else 0
        swapped[name] = tensor if name.endswith(_APART) else swap_halves(tensor, axis)
    return swapped


def _only(layout: Layout, tensors: dict[str, Tensor]) -> Found | None:
    prefixes = layout.prefixes(tensors)
    return layout.find(tensors, prefixes[0]) if len(prefixes) == 1 else None
