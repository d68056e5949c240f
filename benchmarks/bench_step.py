"""One training step of each method, forward, backward and update, against the same built from lightly's parts.

    python -m benchmarks.bench_step

The peers are written as lightly's own examples are, with both views in one batch, which is their best. Ours computes
in what `precision="auto"` picks on this machine; the peers in bfloat16 and in float32.
"""

from collections.abc import Callable

import torch
from lightly.loss.ntx_ent_loss import NTXentLoss
from lightly.models import utils
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.timing import Comparison, Work, record
from vision_ssl import MAE, SimCLR
from vision_ssl.cpu import use_fast_kernels
from vision_ssl.device import native_bf16
from vision_ssl.mae import mask_unit_size
from vision_ssl.optim import build_optimizer

BATCH = 64
CPU = torch.device("cpu")


class LightlySimCLR(nn.Module):
    """lightly's projection head and loss on the encoder of our recipe."""

    def __init__(self, recipe: SimCLR) -> None:
        super().__init__()
        self.encoder = recipe.encoder_spec().build()
        self.head = SimCLRProjectionHead(512, 512, 128)
        self.loss = NTXentLoss(temperature=recipe.temperature)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Loss of two views (B, 3, S, S)."""
        loss: Tensor = self.loss(*self.head(self.encoder(torch.cat([first, second]))).chunk(2))
        return loss


class LightlyMAE(nn.Module):
    """lightly's masked encoder and decoder of the sizes of our recipe."""

    def __init__(self, recipe: MAE) -> None:
        super().__init__()
        self.size = mask_unit_size(recipe)
        self.patches = (recipe.image_size // self.size) ** 2
        vit = VisionTransformer(
            img_size=recipe.image_size, patch_size=self.size, embed_dim=384, depth=12, num_heads=6, num_classes=0
        )
        self.encoder = MaskedVisionTransformerTIMM(vit=vit)
        self.embed = nn.Linear(384, recipe.decoder_dim)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=self.patches,
            embed_dim=recipe.decoder_dim,
            depth=recipe.decoder_depth,
            num_heads=recipe.decoder_heads,
        )
        self.predict = nn.Linear(recipe.decoder_dim, 3 * self.size**2)
        self.ratio = recipe.mask_ratio

    def forward(self, images: Tensor) -> Tensor:
        """Loss of images (B, 3, S, S)."""
        shape = (len(images), 1 + self.patches)
        keep, masked = utils.random_token_mask(size=shape, mask_ratio=self.ratio, device=images.device)
        encoded = self.embed(self.encoder.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, shape).type_as(encoded)
        decoded = self.decoder(utils.set_at_index(tokens, keep, encoded))
        prediction = self.predict(utils.get_at_index(decoded, masked))
        target = utils.get_at_index(utils.patchify(images, self.size), masked - 1)
        return nn.functional.mse_loss(prediction.float(), target)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], *, bf16: bool) -> Work:
    """Forward, backward and an update."""

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def comparison(work: str, recipe: SimCLR | MAE, views: tuple[Tensor, ...], least: tuple[float, float]) -> Comparison:
    """A row for one recipe; `views` are the inputs of our model, of which images come first."""
    ours = recipe.build()
    bf16 = native_bf16(CPU)
    use_fast_kernels(ours, bf16=bf16)
    ours.to(memory_format=torch.channels_last)
    optimizer = build_optimizer("adamw", ours, lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999))

    def peer(*, bf16: bool) -> Work:
        if isinstance(recipe, SimCLR):
            model: nn.Module = LightlySimCLR(recipe)
            inputs = views
        else:
            model, inputs = LightlyMAE(recipe), views[:1]
        model.to(memory_format=torch.channels_last)
        return step(model, torch.optim.AdamW(model.parameters(), lr=1e-4), lambda: model(*inputs), bf16=bf16)

    return Comparison(
        f"{work}, batch {BATCH}, ours in {'bf16' if bf16 else 'fp32'}, {torch.get_num_threads()} threads",
        step(ours, optimizer, lambda: ours(*views)[0], bf16=bf16),
        {"lightly, bf16": peer(bf16=True), "lightly, fp32": peer(bf16=False)},
        dict(zip(("lightly, bf16", "lightly, fp32"), least, strict=True)),
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    mae = MAE(decoder_dim=512, decoder_depth=8, decoder_heads=16, norm_pix=False, batch_size=BATCH)
    simclr = SimCLR(image_size=32, batch_size=BATCH)
    record(
        "step",
        [
            comparison(
                "MAE ViT-S/8 at 64 px, decoder 512 x 8",
                mae,
                (torch.randn(BATCH, 3, 64, 64), torch.rand(BATCH, 64)),
                (1.7, 3.2),
            ),
            comparison(
                "SimCLR ResNet-18 at 32 px",
                simclr,
                (torch.randn(BATCH, 3, 32, 32), torch.randn(BATCH, 3, 32, 32)),
                (1.25, 2.7),
            ),
        ],
    )
