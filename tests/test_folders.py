import json
import os
from pathlib import Path

import pytest

from vision_ssl.errors import DataError
from vision_ssl.folders import Listing, Split, list_folder


def tree(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def labelled(listing: Listing) -> dict[str, str]:
    """Path -> class name, through the label."""
    assert listing.labels is not None
    return {path: listing.classes[label] for path, label in zip(listing.paths, listing.labels, strict=True)}


@pytest.mark.parametrize(
    "files",
    [
        ("b.jpg", "a.png"),
        ("one/b.jpg", "one/c/a.png"),  # one folder is no choice of class
        ("cat/b.jpg", "dog/c.jpg", "a.png"),  # an image beside the class folders
    ],
)
def test_unlabelled(files: tuple[str, ...], tmp_path: Path) -> None:
    listing = list_folder(tree(tmp_path / "photos", *files), "train", None)
    assert listing.paths == sorted(files)
    assert listing.labels is None
    assert listing.classes == ()
    assert listing.name == "photos"


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_for_each_class(split: Split, tmp_path: Path) -> None:
    root = tree(tmp_path, "dog/1.jpg", "cat/2.JPEG", "cat/young/3.webp", "empty/readme.txt")
    listing = list_folder(root, split, None)
    assert listing.classes == ("cat", "dog")
    assert listing.paths == ["cat/2.JPEG", "cat/young/3.webp", "dog/1.jpg"]
    assert listing.labels == [0, 0, 1]


def test_hidden_files_and_other_files_are_no_images(tmp_path: Path) -> None:
    root = tree(tmp_path, "a.jpg", "._a.jpg", ".trash/b.jpg", "notes.txt", "jpg", "c.jpg.part")
    assert list_folder(root, "train", None).paths == ["a.jpg"]


def test_split_folders(tmp_path: Path) -> None:
    files = ("train/ant/1.jpg", "train/bee/2.jpg", "train/cow/3.jpg", "val/bee/4.jpg", "val/cow/5.jpg")
    root = tree(tmp_path / "farm", *files, "test/bee/6.jpg")
    train, val = list_folder(root, "train", None), list_folder(root, "val", None)
    assert (train.name, val.name) == ("farm/train", "farm/val")
    assert train.classes == val.classes == ("ant", "bee", "cow")
    assert labelled(train) == {"train/ant/1.jpg": "ant", "train/bee/2.jpg": "bee", "train/cow/3.jpg": "cow"}
    assert labelled(val) == {"val/bee/4.jpg": "bee", "val/cow/5.jpg": "cow"}


def test_test_stands_in_for_val(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "test/a/3.jpg")
    assert labelled(list_folder(root, "val", None)) == {"test/a/3.jpg": "a"}


def test_labels_of_val_when_train_has_none(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/1.jpg", "val/a/2.jpg", "val/b/3.jpg")
    assert list_folder(root, "train", None).labels is None
    assert labelled(list_folder(root, "val", None)) == {"val/a/2.jpg": "a", "val/b/3.jpg": "b"}


def test_val_without_labels(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/3.jpg")
    assert list_folder(root, "train", None).classes == ("a", "b")
    assert list_folder(root, "val", None).labels is None


def test_a_class_that_training_never_saw(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/c/3.jpg")
    with pytest.raises(DataError, match=r"one of 2 known classes for each image, found 1 without, first val/c/3\.jpg"):
        list_folder(root, "val", None)


def test_a_folder_of_classes_may_have_one_called_train(tmp_path: Path) -> None:
    root = tree(tmp_path, "plane/1.jpg", "train/2.jpg")
    assert list_folder(root, "train", None).classes == ("plane", "train")


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    root = tree(
        tmp_path / "tiny",
        "train/n02/images/n02_0.JPEG",
        "train/n02/n02_boxes.txt",
        "train/n01/images/n01_0.JPEG",
        "val/images/val_0.JPEG",
        "val/images/val_1.JPEG",
    )
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t9\t9\nval_1.JPEG\tn02\t0\t0\t9\t9\n")
    return root


def test_tiny_imagenet(tiny_imagenet: Path) -> None:
    train, val = list_folder(tiny_imagenet, "train", None), list_folder(tiny_imagenet, "val", None)
    assert train.classes == val.classes == ("n02", "n01")  # the order of wnids.txt
    assert labelled(train) == {"train/n01/images/n01_0.JPEG": "n01", "train/n02/images/n02_0.JPEG": "n02"}
    assert labelled(val) == {"val/images/val_0.JPEG": "n01", "val/images/val_1.JPEG": "n02"}
    assert val.name == "tiny/val"


def test_tiny_imagenet_sorted_into_folders(tiny_imagenet: Path) -> None:
    (tiny_imagenet / "val" / "images").rename(tiny_imagenet / "val" / "n01")
    (tiny_imagenet / "val" / "val_annotations.txt").unlink()
    assert list_folder(tiny_imagenet, "val", None).labels == [1, 1]


def test_tiny_imagenet_without_an_annotation(tiny_imagenet: Path) -> None:
    (tiny_imagenet / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t9\t9\n\n")
    with pytest.raises(DataError, match=r"found 1 without, first val/images/val_1\.JPEG"):
        list_folder(tiny_imagenet, "val", None)


@pytest.fixture
def imagenet100(tmp_path: Path) -> Path:
    parts = (
        "train.X1/n3/a.JPEG",
        "train.X1/n1/b.JPEG",
        "train.X2/n2/c.JPEG",
        "val.X/n1/d.JPEG",
        "val.X/n3/e.JPEG",
    )
    root = tree(tmp_path / "ssl_dataset", *parts)
    (root / "Labels.json").write_text(json.dumps({"n2": "two, deux", "n3": "three", "n1": "one"}))
    return root


def test_imagenet100(imagenet100: Path) -> None:
    train, val = list_folder(imagenet100, "train", None), list_folder(imagenet100, "val", None)
    assert train.classes == val.classes == ("two, deux", "three", "one")  # the order of Labels.json
    assert labelled(train) == {
        "train.X1/n1/b.JPEG": "one",
        "train.X1/n3/a.JPEG": "three",
        "train.X2/n2/c.JPEG": "two, deux",
    }
    assert labelled(val) == {"val.X/n1/d.JPEG": "one", "val.X/n3/e.JPEG": "three"}
    assert (train.name, val.name) == ("ssl_dataset/train", "ssl_dataset/val")


def test_imagenet100_by_parts(imagenet100: Path) -> None:
    listing = list_folder(imagenet100, "train", ("train.X1",))
    assert listing.name == "ssl_dataset/train.X1"
    assert labelled(listing) == {"train.X1/n1/b.JPEG": "one", "train.X1/n3/a.JPEG": "three"}
    assert list_folder(imagenet100, "train", ("train.X2", "train.X1", "train.X2")) == list_folder(
        imagenet100, "train", None
    )


@pytest.mark.parametrize("parts", [("train.X9",), ("val.X",), ()])
def test_imagenet100_names_its_parts(parts: tuple[str, ...], imagenet100: Path) -> None:
    with pytest.raises(DataError, match=r"parts \(.*for split 'train': train\.X1, train\.X2$"):
        list_folder(imagenet100, "train", parts)


@pytest.mark.parametrize(
    ("text", "message"),
    [('["n1"]', r"to map class folders to names, found \['n1'\]$"), ('{"n1":', r"Labels\.json is not JSON")],
)
def test_imagenet100_with_damaged_labels(text: str, message: str, imagenet100: Path) -> None:
    (imagenet100 / "Labels.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list_folder(imagenet100, "train", None)


def test_imagenet100_with_a_folder_without_label(imagenet100: Path) -> None:
    tree(imagenet100, "val.X/n9/x.JPEG")
    with pytest.raises(DataError, match=r"found 1 without, first val\.X/n9/x\.JPEG"):
        list_folder(imagenet100, "val", None)


def test_a_plain_folder_may_hold_a_labels_file(tmp_path: Path) -> None:
    assert list_folder(tree(tmp_path, "a/1.jpg", "b/2.jpg", "Labels.json"), "train", None).classes == ("a", "b")


def test_parts_of_a_plain_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"parts \('a',\): source .* has none"):
        list_folder(tree(tmp_path, "a/1.jpg"), "train", ("a",))


@pytest.mark.parametrize(
    ("files", "found"),
    [((), "found no files$"), (("a.txt", "b/c.txt", "LICENSE"), r"found 2 \.txt, 1 LICENSE$")],
)
def test_a_folder_without_images(files: tuple[str, ...], found: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^source .*: looked for images \(.*\.png.*\), {found}"):
        list_folder(tree(tmp_path, *files), "train", None)


def test_a_split_that_is_not_there(tiny_imagenet: Path) -> None:
    (tiny_imagenet / "train").rename(tiny_imagenet / "elsewhere")
    with pytest.raises(DataError, match=r"looked for the folder train/, found elsewhere, val, wnids\.txt$"):
        list_folder(tiny_imagenet, "train", None)


def test_loops_of_links_end(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", "a/1.jpg", "b/2.jpg")
    (root / "a" / "up").symlink_to(root, target_is_directory=True)
    (root / "b" / "self").symlink_to(root / "b" / "self")
    (root / "b" / "again").symlink_to(root / "a", target_is_directory=True)
    assert list_folder(root, "train", None).paths == ["a/1.jpg", "b/2.jpg"]


def test_class_folders_may_be_links(tmp_path: Path) -> None:
    store = tree(tmp_path / "store", "x/1.jpg", "y/2.jpg", "z/3.jpg")
    root = tmp_path / "subset"
    root.mkdir()
    for name in ("x", "z"):
        (root / name).symlink_to(store / name, target_is_directory=True)
    assert labelled(list_folder(root, "train", None)) == {"x/1.jpg": "x", "z/3.jpg": "z"}


def test_a_broken_link_is_an_image_and_a_pipe_is_none(tmp_path: Path) -> None:
    root = tree(tmp_path, "a.jpg")
    (root / "broken.jpg").symlink_to(root / "gone.jpg")
    os.mkfifo(root / "pipe.jpg")
    assert list_folder(root, "train", None).paths == ["a.jpg", "broken.jpg"]


@pytest.mark.parametrize("place", [(os, "scandir"), (Path, "stat")], ids=["listed", "entered"])
def test_a_folder_that_cannot_be_read(
    place: tuple[object, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path, "a/1.jpg", "locked/2.jpg")
    allowed = getattr(*place)

    def refuse(path: Path, **options: bool) -> object:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(path, **options)

    monkeypatch.setattr(*place, refuse)  # a test run by root could not lock itself out
    with pytest.raises(DataError, match=r"^source .*locked: the folder cannot be read: Permission denied$"):
        list_folder(root, "train", None)
