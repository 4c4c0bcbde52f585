"""Run folders on a local disk or on anything that pyarrow opens by URI (s3://, gs://, hdfs://, …)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from ray_det.retry import PATIENCE_S, patiently, reason
from ray_det.types import TrainingError, UserError
from ray_det.uris import plain, resolve

T = TypeVar("T")

COPY_BYTES = 1 << 20


class StorageError(TrainingError):
    """A storage stayed out of reach, full, or refused what was asked of it."""


@dataclass(frozen=True)
class Folder:
    """A folder by absolute local path or URI. Paths given to its methods are relative to it.

    What fails is tried again for `patience_s` seconds, then it is a `StorageError`; `FileNotFoundError` comes at once.
    """

    uri: str
    patience_s: float = PATIENCE_S

    @classmethod
    def at(cls, location: str, patience_s: float = PATIENCE_S) -> Folder:
        """From what a user types: a URI stays, a local path or `file://` becomes an absolute path.

        Raises:
            UserError: a URI with a query or fragment.
        """
        if "://" not in (path := plain(location)):
            return cls(str(Path(path).expanduser().resolve()), patience_s)
        if "?" in path or "#" in path:
            raise UserError(f"storage {location}: ? and # are not understood in a URI, only scheme://host/path is")
        return cls(path.rstrip("/"), patience_s)

    @property
    def local(self) -> Path | None:
        """Its path, or None where it is remote."""
        return None if "://" in self.uri else Path(self.uri)

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{name}", self.patience_s)

    def exists(self, name: str = "") -> bool:
        return self._do("reach", name, lambda system, path: system.get_file_info(path).type != fs.FileType.NotFound)

    def names(self) -> list[str]:
        """Names of what is directly inside, sorted."""

        def listed(system: fs.FileSystem, path: str) -> list[str]:
            return sorted(i.base_name for i in system.get_file_info(fs.FileSelector(path, allow_not_found=True)))

        return self._do("list", "", listed)

    def read_text(self, name: str) -> str:
        def read(system: fs.FileSystem, path: str) -> str:
            with system.open_input_stream(path) as stream:
                return stream.read().decode()

        return self._do("read", name, read)

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_text(name))

    def write_text(self, name: str, text: str) -> None:
        """Whole or not at all, on file systems that can rename."""

        def write(system: fs.FileSystem, path: str) -> None:
            system.create_dir(path.rsplit("/", 1)[0], recursive=True)
            target = f"{path}.tmp" if self.local else path
            with system.open_output_stream(target) as stream:
                stream.write(text.encode())
            if self.local:
                system.move(target, path)

        self._do("write", name, write)

    def upload(self, source: Path, name: str = "") -> None:
        """Copy a local file or folder to `name`."""

        def copy(system: fs.FileSystem, path: str) -> None:
            files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
            for file in files:
                target = f"{path}/{file.relative_to(source).as_posix()}" if source.is_dir() else path
                system.create_dir(target.rsplit("/", 1)[0], recursive=True)
                # Arrow's copy_files takes an upload for done whose last part the object store refused.
                with file.open("rb") as content, system.open_output_stream(target) as stream:
                    shutil.copyfileobj(content, stream, COPY_BYTES)

        self._do("write", name, copy)

    def replace(self, source: Path, name: str, last: str) -> None:
        """Move a local folder to `name`, in place of the one there; where there is `last` of its files, it is whole.

        On a local disk by renaming: whoever has the old one's files open keeps them, and a kill leaves the old one, the
        new one or none, never a mixture. `source` is on the same disk then.
        """
        if not (target := (self / name).local):
            (self / name).delete()
            for file in sorted(source.iterdir(), key=lambda path: path.name == last):
                self.upload(file, f"{name}/{file.name}")
            return shutil.rmtree(source)
        old = target.with_name(f".{name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        source.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def download(self, target: Path, name: str = "") -> None:
        """Copy a file or folder `name` to a local path."""

        def copy(system: fs.FileSystem, path: str) -> None:
            is_folder = system.get_file_info(path).type == fs.FileType.Directory
            (target if is_folder else target.parent).mkdir(parents=True, exist_ok=True)
            fs.copy_files(path, str(target), source_filesystem=system, destination_filesystem=fs.LocalFileSystem())

        self._do("read", name, copy)

    def delete(self) -> None:
        """The folder, or the file that stands in its place."""

        def remove(system: fs.FileSystem, path: str) -> None:
            kind = system.get_file_info(path).type
            if kind == fs.FileType.Directory:
                system.delete_dir(path)
            elif kind == fs.FileType.File:
                system.delete_file(path)

        self._do("delete", "", remove)

    def _do(self, verb: str, name: str, act: Callable[[fs.FileSystem, str], T]) -> T:
        uri = f"{self.uri}/{name}" if name else self.uri
        system, path = (fs.LocalFileSystem(), uri) if self.local else resolve(uri)
        try:
            return patiently(lambda: act(system, path), patience_s=self.patience_s)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"cannot {verb} {uri}: {reason(error)}") from error
