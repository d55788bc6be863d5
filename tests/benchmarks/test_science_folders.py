"""Folders of images that a user may have: small made-up ones of every form."""

# ruff: noqa: E402 (they can be read only where the extra is installed)

from __future__ import annotations

import gzip
import pickle
import struct

import numpy as np
import pytest

pytest.importorskip("sklearn")
image_module = pytest.importorskip("PIL.Image")

from benchmarks.science import __main__ as science
from benchmarks.science.data import load
from benchmarks.science.folders import read_folder

pytestmark = pytest.mark.exhaustive  # no machine of a user changes it

RNG = np.random.default_rng(0)


def write_idx(path, array) -> None:
    raw = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def test_idx_files_with_their_test_part(tmp_path) -> None:
    images = RNG.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = (np.arange(40) % 4).astype(np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", labels)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images[:12])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels[:12])
    found = read_folder(tmp_path)
    assert found.images.shape == (52, 1, 28, 28)
    assert found.test.sum() == 12
    order = np.argsort(found.test, kind="stable")
    np.testing.assert_array_equal(found.images[order][:40, 0], images)
    np.testing.assert_array_equal(found.labels[order], np.concatenate([labels, labels[:12]]))
    data = load(str(tmp_path))
    assert data.images.shape == (52, 1, 14, 14)
    assert set(data.test.tolist()) == set(np.flatnonzero(found.test).tolist())
    assert [len(data.pool), len(data.validation)] == [36, 4]
    assert not {*data.pool.tolist(), *data.validation.tolist()} & set(data.test.tolist())


def test_idx_files_that_are_not_whole_are_refused(tmp_path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, np.zeros((3, 4, 4), dtype=np.uint8))
    with pytest.raises(SystemExit, match="train-labels-idx1-ubyte"):
        read_folder(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match=r"47 bytes .* \(3, 4, 4\) needs 48"):
        read_folder(tmp_path)
    path.write_bytes(b"PNG!")
    with pytest.raises(SystemExit, match="not an IDX file"):
        read_folder(tmp_path)


@pytest.mark.parametrize("labels", [1, 2])
def test_cifar_binary(tmp_path, labels: int) -> None:
    images = RNG.integers(0, 256, (9, 3, 32, 32), dtype=np.uint8)
    fine = np.arange(9, dtype=np.uint8) % 3
    records = np.concatenate([np.full((9, labels - 1), 77, np.uint8), fine[:, None], images.reshape(9, -1)], axis=1)
    names = ("data_batch_1.bin", "test_batch.bin") if labels == 1 else ("train.bin", "test.bin")
    (tmp_path / names[0]).write_bytes(records[:6].tobytes())
    (tmp_path / names[1]).write_bytes(records[6:].tobytes())
    found = read_folder(tmp_path)
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.labels, fine)
    assert found.test.tolist() == [False] * 6 + [True] * 3


def test_cifar_of_python_reads_arrays_and_runs_nothing(tmp_path) -> None:
    images = RNG.integers(0, 256, (6, 3072), dtype=np.uint8)
    for name, rows in (("train", slice(0, 4)), ("test", slice(4, 6))):
        held = {b"data": images[rows], b"fine_labels": [0, 1, 2, 0][: len(images[rows])], b"coarse_labels": [9] * 4}
        (tmp_path / name).write_bytes(pickle.dumps(held, protocol=2))
    found = read_folder(tmp_path)
    np.testing.assert_array_equal(found.images.reshape(6, -1), images)
    assert found.labels.tolist() == [0, 1, 2, 0, 0, 1]
    assert found.test.tolist() == [False] * 4 + [True] * 2
    (tmp_path / "train").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(pickle.UnpicklingError, match=r"os\.system"):
        read_folder(tmp_path)


def write_classes(folder, mode: str, per_class: int) -> None:
    channels = () if mode == "L" else (3,)
    for c, name in enumerate(("ant", "bee", "cat")):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            array = RNG.integers(0, 60, (20, 24, *channels)) + 90 * c
            image_module.fromarray(array.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_by_class(tmp_path, mode: str) -> None:
    write_classes(tmp_path, mode, 10)
    found = read_folder(tmp_path, size=16)
    assert found.images.shape == (30, 3 if mode == "RGB" else 1, 16, 16)
    assert found.classes == ("ant", "bee", "cat")
    assert found.test is None
    means = [found.images[found.labels == c].mean() for c in range(3)]
    assert np.diff(means) == pytest.approx([90.0, 90.0], abs=5.0)
    data = load(str(tmp_path), 16)
    assert [len(part) for part in (data.pool, data.validation, data.test)] == [18, 3, 9]


def test_images_by_class_below_train_and_test(tmp_path) -> None:
    write_classes(tmp_path / "train", "RGB", 7)
    write_classes(tmp_path / "test", "RGB", 3)
    found = read_folder(tmp_path)
    assert found.images.shape == (30, 3, 32, 32)
    assert found.test.sum() == 9


def test_folders_without_images_are_refused(tmp_path) -> None:
    with pytest.raises(SystemExit, match="expected IDX files"):
        read_folder(tmp_path)
    with pytest.raises(SystemExit, match="no such folder"):
        read_folder(tmp_path / "nowhere")


def test_a_folder_runs_from_end_to_end(tmp_path, capsys) -> None:
    write_classes(tmp_path / "mine", "RGB", 30)
    arguments = ["--data", str(tmp_path / "mine"), "--size", "12", "--quick", "--steps", "1", "--workers", "0"]
    science.main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert "whole, " in capsys.readouterr().out
    assert (tmp_path / "out" / "experiment.png").exists()
