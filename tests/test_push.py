"""From a run to the Hub and back: the real `huggingface_hub`, in a process of its own, and a server on loopback."""

import json
import re
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from benchmarks.package_weights import sharded
from tests.hub_server import TOKEN, Client, Fault, HubServer
from vision_ssl import cli, hub, registry
from vision_ssl.card import describe_origin, model_card, origin_of
from vision_ssl.errors import MissingExtraError, WeightsError
from vision_ssl.extra.push import push
from vision_ssl.locate import file_hash
from vision_ssl.pretrain import Run
from vision_ssl.recipes import MAE, Recipe, SimCLR, recipe_from_dict
from vision_ssl.report import Report
from vision_ssl.storage import load_tensors

PIXELS = torch.randint(0, 256, (16, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"image_size": 24, "batch_size": 8, "epochs": 1}
MAE_RECIPE = MAE(encoder="vit_tiny", patch_size=8, decoder_dim=16, decoder_depth=1, decoder_heads=2, **SMALL)
SIMCLR_RECIPE = SimCLR(encoder="resnet18", **SMALL)  # of the stem that plain timm does not know
FILES = ["README.md", "config.json", "curves.png", "head.safetensors", "model.safetensors"]
PUSH = "from pathlib import Path\nfrom vision_ssl.pretrain import Run\nresult = Run(Path(run)).push(repo)"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Two steps of each method; no test changes them."""
    recipes: tuple[Recipe, ...] = (MAE_RECIPE, SIMCLR_RECIPE)
    return {
        recipe.method: recipe.train(
            PIXELS, out=tmp_path_factory.mktemp("runs") / recipe.method, device="cpu", precision="fp32"
        )
        for recipe in recipes
    }


@pytest.fixture(scope="module")
def run(runs: dict[str, Run]) -> Run:
    return runs["mae"]


@pytest.fixture
def author(client: Client) -> Iterator[Client]:
    """Whoever may write."""
    client.run("os.environ['HF_TOKEN'] = token", token=TOKEN)
    yield client
    client.run("del os.environ['HF_TOKEN']")


def latest(server: HubServer, repo: str) -> dict[str, bytes]:
    repository = server.repositories[repo]
    return {name: data for name, data in repository.commits[repository.refs["main"]].items() if name[0] != "."}


@pytest.mark.parametrize("recipe", [MAE_RECIPE, SIMCLR_RECIPE], ids=["mae", "simclr"])
def test_what_is_trained_and_pushed_comes_back(
    server: HubServer, author: Client, tmp_path: Path, runs: dict[str, Run], recipe: Recipe
) -> None:
    run, repo = runs[recipe.method], f"me/{recipe.method}"
    url = author.run(PUSH, run=run.directory, repo=repo)
    assert url == f"{server.url}/{repo}/commit/{server.repositories[repo].refs['main']}"
    assert len(server.repositories[repo].commits) == 2  # the Hub's own first one, and ours
    pushed = latest(server, repo)
    assert sorted(pushed) == FILES
    for name in ("model.safetensors", "head.safetensors", "config.json"):
        assert pushed[name] == (run.directory / "weights" / name).read_bytes()

    exported, expected = load(pushed["model.safetensors"]), hub.load(run.directory / "weights").state_dict()
    code = "encoder = vision_ssl.load(name, cache_dir=cache)\nresult = fingerprint(encoder)"
    back = author.run(code, name=f"hf:{repo}", cache=tmp_path / "cache")
    assert back.keys() == exported.keys() == expected.keys()
    same = author.run("result = fingerprint(vision_ssl.load(name))", name=run.directory / "weights")
    assert back == same
    # The encoder as it was trained, in float32.
    model: Any = recipe.build()
    states = load_tensors(run.directory / "checkpoint.safetensors")[0]
    model.load_state_dict({name[6:]: tensor for name, tensor in states.items() if name.startswith("model.")})
    images = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    features = torch.tensor(author.run("result = encoder(torch.tensor(images)).tolist()", images=images.tolist()))
    assert torch.cosine_similarity(features, model.encoder.eval()(images)).min() > 0.9999

    whole = "result = fingerprint(vision_ssl.load(name, part='full', cache_dir=cache))"
    assert author.run(whole, name=f"hf:{repo}", cache=tmp_path / "cache") == author.run(
        whole, name=run.directory / "weights", cache=None
    )
    check_card(pushed["README.md"].decode(), author, back, recipe)

    timms = "result = timm.create_model(name, pretrained=True, cache_dir=cache).eval()(torch.tensor(images)).tolist()"
    there = author.run(timms, name=f"hf-hub:{repo}", cache=tmp_path / "timm", images=images.tolist())
    here = author.run(timms, name=f"local-dir:{run.directory / 'weights'}", cache=None, images=images.tolist())
    assert there == here == features.tolist()


def test_an_encoder_in_several_files_is_pushed_as_one(
    server: HubServer, author: Client, tmp_path: Path, run: Run
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(run.directory / "weights", folder)
    whole = folder / "model.safetensors"
    content = whole.read_bytes()
    sharded(whole, folder, len(content) // 3)
    assert not whole.exists()
    code = "from pathlib import Path\nfrom vision_ssl.extra.push import push\nresult = push(Path(folder), repo).url"
    author.run(code, folder=folder, repo="me/one")
    pushed = latest(server, "me/one")
    assert "model-00001-of" not in " ".join(pushed)
    assert pushed["model.safetensors"] == content


def check_card(text: str, client: Client, encoder: dict[str, str], recipe: Recipe) -> None:
    """A card has the facts of the run, and its programs load what was pushed."""
    assert "| data | array, 16 images |" in text
    assert "| epochs | 1 (2 steps) |" in text
    assert "](curves.png)" in text
    assert "None were measured." in text
    assert "## Licence\n\nWhoever published these weights has not stated one." in text
    described = re.search(r"## Recipe\n\n```json\n(.*?)\n```", text, re.DOTALL)
    assert described is not None
    assert recipe_from_dict(json.loads(described[1])) == recipe
    ours, timms, torchs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    picture = "from PIL import Image\npicture = Image.new('RGB', (30, 20))\n"
    loaded, shape = client.run(f"{picture}{ours}\nresult = fingerprint(encoder), list(features.shape)")
    assert (loaded, shape) == (encoder, [1, {"vit_tiny": 192, "resnet18": 512}[recipe.encoder]])
    for program in (timms, torchs.replace("path/of/the/clone", str(Path(__file__).parents[1]))):
        assert client.run(f"{program}\nresult = fingerprint(encoder)") == encoder


def test_a_second_push_sends_nothing(server: HubServer, author: Client, run: Run) -> None:
    first = author.run(PUSH, run=run.directory, repo="me/twice")
    server.requests.clear()
    assert author.run(PUSH, run=run.directory, repo="me/twice") == first
    assert len(server.repositories["me/twice"].commits) == 2
    assert server.asked("PUT") == []
    assert server.asked("POST") == ["POST /api/repos/create"]


def save_report(path: Path, protocol: str) -> None:
    path.parent.mkdir(exist_ok=True)
    facts: dict[str, Any] = {"n_train": 16, "settings": {}, "seed": 0, "train_digest": "a", "val_digest": "b"}
    truth, said = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    Report.score(protocol, said, truth, ["a", "b"], train_accuracy=None, **facts).save(path)


def test_only_what_changed_is_sent(server: HubServer, author: Client, run: Run, tmp_path: Path) -> None:
    author.run(PUSH, run=run.directory, repo="me/measured")
    server.requests.clear()
    measured = tmp_path / "mae"
    measured.mkdir()
    for name in ("weights", "metrics.jsonl"):
        (measured / name).symlink_to(run.directory / name)
    for name, protocol in {"photos": "resubstitution", "other": "linear"}.items():
        save_report(measured / "reports" / f"{name}.json", protocol)
    author.run(PUSH, run=measured, repo="me/measured")
    assert server.asked("PUT") == []
    text = latest(server, "me/measured")["README.md"].decode()
    rows = re.findall(r"^\| (\w+) \| ([\w-]+) \| 75.0 \([\d.]+ to 100.0\) \| 0.733 \| 16 \| 4 \|$", text, re.MULTILINE)
    assert rows == [("other", "linear"), ("photos", "resubstitution")]


def test_an_interrupted_push_goes_on(server: HubServer, author: Client, run: Run) -> None:
    server.large.clear()
    digest = file_hash(run.directory / "weights" / "model.safetensors")
    server.faults.append(Fault(f"PUT /upload/{digest}", status=500, times=6))  # as often as it is tried
    message = author.refusal(PUSH, run=run.directory, repo="me/interrupted")
    assert message == f"cannot push to me/interrupted: {server.url} answered 500: try again later"
    assert len(server.repositories["me/interrupted"].commits) == 1
    there = set(server.large)
    assert len(there) == 2  # of the three large files
    server.requests.clear()
    author.run(PUSH, run=run.directory, repo="me/interrupted")
    sent = {request.rpartition("/")[2] for request in server.asked("PUT")}
    assert sent == {digest}
    assert sorted(latest(server, "me/interrupted")) == FILES


def test_privacy(server: HubServer, author: Client, run: Run) -> None:
    code = "result = Run(Path(run)).push(repo, private=True)"
    author.run(code, run=run.directory, repo="me/hidden")
    assert server.repositories["me/hidden"].private
    author.run(PUSH, run=run.directory, repo="me/shown")
    commits = len(server.repositories["me/shown"].commits)
    message = author.refusal(code, run=run.directory, repo="me/shown")
    assert message == "me/shown is public: expected a private repository, or a push that may be seen"
    assert len(server.repositories["me/shown"].commits) == commits


def test_a_tag_keeps_its_meaning(server: HubServer, author: Client, runs: dict[str, Run]) -> None:
    code = "result = Run(Path(run)).push(repo, tag='v1')"
    author.run(code, run=runs["mae"].directory, repo="me/tagged")
    repository = server.repositories["me/tagged"]
    assert repository.tags == {"v1": repository.refs["main"]}
    author.run(code, run=runs["mae"].directory, repo="me/tagged")  # nothing is new
    message = author.refusal(code, run=runs["simclr"].directory, repo="me/tagged")
    assert message == f"tag='v1' of me/tagged is another commit's, {repository.tags['v1']}: expected a new tag"
    assert len(repository.commits) == 2


def test_who_may_not_push(server: HubServer, client: Client, run: Run) -> None:
    message = client.refusal(PUSH, run=run.directory, repo="me/nobody")
    assert message == "cannot push to me/nobody: the Hub forbids it: set HF_TOKEN, or log in by `hf auth login`"
    client.run("os.environ['HF_TOKEN'] = token", token=TOKEN)
    try:
        message = client.refusal(PUSH, run=run.directory, repo="somebody-else/theirs")
    finally:
        client.run("del os.environ['HF_TOKEN']")
    assert message.endswith("the Hub forbids it: the token of HF_TOKEN or `hf auth login` does not open it")


def test_without_a_network(server: HubServer, author: Client, run: Run) -> None:
    author.run(
        "from huggingface_hub import constants\nkept, constants.ENDPOINT = constants.ENDPOINT, 'http://127.0.0.1:1'"
    )
    try:
        unreachable = author.refusal(PUSH, run=run.directory, repo="me/offline")
        author.offline(True)
        offline = author.refusal(PUSH, run=run.directory, repo="me/offline")
    finally:
        author.run("constants.ENDPOINT = kept")
        author.offline(False)
    assert unreachable == (
        "cannot push to me/offline: http://127.0.0.1:1 cannot be reached: check the network, or HF_ENDPOINT"
    )
    assert offline == "cannot push to me/offline: HF_HUB_OFFLINE forbids to ask the Hub"
    assert server.requests == []


def test_the_token_is_never_seen(server: HubServer, author: Client, run: Run) -> None:
    author.run(PUSH, run=run.directory, repo="me/discreet")
    assert server.leaks == []
    assert TOKEN not in author.output
    for path in run.directory.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    assert all(TOKEN.encode() not in data for data in latest(server, "me/discreet").values())


def test_the_zoo(server: HubServer, author: Client) -> None:
    author.run("from vision_ssl.extra.push import push_zoo\nresult = [push.url for push in push_zoo('zoo')]")
    for weights in registry.WEIGHTS:
        pushed = latest(server, f"zoo/{weights.name}")
        assert sorted(pushed) == FILES
        assert sha256(pushed["model.safetensors"]).hexdigest() == weights.card["sha256"]["model.safetensors"]
        assert b"license: mit\n" in pushed["README.md"]


def test_a_dry_run_asks_nothing(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)
    cli.main(["push", str(run.directory), "me/run", "--dry-run"])
    first, *files = capsys.readouterr().out.splitlines()
    assert first == "me/run would hold:"
    assert sorted(line.split(":")[0].strip() for line in files) == FILES


def test_without_matplotlib_there_is_no_picture(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> None:
        raise MissingExtraError("matplotlib", "plot")

    monkeypatch.setattr("vision_ssl.extra.push.curves", missing)
    said = str(push(run.directory, "me/run", dry_run=True))
    assert "curves.png" not in said
    assert said.endswith(
        'the card has no picture of the curves: matplotlib is not installed: pip install "vision-ssl[plot]"'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "push got neither RUN and REPO nor --zoo OWNER alone"),
        (["somewhere"], "push got neither"),
        (["somewhere", "me/x", "--zoo", "me"], "push got neither"),
        (["somewhere", "x"], "repo='x' is no name of a repository: expected owner/name"),
        (["somewhere", "../x"], "repo='../x' is no name of a repository"),
        (
            ["somewhere", "me/x"],
            "run='somewhere' has no config.json: expected the directory of a run, or a folder of w",
        ),
        (["simclr_resnet18", "me/x"], "run='simclr_resnet18' has no config.json"),
        (["hf:me/y", "me/x"], "run='hf:me/y' has no config.json"),
    ],
    ids=str,
)
def test_what_cannot_be_pushed(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        cli.main(["push", *arguments])


def test_only_weights_as_they_were_exported(run: Run, tmp_path: Path) -> None:
    for path in (run.directory / "weights").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(WeightsError, match=r"model\.safetensors is not the file that config\.json lists"):
        push(tmp_path, "me/run", dry_run=True)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"has no model\.safetensors: expected the directory of a run"):
        push(tmp_path, "me/run", dry_run=True)


def test_a_card_of_few_facts() -> None:
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_features": 192,
        "model_args": {"patch_size": 8},
        "pretrained_cfg": {"input_size": [5, 24, 24]},
    }
    text = model_card("me/x", config, scores=[], picture=None)
    assert "with patches of 8 px. It takes images of 24 x 24 px with 5 channels, and gives features (B, 192)." in text
    assert "license" not in text
    assert "None were measured." in text
    assert "Whoever published these weights has not stated one." in text
    noncommercial = json.loads(json.dumps(config)) | {"vision_ssl": {"licence": "CC-BY-NC-4.0: not for commercial use"}}
    assert "\nlicense: cc-by-nc-4.0\n" in model_card("me/x", noncommercial, scores=[], picture=None)


def test_a_card_tells_what_its_training_started_from() -> None:
    training = {"epochs": 4.0, "minutes": 9.5}
    facts = {"name": "a", "licence": "CC-BY-NC-4.0: no sales"}
    origin = origin_of({**facts, "data": {"name": "photos"}, "training": training}, "asked")
    assert origin == {**facts, **training, "data": "photos"}
    second = {"training": {"epochs": 3.0, "minutes": 1.0, "init": "a"}, "origin": origin}
    assert describe_origin(second) == "a (4 epochs of photos)"
    assert origin_of(second, "b") == {"name": "b", "epochs": 7.0, "minutes": 10.5}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_features": 192,
        "pretrained_cfg": {"input_size": [3, 24, 24]},
        "vision_ssl": {"origin": origin},
    }
    text = model_card("me/x", config, scores=[], picture=None)
    assert "Pretraining started from a, whose licence is: CC-BY-NC-4.0: no sales" in text
    assert "\nlicense:" not in text  # nobody has stated one for these


def test_a_start_of_which_little_is_known() -> None:
    assert origin_of({}, "photos.safetensors") == {"name": "photos.safetensors"}
    hostile = {"name": 3, "data": [], "training": {"epochs": "many"}, "licence": {}}
    assert origin_of(hostile, "b") == {"name": "b"}
    card = {"training": {"epochs": 3.0, "init": "b"}, "origin": {"name": "b"}}
    assert describe_origin(card) == "b (of unknown data)"
    assert origin_of(card, "c") == {"name": "c"}
    assert describe_origin({"training": {"init": None}}) == "random weights"
