import copy
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data.config
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vision_ssl
from benchmarks.package_weights import sharded
from vision_ssl import hub, registry
from vision_ssl.encoders import EncoderSpec, resolve_encoder
from vision_ssl.errors import RecipeError, WeightsError
from vision_ssl.locate import ENCODER_FILE, INDEX_FILE, file_hash
from vision_ssl.recipes import recipe_from_dict
from vision_ssl.registry import Weights

VIT = resolve_encoder("vit_tiny", image_size=24, patch_size=8)
RESNET = resolve_encoder("resnet18", image_size=24, stem="7x7")
SMALL_STEM = resolve_encoder("resnet18", image_size=24, stem="3x3-nopool")
IMAGES = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CARD = {"method": "mae", "data": {"name": "größe"}, "scores": []}


def build(spec: EncoderSpec) -> nn.Module:
    torch.manual_seed(0)
    return spec.build().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a ViT, with a head; no test changes them."""
    path = tmp_path_factory.mktemp("weights") / "vit"
    hub.save(path, build(VIT), VIT, card=CARD, head=nn.Linear(2, 3))
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The same weights, to be damaged."""
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config))


def register(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> None:
    """Publish one folder of weights under some names, the newest last."""
    hashes = {path.name: file_hash(path) for path in folder.glob("*.safetensors*")}
    for name in names:
        (folder.parent / name).symlink_to(folder, target_is_directory=True)
    monkeypatch.setattr(registry, "PACKAGED", folder.parent)
    monkeypatch.setattr(registry, "UPSTREAM", ())
    monkeypatch.setattr(registry, "WEIGHTS", tuple(Weights(name, "made for a test", hashes) for name in names))


@pytest.mark.parametrize("spec", [VIT, RESNET, SMALL_STEM, replace(SMALL_STEM, channels=5)], ids=str)
def test_what_is_saved_comes_back(tmp_path: Path, spec: EncoderSpec) -> None:
    encoder = build(spec)
    hub.save(tmp_path, encoder, spec, card=CARD)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == encoder.state_dict().keys()  # no prefix, nothing else
    assert {tensor.dtype for tensor in stored.values()} <= {torch.float16, torch.int64}
    loaded = vision_ssl.load(tmp_path)
    for name, tensor in loaded.state_dict().items():
        expected = encoder.state_dict()[name]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected.half().float() if expected.is_floating_point() else expected), name
    assert not loaded.training
    assert loaded.num_features == (192 if spec.is_vit else 512)
    images = IMAGES if spec.channels == 3 else torch.rand(2, 5, 24, 24)
    features = loaded(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, encoder(images), atol=5e-3, rtol=5e-3)
    assert len(loaded.preprocess.mean) == spec.channels
    assert loaded.preprocess.size == 24
    assert vision_ssl.load(tmp_path / "model.safetensors")(images).equal(features)


def test_features_have_the_promised_shapes(folder: Path, tmp_path: Path) -> None:
    hub.save(tmp_path, build(RESNET), RESNET, card={})
    assert vision_ssl.load(tmp_path).forward_features(IMAGES).shape == (2, 512, 1, 1)
    vit = vision_ssl.load(folder)
    tokens = vit.forward_features(IMAGES)
    assert tokens.shape == (2, 1 + 9, 192)
    torch.testing.assert_close(vit(IMAGES), tokens[:, 1:].mean(dim=1))


