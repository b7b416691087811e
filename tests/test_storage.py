import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from infra.local.ports import free_ports
from rcnn import storage
from rcnn.cli import main
from rcnn.errors import ClusterError, ConfigError, DataError, RcnnError
from rcnn.storage import StageFolder, Storage


def test_json_comes_back_and_no_draft_is_left(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_json("a/b.json", {"x": [1, 2]})
    assert storage.read_json("a/b.json") == {"x": [1, 2]}
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b.json"]
    assert storage.read_json("a/c.json") is None


def test_a_stream_leaves_a_whole_file_or_what_was_there(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with storage.writing_file("a/b") as stream:
        stream.write(b"one")
        assert not storage.exists("a/b")
        stream.write(b" two")

    def fail_halfway() -> None:
        with storage.writing_file("a/b") as stream:
            stream.write(b"other")
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        fail_halfway()
    assert storage.read_bytes("a/b") == b"one two"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b"]


def test_folders_are_copied_both_ways_and_deleted(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "root"))
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_text("text")
    storage.upload(source, "copy")
    assert storage.read_text("copy/sub/file") == "text"
    storage.download("copy", tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "file").read_text() == "text"
    storage.delete("copy")
    storage.delete("copy")
    assert not storage.exists("copy")


def test_another_kind_of_storage_works_by_its_uri(tmp_path: Path) -> None:
    storage = Storage(tmp_path.as_uri())
    storage.write_json("x.json", 1)
    assert (tmp_path / "x.json").read_text() == "1\n"
    with pytest.raises(ConfigError, match="not a local folder"):
        storage.local_path("mlflow.db")


def test_an_unknown_uri_and_an_unwritable_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="storage = 'carrier-pigeon://x' cannot be opened"):
        Storage("carrier-pigeon://x").exists("y")
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="cannot be written"):
        Storage(str(tmp_path / "file")).write_text("x", "y")


def address_of_s3(port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    end = f"scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1&allow_bucket_creation=true"
    return f"s3://bucket/x?{end}"


@pytest.mark.long
@pytest.mark.parametrize("use", [lambda store: store.read_json("x"), lambda store: store.write_json("x", 1)])
def test_an_object_store_that_stays_away_may_be_back_later(
    use: Callable[[Storage], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SECONDS_TO_WAIT", 0)
    [port] = free_ports(1)
    with pytest.raises(ClusterError, match=r"s3://.*cannot be (read|written) .*Check that the store answers") as raised:
        use(Storage(address_of_s3(port, monkeypatch)))
    assert raised.value.retryable


@pytest.mark.long
def test_an_object_store_that_is_restarted_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    [port] = free_ports(1)
    server, said = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False), list[str]()

    def start_it(text: str) -> None:
        said.append(text)
        server.start()

    monkeypatch.setattr(storage, "say", start_it)
    store = Storage(address_of_s3(port, monkeypatch))
    try:
        store.write_json("y", 1)
        assert store.read_json("y") == 1
    finally:
        server.stop()
    [line] = said
    assert re.search(r"s3://bucket/x/y cannot be written .*; trying again for 60 s", line)


@pytest.mark.parametrize("root", ["/dev/null", "/etc/passwd/x", "~no-such-user/x", "n" * 300])
@pytest.mark.parametrize("command", [["data", "list"], ["data", "verify", "x"], ["registry"], ["predict", "x.png"]])
def test_an_impossible_storage_is_one_line(root: str, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.png").touch()
    assert main([*command, "--set", f"storage={root}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert root.split("/")[0][:20] in error


def test_a_storage_that_is_not_there_yet_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list", "--set", f"storage={tmp_path / 'new'}"]) == 0
    assert "there are no data sets" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_errors_keep_their_parts_between_processes() -> None:
    error = DataError("what", where="here", remedy="do that", retryable=True)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, RcnnError)
    assert (str(copy), copy.retryable) == ("here: what. do that", True)


def test_what_a_killed_attempt_left_is_deleted(tmp_path: Path) -> None:
    target = StageFolder(Storage(str(tmp_path)), "runs/x")
    target.storage.write_text(target.path("ray-0a1b2c3d/state"), "")
    with target.scratch() as own:
        target.storage.write_text(f"{own}/state", "")
        assert [target.path(name) for name in target.storage.list_folders(target.name)] == [own]
    assert target.storage.list_folders(target.name) == []
