"""Weights from the Hub: the real `huggingface_hub`, in a process of its own, and a server on loopback."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load, save
from torch import nn

import vision_ssl
from tests.hub_server import TOKEN, Client, Fault, Files, HubServer
from vision_ssl import hub, registry
from vision_ssl.encoders import resolve_encoder
from vision_ssl.errors import WeightsError
from vision_ssl.registry import Weights

VIT = resolve_encoder("vit_tiny", image_size=24, patch_size=8)
ENCODER, HEAD, CONFIG = "model.safetensors", "head.safetensors", "config.json"
LOAD = "result = fingerprint(vision_ssl.load(name, cache_dir=cache))"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A folder of weights, as it is published."""
    return weights(tmp_path_factory.mktemp("weights"), seed=0)


def weights(folder: Path, seed: int) -> Files:
    torch.manual_seed(seed)
    hub.save(folder, VIT.build(), VIT, card={"method": "mae"}, head=nn.Linear(2, 3))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_hashes(files: Files) -> Files:
    config = json.loads(files[CONFIG])
    del config["vision_ssl"]["sha256"]
    return files | {CONFIG: json.dumps(config).encode()}


def fingerprint(files: Files) -> dict[str, str]:
    """What `fingerprint` in the client says of an encoder that holds these tensors."""
    tensors = load(files[ENCODER])
    return {name: sha256(tensor.float().numpy().tobytes()) for name, tensor in tensors.items()}