def test_the_card_and_hashes_travel_along(folder: Path) -> None:
    files = {name: file_hash(folder / name) for name in ("model.safetensors", "head.safetensors")}
    assert vision_ssl.load(folder).card == CARD | {"sha256": files}
    assert hub.read_card(folder) == CARD | {"sha256": files}
    assert "größe" in (folder / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("spec", [VIT, RESNET, SMALL_STEM], ids=str)
def test_timm_loads_it_by_itself(tmp_path: Path, spec: EncoderSpec) -> None:
    hub.save(tmp_path, build(spec), spec, card=CARD)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    ours = vision_ssl.load(tmp_path)
    assert torch.equal(theirs(IMAGES), ours(IMAGES))
    classifier: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
    assert torch.equal(classifier.forward_features(IMAGES), ours.forward_features(IMAGES))
    data = timm.data.config.resolve_data_config(model=theirs)
    assert (list(data["input_size"]), data["interpolation"], data["crop_pct"]) == ([3, 24, 24], "bicubic", 1.0)
    assert (tuple(data["mean"]), tuple(data["std"])) == (ours.preprocess.mean, ours.preprocess.std)


def test_preprocess_takes_a_picture(folder: Path) -> None:
    encoder = vision_ssl.load(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    assert encoder.preprocess(picture).shape == (3, 24, 24)


@pytest.mark.parametrize("spec", [VIT, RESNET], ids=str)
def test_a_new_head(tmp_path: Path, spec: EncoderSpec) -> None:
    hub.save(tmp_path, build(spec), spec, card=CARD)
    model = vision_ssl.load(tmp_path, num_classes=7)
    assert model(IMAGES).shape == (2, 7)
    trained = vision_ssl.load(tmp_path).state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in trained.items())
    assert len(model.state_dict()) == len(trained) + 2


def test_the_bare_architecture(folder: Path) -> None:
    bare, trained = vision_ssl.load(folder, pretrained=False), vision_ssl.load(folder)
    assert bare.state_dict().keys() == trained.state_dict().keys()
    assert not torch.equal(bare.get_parameter("cls_token"), trained.get_parameter("cls_token"))
    assert (bare.preprocess, bare.training) == (trained.preprocess, False)


def test_another_image_size(folder: Path, tmp_path: Path) -> None:
    encoder = vision_ssl.load(folder, img_size=40)
    assert encoder.preprocess.size == 40
    assert encoder.forward_features(torch.zeros(1, 3, 40, 40)).shape == (1, 1 + 25, 192)
    embedding = vision_ssl.load(folder).get_parameter("pos_embed")
    grid = embedding[:, 1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(grid, size=(5, 5), mode="bicubic", antialias=True, align_corners=False)
    expected = torch.cat([embedding[:, :1], resized.flatten(2).mT], dim=1)
    torch.testing.assert_close(encoder.get_parameter("pos_embed"), expected, atol=1e-5, rtol=1e-4)
    hub.save(tmp_path, build(RESNET), RESNET, card={})
    resnet = vision_ssl.load(tmp_path, img_size=40)
    assert (resnet.preprocess.size, resnet(torch.zeros(1, 3, 40, 40)).shape) == (40, (1, 512))


@pytest.mark.parametrize("spec", [VIT, RESNET, SMALL_STEM], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels_are_adapted_as_timm_does(tmp_path: Path, spec: EncoderSpec, channels: int) -> None:
    hub.save(tmp_path, build(spec), spec, card=CARD)
    encoder = vision_ssl.load(tmp_path, in_chans=channels)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=channels).eval()
    images = torch.rand(2, channels, 24, 24)
    assert torch.equal(encoder(images), theirs(images))
    assert encoder.preprocess.mean == (0.5,) * channels


def test_only_weights_for_three_channels_are_adapted(tmp_path: Path) -> None:
    spec = replace(VIT, channels=5)
    hub.save(tmp_path, build(spec), spec, card=CARD)
    assert vision_ssl.load(tmp_path, in_chans=5)(torch.rand(1, 5, 24, 24)).shape == (1, 192)
    with pytest.raises(RecipeError, match="in_chans=3 does not fit weights for 5 channels: only those for 3 adapt"):
        vision_ssl.load(tmp_path, in_chans=3)


def test_other_pooling(folder: Path, tmp_path: Path) -> None:
    vit = vision_ssl.load(folder, global_pool="token")
    assert torch.equal(vit(IMAGES), vit.forward_features(IMAGES)[:, 0])
    hub.save(tmp_path, build(RESNET), RESNET, card={})
    maps = vision_ssl.load(tmp_path, global_pool="")(IMAGES)
    assert maps.shape == (2, 512, 1, 1)
    larger = torch.rand(2, 3, 64, 64)
    pooled = {pool: vision_ssl.load(tmp_path, global_pool=pool)(larger) for pool in ("avg", "max")}
    maps = vision_ssl.load(tmp_path, global_pool="")(larger)
    torch.testing.assert_close(pooled, {"avg": maps.mean(dim=(2, 3)), "max": maps.amax(dim=(2, 3))})
    with pytest.raises(RecipeError, match=r"^global_pool='' does not fit resnet18: expected 'avg', 'max'$"):
        vision_ssl.load(tmp_path, global_pool="", num_classes=3)
    with pytest.raises(
        RecipeError, match=r"^global_pool='max' does not fit vit_tiny_patch16_224: expected 'avg', 'tok"
    ):
        vision_ssl.load(folder, global_pool="max")


def test_precision_and_device(folder: Path) -> None:
    encoder = vision_ssl.load(folder, dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert encoder(IMAGES.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(RecipeError, match="device='nowhere' cannot be used here"):
        vision_ssl.load(folder, device="nowhere")
    parts: tuple[Any, ...] = ("encoder", "full")
    precisions: tuple[Any, ...] = ("bfloat16", torch.int8)
    for part in parts:
        for dtype in precisions:
            with pytest.raises(RecipeError, match=f"^dtype={dtype!r} is no precision of weights: expected one such as"):
                vision_ssl.load("mae_vit_tiny", part=part, dtype=dtype)


def test_a_file_of_any_name_beside_a_config(copied: Path) -> None:
    (copied / ENCODER_FILE).rename(copied / "best.safetensors")
    assert vision_ssl.load(copied / "best.safetensors")(IMAGES).isfinite().all()
    with pytest.raises(WeightsError, match=r"head\.safetensors does not fit VisionTransformer"):
        vision_ssl.load(copied / "head.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_chans": 0}, "in_chans=0 is too small: expected at least 1"),
        ({"img_size": 30}, "img_size=30 is not divisible by patch_size=8: the nearest valid is 32"),
        ({"img_size": 0}, "img_size=0 is too small"),
        ({"img_size": -8}, "img_size=-8 is too small"),
        ({"num_classes": -1}, "num_classes=-1 is too small"),
        ({"img_size": 64.0}, r"^img_size=64\.0 is not a count: expected a whole number$"),
        ({"num_classes": "10"}, "^num_classes='10' is not a count"),
        ({"num_classes": True}, "^num_classes=True is not a count"),
    ],
)
def test_sizes_that_cannot_be(folder: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        vision_ssl.load(folder, **settings)  # type: ignore[call-overload]  # mypy takes the values for every option


def test_preprocess_and_card_are_no_part_of_the_network(folder: Path) -> None:
    encoder = vision_ssl.load(folder)
    plain = build(VIT)
    assert encoder.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in encoder.named_modules()] == [name for name, _ in plain.named_modules()]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda encoder: pickle.loads(pickle.dumps(encoder))])
