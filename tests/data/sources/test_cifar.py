"""CIFAR-10 and CIFAR-100 in miniature: archives of pickles that the test writes, and that torchvision reads too."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from rcnn.config import DataConfig
from rcnn.data.sources import cifar, open_source
from rcnn.data.sources.cifar import CIFAR10, CIFAR100, URL, CifarFiles, PlainUnpickler
from rcnn.data.sources.origin import Origin
from rcnn.errors import SourceError

TORCHVISION = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
FILES = {"cifar10": CIFAR10, "cifar100": CIFAR100}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100}


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]  # the one written in Python can be changed
    """Writes text and bytes alike as byte strings, as Python 2 wrote the official files."""

    def save_string(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}  # type: ignore[attr-defined]


def python2_pickle(tree: Any) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(tree)
    return stream.getvalue().replace(b"numpy._core.", b"numpy.core.")  # its name of those days


def python3_pickle(tree: Any) -> bytes:
    return pickle.dumps(tree, protocol=2)


def small_trees(files: CifarFiles) -> dict[str, Any]:
    """What is in the members: 7 images in each batch, and names of classes."""
    rng = np.random.default_rng(0)
    trees: dict[str, Any] = {}
    for name in [name for names in files.parts.values() for name in names]:
        trees[name] = {
            "batch_label": name,
            files.labels: rng.integers(0, NUM_CLASSES[files.name], 7).tolist(),
            "data": rng.integers(0, 256, (7, 3072), dtype=np.uint8),
            "filenames": [f"{row}.png" for row in range(7)],
        }
        if files.coarse:
            trees[name][files.coarse] = rng.integers(0, 20, 7).tolist()
    trees[files.meta[0]] = {files.label_names: [f"fine {number}" for number in range(NUM_CLASSES[files.name])]}
    if files.coarse:
        trees[files.meta[0]][files.coarse_names] = [f"coarse {number}" for number in range(20)]
    return trees


@dataclass
class Miniature:
    """An archive and a folder that the code takes for the official ones."""

    files: CifarFiles
    place: Path
    patch: pytest.MonkeyPatch

    @property
    def folder(self) -> Path:
        return self.place / "unpacked" / self.files.folder

    @property
    def archive(self) -> Path:
        return self.place / "packed" / self.files.archive

    def publish(self, contents: dict[str, bytes], *extra: tarfile.TarInfo) -> None:
        """Writes both, and makes their checksums the official ones, for torchvision too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (self.folder / name).write_bytes(content)
        self.pack([*map(self.member, contents.items()), *((member, b"") for member in extra)])
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
        meta = self.files.meta[0]
        parts = {part: {name: md5.get(name, "") for name in names} for part, names in self.files.parts.items()}
        self.declare(parts=parts, meta=(meta, md5.get(meta, "")))
        theirs = TORCHVISION[self.files.name]
        self.patch.setattr(theirs, "train_list", [list(pair) for pair in parts["train"].items()])
        self.patch.setattr(theirs, "test_list", [list(pair) for pair in parts["test"].items()])
        self.patch.setattr(theirs, "meta", theirs.meta | {"md5": md5.get(meta)})

    def member(self, pair: tuple[str, bytes]) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(f"{self.files.folder}/{pair[0]}")
        info.size = len(pair[1])
        return info, pair[1]

    def pack(self, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        self.archive.parent.mkdir(exist_ok=True)
        with tarfile.open(self.archive, "w:gz") as tar:
            for info, content in members:
                tar.addfile(info, io.BytesIO(content))
        self.declare()

    def declare(self, **fields: Any) -> None:
        """Makes the archive as it is now the official one."""
        md5 = hashlib.md5(self.archive.read_bytes()).hexdigest()
        table = self.files.name.upper()
        self.patch.setattr(cifar, table, replace(getattr(cifar, table), archive_md5=md5, **fields))

    def open(self, root: Path | str = "", **settings: str) -> Origin:
        data = DataConfig(source=self.files.name, root=str(root), **settings)
        return open_source(data, self.place / "downloads")


@pytest.fixture(params=FILES)
def official(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Miniature:
    miniature = Miniature(FILES[request.param], tmp_path, monkeypatch)
    miniature.publish({name: python2_pickle(tree) for name, tree in small_trees(miniature.files).items()})
    return miniature


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Miniature:
    miniature = Miniature(CIFAR10, tmp_path, monkeypatch)
    miniature.publish({name: python3_pickle(tree) for name, tree in small_trees(CIFAR10).items()})
    return miniature


@pytest.fixture
def server(official: Miniature) -> Iterator[str]:
    """The archive over HTTP."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(official.archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def assert_same_as_torchvision(origin: Origin, official: Miniature) -> None:
    for part in ("train", "test"):
        theirs = TORCHVISION[official.files.name](official.folder.parent, train=part == "train")
        block = origin.cut(part, np.arange(len(origin.labels[part]))).read()[0]
        np.testing.assert_array_equal(block.images, theirs.data)
        assert block.labels.tolist() == theirs.targets
        assert block.labels.dtype == np.int64
        assert list(origin.classes) == theirs.classes


@pytest.mark.parametrize("name", FILES)
def test_checksums_names_and_address_are_torchvisions(name: str) -> None:
    ours, theirs = FILES[name], TORCHVISION[name]
    assert [list(pair) for pair in ours.parts["train"].items()] == theirs.train_list
    assert [list(pair) for pair in ours.parts["test"].items()] == theirs.test_list
    assert ours.meta == (theirs.meta["filename"], theirs.meta["md5"])
    assert ours.label_names == theirs.meta["key"]
    assert (ours.archive_md5, ours.archive, ours.folder) == (theirs.tgz_md5, theirs.filename, theirs.base_folder)
    assert URL + ours.archive == theirs.url


@pytest.mark.parametrize("write", [python2_pickle, python3_pickle])
def test_pixels_labels_and_classes_are_torchvisions(official: Miniature, write: Callable[[Any], bytes]) -> None:
    official.publish({name: write(tree) for name, tree in small_trees(official.files).items()})
    assert_same_as_torchvision(official.open(official.folder.parent), official)


@pytest.mark.parametrize("place", ["folder", "folder.parent", "archive", "archive.parent"])
def test_folder_and_archive_are_found_and_hold_the_same(official: Miniature, place: str) -> None:
    root = getattr(official, place.split(".")[0])
    origin = official.open(root.parent if place.endswith("parent") else root)
    assert_same_as_torchvision(origin, official)
    assert origin.image_shape == (32, 32, 3)


def test_the_archive_is_downloaded_once_and_read(official: Miniature, server: str) -> None:
    assert_same_as_torchvision(official.open(mirror=server), official)
    official.archive.unlink()
    assert_same_as_torchvision(official.open(mirror=server), official)
    folder = official.place / "downloads" / official.files.name
    assert [file.name for file in folder.iterdir() if not file.name.startswith(".")] == [official.files.archive]


def test_batches_follow_each_other_in_the_row_ids(cifar10: Miniature) -> None:
    trees = small_trees(CIFAR10)
    block = cifar10.open(cifar10.folder).cut("train", np.array([0, 7, 34])).read()[0]
    assert block.row_ids == ["train/0", "train/7", "train/34"]
    expected = [
        trees["data_batch_1"]["labels"][0],
        trees["data_batch_2"]["labels"][0],
        trees["data_batch_5"]["labels"][6],
    ]
    assert block.labels.tolist() == expected


def test_the_coarse_labels_of_cifar100_are_kept(official: Miniature) -> None:
    origin = official.open(official.folder)
    coarse = origin.cut("test", np.array([1, 5])).read()[0].coarse
    if official.files is CIFAR10:
        assert coarse is None
        assert origin.coarse_classes == ()
    else:
        expected = small_trees(CIFAR100)["test"]["coarse_labels"]
        assert coarse is not None
        assert coarse.tolist() == [expected[1], expected[5]]
        assert coarse.dtype == np.int64
        assert origin.coarse_classes == tuple(f"coarse {number}" for number in range(20))


def test_the_record_tells_address_and_checksums(official: Miniature) -> None:
    record = official.open(official.archive).record
    assert (record.name, record.url) == (official.files.name, URL + official.files.archive)
    names = {name for names in official.files.parts.values() for name in names}
    expected = {name: f"md5:{hashlib.md5((official.folder / name).read_bytes()).hexdigest()}" for name in names}
    assert record.files == expected


def test_a_root_without_either_is_named(official: Miniature) -> None:
    for root in (official.place, official.place / "nowhere"):
        with pytest.raises(SourceError, match=rf"data\.root = {root}: holds neither .* nor {official.files.archive}"):
            official.open(root)


def test_a_missing_or_altered_member_is_named(official: Miniature) -> None:
    member = official.folder / next(iter(official.files.parts["test"]))
    member.write_bytes(member.read_bytes() + b"x")
    with pytest.raises(SourceError, match=f"{member}: the MD5 of its content is .*, the official"):
        official.open(official.folder)
    member.unlink()
    with pytest.raises(SourceError, match=f"{member}: cannot be read"):
        official.open(official.folder)


def test_an_altered_archive_is_named(official: Miniature) -> None:
    official.archive.write_bytes(official.archive.read_bytes()[:-1])
    with pytest.raises(SourceError, match=f"{official.archive}: the MD5 of its content is .*, the official"):
        official.open(official.archive)


@pytest.mark.parametrize("fault", ["other", "no tar", "cut off", "empty"])
def test_an_archive_that_cannot_be_unpacked_is_named(cifar10: Miniature, fault: str) -> None:
    whole = cifar10.archive.read_bytes()
    contents = {
        "other": b"x" * 99,
        "no tar": gzip.compress(b"x" * 999),
        "cut off": whole[: len(whole) // 2],
        "empty": b"",
    }
    cifar10.archive.write_bytes(contents[fault])
    cifar10.declare()
    with pytest.raises(SourceError, match=f"{cifar10.archive}: cannot be unpacked"):
        cifar10.open(cifar10.archive)


def test_a_member_missing_in_the_archive_is_named(cifar10: Miniature) -> None:
    contents = {file.name: file.read_bytes() for file in cifar10.folder.iterdir() if file.name != "data_batch_3"}
    cifar10.pack([cifar10.member(pair) for pair in contents.items()])
    with pytest.raises(SourceError, match=f"{cifar10.archive}: data_batch_3 is missing"):
        cifar10.open(cifar10.archive)


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "hostile",
    [
        tar_member("../outside"),
        tar_member("cifar-10-batches-py/../../outside"),
        tar_member("link", tarfile.SYMTYPE, "../outside"),
        tar_member("link", tarfile.SYMTYPE, "/etc/passwd"),
        tar_member("link", tarfile.LNKTYPE, "../outside"),
        tar_member("pipe", tarfile.FIFOTYPE),
        tar_member("device", tarfile.CHRTYPE),
    ],
    ids=lambda member: f"{member.name} {member.linkname}",
)
def test_an_archive_that_reaches_out_is_refused(cifar10: Miniature, hostile: tarfile.TarInfo) -> None:
    contents = {file.name: file.read_bytes() for file in cifar10.folder.iterdir()}
    cifar10.pack([(hostile, b""), *map(cifar10.member, contents.items())])
    with pytest.raises(SourceError, match=f"{cifar10.archive}: cannot be unpacked"):
        cifar10.open(cifar10.archive)


@pytest.mark.parametrize(
    "impostor",
    [
        tar_member("/cifar-10-batches-py/data_batch_3"),
        tar_member("data_batch_3"),
        tar_member("cifar-10-batches-py/data_batch_3", tarfile.DIRTYPE),
        tar_member("cifar-10-batches-py/data_batch_3", tarfile.SYMTYPE, "data_batch_1"),
        tar_member("cifar-10-batches-py/data_batch_3", tarfile.SYMTYPE, "nowhere"),
        tar_member("cifar-10-batches-py/data_batch_3", tarfile.LNKTYPE, "cifar-10-batches-py/data_batch_1"),
    ],
    ids=lambda member: f"{member.name} {member.linkname}",
)
def test_a_link_a_folder_or_another_path_is_not_taken_for_a_member(
    cifar10: Miniature, impostor: tarfile.TarInfo
) -> None:
    contents = {file.name: file.read_bytes() for file in cifar10.folder.iterdir() if file.name != "data_batch_3"}
    cifar10.pack([*map(cifar10.member, contents.items()), (impostor, b"")])
    with pytest.raises(SourceError, match="data_batch_3 is missing"):
        cifar10.open(cifar10.archive)


class Calls:
    """Is pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_a_pickle_that_runs_a_command_is_refused_and_the_command_does_not_run(
    cifar10: Miniature, name: str, packed: bool
) -> None:
    proof = cifar10.place / "it-ran"
    trees = small_trees(CIFAR10)
    trees[name]["labels"] = Calls(os.system, f"touch {proof}")
    cifar10.publish({name: python3_pickle(tree) for name, tree in trees.items()})
    with pytest.raises(SourceError, match=rf"{name} is not a plain pickle \(it asks for \w+\.system\)\. Do not use"):
        cifar10.open(cifar10.archive if packed else cifar10.folder)
    assert not proof.exists()
    pickle.loads((cifar10.folder / name).read_bytes())  # as torchvision would
    assert proof.exists()


@pytest.mark.parametrize("call", [Calls(eval, "1"), Calls(exec, "1"), Calls(getattr, "", "join"), Calls(open, "/x")])
def test_built_in_functions_are_refused(call: Calls) -> None:
    with pytest.raises(pickle.UnpicklingError, match="it asks for"):
        PlainUnpickler(io.BytesIO(python3_pickle([call]))).load()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "asked",
    ["os.system", "builtins.eval", "subprocess.Popen", "numpy.load", "numpy.ndarray.__class__", "numpy.core.multiarray.scalar",
     "_codecs.decode", "copyreg._reconstructor", "functools.partial", "importlib.import_module", "builtins.dict"],
)  # fmt: skip
def test_nothing_is_admitted_but_arrays(asked: str, protocol: int) -> None:
    split = asked.index(".", len("numpy.core.multiarray") if asked.startswith("numpy.core") else 0)
    module, name = asked[:split], asked[split + 1 :]
    if protocol == 4:
        texts = b"".join(pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, name))
        content = b"\x80\x04" + texts + pickle.STACK_GLOBAL + b"."
    else:
        content = (b"\x80\x02" if protocol else b"") + f"c{module}\n{name}\n.".encode()
    with pytest.raises(pickle.UnpicklingError, match=f"it asks for {asked}"):
        PlainUnpickler(io.BytesIO(content)).load()


