"""Run folders on a real S3 server, which goes away and comes back."""

from __future__ import annotations

import errno
import re
import threading
from pathlib import Path

import pytest

from ray_det.data import files, paths
from ray_det.retry import patiently
from ray_det.storage import Folder, StorageError
from ray_det.types import UserError
from tests.s3 import S3Server, s3_server


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path) -> Folder:
    if request.param == "local":
        return Folder.at(str(tmp_path / "runs" / "run"))
    request.getfixturevalue("s3")
    return Folder.at(f"s3://bucket/{tmp_path.name}/run")


def test_texts_files_and_folders_come_back_as_they_were(folder, tmp_path):
    folder.write_text("a/b.json", '{"ä": 1}')
    assert folder.read_json("a/b.json") == {"ä": 1}
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "x").write_bytes(b"x" * 6_000_000)
    (source / "sub" / "y").write_text("y")
    folder.upload(source, "copy")
    folder.download(tmp_path / "back", "copy")
    assert (tmp_path / "back" / "x").read_bytes() == (source / "x").read_bytes()
    assert (tmp_path / "back" / "sub" / "y").read_text() == "y"
    assert folder.names() == ["a", "copy"]
    assert (folder.exists("a"), folder.exists("b")) == (True, False)
    (folder / "copy").delete()
    assert not folder.exists("copy/x")
    with pytest.raises(FileNotFoundError):
        folder.read_text("nothing")


def test_a_remote_path_is_taken_as_it_is_written(s3, tmp_path):
    root = Folder.at(f"s3://bucket/{tmp_path.name}")
    (tmp_path / "x").write_text("1")
    for name in ("my%20runs", "my runs", "é", "a"):
        folder = Folder.at(f"{root.uri}/{name}")
        folder.upload(tmp_path / "x", "x")
        assert files.read_text(f"{folder.uri}/x") == folder.read_text("x") == "1"
    with files.writing(f"{root.uri}/a#1?/b/x") as path:
        path.write_text("2")
    assert root.names() == ["a", "a#1?", "my runs", "my%20runs", "é"]
    (root / "a#1?").delete()
    (root / "my%20runs").delete()
    left = [name for name in ("a#1?/b/x", "my%20runs/x", "a/x", "my runs/x") if root.exists(name)]
    assert left == ["a/x", "my runs/x"]


def test_a_file_uri_is_unquoted_whoever_reads_it(tmp_path):
    local = tmp_path / "my runs" / "50%#1?é"
    folder = Folder.at(local.as_uri())
    folder.write_text("x", "1")
    folder.upload(local / "x", "y")
    with files.writing(f"{local.as_uri()}/z") as path:
        path.write_text("1")
    assert folder.local == local and folder.uri == str(local) and folder.names() == ["x", "y", "z"]
    assert files.read_text(f"{local.as_uri()}/x") == files.read_text(f"{paths.absolute(local.as_uri())}/x") == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["my runs"]


@pytest.mark.parametrize("location", ["s3://bucket/exp#1/runs", "s3://bucket/runs?region=eu-west-1", "s3://bucket#1"])
def test_a_query_or_fragment_is_refused_before_anything_is_touched(location):
    with pytest.raises(UserError, match=f"^storage {re.escape(location)}: [?] and # are not understood"):
        Folder.at(location)


def test_replacing_leaves_nothing_of_the_one_before(folder, tmp_path):
    for name in ("old", "new"):
        staged = Path(folder.uri if folder.local else tmp_path) / "staging"
        staged.mkdir(parents=True)
        (staged / name).write_text(name)
        folder.replace(staged, "best", last=name)
        assert not staged.exists()
    assert (folder / "best").names() == ["new"]


def test_a_folder_that_is_cut_off_on_its_way_lacks_its_last_file(s3, tmp_path, monkeypatch):
    folder, staged, upload = Folder.at(f"s3://bucket/{tmp_path.name}"), tmp_path / "staging", Folder.upload
    staged.mkdir()
    for name in ("a_last", "b", "c"):
        (staged / name).write_text(name)
    uploads = iter("12")

    def cut_off(self: Folder, source: Path, name: str = "") -> None:
        if next(uploads, None) is None:
            raise StorageError("cut off")
        upload(self, source, name)

    monkeypatch.setattr(Folder, "upload", cut_off)
    with pytest.raises(StorageError):
        folder.replace(staged, "checkpoint", last="a_last")
    assert (folder / "checkpoint").names() == ["b", "c"]


@pytest.mark.parametrize("outage", [pytest.param("stopped", marks=pytest.mark.slow), "frozen"])
def test_an_outage_is_waited_for(outage, s3: S3Server, tmp_path):
    folder = Folder.at(f"s3://bucket/{tmp_path.name}")
    folder.write_text("data", "1")
    end, again = (s3.stop, s3.start) if outage == "stopped" else (s3.freeze, s3.thaw)
    end()
    timer = threading.Timer(3, again)
    timer.start()
    folder.write_text("text", "2")
    assert files.read_bytes(f"{folder.uri}/data", patience_s=60) == b"1"
    timer.join()
    assert folder.names() == ["data", "text"]


def test_what_does_not_fit_is_an_error_and_not_an_empty_object(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 30_000_000)
    with s3_server(tmp_path / "s3", room_mb=16):
        folder = Folder.at("s3://bucket/full", patience_s=0.1)
        uploaded = []
        with pytest.raises(StorageError, match="^cannot write s3://bucket/full/"):
            for name in ("a", "b", "c"):
                folder.upload(tmp_path / "file", name)
                uploaded.append(name)
        assert folder.names() == uploaded


@pytest.mark.slow
def test_an_outage_for_good_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with pytest.raises(StorageError, match=r"^cannot write s3://bucket/run/text: .*Could not connect"):
        Folder.at("s3://bucket/run", patience_s=0.5).write_text("text", "")


def test_what_time_does_not_mend_is_not_tried_again():
    for error in (FileNotFoundError(), PermissionError(), OSError("AWS Error ACCESS_DENIED during PutObject")):
        tries = []

        def fail(error: OSError = error, tries: list[int] = tries) -> None:
            tries.append(1)
            raise error

        with pytest.raises(OSError):
            patiently(fail, patience_s=60)
        assert len(tries) == 1


def test_what_time_mends_is_tried_until_it_works(caplog):
    errors = [OSError(errno.ENOSPC, "No space left on device"), TimeoutError("slow")]

    def work() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    assert patiently(work, patience_s=60) == "done"
    assert [record.message for record in caplog.records] == ["No space left on device: trying again for up to 60 s"]
