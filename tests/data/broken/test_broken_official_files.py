"""Official files, in miniature: the real code, with checksums of files that are made here."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from rcnn.data.sources import cifar, digits, download, svhn
from rcnn.errors import SourceError
from tests.data.broken.scene import Case, Scene, Settings, check_refused, ingest, named, picture

OFFICIAL: list[Case] = []


def official(*words: str) -> Callable[[Any], Any]:
    def register(make: Callable[[Scene], Settings]) -> Callable[[Scene], Settings]:
        OFFICIAL.append(Case(make, words, SourceError))
        return make

    return register


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 2048 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_files(scene: Scene, labels: Sequence[int] = tuple(range(10)) * 10) -> Settings:
    """Unpacked files of Fashion-MNIST, which the code takes for the official ones."""
    for prefix in ("train", "t10k"):
        images = np.stack([picture(row, 28, 28) for row in range(len(labels))])
        (scene.root / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (scene.root / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.array(labels)))
    return trusted_idx(scene)


def trusted_idx(scene: Scene) -> Settings:
    """Makes the code take the files that are there, whatever they hold, for the official ones."""
    md5 = {}
    for name in digits.FASHION_MNIST.md5:
        file = scene.root / name
        md5[name] = ("", hashlib.md5(file.read_bytes()).hexdigest() if file.is_file() else "")
    scene.patch.setattr(digits, "FASHION_MNIST", replace(digits.FASHION_MNIST, md5=md5))
    return scene.settings("fashion-mnist")


def mat_file(scene: Scene, content: bytes) -> Settings:
    """SVHN's files, each with this content, which the code takes for the official one."""
    checksum = hashlib.md5(content).hexdigest()
    scene.patch.setattr(svhn, "MD5", dict.fromkeys(svhn.MD5, checksum))
    for part in ("train", "test"):
        (scene.root / f"{part}_32x32.mat").write_bytes(content)
    return scene.settings("svhn")


def mat(**arrays: Any) -> bytes:
    packed = io.BytesIO()
    scipy.io.savemat(packed, arrays)
    return packed.getvalue()


def cifar_members(**changes: bytes) -> dict[str, bytes]:
    """The files of CIFAR-10 with 4 images each."""
    members = {"batches.meta": pickle.dumps({"label_names": list("abcdefghij")}, 2)}
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 3072), dtype=np.uint8)
        members[name] = pickle.dumps({"data": pixels, "labels": [row % 10 for row in range(20)]}, 2)
    return members | {name.replace("__", "."): content for name, content in changes.items()}


def trust(scene: Scene, members: Mapping[str, bytes], archive: bytes = b"") -> None:
    """Makes the code take these files for the official ones."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in members.items()}
    parts = {part: {name: md5[name] for name in names if name in md5} for part, names in cifar.CIFAR10.parts.items()}
    files = replace(
        cifar.CIFAR10,
        parts=parts,
        meta=("batches.meta", md5["batches.meta"]),
        archive_md5=hashlib.md5(archive).hexdigest(),
    )
    scene.patch.setattr(cifar, "CIFAR10", files)


def cifar_folder(scene: Scene, **changes: bytes) -> Settings:
    members = cifar_members(**changes)
    trust(scene, members)
    for name, content in members.items():
        (scene.root / name).write_bytes(content)
    return scene.settings("cifar10")


def cifar_archive(scene: Scene, *more: tuple[tarfile.TarInfo, bytes], without: str = "", **changes: bytes) -> Settings:
    members = cifar_members(**changes)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            if name != without:
                tar.addfile(tar_info(f"cifar-10-batches-py/{name}", len(content)), io.BytesIO(content))
        for info, content in more:
            tar.addfile(info, io.BytesIO(content))
    trust(scene, members, packed.getvalue())
    (scene.root / "cifar-10-python.tar.gz").write_bytes(packed.getvalue())
    return scene.settings("cifar10")


def tar_info(name: str, size: int = 0, **attributes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info


class Command:
    """A pickle of it runs a command where it is loaded without care."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def mark(scene: Scene) -> Path:
    """What the command would leave behind."""
    return scene.root.parent / "the-command-ran"


def with_command(scene: Scene) -> bytes:
    pixels = np.zeros((20, 3072), np.uint8)
    return pickle.dumps({"data": pixels, "labels": [0] * 20, "more": Command(f"touch {mark(scene)}")}, 2)


@official("{root}/train-images-idx3-ubyte", "MD5", "6bbc9ace898e44ae57da46a324031adb")
def mnist_with_another_checksum(scene: Scene) -> Settings:
    settings = idx_files(scene) | {"data.source": "mnist"}
    (scene.root / "train-images-idx3-ubyte").write_bytes(idx(np.ones((100, 28, 28))))  # neither data set's
    return settings


@official("{root}", "mnist")
def mnist_without_files(scene: Scene) -> Settings:
    return scene.settings("mnist")


@official("{root}/nowhere", "mnist")
def mnist_root_missing(scene: Scene) -> Settings:
    return scene.settings("mnist", root=f"{scene.root}/nowhere")