def test_arrays_and_plain_containers_are_admitted() -> None:
    tree = {
        "a": [1, 2.5, None, True, "text", b"bytes"],
        "b": np.arange(6, dtype=np.int32).reshape(2, 3),
        "c": (1, {2: 3}),
    }
    found = PlainUnpickler(io.BytesIO(python3_pickle(tree))).load()
    np.testing.assert_array_equal(found.pop("b"), tree.pop("b"))
    assert found == tree


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is not a plain pickle"),
        (b"no pickle", "is not a plain pickle"),
        (python3_pickle(small_trees(CIFAR10)["test_batch"])[:-100], "is not a plain pickle"),
        (python3_pickle([1]), "does not hold a dictionary"),
        (python3_pickle({}), "does not hold images of 32x32x3 with labels"),
        (python3_pickle({"data": PIXELS}), "does not hold images"),
        (python3_pickle({"data": PIXELS, "labels": [1]}), "does not hold images"),
        (python3_pickle({"data": PIXELS[:, :-1], "labels": [1, 2]}), "does not hold images"),
        (python3_pickle({"data": PIXELS.astype(np.int64), "labels": [1, 2]}), "does not hold images"),
        (python3_pickle({"data": PIXELS.tolist(), "labels": [1, 2]}), "does not hold images"),
    ],
    ids=range(10),
)
def test_a_batch_that_is_something_else_is_named(cifar10: Miniature, content: bytes, expected: str) -> None:
    contents = {file.name: file.read_bytes() for file in cifar10.folder.iterdir()}
    cifar10.publish(contents | {"test_batch": content})
    with pytest.raises(SourceError, match=f"{cifar10.folder}: test_batch {expected}"):
        cifar10.open(cifar10.folder)