def test_an_encoder_can_be_copied(folder: Path, duplicate: Callable[[hub.Encoder], hub.Encoder]) -> None:
    encoder = vision_ssl.load(folder)
    twin = duplicate(encoder)
    assert (twin.preprocess, twin.card) == (encoder.preprocess, encoder.card)
    assert torch.equal(twin(IMAGES), encoder(IMAGES))
    with torch.no_grad():
        twin.get_parameter("cls_token").zero_()
    assert encoder.get_parameter("cls_token").any()


def test_what_float16_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    encoder = build(RESNET)
    hub.save(tmp_path / "weights", encoder, RESNET, card={}, head=nn.Linear(2, 2))
    before = {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()}
    head = nn.Linear(2, 2)
    with torch.no_grad():
        encoder.get_parameter("conv1.weight").zero_()
        head.weight.fill_(70_000)
    with pytest.raises(WeightsError, match=r"^weight has values up to 7e\+04, which float16 \(65,504 at most\)"):
        hub.save(tmp_path / "weights", encoder, RESNET, card={}, head=head)
    encoder.get_buffer("layer1.0.bn1.running_var").fill_(1e6)
    with pytest.raises(WeightsError, match=r"^layer1.0.bn1.running_var has values up to 1e\+06"):
        hub.save(tmp_path / "weights", encoder, RESNET, card={})
    encoder.get_buffer("layer1.0.bn1.running_var").fill_(float("nan"))
    with pytest.raises(WeightsError, match=r"^layer1.0.bn1.running_var has values up to nan"):
        hub.save(tmp_path / "weights", encoder, RESNET, card={})
    assert {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()} == before


def test_the_folder_of_a_run_is_accepted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").symlink_to(folder, target_is_directory=True)
    assert vision_ssl.load(str(tmp_path / "run"))(IMAGES).equal(vision_ssl.load(folder)(IMAGES))


def test_published_weights_load_by_name(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, copied, "mae_vit.old", "simclr_resnet.old", "mae_vit.new")
    assert vision_ssl.list_models() == ["mae_vit.old", "simclr_resnet.old", "mae_vit.new"]
    for name in ("mae_vit", "mae_vit.old", "mae_vit.new"):
        assert vision_ssl.load(name).card["method"] == "mae"
    newest = registry.find("mae_vit")
    assert newest is not None
    assert newest.name == "mae_vit.new"
    assert newest.config["vision_ssl"]["method"] == "mae"


