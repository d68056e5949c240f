import json
from pathlib import Path

import pytest
import torch

from benchmarks import throughput
from benchmarks.throughput import Arguments, main
from vision_ssl import MAE, SimCLR

WORK = "MAE at 24 px"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that a CPU trains in no time."""
    mae = MAE(encoder="vit_tiny", image_size=24, patch_size=8, decoder_depth=1, decoder_dim=32)
    simclr = SimCLR(image_size=24)
    monkeypatch.setattr(throughput, "TRAINING", {WORK: (mae, 10, 5), "SimCLR at 24 px": (simclr, 10, 5)})


def test_rows_come_beside_those_that_are_there(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    out.write_text('{"rows": [{"work": "another"}]}')
    main(Arguments(device="cpu", tiny=True, only=("MAE",), out=out))
    kept, *rows = json.loads(out.read_text())["rows"]
    assert kept == {"work": "another"}
    assert [row["work"] for row in rows][:3] == [
        f"{WORK}, exact views, compile off",
        f"{WORK}, exact views, augmentation alone, compile off",
        f"{WORK}, without augmentation: our model, eager",
    ]
    assert (rows[0]["ceiling"], rows[0]["asked_for"], rows[0]["tiny"]) == (10, 5, True)
    for row in rows:
        speed = row["images_per_second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]


def test_simclr_is_measured_with_both_kinds_of_views(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    main(Arguments(device="cpu", tiny=True, only=("SimCLR",), out=out))
    works = [row["work"].split(", ")[1] for row in json.loads(out.read_text())["rows"]]
    assert works[:4] == ["exact views", "exact views", "fast views", "fast views"]


def test_features_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "ROUNDS", 1)
    (speed,) = throughput.features(torch.device("cpu"), 2)
    assert speed > 0


def test_a_profile_is_printed_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "features", lambda device, count: [8.0])
    out = tmp_path / "throughput.json"
    main(Arguments(device="cpu", tiny=True, only=("features", "MAE"), profile=True, out=out))
    printed = capsys.readouterr().out
    for line in (f"{throughput.FEATURES}\n", "\n500.00 ms for 4 images", f"{WORK}, exact views\n", "aten::addmm"):
        assert line in printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tiny": True}, "tiny: its figures mean nothing: expected another out than .*throughput.json"),
        ({"steps": 4}, "steps=4: expected at least 5, of which the spread is taken"),
        ({"only": ("nothing",)}, r"only=\('nothing',\) fits no row: expected parts of features of .*, MAE at 24 px"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(Arguments(device="cpu", **arguments))  # type: ignore[arg-type]  # of several types