@official("~nobody-of-this-name")
def mnist_root_of_an_unknown_user(scene: Scene) -> Settings:
    return scene.settings("mnist", root="~nobody-of-this-name")


@official("{root}/t10k-labels-idx1-ubyte", "missing")
def mnist_file_missing(scene: Scene) -> Settings:
    settings = idx_files(scene)
    (scene.root / "t10k-labels-idx1-ubyte").unlink()
    return settings


@official("{root}/t10k-labels-idx1-ubyte", "directory")
def mnist_file_that_is_a_folder(scene: Scene) -> Settings:
    settings = mnist_file_missing(scene)
    (scene.root / "t10k-labels-idx1-ubyte").mkdir()
    return settings


@official("{root}/train-images-idx3-ubyte", "IDX")
def idx_file_cut_off(scene: Scene) -> Settings:
    idx_files(scene)
    file = scene.root / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    return trusted_idx(scene)


@official("{root}/train-images-idx3-ubyte", "IDX")
def idx_file_of_labels_for_images(scene: Scene) -> Settings:
    idx_files(scene)
    shutil.copy(scene.root / "train-labels-idx1-ubyte", scene.root / "train-images-idx3-ubyte")
    return trusted_idx(scene)


@official("{root}/train-labels-idx1-ubyte.gz", "cannot be read")
def idx_file_packed_and_cut_off(scene: Scene) -> Settings:
    settings = idx_files(scene)
    file = scene.root / "train-labels-idx1-ubyte"
    (scene.root / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes())[:-9])
    file.unlink()
    return settings


@official("{root}/train-images-idx3-ubyte", "100", "99")
def idx_files_of_different_lengths(scene: Scene) -> Settings:
    idx_files(scene)
    (scene.root / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(99) % 10))
    return trusted_idx(scene)


@official("{root}/train-labels-idx1-ubyte", "label", "is 10")
def idx_label_beyond_the_classes(scene: Scene) -> Settings:
    return idx_files(scene, [*range(10), *range(10), 10])


@official("{root}/train-images-idx3-ubyte", "0")
def idx_files_without_rows(scene: Scene) -> Settings:
    idx_files(scene)
    (scene.root / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((0, 28, 28))))
    (scene.root / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(0)))
    return trusted_idx(scene)


@official("{root}/train-images-idx3-ubyte", "8")
def idx_files_of_another_size(scene: Scene) -> Settings:
    idx_files(scene)
    (scene.root / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((100, 8, 8))))
    return trusted_idx(scene)


@official("{root}/train_32x32.mat", "missing")
def mat_missing(scene: Scene) -> Settings:
    return scene.settings("svhn")


@official("{root}/train_32x32.mat", "MD5", "e26dedcc434d2e4c54c9b2d4a06d8373")
def mat_with_another_checksum(scene: Scene) -> Settings:
    (scene.root / "train_32x32.mat").write_bytes(b"another")
    return scene.settings("svhn")


@official("{root}/train_32x32.mat", "is not a MATLAB file")
def mat_that_is_none(scene: Scene) -> Settings:
    return mat_file(scene, b"this is not a MATLAB file\n" * 20)


@official("{root}/train_32x32.mat", "is not a MATLAB file")
def mat_of_no_bytes(scene: Scene) -> Settings:
    return mat_file(scene, b"")


@official("{root}/train_32x32.mat", "is not a MATLAB file")
def mat_cut_off(scene: Scene) -> Settings:
    return mat_file(scene, mat(X=np.zeros((32, 32, 3, 4), np.uint8), y=np.zeros((4, 1)))[:900])


@official("{root}/train_32x32.mat", "is not a MATLAB file", "'X'")
def mat_without_images(scene: Scene) -> Settings:
    return mat_file(scene, mat(y=np.zeros((4, 1))))


@official("{root}/train_32x32.mat", "(8, 8, 3, 4)")
def mat_of_another_size(scene: Scene) -> Settings:
    return mat_file(scene, mat(X=np.zeros((8, 8, 3, 4), np.uint8), y=np.zeros((4, 1))))


@official("{root}/train_32x32.mat", "11")
def mat_label_beyond_the_classes(scene: Scene) -> Settings:
    return mat_file(scene, mat(X=np.zeros((32, 32, 3, 4), np.uint8), y=np.array([[1], [2], [3], [11]])))


@official("{root}", "cifar-10-python.tar.gz")
def cifar_missing(scene: Scene) -> Settings:
    return scene.settings("cifar10")


@official("{root}/cifar-10-python.tar.gz", "MD5", "c58f30108f718f92721af3b95e74349a")
def cifar_with_another_checksum(scene: Scene) -> Settings:
    (scene.root / "cifar-10-python.tar.gz").write_bytes(b"another")
    return scene.settings("cifar10")


@official("{root}/data_batch_3", "MD5")
def cifar_batch_with_another_checksum(scene: Scene) -> Settings:
    settings = cifar_folder(scene)
    (scene.root / "data_batch_3").write_bytes(b"another")
    return settings


@official("{root}/data_batch_3", "No such file")
def cifar_batch_missing(scene: Scene) -> Settings:
    settings = cifar_folder(scene)
    (scene.root / "data_batch_3").unlink()
    return settings


