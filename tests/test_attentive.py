from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssl import attentive as module
from vision_ssl import hub
from vision_ssl.attentive import AttentionPool, Attentive, attentive
from vision_ssl.data import ImageSet, Preprocess
from vision_ssl.encoders import resolve_encoder
from vision_ssl.errors import DataError
from vision_ssl.features import Features
from vision_ssl.logistic import hold_out
from vision_ssl.optim import schedule_factor
from vision_ssl.probe import evaluate

SIZE = 16
CPU = torch.device("cpu")
QUICK = Attentive(lrs=(1e-4, 1e-3, 1e-2), epochs=2, batch_size=20)


class Patches(nn.Module):
    """An encoder whose tokens are a class token, and of 16 patches the mean colours beside five ones."""

    num_prefix_tokens = 1

    def __init__(self, as_map: bool = False) -> None:
        super().__init__()
        self.as_map = as_map
        self.preprocess: Any = Preprocess(SIZE, (0.5,) * 3, (0.25,) * 3)

    def forward_features(self, x: Tensor) -> Tensor:
        patches = F.pad(F.avg_pool2d(x, 4), (0, 0, 0, 0, 0, 5), value=1.0)
        return patches if self.as_map else F.pad(patches.flatten(2).mT, (0, 0, 1, 0), value=99.0)