def test_a_published_name_goes_before_a_folder_of_that_name(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, copied, "mae_vit.new")
    (tmp_path / "mae_vit").mkdir()
    monkeypatch.chdir(tmp_path)
    assert vision_ssl.load("mae_vit").card["method"] == "mae"


@pytest.mark.parametrize("file", ["model.safetensors", "head.safetensors"])
def test_other_bytes_than_the_published_are_refused(copied: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    register(monkeypatch, copied, "mae_vit.new")
    tensors = load_file(copied / file)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, copied / file)
    model = nn.ModuleDict({"encoder": build(VIT), "head": nn.Linear(2, 3)})
    with pytest.raises(WeightsError, match=rf"{file} has SHA-256 \w{{64}}, but the registry says \w{{64}}: it is"):
        hub.load_into(model, "mae_vit", head_required=True)
    if file == "model.safetensors":
        with pytest.raises(WeightsError, match="it is refused"):
            vision_ssl.load("mae_vit")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mae_vit_smal", "did you mean 'mae_vit_small'?"),
        ("mae_vit_small.tiny_imagnet_v3", "did you mean 'mae_vit_small.tiny_imagenet_v3'?"),
        ("dino", "the models are simclr_resnet18.tiny_imagenet_v2, mae_vit_small.tiny_imagenet_v3"),
    ],
)
def test_unknown_names(monkeypatch: pytest.MonkeyPatch, name: str, hint: str) -> None:
    names = ("simclr_resnet18.tiny_imagenet_v2", "mae_vit_small.tiny_imagenet_v3")
    monkeypatch.setattr(registry, "WEIGHTS", tuple(Weights(each, "", {}) for each in names))
    monkeypatch.setattr(registry, "UPSTREAM", ())
    with pytest.raises(WeightsError) as refusal:
        vision_ssl.load(name)
    assert str(refusal.value) == f"'{name}' is neither a known model nor a path: {hint}"


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is not a folder of weights: expected config.json and model.safetensors"):
        vision_ssl.load(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(WeightsError, match=r"notes.txt is not opened: expected a \.safetensors file beside its config"):
        vision_ssl.load(tmp_path / "notes.txt")


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_the_canary_sings(tmp_path: Path) -> None:
    torch.save(Canary(tmp_path / "canary"), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "canary").is_dir()


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.ckpt", "x.bin", "x.pkl", "x.pth.tar", "model.safetensors"])
def test_pickles_are_refused_and_never_executed(copied: Path, name: str) -> None:
    torch.save(Canary(copied / "canary"), copied / name)
    with pytest.raises(WeightsError) as refusal:
        vision_ssl.load(copied / name)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (copied / "canary").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.pth.tar", "x.torch", "x.safetensors"])
def test_who_has_another_file_learns_how_to_convert_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(
        WeightsError, match=rf"{name} is not opened: expected a \.safetensors .*`vision-ssl import` makes"
    ):
        vision_ssl.load(tmp_path / name)


def test_a_pickle_is_no_substitute_for_safetensors(copied: Path) -> None:
    torch.save(Canary(copied / "canary"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors is not there"):
        vision_ssl.load(copied)
    assert not (copied / "canary").exists()


def assert_refused(folder: Path, message: str) -> None:
    """One line, and not a part of timm was asked to build anything."""
    with pytest.raises(WeightsError, match=message) as refusal:
        vision_ssl.load(folder)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"5", b'"architecture"', b"\xff\xfe\x00", b"[" * 100_000, b'{"architecture": NaN}'],
    ids=lambda content: repr(content[:9]),
)
def test_damaged_configs(copied: Path, content: bytes) -> None:
    (copied / "config.json").write_bytes(content)
    assert_refused(copied, r"config\.json is not the description of an encoder: \w+: ")
    with pytest.raises(WeightsError):
        hub.read_card(copied)


def test_a_config_of_more_than_a_megabyte_is_not_read_to_its_end(copied: Path) -> None:
    edit(copied, lambda config: config["vision_ssl"].update(note="x" * (1 << 20)))
    assert_refused(copied, "is not the description of an encoder: JSONDecodeError: ")


@pytest.mark.parametrize("key", ["architecture", "pretrained_cfg"])
def test_configs_that_lack_something(copied: Path, key: str) -> None:
    edit(copied, lambda config: config.pop(key))
    assert_refused(copied, f"is not the description of an encoder: KeyError: '{key}'")


@pytest.mark.parametrize(
    "architecture",
    ["vit_giant_patch14_224", "resnet18d", "hf-hub:somebody/x", "local-dir:/tmp", "", None, 5, ["resnet18"], {}],
    ids=repr,
)
def test_only_our_architectures_are_built(copied: Path, monkeypatch: pytest.MonkeyPatch, architecture: object) -> None:
    monkeypatch.setattr(timm, "create_model", None)
    edit(copied, lambda config: config.update(architecture=architecture))
    assert_refused(copied, r"config\.json asks for .*: expected one of resnet18, resnet18_3x3, resnet18_3x3_nopool, ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"checkpoint_path": "evil.pth"}, r"has model_args \{.*'checkpoint_path': 'evil.pth'\}: expected \{"),
        ({"pretrained": True}, "has model_args"),
        ({"pretrained_cfg_overlay": {"file": "evil.pth"}}, "has model_args"),
        ({"in_chans": 4}, "has model_args"),
        ({"img_size": 48}, "has model_args"),
        ({"fc_norm": True}, "has model_args"),
        ({"global_pool": "token"}, "has model_args"),
        ({"patch_size": 0}, "has patch_size 0: expected a whole number above 0"),
        ({"patch_size": True}, "has patch_size True"),
        ({"patch_size": 8.0}, r"has patch_size 8\.0"),
        ({"patch_size": "8"}, "has patch_size '8'"),
        ({"patch_size": [8, 8]}, r"has patch_size \[8, 8\]"),
        ({"patch_size": 7}, "image_size=24 is not divisible by patch_size=7"),
    ],
    ids=str,
)
def test_only_our_arguments_reach_timm(
    copied: Path, monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(timm, "create_model", None)
    edit(copied, lambda config: config["model_args"].update(args))
    assert_refused(copied, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_args": None}, "is not the description of an encoder: TypeError"),
        ({"model_args": "abc"}, "is not the description of an encoder: ValueError"),
        ({"model_args": {}}, r"has model_args \{\}: expected \{"),
        ({"pretrained_cfg": STATISTICS | {"input_size": [3, 24]}}, "is not the description of an encoder: ValueError"),
        ({"pretrained_cfg": STATISTICS | {"input_size": 24}}, "is not the description of an encoder: TypeError"),
        ({"pretrained_cfg": STATISTICS | {"input_size": "123"}}, "has channels '1': expected a whole number"),
        ({"pretrained_cfg": STATISTICS | {"input_size": [3, -24, -24]}}, "has image size -24: expected a whole number"),
        (
            {"pretrained_cfg": STATISTICS | {"input_size": [3, 25, 25]}},
            "image_size=25 is not divisible by patch_size=8",
        ),
        ({"pretrained_cfg": STATISTICS | {"input_size": [1, 24, 24]}}, "has model_args"),
        ({"vision_ssl": [1]}, "is not the description of an encoder: TypeError"),
        ({"pretrained_cfg": {"input_size": [3, 24, 24]}}, "is not the description of an encoder: KeyError: 'mean'"),
        (
            {"pretrained_cfg": {"input_size": [3, 24, 24], "mean": [0.5] * 3, "std": [0.5] * 3}},
            r"has mean and std \(\(0.5, 0.5, 0.5\), \(0.5, 0.5, 0.5\)\): expected \(\(0.485",
        ),
    ],
    ids=str,
)
def test_configs_with_other_types(copied: Path, change: dict[str, Any], message: str) -> None:
    edit(copied, lambda config: config.update(change))
    assert_refused(copied, message)


@pytest.mark.parametrize(
    "change",
    [
        {"pretrained_cfg": STATISTICS | {"input_size": [10**9, 24, 24]}},
        {"pretrained_cfg": STATISTICS | {"input_size": [3, 10**9, 10**9]}},
        {"pretrained_cfg": STATISTICS | {"input_size": [3, 4096, 4096]}, "model_args": {"patch_size": 4096}},
        {"pretrained_cfg": STATISTICS | {"input_size": [3, 4096, 4096]}, "model_args": {"patch_size": 1}},
        {"pretrained_cfg": STATISTICS | {"input_size": [3, 10**9, 10**9]}, "architecture": "resnet18"},
    ],
    ids=str,
)
def test_sizes_that_would_fill_the_memory(
    copied: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(timm, "create_model", None)
    edit(copied, lambda config: config.update(change))
    assert_refused(
        copied, r"asks for \d+ channels of \d+ px, in patches of \w+: expected at most 16,384 px, and 131,072"
    )


@pytest.mark.parametrize("hashes", [[], "abc", {"model.safetensors": 5}, {"model.safetensors": "a\nb"}], ids=str)
def test_hashes_that_are_none(copied: Path, hashes: object) -> None:
    edit(copied, lambda config: config["vision_ssl"].update(sha256=hashes))
    assert_refused(copied, r"config\.json is not the description of an encoder: \w+: ")


def test_weights_of_timm_without_a_card(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="avg", fc_norm=False).eval()
    timm.models.save_for_hf(theirs, str(tmp_path), safe_serialization=True, model_args={})
    edit(tmp_path, lambda config: config["pretrained_cfg"].update(STATISTICS))
    edit(tmp_path, lambda config: config.pop("model_args"))
    ours = vision_ssl.load(tmp_path)
    assert ours.card == {}
    images = torch.rand(1, 3, 224, 224)
    assert torch.equal(ours(images), theirs(images))


def without_one(tensors: dict[str, Tensor]) -> None:
    del tensors["cls_token"]


def with_one_more(tensors: dict[str, Tensor]) -> None:
    tensors["module.a\nb"] = torch.zeros(2, 3)


def with_another_shape(tensors: dict[str, Tensor]) -> None:
    tensors["norm.bias"] = torch.zeros(7)


def prefixed(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_one, r"does not fit VisionTransformer: 'cls_token' is missing, expected \(1, 1, 192\)$"),
        (with_one_more, r"does not fit VisionTransformer: 'module.a\\nb' is \(2, 3\), expected nothing$"),
        (with_another_shape, r"does not fit VisionTransformer: 'norm.bias' is \(7,\), expected \(192,\)$"),
        (prefixed, r"'cls_token' is missing, expected \(1, 1, 192\), .* and 295 more$"),
    ],
)
def test_tensors_that_do_not_fit(copied: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    tensors = load_file(copied / "model.safetensors")
    change(tensors)
    save_file(tensors, copied / "model.safetensors")
    assert_refused(copied, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(copied: Path, value: float) -> None:
    tensors = load_file(copied / "model.safetensors")
    tensors["blocks.3.attn.qkv.weight"][5, 7] = value
    save_file(tensors, copied / "model.safetensors")
    assert_refused(copied, r"is damaged: blocks\.3\.attn\.qkv\.weight has values that are not finite$")


def test_a_missing_tensor_is_not_taken_for_a_new_head(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors["cls_token"]
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(WeightsError, match="'cls_token' is missing"):
        vision_ssl.load(copied, num_classes=3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:100],
        lambda content: b"",
        lambda content: b"\xff" * 8 + content[8:],  # a header of 2**64 bytes
        lambda content: content[:8] + b"[" + content[9:],
        lambda content: b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=["last byte", "truncated", "empty", "huge header", "header", "pointer"],
)
def test_damaged_tensors(copied: Path, damage: Callable[[bytes], bytes]) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(copied, r"model\.safetensors is damaged or not a safetensors file: ")


def test_heads(folder: Path, copied: Path) -> None:
    model = nn.ModuleDict({"encoder": build(VIT), "head": nn.Linear(2, 3)})
    hub.load_into(model, folder, head_required=True)
    head = load_file(folder / "head.safetensors")
    assert torch.equal(model.get_parameter("head.weight"), head["weight"].float())
    other = nn.ModuleDict({"encoder": build(VIT), "head": nn.Linear(2, 4)})
    hub.load_into(other, folder)  # it stays as it is
    with pytest.raises(WeightsError, match=r"head\.safetensors does not fit Linear: 'weight' is \(3, 2\), expected"):
        hub.load_into(other, folder, head_required=True)
    (copied / "head.safetensors").unlink()
    hub.load_into(model, copied)
    with pytest.raises(WeightsError, match=r"head\.safetensors is not there"):
        hub.load_into(model, copied, head_required=True)


@pytest.mark.parametrize("weights", registry.WEIGHTS, ids=lambda weights: weights.name)
class TestEveryPublishedModel:
    """What is true of every entry of the registry."""

    def test_its_files_are_the_published_ones(self, weights: Weights) -> None:
        tensors = {path.name: file_hash(path) for path in weights.directory.glob("*.safetensors*")}
        listed = weights.config["vision_ssl"]["sha256"]
        assert listed.keys() <= {"model.safetensors", "head.safetensors"}
        assert ("model.safetensors" in tensors) != (INDEX_FILE in tensors)
        assert weights.sha256 == tensors
        assert "model.safetensors" in listed  # the hash of the whole encoder, as `push` publishes it
        assert all(tensors.get(name, digest) == digest for name, digest in listed.items())
        assert {path.suffix for path in weights.directory.iterdir()} <= {".json", ".jsonl", ".safetensors"}

    def test_it_loads_without_a_network(self, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> None:
            raise OSError("no network in tests")

        monkeypatch.setattr("socket.socket.connect", refuse)
        bare = weights.name.partition(".")[0]
        encoder = vision_ssl.load(weights.name)
        assert registry.find(bare) is not None
        assert vision_ssl.load(bare).num_features == encoder.num_features
        channels, size = len(encoder.preprocess.mean), encoder.preprocess.size
        images = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))
        features = encoder(images)
        assert features.shape == (2, encoder.num_features)
        assert features.isfinite().all()
        assert features.std(dim=0).max() > 0  # two images, two answers
        tokens = encoder.forward_features(images)
        if tokens.ndim == 3:
            torch.testing.assert_close(features, tokens[:, 1:].mean(dim=1))
        else:
            torch.testing.assert_close(features, tokens.mean(dim=(2, 3)))
        if "model.safetensors" in weights.sha256:  # timm reads no encoder in several files; `push` makes one
            theirs = timm.create_model(f"local-dir:{weights.directory}", pretrained=True).eval()
            assert torch.equal(theirs(images), features)

    def test_its_card_holds_the_facts(self, weights: Weights) -> None:
        card = vision_ssl.load(weights.name).card
        recipe = recipe_from_dict(card["recipe"])
        assert recipe.method == card["method"] == weights.name.partition("_")[0]
        assert {"name", "images"} <= card["data"].keys()
        training = card["training"]
        assert training["minutes"] > 0
        assert training["epochs"] > 0
        assert all(training[fact] for fact in ("steps", "commit", "hardware", "torch", "vision_ssl"))
        assert card["scores"]
        for score in card["scores"]:
            assert score["protocol"]
            assert 0 <= score["accuracy"] <= 100
            assert 0 <= score["macro_f1"] <= 1
        assert weights.summary

    def test_its_head_goes_with_its_recipe(self, weights: Weights) -> None:
        model = recipe_from_dict(weights.config["vision_ssl"]["recipe"]).build()
        hub.load_into(model, weights.name, head_required="head.safetensors" in weights.sha256)


@pytest.mark.parametrize("weights", registry.UPSTREAM, ids=lambda weights: weights.name)
def test_weights_of_others_are_what_timm_publishes(weights: Weights) -> None:
    published = weights.repo.removeprefix("timm/")
    theirs = timm.get_pretrained_cfg(published)
    assert theirs is not None
    assert theirs.hf_hub_id == weights.repo
    assert weights.card["licence"].lower().startswith(f"{theirs.license}: ")
    assert re.fullmatch("[0-9a-f]{40}", weights.revision)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in weights.sha256.values())
    architecture = published.removesuffix(".mae")
    name, patch_size = architecture.partition("_patch")[0], int(architecture.partition("_patch")[2][:2])
    spec = resolve_encoder(name, image_size=theirs.input_size[1], patch_size=patch_size)
    with torch.device("meta"):
        ours, plain = spec.build(), timm.create_model(architecture, num_classes=0)
    assert spec.architecture == architecture
    assert weights.name == f"mae_{name}.in1k"
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }


