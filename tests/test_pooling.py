from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from vision_ssl import hub
from vision_ssl.data import ImageSet
from vision_ssl.encoders import resolve_encoder
from vision_ssl.errors import DataError, RecipeError
from vision_ssl.features import extract
from vision_ssl.logistic import choose_l2
from vision_ssl.pooling import candidates, choose_pooling, pool
from vision_ssl.probe import evaluate

SIZE = 16


def encoder(name: str = "vit_tiny") -> hub.Encoder:
    torch.manual_seed(0)
    spec = resolve_encoder(name, image_size=SIZE, patch_size=4 if name == "vit_tiny" else None)
    return hub.attach(spec.build(), SIZE, 3, card={}).eval()


def images(seed: int, n: int = 40) -> ImageSet:
    """Noise with a channel that stands out: the class."""
    labels = torch.arange(n) % 3
    pixels = torch.randint(200, (n, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    pixels[torch.arange(n), labels] += 20
    names = ("class 0", "class 1", "class 2")
    return ImageSet(pixels.byte(), labels, names, tuple(map(str, range(n))), f"noise {seed}", str(seed) * 64)


def layer_by_layer(vit: Any, x: Tensor) -> list[Tensor]:
    """Tokens (B, 1 + N, D) after each block and the final norm, as a ViT is written."""
    tokens, states = vit.patch_drop(vit._pos_embed(vit.patch_embed(x))), []
    for block in vit.blocks:
        tokens = block(tokens)
        states.append(vit.norm(tokens))
    return states


@pytest.mark.parametrize("layers", [1, 3])
def test_pooling_is_what_its_name_says(layers: int) -> None:
    vit, x = encoder(), torch.randn(5, 3, SIZE, SIZE)
    with torch.inference_mode():
        last = torch.stack(layer_by_layer(vit, x)[-layers:]).mean(dim=0)
        token, patches = last[:, 0], last[:, 1:].mean(dim=1)
        assert not torch.allclose(token, patches, atol=0.1)
        for pooling, expected in (("avg", patches), ("token", token), ("both", torch.cat([token, patches], dim=1))):
            torch.testing.assert_close(pool(vit, x, cast(Any, pooling), layers), expected, atol=1e-5, rtol=1e-5)


def test_one_pass_makes_all_that_can_be_chosen() -> None:
    vit, x = encoder(), torch.randn(5, 3, SIZE, SIZE)
    with torch.inference_mode():
        expected = torch.cat([pool(vit, x, "both", 1), pool(vit, x, "both", 4)], dim=1)
        torch.testing.assert_close(candidates(vit, x), expected)


@pytest.mark.parametrize("where", range(4))  # with noise in the other three
def test_the_choice_has_the_lowest_loss_on_held_out_images(where: int) -> None:
    """The only informative quarter is found: token or mean of the patches, of the last layer or of the last four."""
    labels = torch.arange(150) % 3
    features = torch.randn(150, 4 * 40, generator=torch.Generator().manual_seed(where))
    features[torch.arange(150), 40 * where + labels] += 2
    choice = choose_pooling(features, labels, 3, seed=2)
    assert (choice.pooling, choice.layers) == [("token", 1), ("avg", 1), ("token", 4), ("avg", 4)][where]
    assert choice.columns == slice(40 * where, 40 * where + 40)
    assert list(choice.losses) == ["avg of 1", "token of 1", "both of 1", "avg of 4", "token of 4", "both of 4"]
    for name, columns in (("avg of 1", slice(40, 80)), ("both of 4", slice(80, 160))):
        assert choice.losses[name] == choose_l2(features[:, columns], labels, 3, seed=2)["selection_loss"]


def test_extract_notes_how_it_pooled() -> None:
    vit, source = encoder(), images(1)
    plain, both = extract(vit, source), extract(vit, source, pooling="both", layers=2)
    assert (plain.features.shape, both.features.shape) == ((40, 192), (40, 384))
    assert plain.preprocess.startswith("Preprocess(size=16, mean=(0.485, 0.456, 0.406), std=(")
    assert plain.preprocess.endswith("; avg of 1")
    assert both.preprocess.endswith("; both of 2")
    with pytest.raises(DataError, match=r"val: preprocess of the features is .*both of 2', expected .*avg of 1' as in"):
        evaluate(vit, train=plain, val=extract(vit, images(2), pooling="both", layers=2))


@pytest.mark.parametrize("classes", [None, 2])
def test_evaluate_measures_what_it_chose(classes: int | None) -> None:
    vit = encoder()
    chosen = evaluate(vit, train=images(1), val=images(2), pooling="choose", classes=classes, seed=3)
    pooling, layers = chosen.settings["pooling"], chosen.settings["layers"]
    losses = chosen.settings["pooling_losses"]
    assert min(losses, key=losses.get) == f"{pooling} of {layers}"
    assert chosen.settings["selection_loss"] == losses[f"{pooling} of {layers}"]
    given = evaluate(vit, train=images(1), val=images(2), pooling=pooling, layers=layers, classes=classes, seed=3)
    assert (chosen.predictions == given.predictions).all()
    assert chosen.train_digest == given.train_digest


def test_validation_images_choose_nothing() -> None:
    vit = encoder()
    a, b = (evaluate(vit, train=images(1), val=images(seed), pooling="choose") for seed in (2, 3))
    assert a.settings == b.settings


def test_what_is_refused() -> None:
    source = images(1)
    vit, resnet = encoder(), encoder("resnet18")
    assert extract(resnet, source).features.shape == (40, 512)
    refused: list[tuple[nn.Module, str, int, str]] = [
        (resnet, "token", 1, "pooling='token', layers=1: expected avg of 1, since .*ResNet has no class token"),
        (resnet, "avg", 2, "pooling='avg', layers=2: expected avg of 1, since .*ResNet has no class token"),
        (vit, "max", 1, "pooling='max': expected one of avg, token, both"),
        (vit, "avg", 0, "layers=0: expected 1 to 12, the blocks of the encoder"),
        (vit, "both", 13, "layers=13: expected 1 to 12"),
    ]
    for module, pooling, layers, message in refused:
        with pytest.raises(RecipeError, match=message):
            extract(module, source, pooling=cast(Any, pooling), layers=layers)
    with pytest.raises(RecipeError, match="has no class token"):
        evaluate(resnet, train=source, val=images(2), pooling="choose")
    with pytest.raises(DataError, match="pooling='choose': expected images as train and as val"):
        evaluate(vit, train=source, protocol="knn", pooling="choose")
    features = extract(vit, source)
    with pytest.raises(DataError, match=r"train: features, which are pooled already: .* for pooling='choose'"):
        evaluate(vit, train=features, val=images(2), pooling="choose")
    with pytest.raises(DataError, match=r"val: features, which are pooled already: .* for pooling='token'"):
        evaluate(vit, train=images(2), val=features, pooling="token")


@pytest.mark.filterwarnings("ignore:linear-sgd-simclr")  # few images
@pytest.mark.parametrize("name", ["vit_tiny", "resnet18"])
def test_an_encoder_in_bfloat16_takes_images_as_any_other(name: str) -> None:
    train, val = images(1, 20), images(2, 20)
    exact, rough = encoder(name), encoder(name).bfloat16()
    features = extract(rough, train).features
    assert features.dtype == torch.float32
    assert torch.cosine_similarity(features, extract(exact, train).features).min() > 0.999
    ways: list[dict[str, Any]] = [{"protocol": "linear-sgd-simclr"}, {"protocol": "attentive"}]
    if name == "vit_tiny":
        ways += [{"pooling": "both", "layers": 2}, {"pooling": "choose"}]
    for way in ways:
        found, expected = (evaluate(encoder, train=train, val=val, **way) for encoder in (rough, exact))
        assert (found.predictions == expected.predictions).mean() >= 0.9  # of 20 images, 2 at a boundary
