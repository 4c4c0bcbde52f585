"""Run folders on a local disk or on anything that pyarrow opens by URI (s3://, gs://, hdfs://, …)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from ray_det.types import UserError


@dataclass(frozen=True)
class Folder:
    """A folder by absolute local path or URI. Paths given to its methods are relative to it."""

    uri: str

    @classmethod
    def at(cls, location: str) -> Folder:
        """From what a user types: a URI stays, a local path becomes absolute."""
        return cls(location.rstrip("/") if "://" in location else str(Path(location).expanduser().resolve()))

    @property
    def local(self) -> Path | None:
        """Its path, or None where it is remote."""
        if self.uri.startswith("file://"):
            return Path(self.uri.removeprefix("file://"))
        return None if "://" in self.uri else Path(self.uri)

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{name}")

    def _resolve(self, name: str = "") -> tuple[fs.FileSystem, str]:
        uri = f"{self.uri}/{name}" if name else self.uri
        try:
            return fs.FileSystem.from_uri(uri) if "://" in uri else (fs.LocalFileSystem(), uri)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot open storage {uri}: {error}") from error

    def exists(self, name: str = "") -> bool:
        filesystem, path = self._resolve(name)
        return filesystem.get_file_info(path).type != fs.FileType.NotFound

    def names(self) -> list[str]:
        """Names of what is directly inside, sorted."""
        filesystem, path = self._resolve()
        return sorted(i.base_name for i in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True)))

    def read_text(self, name: str) -> str:
        filesystem, path = self._resolve(name)
        with filesystem.open_input_stream(path) as stream:
            return stream.read().decode()

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_text(name))

    def write_text(self, name: str, text: str) -> None:
        """Whole or not at all, on file systems that can rename."""
        filesystem, path = self._resolve(name)
        filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
        target = f"{path}.tmp" if self.local else path
        with filesystem.open_output_stream(target) as stream:
            stream.write(text.encode())
        if self.local:
            filesystem.move(target, path)

    def upload(self, source: Path, name: str = "") -> None:
        """Copy a local file or folder to `name`."""
        filesystem, path = self._resolve(name)
        filesystem.create_dir(path if source.is_dir() else path.rsplit("/", 1)[0], recursive=True)
        fs.copy_files(str(source), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)

    def replace(self, source: Path, name: str) -> None:
        """Put a local folder at `name` in place of the one there. On a local disk by renaming: whoever has the old
        one's files open keeps them, and a kill leaves the old one, the new one or none, never a mixture."""
        if not (target := (self / name).local):
            return self.upload(source, name)
        new, old = target.with_name(f".{name}.new"), target.with_name(f".{name}.old")
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(source, new)
        if target.exists():
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    def download(self, target: Path, name: str = "") -> None:
        """Copy a file or folder `name` to a local path."""
        filesystem, path = self._resolve(name)
        is_folder = filesystem.get_file_info(path).type == fs.FileType.Directory
        (target if is_folder else target.parent).mkdir(parents=True, exist_ok=True)
        fs.copy_files(path, str(target), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())

    def delete(self) -> None:
        """The folder, or the file that stands in its place."""
        filesystem, path = self._resolve()
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == fs.FileType.File:
            filesystem.delete_file(path)
