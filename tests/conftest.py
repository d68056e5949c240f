import colorsys
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.hub_server import Client, HubServer, serve

os.environ["HF_HUB_OFFLINE"] = "1"  # here: `huggingface_hub` reads it once, when the first test module imports timm


@pytest.fixture(scope="session", autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither see nor fill the user's cache, do not reach for the Hub, and share the cores fairly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: handing them to threads costs more than it saves
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISION_SSL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder for each of three classes, red, green and blue, of eight noisy 40 x 48 JPEG files."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for index, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        colour = 255 * np.array(colorsys.hsv_to_rgb(index / 3, 0.6, 0.7))
        for number in range(8):
            pixels = np.clip(rng.normal(colour, 40, size=(48, 40, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.jpg")
    return folder


@pytest.fixture(scope="session")
def _hub() -> Iterator[HubServer]:
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def _hub_client(_hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(tmp_path_factory.mktemp("home"), _hub.url)
    client.run(
        "import hashlib, os\n"
        "import timm, torch\n"
        "import vision_ssl\n"
        "torch.set_num_threads(1)\n"
        "def fingerprint(encoder):\n"
        "    return {name: hashlib.sha256(tensor.numpy()).hexdigest() for name, tensor in encoder.state_dict().items()}"
    )
    yield client
    client.close()


@pytest.fixture
def server(_hub: HubServer) -> HubServer:
    """A Hub on loopback that nothing was asked of, where all goes well."""
    _hub.requests.clear()
    _hub.faults.clear()
    return _hub


@pytest.fixture
def client(server: HubServer, _hub_client: Client) -> Client:
    """A process whose Hub is `server`: one for all tests, since its imports take seconds."""
    return _hub_client