def images(seed: int, n: int = 60) -> ImageSet:
    """Noise, and at a random place a spot whose colour is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = torch.randint(256, (n, 3, SIZE, SIZE), generator=generator)
    for index, (row, column) in enumerate(4 * torch.randint(4, (n, 2), generator=generator)):
        pixels[index, :, row : row + 4, column : column + 4] = 255 * F.one_hot(labels[index], 3)[:, None, None]
    names = ("class 0", "class 1", "class 2")
    return ImageSet(pixels.byte(), labels, names, tuple(map(str, range(n))), f"noise {seed}", str(seed) * 64)


TRAIN, VAL = images(1), images(2)


def tokens_of(source: ImageSet) -> Tensor:
    colours = F.avg_pool2d((source.pixels.float() / 255 - 0.5) / 0.25, 4).flatten(2).mT
    return F.pad(colours, (0, 5), value=1.0)


def pool() -> module._Tokens:
    return module._Tokens(Patches(), Patches().preprocess, CPU)


@pytest.mark.parametrize("dim", [6, 128])
def test_attention_by_its_definition(dim: int) -> None:
    """Softmax of the scaled products of query and keys, head by head, weighs the values."""
    torch.manual_seed(0)
    probe, tokens = AttentionPool(dim, 4), torch.randn(5, 7, dim)
    attention, heads = probe.attention, 2 if dim == 128 else 1
    normed = probe.norm(tokens)
    assert attention.num_heads == heads
    q, k, v = (
        (x @ weight.T).unflatten(-1, (heads, -1))
        for x, weight in zip((probe.query, normed, normed), attention.in_proj_weight.chunk(3), strict=True)
    )
    weights = (torch.einsum("hd,bnhd->bhn", q, k) / (dim / heads) ** 0.5).softmax(dim=2)
    gathered = torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1)
    torch.testing.assert_close(probe(tokens), probe.head(attention.out_proj(gathered)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("as_map", [False, True])
def test_tokens_are_patches_and_places_without_the_class_token(as_map: bool) -> None:
    found = module._Tokens(Patches(as_map), Patches().preprocess, CPU)(TRAIN.pixels)
    torch.testing.assert_close(found, tokens_of(TRAIN))
    assert not found.requires_grad


def test_learning_rates_do_not_meet_and_steps_are_those_of_adamw() -> None:
    together = module._train(pool(), TRAIN, QUICK, 5)
    for lr, found in zip(QUICK.lrs, together, strict=True):
        with torch.random.fork_rng([]):
            torch.manual_seed(5)
            alone = AttentionPool(8, 3)
        optimizer = torch.optim.AdamW(alone.parameters(), lr=lr, weight_decay=0.01)
        generator = torch.Generator().manual_seed(5)
        step = 0
        for _ in range(2):
            for rows in torch.randperm(60, generator=generator).split(20):
                factor = schedule_factor(step, steps=6, warmup_steps=0, warmup="linear", schedule="cosine")
                optimizer.param_groups[0]["lr"] = lr * factor
                optimizer.zero_grad()
                F.cross_entropy(alone(tokens_of(TRAIN)[rows]), cast(Tensor, TRAIN.labels)[rows]).backward()
                optimizer.step()
                step += 1
        for ours, expected in zip(found.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_the_learning_rate_is_the_most_accurate_on_held_out_images(monkeypatch: pytest.MonkeyPatch) -> None:
    source, how = images(1, 250), replace(QUICK, epochs=5, lrs=(1e-4, 3e-2, 100.0))
    held = hold_out(cast(Tensor, source.labels), torch.Generator().manual_seed(4))
    asked: list[tuple[int, tuple[float, ...]]] = []
    train = module._train

    def watch(tokens: Any, given: ImageSet, how: Attentive, seed: int) -> list[AttentionPool]:
        asked.append((len(given), how.lrs))
        return train(tokens, given, how, seed)

    monkeypatch.setattr(module, "_train", watch)
    report = attentive(Patches(), train=source, val=VAL, how=how, seed=4)
    fitted = train(pool(), source.select(~held), how, 4)
    hits = [module._accuracy(probe, pool(), source.select(held)) for probe in fitted]
    assert hits[1] == report.settings["selection_accuracy"] > max(hits[0], hits[2])
    assert (report.settings["lr"], report.settings["lr_at_grid_edge"]) == (3e-2, False)
    assert (report.settings["selection_fitted_on"], report.settings["selection_scored_on"]) == (199, 51)
    assert asked == [(199, how.lrs), (250, (3e-2,))]


def test_it_learns() -> None:
    train, val = images(1, 300), images(2, 150)
    report = attentive(Patches(), train=train, val=val, how=replace(QUICK, epochs=8), seed=3)
    assert report.accuracy > 90
    assert report.train_accuracy is not None
    assert report.train_accuracy > 90
    assert (report.protocol, report.n_train, report.n_val, report.seed) == ("attentive", 300, 150, 3)
    assert (report.train_digest, report.val_digest) == (train.digest, val.digest)


def test_the_seed_decides_everything_and_validation_labels_nothing() -> None:
    first, again = (attentive(Patches(), train=TRAIN, val=VAL, how=QUICK, seed=1) for _ in range(2))
    assert (first.predictions == again.predictions).all()
    shuffled = replace(VAL, labels=cast(Tensor, VAL.labels).roll(1))
    other = attentive(Patches(), train=TRAIN, val=shuffled, how=QUICK, seed=1)
    assert (first.predictions == other.predictions).all()
    assert first.settings == other.settings


@pytest.mark.parametrize(("name", "patch_size"), [("vit_tiny", 8), ("resnet18", None)])
def test_encoders_stay_as_they_were(name: str, patch_size: int | None) -> None:
    torch.manual_seed(0)
    spec = resolve_encoder(name, image_size=SIZE, patch_size=patch_size)
    encoder = hub.attach(spec.build(), SIZE, 3, card={}).train()
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    report = attentive(encoder, train=TRAIN, val=VAL, how=replace(QUICK, epochs=1))
    assert (report.n_train, report.n_val) == (len(TRAIN), len(VAL))
    assert encoder.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())


def test_evaluate_knows_it_and_wants_images() -> None:
    report = evaluate(Patches(), train=TRAIN, val=VAL, protocol="attentive", seed=2)
    assert (report.protocol, report.seed, report.settings["epochs"]) == ("attentive", 2, 10)
    features = Features(torch.randn(60, 3), TRAIN.labels, TRAIN.classes, TRAIN.paths, "x")
    for sources in ({"train": features, "val": VAL}, {"train": TRAIN}):
        with pytest.raises(DataError, match="protocol='attentive': expected images as train and as val"):
            evaluate(Patches(), protocol="attentive", **cast(Any, sources))
    with pytest.raises(DataError, match="val: holds the same images as train"):
        attentive(Patches(), train=TRAIN, val=TRAIN)