def sha256(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


def contents(folder: Path) -> list[bytes]:
    """Of all files that have their final name."""
    return [path.read_bytes() for path in folder.rglob("blobs/*") if not path.name.endswith(".refused")]


def test_a_repository_is_downloaded_once(server: HubServer, client: Client, files: Files, tmp_path: Path) -> None:
    server.publish("me/once", files)
    assert client.run(LOAD, name="hf:me/once", cache=tmp_path) == fingerprint(files)
    assert len(server.asked("GET /cdn/")) == 1  # the encoder alone
    server.requests.clear()
    assert client.run(LOAD, name="hf:me/once", cache=tmp_path) == fingerprint(files)
    assert server.asked("GET") == []
    assert server.asked("HEAD") == ["HEAD /me/once/resolve/main/config.json"]  # is there anything new?


@pytest.mark.parametrize(
    "offline", ["local_files_only=True", "cache_dir=cache"], ids=["local_files_only", "HF_HUB_OFFLINE"]
)
def test_without_a_network_the_cache_serves(
    server: HubServer, client: Client, files: Files, tmp_path: Path, offline: str
) -> None:
    server.publish("me/cached", files)
    client.run(LOAD, name="hf:me/cached", cache=tmp_path)
    server.requests.clear()
    client.offline("cache" in offline)
    try:
        code = f"result = fingerprint(vision_ssl.load(name, **dict(cache_dir=cache) | dict({offline})))"
        assert client.run(code, name="hf:me/cached", cache=tmp_path) == fingerprint(files)
        message = client.refusal(code, name="hf:me/cached", cache=tmp_path / "empty")
        assert client.run("result = vision_ssl.load('simclr_resnet18').num_features") == 512
    finally:
        client.offline(False)
    assert server.requests == []
    assert message == (
        "cannot load config.json of me/cached: it is not in the cache, and HF_HUB_OFFLINE or local_files_only forbids "
        "to ask the Hub"
    )


def test_a_revision_stays_what_it_is(server: HubServer, client: Client, files: Files, tmp_path: Path) -> None:
    newer = weights(tmp_path / "newer", seed=1)
    first = server.publish("me/versions", files)
    server.repositories["me/versions"].tags["v1"] = first
    server.publish("me/versions", newer)
    for revision, expected in {"": newer, "@main": newer, "@v1": files, f"@{first}": files}.items():
        name = f"hf:me/versions{revision}"
        assert client.run(LOAD, name=name, cache=tmp_path / "cache") == fingerprint(expected), name


def test_all_files_are_of_one_commit(server: HubServer, client: Client, files: Files, tmp_path: Path) -> None:
    server.publish("me/moving", files)
    located = "from vision_ssl.locate import locate\nlocated = locate('hf:me/moving', cache_dir=cache)"
    client.run(located, cache=tmp_path / "cache")
    server.publish("me/moving", weights(tmp_path / "newer", seed=1))
    assert client.run("result = hashlib.sha256(located.encoder()[0].read_bytes()).hexdigest()") == sha256(
        files[ENCODER]
    )


@pytest.mark.parametrize(
    "name",
    [
        "hf:",
        "hf:me",
        "hf:../x",
        "hf:/etc/passwd",
        "hf:me/a/b",
        "hf:me/..",
        "hf:a..b/c",
        "hf:a/b@../c",
        "hf:a/b@c/../d",
        "hf:a/b@/c",
        "hf:a/b@",
    ],
)
def test_what_is_no_reference(name: str) -> None:
    with pytest.raises(WeightsError, match=r"names no repository: expected hf:owner/repo or hf:owner/repo@revision$"):
        vision_ssl.load(name)


def test_a_registered_model_comes_from_its_commit(
    server: HubServer, client: Client, files: Files, tmp_path: Path
) -> None:
    commit = server.publish("zoo/registered", files)
    server.publish("zoo/registered", weights(tmp_path / "newer", seed=1))
    entry = Weights("mae_new.data", "", {ENCODER: sha256(files[ENCODER])}, repo="zoo/registered", revision=commit)
    client.run("from vision_ssl import registry\nkept = registry.WEIGHTS")
    client.run("registry.WEIGHTS = (registry.Weights(**entry),)", entry=vars(entry))
    try:
        assert client.run(LOAD, name="mae_new", cache=tmp_path / "cache") == fingerprint(files)
        server.requests.clear()
        assert client.run(LOAD, name="mae_new.data", cache=tmp_path / "cache") == fingerprint(files)
        assert server.requests == []  # a commit does not change: there is nothing to ask
        other = vars(replace(entry, sha256={ENCODER: "0" * 64}))
        client.run("registry.WEIGHTS = (registry.Weights(**entry),)", entry=other)
        message = client.refusal(LOAD, name="mae_new", cache=tmp_path / "cache")
        assert f"has SHA-256 {sha256(files[ENCODER])}, but the registry says {'0' * 64}: it is refused" in message
    finally:
        client.run(
            "import importlib\nimportlib.reload(registry)\nfrom vision_ssl import locate\nimportlib.reload(locate)"
        )


def test_weights_of_others_come_from_timms_repository(server: HubServer, client: Client, tmp_path: Path) -> None:
    name, repo = "vit_tiny_patch16_224", "timm/vit_tiny_patch16_224.mae"
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=0).eval()
    config = {  # in the form of those of the Hub
        "architecture": name,
        "num_classes": 0,
        "num_features": 192,
        "global_pool": "token",
        "pretrained_cfg": {
            "tag": "mae",
            "custom_load": False,
            "input_size": [3, 224, 224],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "crop_mode": "center",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "cc-by-nc-4.0",
        },
    }
    commit = server.publish(repo, {CONFIG: json.dumps(config).encode(), ENCODER: save(theirs.state_dict())})
    client.run("from vision_ssl import registry\nkept = registry.UPSTREAM, registry.WEIGHTS")
    # Ours would have the bare name.
    others = "registry.UPSTREAM, registry.WEIGHTS = (registry._mae('tiny', 16, commit, {}),), ()"
    client.run(others, commit=commit)
    images = torch.rand(1, 3, 224, 224)
    code = (
        "encoder = vision_ssl.load(name, global_pool='token', cache_dir=cache)\n"
        "result = encoder(torch.tensor(images)).tolist(), encoder.card"
    )
    for asked in ("mae_vit_tiny", "mae_vit_tiny.in1k", f"hf:{repo}"):
        features, card = client.run(code, name=asked, cache=tmp_path, images=images.tolist())
        torch.testing.assert_close(torch.tensor(features), theirs(images))
        assert card.get("licence") == (None if asked[:3] == "hf:" else "CC-BY-NC-4.0: not for commercial use")
    terms = f"not for commercial use; its hash is {registry.UPSTREAM[0].card['hash']}"
    assert client.output.splitlines().count(f"mae_vit_tiny.in1k: CC-BY-NC-4.0: {terms}") == 2  # not by `hf:`
    client.run("registry.UPSTREAM, registry.WEIGHTS = kept")


def test_pickled_code_is_never_asked_for(server: HubServer, client: Client, files: Files, tmp_path: Path) -> None:
    code = b"cposix\nsystem\n(S'touch " + str(tmp_path / "canary").encode() + b"'\ntR."
    pickles = {"pytorch_model.bin": code, "model.pt": code, "model.pkl": code}
    server.publish("me/pickles", pickles | {CONFIG: without_hashes(files)[CONFIG]})
    message = client.refusal(LOAD, name="hf:me/pickles", cache=tmp_path / "cache")
    assert message == "cannot load model.safetensors of me/pickles: the repository has no such file"
    server.publish("me/pickles", pickles | without_hashes(files) | {ENCODER: code})
    assert "is damaged or not a safetensors file" in client.refusal(
        LOAD, name="hf:me/pickles", cache=tmp_path / "cache"
    )
    assert [request for request in server.requests if "/pytorch_model" in request or "/model.p" in request] == []
    assert not (tmp_path / "canary").exists()


