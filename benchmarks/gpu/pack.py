"""Cut a folder into parts that fit through a narrow door, and put it together again, by checksum.

python benchmarks/gpu/pack.py split FOLDER PARTS    # an archive in parts of at most 15 MiB, and parts.json
python benchmarks/gpu/pack.py join PARTS FOLDER     # refuses an archive that lacks a part or changed on the way
"""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

PART = 15 << 20
INDEX = "parts.json"


def split(folder: Path, parts: Path, size: int = PART) -> list[Path]:
    """Archive a folder, and cut the archive.

    Args:
        folder: What to keep.
        parts: Folder for the parts; made if it is not there.
        size: Bytes of a part at most.

    Returns:
        The index first, then the parts in their order.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    data = archive.getvalue()
    parts.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, start in enumerate(range(0, len(data), size)):
        paths.append(parts / f"{number:02}.part")
        paths[-1].write_bytes(data[start : start + size])
    index = {"sha256": hashlib.sha256(data).hexdigest(), "parts": [path.name for path in paths]}
    (parts / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [parts / INDEX, *paths]


def join(parts: Path, folder: Path) -> list[Path]:
    """Undo `split`.

    Raises:
        SystemExit: A part is missing, or the archive is not what it was; nothing is written.
    """
    index = json.loads((parts / INDEX).read_text())
    missing = [name for name in index["parts"] if not (parts / name).is_file()]
    if missing:
        raise SystemExit(f"{parts} lacks {', '.join(missing)}")
    data = b"".join((parts / name).read_bytes() for name in index["parts"])
    found = hashlib.sha256(data).hexdigest()
    if found != index["sha256"]:
        raise SystemExit(f"the archive in {parts} has SHA-256 {found}: expected {index['sha256']}")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")
    return sorted(folder.iterdir())


if __name__ == "__main__":
    command, given, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    for path in split(given, target) if command == "split" else join(given, target):
        print(path)