@official("{root}", "data_batch_2", "posix.system")
def cifar_batch_that_runs_a_command(scene: Scene) -> Settings:
    return cifar_folder(scene, data_batch_2=with_command(scene))


@official("{root}", "batches.meta", "posix.system")
def cifar_meta_that_runs_a_command(scene: Scene) -> Settings:
    return cifar_archive(scene, batches__meta=with_command(scene))


@official("{root}", "data_batch_1", "eval")
def cifar_batch_that_evaluates(scene: Scene) -> Settings:
    code = f"cbuiltins\neval\n(Vopen({str(mark(scene))!r}, 'w')\ntR."
    return cifar_folder(scene, data_batch_1=code.encode())


@official("{root}", "data_batch_1", "is not a plain pickle")
def cifar_batch_that_is_a_text(scene: Scene) -> Settings:
    return cifar_folder(scene, data_batch_1=b"\n\nnothing\n")


@official("{root}", "data_batch_1", "is not a plain pickle")
def cifar_batch_cut_off(scene: Scene) -> Settings:
    return cifar_folder(scene, data_batch_1=cifar_members()["data_batch_1"][:500])


@official("{root}", "data_batch_1", "does not hold a dictionary")
def cifar_batch_that_is_a_list(scene: Scene) -> Settings:
    return cifar_folder(scene, data_batch_1=pickle.dumps([1, 2]))


@official("{root}", "data_batch_1", "32x32x3")
def cifar_batch_without_labels(scene: Scene) -> Settings:
    return cifar_folder(scene, data_batch_1=pickle.dumps({"data": np.zeros((4, 3072), np.uint8)}, 2))


@official("{root}/cifar-10-python.tar.gz", "../data_batch_1")
def cifar_member_that_leads_out(scene: Scene) -> Settings:
    return cifar_archive(scene, (tar_info("../data_batch_1", 1), b"x"))


@official("{root}/cifar-10-python.tar.gz", "link")
def cifar_member_that_is_a_link_out(scene: Scene) -> Settings:
    link = tar_info("cifar-10-batches-py/link", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    return cifar_archive(scene, (link, b""))


@official("{root}/cifar-10-python.tar.gz", "data_batch_1")
def cifar_member_that_is_a_link_to_nothing(scene: Scene) -> Settings:
    link = tar_info("cifar-10-batches-py/data_batch_1", type=tarfile.SYMTYPE, linkname="nothing")
    return cifar_archive(scene, (link, b""), without="data_batch_1")


@official("{root}/cifar-10-python.tar.gz", "data_batch_1")
def cifar_member_that_is_a_folder(scene: Scene) -> Settings:
    batch = tar_info("cifar-10-batches-py/data_batch_1", type=tarfile.DIRTYPE)
    return cifar_archive(scene, (batch, b""), without="data_batch_1")


@official("{root}/cifar-10-python.tar.gz", "data_batch_4", "missing")
def cifar_member_missing(scene: Scene) -> Settings:
    return cifar_archive(scene, without="data_batch_4")


@official("{root}/cifar-10-python.tar.gz", "cannot be unpacked")
def cifar_archive_cut_off(scene: Scene) -> Settings:
    settings = cifar_archive(scene)
    file = scene.root / "cifar-10-python.tar.gz"
    file.write_bytes(file.read_bytes()[:2000])
    trust(scene, cifar_members(), file.read_bytes())
    return settings


@official("{root}/cifar-10-python.tar.gz", "cannot be unpacked")
def cifar_archive_that_is_none(scene: Scene) -> Settings:
    settings = cifar_archive(scene)
    (scene.root / "cifar-10-python.tar.gz").write_bytes(b"no archive")
    trust(scene, cifar_members(), b"no archive")
    return settings


@official("train-images-idx3-ubyte.gz", "file:///mirror", "is not an http address")
def mirror_that_is_a_file(scene: Scene) -> Settings:
    return {"data.source": "mnist", "data.mirror": "file:///mirror"}


@official("train-images-idx3-ubyte.gz", "http://127.0.0.1:1/", "refused")
def mirror_that_does_not_answer(scene: Scene) -> Settings:
    scene.patch.setattr(download, "SECONDS_BETWEEN_ATTEMPTS", 0)
    return {"data.source": "mnist", "data.mirror": "http://127.0.0.1:1/"}


@pytest.mark.parametrize("case", named(OFFICIAL))
def test_a_broken_official_file_is_named(scene: Scene, case: Case) -> None:
    check_refused(scene, case.make(scene), SourceError, case.words)
    assert not mark(scene).exists()


def test_the_command_in_the_pickle_would_run_if_it_were_loaded(scene: Scene) -> None:
    pickle.loads(with_command(scene))
    assert mark(scene).exists()


@pytest.mark.parametrize("make", [cifar_folder, cifar_archive, idx_files])
def test_the_same_files_unbroken_are_taken(scene: Scene, make: Callable[[Scene], Settings]) -> None:
    assert sum(split.rows for split in ingest(scene, make(scene)).splits.values()) in (120, 200)
