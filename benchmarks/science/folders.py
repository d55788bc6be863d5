"""Images of a user's folder: IDX files, CIFAR's files, or images in one folder a class."""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm"}
TEST_NAMES = ("test", "val", "validation", "t10k")
DEFAULT_SIZE = 32
SIDE = 32  # of CIFAR's images


class Folder(NamedTuple):
    """What was found; ``test`` marks the images of a test part, ``None`` if there is no such part."""

    images: np.ndarray  # [N, channels, H, W] uint8
    labels: np.ndarray  # [N] int64
    classes: tuple[str, ...]
    test: np.ndarray | None  # [N] bool


def read_folder(folder: Path, size: int | None = None) -> Folder:
    """Reads what the folder holds: IDX, else CIFAR (binary or Python's form), else images by class.

    ``size``: the side that images by class are brought to, 32 unless given. ``SystemExit`` says what is accepted.
    """
    if not folder.is_dir():
        raise SystemExit(f"--data {folder}: no such folder")
    for read in (_idx, _cifar_binary, _cifar_pickled):
        found = read(folder)
        if found is not None:
            return found
    found = _by_class(folder, size or DEFAULT_SIZE)
    if found is None:
        raise SystemExit(
            f"--data {folder}: expected IDX files (train-images-idx3-ubyte, …), CIFAR's files (data_batch_1.bin, "
            "data_batch_1, train.bin, train, …), or images in one folder a class, or that below train/ and test/"
        )
    return found


def _put_together(parts: Iterable[tuple[np.ndarray, np.ndarray, bool]], names: tuple[str, ...] = ()) -> Folder | None:
    """Images, labels and whether they are of a test part."""
    parts = list(parts)
    if not parts:
        return None
    images, labels = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    test = np.concatenate([np.full(len(part[1]), part[2]) for part in parts])
    classes = names or tuple(str(c) for c in range(int(labels.max()) + 1))
    return Folder(images, labels.astype(np.int64), classes, test if test.any() and not test.all() else None)


def _idx(folder: Path) -> Folder | None:
    parts = []
    for path in sorted(folder.glob("*images*idx3-ubyte*")):
        labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        if not labels.exists():
            raise SystemExit(f"--data {folder}: {path.name} has no {labels.name} beside it")
        parts.append((_idx_array(path)[:, None], _idx_array(labels), path.name.startswith(TEST_NAMES)))
    return _put_together(parts)


def _idx_array(path: Path) -> np.ndarray:
    """Two zeros, the type (8: bytes), the number of dimensions, each as four big-endian bytes, then the numbers."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{path}: not an IDX file of bytes")
    end = 4 + 4 * raw[3]
    shape = tuple(int(n) for n in np.frombuffer(raw[4:end], dtype=">u4"))
    if len(raw) - end != np.prod(shape):
        raise SystemExit(f"{path}: {len(raw) - end} bytes of numbers, where its shape {shape} needs {np.prod(shape)}")
    return np.frombuffer(raw[end:], dtype=np.uint8).reshape(shape)


def _cifar_binary(folder: Path) -> Folder | None:
    """Records of 1 (CIFAR-10) or 2 (CIFAR-100: coarse, fine) label bytes and 3,072 bytes of an image."""
    parts = []
    for name, labels in (("data_batch_*.bin", 1), ("test_batch.bin", 1), ("train.bin", 2), ("test.bin", 2)):
        for path in sorted(folder.glob(name)):
            raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
            if raw.size % (3 * SIDE * SIDE + labels):
                raise SystemExit(f"{path}: not whole records of {3 * SIDE * SIDE + labels} bytes")
            records = raw.reshape(-1, 3 * SIDE * SIDE + labels)
            images = records[:, labels:].reshape(-1, 3, SIDE, SIDE)
            parts.append((images, records[:, labels - 1], path.name.startswith("test")))
    return _put_together(parts)


class _Arrays(pickle.Unpickler):
    """Reads dictionaries, lists, bytes and arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a file of CIFAR holds no {module}.{name}")


def _cifar_pickled(folder: Path) -> Folder | None:
    parts = []
    for name in ("data_batch_[0-9]", "test_batch", "train", "test"):
        for path in sorted(p for p in folder.glob(name) if p.is_file()):
            found = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
            labels = found.get(b"fine_labels", found.get(b"labels"))
            images = np.asarray(found[b"data"], dtype=np.uint8).reshape(-1, 3, SIDE, SIDE)
            parts.append((images, np.asarray(labels), path.name.startswith("test")))
    return _put_together(parts)


def _by_class(folder: Path, size: int) -> Folder | None:
    """``CLASS/*.png``, or ``train/CLASS/*.png`` and ``test/CLASS/*.png``."""
    tests = [folder / name for name in TEST_NAMES if (folder / name).is_dir()]
    places = [(folder / "train", False), (tests[0], True)] if tests and (folder / "train").is_dir() else []
    files = [
        (path, path.parent.name, is_test)
        for place, is_test in places or [(folder, False)]
        for path in sorted(place.glob("*/*"))
        if path.suffix.lower() in IMAGES
    ]
    if not files:
        return None
    from PIL import Image

    names = tuple(sorted({name for _, name, _ in files}))
    opened = []
    for path, _, _ in files:
        with Image.open(path) as image:
            opened.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)))
    images = np.stack(opened).transpose(0, 3, 1, 2)
    if (images == images[:, :1]).all():
        images = images[:, :1]  # grey
    labels = np.array([names.index(name) for _, name, _ in files])
    test = np.array([is_test for _, _, is_test in files])
    return Folder(np.ascontiguousarray(images), labels.astype(np.int64), names, test if places else None)