def test_a_hostile_config_costs_no_download(server: HubServer, client: Client, files: Files, tmp_path: Path) -> None:
    config = json.loads(files[CONFIG]) | {"architecture": "vit_giant_patch14_224"}
    server.publish("me/hostile", files | {CONFIG: json.dumps(config).encode()})
    message = client.refusal(LOAD, name="hf:me/hostile", cache=tmp_path)
    assert "config.json asks for 'vit_giant_patch14_224': expected one of resnet18, " in message
    assert server.asked("GET /cdn/") == []


@pytest.mark.parametrize("voucher", ["its card", "the Hub"])
def test_a_damaged_file_is_kept_aside_and_downloaded_anew(
    server: HubServer, client: Client, files: Files, tmp_path: Path, voucher: str
) -> None:
    repo = f"me/damaged-{voucher.split()[1].lower()}"
    server.publish(repo, files if voucher == "its card" else without_hashes(files))
    client.run(LOAD, name=f"hf:{repo}", cache=tmp_path)
    blob = next(tmp_path.rglob(f"blobs/{sha256(files[ENCODER])}"))
    damaged = bytearray(files[ENCODER])
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    message = client.refusal(LOAD, name=f"hf:{repo}", cache=tmp_path)
    assert f"has SHA-256 {sha256(damaged)}, but {voucher} says {sha256(files[ENCODER])}: it is refused" in message
    kept = blob.with_name(f"{blob.name}.refused")
    assert message.endswith(f"and kept as {kept}")
    assert kept.read_bytes() == damaged
    server.requests.clear()
    assert client.run(LOAD, name=f"hf:{repo}", cache=tmp_path) == fingerprint(files)
    assert len(server.asked("GET /cdn/")) == 1


def test_a_cut_download_is_resumed(server: HubServer, client: Client, files: Files, tmp_path: Path) -> None:
    server.publish("me/cut", files)
    third = len(files[ENCODER]) // 3
    server.faults += [Fault("GET /cdn/", cut=cut) for cut in (0, 1, third, 8, third)]
    client.run("from huggingface_hub import constants\nconstants.DOWNLOAD_CHUNK_SIZE = 1 << 16")  # else 10 MB
    try:
        assert client.run(LOAD, name="hf:me/cut", cache=tmp_path) == fingerprint(files)
    finally:
        client.run("constants.DOWNLOAD_CHUNK_SIZE = 10 << 20")
    starts = [int(request.partition("bytes=")[2].strip("-") or 0) for request in server.asked("GET /cdn/")]
    assert starts == [0, 0, 0, third >> 16 << 16, third >> 16 << 16, (third >> 16 << 16) * 2]
    assert files[ENCODER] in contents(tmp_path)


@pytest.mark.parametrize("cut", [0, 1_000])
def test_what_is_cut_for_good_leaves_nothing_behind(
    server: HubServer, client: Client, files: Files, tmp_path: Path, cut: int
) -> None:
    server.publish("me/lost", files)
    server.faults += [Fault("GET /cdn/", cut=cut), Fault("GET /cdn/", cut=0, times=100)]
    message = client.refusal(LOAD, name="hf:me/lost", cache=tmp_path)
    assert message.startswith("cannot load model.safetensors of me/lost: ")
    assert contents(tmp_path) == [files[CONFIG]]
    server.faults.clear()
    assert client.run(LOAD, name="hf:me/lost", cache=tmp_path) == fingerprint(files)


@pytest.mark.parametrize("request_line", ["HEAD /me/busy/resolve", "GET /cdn/"])
def test_a_busy_hub_is_given_the_time_that_it_asks_for(
    server: HubServer, client: Client, files: Files, tmp_path: Path, request_line: str
) -> None:
    server.publish("me/busy", files)
    server.faults.append(Fault(request_line, status=429, headers={"Retry-After": "41"}, times=3))
    found, waits = client.run(f"{LOAD}, list(sleeps)", name="hf:me/busy", cache=tmp_path)
    assert found == fingerprint(files)
    assert waits
    assert min(waits) > 41


def test_a_full_disk(server: HubServer, client: Client, files: Files, tmp_path: Path) -> None:
    server.publish("me/full", files)
    client.run("import resource\nlimits = resource.getrlimit(resource.RLIMIT_FSIZE)")
    client.run("resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))")  # no file may be larger
    try:
        message = client.refusal(LOAD, name="hf:me/full", cache=tmp_path)
    finally:
        client.run("resource.setrlimit(resource.RLIMIT_FSIZE, limits)")
    assert message == "cannot load model.safetensors of me/full: OSError: [Errno 27] File too large"
    assert contents(tmp_path) == [files[CONFIG]]
    assert client.run(LOAD, name="hf:me/full", cache=tmp_path) == fingerprint(files)