def test_a_clone_keeps_what_is_too_big_for_the_package(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, copied, "mae_big.data")
    monkeypatch.setattr(registry, "CLONED", copied.parent)
    monkeypatch.setattr(registry, "PACKAGED", tmp_path / "package")
    assert vision_ssl.load("mae_big").card["method"] == "mae"
    monkeypatch.setattr(registry, "CLONED", tmp_path / "no clone")
    with pytest.raises(WeightsError, match=r"^mae_big\.data is too big for the package, and in clones alone"):
        vision_ssl.load("mae_big")
    others = (replace(registry.WEIGHTS[0], name="mae_big.others", repo="them/mae_big"),)
    monkeypatch.setattr("vision_ssl.locate.UPSTREAM", others)
    with pytest.raises(WeightsError, match=r"there, or mae_big\.others, which is downloaded$"):
        vision_ssl.load("mae_big")


class TestShards:
    """An encoder in several files, as clones keep one that is too large for a single file."""

    @pytest.fixture
    def divided(self, copied: Path) -> Path:
        whole = copied / "model.safetensors"
        assert len(sharded(whole, copied, whole.stat().st_size // 3)) > 3
        assert not whole.exists()
        return copied

    def test_they_are_the_encoder(self, divided: Path, folder: Path) -> None:
        whole, parts = (hub.load(place).state_dict() for place in (folder, divided))
        torch.testing.assert_close(parts, whole, rtol=0, atol=0)

    def test_a_whole_file_goes_first(self, divided: Path, folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", divided)
        (divided / INDEX_FILE).write_text("damaged")
        hub.load(divided)

    @pytest.mark.parametrize("name", ["model-00002-of-*", INDEX_FILE])
    def test_each_has_the_hash_of_the_registry(self, divided: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        register(monkeypatch, divided, "mae_parts.data")
        hub.load("mae_parts")
        (changed,) = divided.glob(name)
        content = bytearray(changed.read_bytes())
        content[-1] ^= 1
        changed.write_bytes(content)
        with pytest.raises(WeightsError, match=rf"{changed.name} has SHA-256 .*but the registry says"):
            hub.load("mae_parts")

    def test_none_may_be_missing(self, divided: Path) -> None:
        first = min(divided.glob("model-*"))
        first.unlink()
        with pytest.raises(WeightsError, match=rf"{first.name} is not there"):
            hub.load(divided)

    @pytest.mark.parametrize(
        "index",
        [
            "",
            "[1]",
            "{}",
            '{"weight_map": 1}',
            '{"weight_map": {"a": [1]}}',
            '{"weight_map": {"a": 1}}',
            '{"weight_map": {"a": "/etc/passwd"}}',
            '{"weight_map": {"a": "../model-00001-of-00002.safetensors"}}',
            '{"weight_map": {"a": "model.pkl"}}',
            "[" * 100_000,
        ],
        ids=lambda index: index[:60],
    )
    def test_an_index_that_is_none(self, divided: Path, index: str) -> None:
        (divided / INDEX_FILE).write_text(index)
        with pytest.raises(WeightsError, match=r"index\.json (is damaged|names the file)"):
            hub.load(divided)

    def test_an_index_that_does_not_hold(self, divided: Path) -> None:
        path = divided / INDEX_FILE
        index = json.loads(path.read_text())
        index["weight_map"].pop(min(index["weight_map"]))
        path.write_text(json.dumps(index))
        with pytest.raises(WeightsError, match=r"does not hold the tensors that model\.safetensors\.index\.json says"):
            hub.load(divided)


def test_the_package_goes_before_the_clone_and_both_before_the_hub(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, copied, "mae_vit.data")
    entry = replace(registry.WEIGHTS[0], repo="zoo/mae_vit", revision="0" * 40)
    monkeypatch.setattr(registry, "WEIGHTS", (entry,))
    places = {"PACKAGED": tmp_path / "package", "CLONED": tmp_path / "clone"}
    for variable, place in places.items():
        shutil.copytree(copied, place / "mae_vit.data")
        edit(place / "mae_vit.data", lambda config, variable=variable: config["vision_ssl"].update(place=variable))  # type: ignore[misc]  # a lambda has no annotations
        monkeypatch.setattr(registry, variable, place)
    for variable, place in places.items():
        assert vision_ssl.load("mae_vit").card["place"] == variable
        shutil.rmtree(place)
    with pytest.raises(
        WeightsError, match=r"^cannot load config\.json of zoo/mae_vit: it is not in the cache, and HF_HU"
    ):
        vision_ssl.load("mae_vit")


def test_names_of_published_models() -> None:
    assert len(set(vision_ssl.list_models())) == len(registry.WEIGHTS) + len(registry.UPSTREAM)
    for name in vision_ssl.list_models():
        bare, dot, tag = name.partition(".")
        assert bare.isidentifier()  # torch.hub calls it as a function
        assert dot
        assert tag.isidentifier()


def test_no_weights_are_packaged_unpublished() -> None:
    packaged = {path.name for path in registry.PACKAGED.iterdir()} if registry.PACKAGED.exists() else set()
    cloned = {path.name for path in registry.CLONED.iterdir()} if registry.CLONED.exists() else set()
    assert packaged | cloned == {weights.name for weights in registry.WEIGHTS}
    assert not packaged & cloned
