"""Files that are complete or absent: JSON, folders that appear by rename, sums of what is in them, the disk's words as ours."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import CheckpointError, ConfigError


def local_path(given: str | os.PathLike[str], what: str) -> Path:
    """Return a path that a caller gave, with ~ for the home; raises ConfigError for what is none, by the name of `what` it is."""
    try:
        return Path(given).expanduser()
    except (TypeError, RuntimeError):  # RuntimeError: no such home
        raise ConfigError(f"{what}={given!r}: expected a path, for instance 'out' or '~/models/out'.") from None


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn what the file system or safetensors says into a CheckpointError."""
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):  # safetensors wraps what the system says when writing
            raise CheckpointError(f"{doing}: the disk is full. Free some space and run again.") from error
        raise CheckpointError(f"{doing}: not a valid safetensors file ({error}).") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(f"{doing}: the disk is full. Free some space and run again.") from error
        raise CheckpointError(f"{doing}: {error.strerror or error}.") from error


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a neighbour file, flush it to disk, then rename it to `path`."""
    draft = path.with_name(f"{path.name}.tmp")
    with disk_errors(f"writing {path}"):
        try:
            write(draft)
            sync(draft)
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any, atomic: bool = True) -> None:
    """Write JSON, keys in the order given; atomic is not needed in a draft that appears as a whole."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if atomic:
        write_atomic(path, lambda draft: draft.write_text(text, encoding="utf-8"))
        return
    with disk_errors(f"writing {path}"):
        path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises CheckpointError when the file is missing, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object.")
    return value


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of a model folder; the hub's cache, whose files are links, counts as one with its blobs."""
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise CheckpointError(f"{path} is a link out of the folder, to {path.resolve()}. Copy the file if it is meant.")


class Flusher:
    """Sends a file's pages to the disk on a thread of its own, while more is made and written."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None

    def nudge(self, file: Any) -> None:
        """Flush an open file, unless the disk has not finished with what it got before."""
        if self._under_way is None or self._under_way.done():
            self.wait()
            file.flush()
            self._under_way = self._thread.submit(os.fsync, file.fileno())

    def close(self, file: Any) -> None:
        """Flush a file once more and close it, in the background; `settle` waits for it."""
        self.wait()
        file.flush()
        self._under_way = self._thread.submit(_sync_and_close, file)

    def wait(self) -> None:
        """Wait for the disk, and raise what it has to say."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def settle(self) -> None:
        """Wait, for the last time."""
        self.wait()
        self._thread.shutdown()


def _sync_and_close(file: Any) -> None:
    with file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def complete_folder(target: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Give a draft folder that becomes `target` by rename when the block ends well, and vanishes when it does not.

    Raises CheckpointError when target exists and is not an empty folder, or cannot be made.
    """
    check_output(target)
    draft = scratch or target.with_name(f"{target.name}.writing")
    with disk_errors(f"making {draft}"):
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir(parents=True)
    try:
        yield draft
        with disk_errors(f"finishing {target}"):
            for file in draft.iterdir():
                sync(file)
            if target.exists():
                target.rmdir()
            os.replace(draft, target)
            sync(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def check_output(target: Path) -> None:
    """Refuse an output that exists with something in it, or whose parent cannot be written."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"output {target} exists already. Choose another folder or remove it first.")
    with disk_errors(f"output {target} cannot be made"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise CheckpointError(f"output {target} cannot be made: {target.parent} is not writable.")


MANIFEST = "SHA256SUMS"


def write_manifest(folder: Path) -> None:
    """Write the sha256 of every file into SHA256SUMS, as `sha256sum -c` reads it."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != MANIFEST)
    text = "".join(f"{_sha256(file)}  {file.name}\n" for file in files)
    write_atomic(folder / MANIFEST, lambda draft: draft.write_text(text, encoding="utf-8"))


def check_manifest(folder: Path) -> bool | None:
    """Whether a folder has a manifest that holds; None without one.

    Raises CheckpointError naming the first file that is missing or differs.
    """
    if not (folder / MANIFEST).is_file():
        return None
    with disk_errors(f"reading {folder / MANIFEST}"):
        lines = (folder / MANIFEST).read_bytes().decode("utf-8", "replace").splitlines()
    for line in lines:
        digest, _, name = line.partition("  ")
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder / MANIFEST} names {name!r}, which is no file in the folder.")
        if _sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name} is not the file that {MANIFEST} was written for.")
    return True


def _sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with disk_errors(f"reading {path}"), path.open("rb") as handle:
        while chunk := handle.read(2**20):
            hasher.update(chunk)
    return hasher.hexdigest()