def test_two_processes_load_at_once(server: HubServer, client: Client, files: Files, tmp_path: Path) -> None:
    server.publish("me/both", files)
    code = """
        import json, sys
        from huggingface_hub import hf_hub_download
        children = []
        for number in range(2):
            if (child := os.fork()) == 0:
                try:
                    answer = fingerprint(vision_ssl.load(name, cache_dir=cache))
                    open(f"{cache}/{number}.json", "w").write(json.dumps(answer))
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        """
    lines = code.strip().split("\n")
    client.run(
        "\n".join(line[8:] if line.startswith(" ") else line for line in lines), name="hf:me/both", cache=tmp_path
    )
    for number in range(2):
        assert json.loads((tmp_path / f"{number}.json").read_text()) == fingerprint(files)
    assert sorted(contents(tmp_path)) == sorted([files[CONFIG], files[ENCODER]])


def test_a_link_out_of_the_cache_is_refused(server: HubServer, client: Client, files: Files, tmp_path: Path) -> None:
    server.publish("me/linked", files)
    cache = tmp_path / "cache"
    client.run(LOAD, name="hf:me/linked", cache=cache)
    (tmp_path / "elsewhere").write_bytes(files[ENCODER])
    link = next(cache.rglob(f"snapshots/*/{ENCODER}"))
    link.unlink()
    link.symlink_to(tmp_path / "elsewhere")
    message = client.refusal(LOAD, name="hf:me/linked", cache=cache)
    assert message == f"{link} is a link out of the cache: it is refused; delete it to download the file anew"


@pytest.mark.parametrize(
    ("name", "faults", "message"),
    [
        ("hf:me/none", [], "there is no such repository, or it is private: set HF_TOKEN, or log in by `hf auth login`"),
        ("hf:me/there@v9", [], "the repository has no such revision"),
        ("hf:me/bare", [], "the repository has no such file"),
        ("hf:me/there", [Fault("HEAD", 500, times=99)], "answered 500: try again later"),
        ("hf:me/there", [Fault("HEAD", 429, times=99)], "answered 429: try again later"),
        ("hf:me/there", [Fault("HEAD", 403, times=99)], "the Hub forbids it: set HF_TOKEN, or log in"),
        ("hf:me/there", [Fault("HEAD", 403, {"X-Error-Code": "GatedRepo"}, times=99)], "access on request, at http"),
        ("hf:me/there", [Fault("GET /cdn/", 500)], "answered 500: try again later"),
    ],
    ids=["repository", "revision", "file", "500", "429", "403", "gated", "500 of a file"],
)
def test_what_cannot_be_had_is_said_in_a_line(
    server: HubServer, client: Client, files: Files, tmp_path: Path, name: str, faults: list[Fault], message: str
) -> None:
    server.publish("me/there", files)
    server.publish("me/bare", {"README.md": b"nothing here"})
    server.faults += [replace(fault) for fault in faults]
    said = client.refusal(LOAD, name=name, cache=tmp_path)
    assert said.startswith("cannot load ")
    assert message in said


def test_a_hub_that_cannot_be_reached(server: HubServer, client: Client, tmp_path: Path) -> None:
    template = "constants.HUGGINGFACE_CO_URL_TEMPLATE"
    client.run(
        f"from huggingface_hub import constants\nkept = {template}\n{template} = kept.replace(url, nowhere)",
        url=server.url,
        nowhere="http://127.0.0.1:1",
    )
    try:
        message = client.refusal(LOAD, name="hf:me/any", cache=tmp_path)
    finally:
        client.run(f"{template} = kept")
    assert message == (
        f"cannot load config.json of me/any: it is not in the cache, and {server.url} cannot be reached: "
        "check the network, or HF_ENDPOINT"
    )


def test_a_private_repository_opens_to_its_token_which_is_never_seen(
    server: HubServer, client: Client, files: Files, tmp_path: Path
) -> None:
    server.publish("me/private", files, private=True)
    assert "set HF_TOKEN, or log in by `hf auth login`" in client.refusal(LOAD, name="hf:me/private", cache=tmp_path)
    client.run("os.environ['HF_TOKEN'] = token", token=TOKEN)
    try:
        assert client.run(LOAD, name="hf:me/private", cache=tmp_path) == fingerprint(files)
        server.faults.append(Fault("HEAD", 403, times=99))
        message = client.refusal(LOAD, name="hf:me/private", cache=tmp_path / "empty")
    finally:
        client.run("del os.environ['HF_TOKEN']")
    assert message.endswith("the Hub forbids it: the token of HF_TOKEN or `hf auth login` does not open it")
    assert server.leaks == []
    assert TOKEN not in client.output
    assert [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []
