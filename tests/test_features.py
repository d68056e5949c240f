from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from vision_ssl import features as module
from vision_ssl.data import ImageSet, Preprocess, open_images
from vision_ssl.errors import CheckpointError, DataError
from vision_ssl.features import Features, extract, pixel_features
from vision_ssl.storage import save_tensors

Module = TypeVar("Module", bound=nn.Module)

SIZE = 20  # pixels
PREPROCESS = Preprocess(SIZE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def attach(encoder: Module, preprocess: Preprocess | None) -> Module:
    encoder.preprocess = preprocess  # type: ignore[assignment]  # nn.Module says that attributes are tensors
    return encoder


def make_encoder(preprocess: Preprocess | None = PREPROCESS, pooled: bool = True) -> nn.Sequential:
    """An encoder whose features differ in training mode: it has a BatchNorm and a Dropout."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)]
    encoder = nn.Sequential(*layers, *([nn.Flatten()] if pooled else []))
    return attach(encoder, preprocess)


def make_images(n: int, size: int = SIZE, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def make_features(n: int = 6, *, labelled: bool = True, **changes: Any) -> Features:
    facts: dict[str, Any] = {
        "features": torch.arange(4 * n).view(n, 4) / 7,
        "labels": torch.arange(n) % 2 if labelled else None,
        "classes": ("chèvre", "yak") if labelled else (),
        "paths": tuple(f"farm/{i}.jpg" for i in range(n)),
        "digest": "d" * 64,
        "encoder": "resnet18",
        "preprocess": "at 20 px",
    }
    return Features(**(facts | changes))


def assert_same(a: Features, b: Features) -> None:
    assert torch.equal(a.features.view(torch.int32), b.features.view(torch.int32))  # bit for bit, NaN too
    assert (a.labels is None) == (b.labels is None)
    assert a.labels is None or b.labels is None or torch.equal(a.labels, b.labels)
    assert (a.classes, a.paths, a.digest, a.encoder) == (b.classes, b.paths, b.digest, b.encoder)
    assert a.preprocess == b.preprocess


@pytest.mark.parametrize(("size", "device", "at_a_time"), [(64, "cpu", 32), (224, "cpu", 8), (224, "cuda", 256)])
def test_images_at_a_time(size: int, device: str, at_a_time: int) -> None:
    preprocess = Preprocess(size, (0.5,), (0.25,))
    assert module.images_at_a_time(preprocess, torch.device(device)) == at_a_time


@pytest.mark.parametrize("batch_size", [1, 4, 10, 256])
@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_extract_keeps_every_image_in_order(batch_size: int, in_flight: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.IN_FLIGHT, "cpu", in_flight)
    encoder, images = make_encoder(), make_images(10)
    features = extract(encoder, images, batch_size=batch_size)
    expected = encoder.eval()(PREPROCESS.normalise(images)).detach()
    torch.testing.assert_close(features.features, expected)
    assert features.features.dtype == torch.float32
    assert features.digest == open_images(images, size=SIZE).digest


def test_an_encoder_may_return_the_same_memory_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.IN_FLIGHT, "cpu", 3)

    class Reusing(nn.Module):
        memory = torch.empty(2, 3)

        def forward(self, images: Tensor) -> Tensor:
            return torch.mean(images, dim=(2, 3), out=self.memory)

    images = make_images(10)
    features = extract(attach(Reusing(), PREPROCESS), images, batch_size=2).features
    torch.testing.assert_close(features, PREPROCESS.normalise(images).mean(dim=(2, 3)))


def test_extract_is_deterministic_whatever_the_mode() -> None:
    encoder, images = make_encoder(), make_images(10)
    first = extract(encoder.train(), images).features
    assert torch.equal(first, extract(encoder.train(), images).features)
    assert torch.equal(first, extract(encoder.eval(), images).features)


@pytest.mark.parametrize("training", [True, False])
def test_extract_leaves_the_encoder_as_it_was(training: bool) -> None:
    encoder = make_encoder().train(training)
    frozen = encoder[1].eval()  # a BatchNorm that stays in eval mode while the rest trains
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    extract(encoder, make_images(10))
    assert encoder.training is training
    assert encoder[2].training is training
    assert not frozen.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_extract_leaves_the_encoder_as_it_was_after_an_error() -> None:
    encoder = make_encoder(pooled=False).train()
    with pytest.raises(DataError):
        extract(encoder, make_images(2))
    assert encoder.training
    assert encoder[1].training


def test_extract_brings_the_encoder_back_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder()
    moves = []

    def to(device: torch.device) -> nn.Module:
        moves.append(str(device))
        return encoder

    monkeypatch.setattr(encoder, "to", to)
    extract(encoder, make_images(2), device="cpu:0")
    assert moves == ["cpu:0", "cpu"]


def test_features_can_be_trained_on() -> None:
    features = extract(make_encoder(), make_images(4)).features
    assert not features.requires_grad
    assert not features.is_inference()
    head = nn.Linear(6, 2)
    head(features).sum().backward()
    assert head.weight.grad is not None


@pytest.mark.filterwarnings("ignore")  # TorchScript's own
def test_extract_by_a_module_of_torchscript() -> None:
    encoder, images = make_encoder(), make_images(4)
    traced = torch.jit.trace(encoder.eval(), torch.rand(1, 3, 20, 20))
    object.__setattr__(traced, "preprocess", PREPROCESS)  # which it does not take as an attribute of its own
    torch.testing.assert_close(extract(traced, images).features, extract(encoder, images).features)


def test_extract_in_less_precision_when_asked() -> None:
    encoder, images = make_encoder(), make_images(4)
    exact = extract(encoder, images).features
    with torch.autocast("cpu", torch.bfloat16):
        rough = extract(encoder, images).features
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.02, rtol=0.05)


def test_extract_of_a_labelled_folder(photos: Path) -> None:
    (photos / "red" / "0.jpg").write_bytes(b"not a JPEG")
    with pytest.warns(UserWarning, match="skipped 1 of 24 images"):
        features = extract(make_encoder(), photos, require_labels=True)
    assert features.classes == ("blue", "green", "red")
    assert features.labels is not None
    assert features.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 7
    assert features.paths[-1] == str(Path("red") / "7.jpg")
    assert len(features) == len(features.paths) == 23


def test_extract_refuses_a_source_without_labels_only_where_they_are_required() -> None:
    assert extract(make_encoder(), make_images(3)).labels is None
    with pytest.raises(DataError, match="looked for labels"):
        extract(make_encoder(), make_images(3), require_labels=True)


def test_features_say_which_encoder_made_them() -> None:
    assert extract(make_encoder(), make_images(1)).encoder == "Sequential"
    encoder = attach(timm.create_model("test_resnet", num_classes=0), Preprocess(32, (0.5,) * 3, (0.25,) * 3))
    assert extract(encoder, make_images(1, 32)).encoder == "test_resnet"


@pytest.mark.parametrize(
    ("encoder", "images", "options", "message"),
    [
        (make_encoder(None), make_images(2), {}, "encoder: Sequential has no preprocess"),
        ("mae_vit_tiny", make_images(2), {}, "encoder: str has no preprocess"),
        (
            attach(nn.Bilinear(2, 2, 2), PREPROCESS),  # as a whole model does, it takes more than images
            make_images(2),
            {},
            r"encoder: Bilinear cannot be called with images alone \(missing a required argument: 'input2'\): expected",
        ),
        (
            make_encoder(pooled=False),
            make_images(2),
            {},
            r"encoder: returned torch.float32 \(2, 6, 1, 1\), expected pooled features \(2, D\)",
        ),
        (
            make_encoder(),
            make_images(2, channels=1),
            {},
            "source array: images have 1 channels, the encoder takes 3",
        ),
        (make_encoder(), make_images(2), {"batch_size": 0}, "batch_size=0: expected at least 1"),
    ],
)
def test_extract_refuses(encoder: nn.Module, images: Tensor, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        extract(encoder, images, **options)


def test_pixel_features(photos: Path) -> None:
    features = pixel_features(photos, size=8)
    images = open_images(photos, size=8)
    assert features.features.shape == (24, 3 * 8 * 8)
    assert torch.equal(features.features.view(24, 3, 8, 8), images.pixels / 255)
    assert (features.encoder, features.digest) == ("pixels 8 x 8", images.digest)
    assert features.classes == images.classes
    assert features.labels is not None
    assert images.labels is not None
    assert torch.equal(features.labels, images.labels)


def test_extract_and_pixels_take_the_split(tmp_path: Path, photos: Path) -> None:
    both = tmp_path / "both"
    both.mkdir()
    photos.rename(both / "train")
    for name in ("red", "green", "blue"):
        (both / "val" / name).mkdir(parents=True)
        (both / "train" / name / "0.jpg").rename(both / "val" / name / "0.jpg")
    assert len(pixel_features(both, size=8)) == 21
    assert len(pixel_features(both, size=8, split="val")) == 3
    assert len(extract(make_encoder(), both)) == 21
    assert len(extract(make_encoder(), both, split="val")) == 3


@pytest.mark.parametrize(
    ("indices", "index"),
    [
        ([3, 1], [3, 1]),
        (torch.tensor([5, 5]), [5, 5]),
        (np.array([0]), [0]),
        ([True, True, False, False, True, False], [0, 1, 4]),
        ([], []),
    ],
)
def test_select(indices: Any, index: list[int]) -> None:
    features = make_features()
    part = features.select(indices)
    assert torch.equal(part.features, features.features[index])
    assert part.labels is not None
    assert part.labels.tolist() == [i % 2 for i in index]
    assert part.paths == tuple(features.paths[i] for i in index)
    assert part.classes == features.classes
    assert part.digest != features.digest


def test_selected_features_are_those_of_the_selected_images() -> None:
    encoder = make_encoder()
    images = open_images(make_images(6), size=SIZE)
    assert_same(extract(encoder, images).select([4, 2]), extract(encoder, images.select([4, 2])))


def test_features_of_the_first_classes_are_those_of_their_images() -> None:
    encoder = make_encoder()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    images = replace(open_images(make_images(6), size=SIZE), labels=labels, classes=("wolf", "ant", "cat"))
    first = extract(encoder, images).first_classes(2)
    assert first.classes == ("ant", "cat")
    assert first.labels is not None
    assert first.labels.tolist() == [0, 1, 0, 1]
    assert_same(first, extract(encoder, images.first_classes(2)))


@settings(deadline=None, max_examples=25)
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=12), labelled=st.booleans())
def test_save_and_load(tmp_path_factory: pytest.TempPathFactory, values: list[float], labelled: bool) -> None:
    path = tmp_path_factory.mktemp("features") / "a.safetensors"
    saved = make_features(len(values), labelled=labelled, features=torch.tensor(values).view(-1, 1))
    saved.save(path)
    assert_same(Features.load(path), saved)


def test_save_and_load_of_features_that_are_a_view(tmp_path: Path) -> None:
    whole = torch.arange(48.0).view(6, 8)
    saved = make_features(features=whole[:, ::2])
    saved.save(tmp_path / "a.safetensors")
    assert_same(Features.load(tmp_path / "a.safetensors"), saved)


def test_load_of_a_missing_or_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"a\.safetensors is not there"):
        Features.load(path)
    make_features().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is damaged"):
        Features.load(path)


def test_load_of_another_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"conv.weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"model\.safetensors: .* found none of its 'features'"):
        Features.load(path)
    save_file({"features": torch.zeros(3, 2)}, path)
    with pytest.raises(DataError, match=r"model\.safetensors: .* found none of its 'classes'"):
        Features.load(path)


def test_load_checks_what_it_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    make_features().save(path)
    facts = {"classes": '["yak"]', "paths": '["1", "2"]', "digest": '"d"', "encoder": '"e"'}
    save_file({"features": torch.zeros(2, 2), "labels": torch.tensor([0, 1])}, path, metadata=facts)
    with pytest.raises(DataError, match=r"a\.safetensors: labels: got 0 to 1, expected 0 to 0"):
        Features.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.zeros(6)}, r"features: got torch.float32 \(6,\), expected torch.float32 \(n, D\)"),
        ({"features": torch.zeros(6, 2).half()}, r"features: got torch.float16 \(6, 2\)"),
        ({"paths": ("a",)}, "paths: got 1, expected one for each of 6 features"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels: got torch.int64 \(5,\), expected torch.int64 \(6,\)"),
        ({"labels": torch.zeros(6)}, r"labels: got torch.float32 \(6,\)"),
        ({"labels": torch.arange(6)}, "labels: got 0 to 5, expected 0 to 1"),
        ({"labels": torch.arange(6) - 5}, "labels: got -5 to 0, expected 0 to 1"),
        ({"classes": ("crane", "crane")}, "classes: 2 names of which some are equal"),
    ],
)
def test_features_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_features(**changes)


def test_extract_takes_an_image_set() -> None:
    images = ImageSet(make_images(3), torch.tensor([0, 1, 1]), ("a", "b"), ("x", "y", "z"), "mine", "e" * 64)
    features = extract(make_encoder(), images)
    assert (features.paths, features.digest, features.classes) == (("x", "y", "z"), "e" * 64, ("a", "b"))


@pytest.mark.parametrize(
    ("name", "preprocess"),
    [
        ("mean", Preprocess(SIZE, (123.7, 116.3, 103.5), (0.2, 0.2, 0.2))),
        ("std", Preprocess(SIZE, (0.5, 0.5, 0.5), (58.4, 57.1, 57.4))),
        ("std", Preprocess(SIZE, (0.5, 0.5, 0.5), (0.2, 0.0, 0.2))),
    ],
)
def test_a_preprocess_of_another_range_is_noticed(name: str, preprocess: Preprocess) -> None:
    with pytest.raises(DataError, match=rf"encoder: its preprocess has {name}=\(.*expected within 0\.\.1"):
        extract(make_encoder(preprocess), make_images(2))


def test_features_of_an_earlier_version(tmp_path: Path) -> None:
    features = make_features(preprocess="")
    path = tmp_path / "features.safetensors"
    facts = {name: getattr(features, name) for name in ("classes", "paths", "digest", "encoder")}
    save_tensors(path, {"features": features.features, "labels": cast(Tensor, features.labels)}, facts)
    assert_same(Features.load(path), features)
