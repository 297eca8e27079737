"""A folder of weights written shard by shard, by a run that may be killed at any time and started again.

Every file is written under a temporary name, flushed, and renamed; what is done is noted after each in a file
of progress. That goes last, when the folder is complete, and config.json comes right before it: a folder that
is not complete is not taken for a model by anybody.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..adapter_files import _fsync
from .common import size_text
from .model_folder import CONFIG, INDEX, WEIGHTS, index_text, json_text

PROGRESS = ".fastlora-progress.json"
_SPARE = 16 * 2**20  # for headers, an index and the file system's own


class ShardRun:
    """The writing of one folder.

    Args:
        folder: to be made; it may be there if it is empty, or was left by a run of the same `what`.
        what: JSON of all that the bytes depend on.
        shards: the names of the files to come.
        needed: bytes that all of it will take.

    Attributes:
        done: by shard, {"tensors": {key: bytes}, "note": ...} of those that are written.
        resumed: how many of them an earlier run wrote.

    Used as a context. Leaving it by ValueError or TypeError, which is for input that gives no result, removes
    what was written; by anything else, that stays and can be resumed.

    Raises FileExistsError for a folder that is there and is not this run's, OSError for one that another
    process writes and for a disk without the space.
    """

    def __init__(self, folder: Path, what: Mapping[str, Any], shards: Sequence[str], needed: int) -> None:
        self.folder, self.shards, self.needed = folder, list(shards), needed
        self.what = json.loads(json.dumps(what))
        self.done: dict[str, dict[str, Any]] = {}
        self.resumed = 0
        self._lock: int | None = None

    def __enter__(self) -> ShardRun:
        new = not os.path.lexists(self.folder)
        if new:
            self._check_space()
            self.folder.mkdir(parents=True)
        elif not self.folder.is_dir():
            raise self._taken()
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            self._exclude_others()
            if not new:
                self._read_progress()
                self._check_space()
            self._note()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and issubclass(kind, (ValueError, TypeError)):
                self._remove()
        finally:
            self._unlock()

    @property
    def left(self) -> list[str]:
        return [name for name in self.shards if name not in self.done]

    def write(self, name: str, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """A shard. `note` is JSON to be found in `done`, by this run or the one that goes on."""
        contiguous = {key: t.contiguous() for key, t in tensors.items()}
        with self._replacing(name) as temporary:
            safetensors.torch.save_file(contiguous, temporary, metadata={"format": "pt"})
        self.done[name] = {"tensors": {key: t.nbytes for key, t in contiguous.items()}, "note": note}
        self._note()

    def finish(self, config: Mapping[str, Any], others: Iterable[Path]) -> None:
        """All that goes beside the shards."""
        for other in others:
            with self._replacing(other.name) as temporary:
                shutil.copyfile(other, temporary)
        if self.shards != [WEIGHTS]:
            self._text(INDEX, index_text({name: self.done[name]["tensors"] for name in self.shards}))
        self._text(CONFIG, json_text(config))
        (self.folder / PROGRESS).unlink()
        _fsync(self.folder)

    # --- progress -----------------------------------------------------------------------------------------

    def _read_progress(self) -> None:
        """Of a folder that is there."""
        file = self.folder / PROGRESS
        if not file.is_file():
            if all(p.name == f".{PROGRESS}.tmp" for p in self.folder.iterdir()):
                return
            raise self._taken()
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            then, now = stored["what"], self.what
            other = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
            done = {name: stored["done"][name] for name in self.shards if name in stored["done"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FileExistsError(f"expected progress of a run in {file}, got what is none") from None
        if other:
            raise FileExistsError(
                f"expected {self.folder} to be left by a run like this one, got another {', '.join(other)}; "
                "remove it to begin anew"
            )
        self.done = {name: one for name, one in done.items() if (self.folder / name).is_file()}
        self.resumed = len(self.done)

    def _taken(self) -> FileExistsError:
        return FileExistsError(
            f"expected a new folder to write, or one that a killed run left, got {self.folder}, which is "
            "there and is neither"
        )

    def _exclude_others(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of a process: a kill lets it go
        except BlockingIOError:
            raise OSError(f"expected {self.folder} to be free, got one that another process writes") from None
        except OSError:
            pass  # a file system without locks on folders

    def _note(self) -> None:
        self._text(PROGRESS, json_text({"what": self.what, "done": self.done}))

    def _check_space(self) -> None:
        there = next(p for p in (self.folder.absolute(), *self.folder.absolute().parents) if p.exists())
        written = sum(size for one in self.done.values() for size in one["tensors"].values())
        needed, free = self.needed - written + _SPARE, shutil.disk_usage(there).free
        if free < needed:
            raise OSError(f"expected {size_text(needed)} free for {self.folder}, got {size_text(free)}")

    # --- files --------------------------------------------------------------------------------------------

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        temporary = self.folder / f".{name}.tmp"  # always the same, so that a killed run's is overwritten
        yield temporary
        _fsync(temporary)
        os.replace(temporary, self.folder / name)
        _fsync(self.folder)

    def _text(self, name: str, text: str) -> None:
        with self._replacing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _remove(self) -> None:
        for name in (*self.shards, PROGRESS):
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / f".{name}.tmp").unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def progress_bar(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Gives advance(bytes); a bar on stderr where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
