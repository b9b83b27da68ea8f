"""The patches in some folders: a fast list of them, and changes to their files.

Beside ``dog.safetensors`` may lie its companions: ``dog.jpg`` (or .jpeg, .png, .webp), its
thumbnail, ``dog.fmn.json``, the user's notes, and ``dog.fmn-train``, from which its training can be
resumed. They move and go with it. A file is only ever named by its folder's number and its path in
the list, so no name leads out of the folders.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

from .. import images
from ..errors import ForgetError
from ..files import PICTURES, STATE_ENDING, AnyPath, checked_stem, write_whole
from .library_entry import HIDDEN, UNREADABLE, describe_file, file_is_changed, read_metadata
from .metadata import THUMBNAIL

SUFFIX = ".safetensors"
NOTES = ".fmn.json"
MAX_NOTES = 4000  # letters
MAX_NOTES_FILE = 1 << 16  # bytes
Contents = dict[tuple[str, int, int], Any]  # (path, time, size) -> what was read there


class PatchFiles(NamedTuple):
    """A patch below a folder: its path there, with /, its file and the companions of that."""

    name: str
    file: os.DirEntry[str]
    companions: list[os.DirEntry[str]]

    @property
    def path(self) -> Path:
        return Path(self.file.path)

    @property
    def picture(self) -> os.DirEntry[str] | None:
        pictures = (item for item in self.companions if item.name.lower().endswith(PICTURES))
        return next(pictures, None)

    def notes(self) -> str:
        """The user's notes; "" if there are none, or none that can be read."""
        for item in self.companions:
            if item.name.endswith(NOTES):
                with suppress(OSError):
                    return _read_notes(Path(item.path))
        return ""


class Library:
    """The patches below ``folders``. What was read of a file is kept until the file changes.

    Args:
        folders: searched in this order; of two files with one name the first is loaded.
    """

    def __init__(self, folders: Sequence[AnyPath]) -> None:
        self.folders = [Path(folder) for folder in folders]
        self._contents: Contents = {}
        self._listed: dict[tuple[int, str], PatchFiles] = {}  # of the last listing
        self._lock = RLock()

    def entries(self) -> list[dict[str, Any]]:
        """The entry of each file, plain data for JSON without empty values.

        Keys: folder (number), name (path with /), size (bytes), date (seconds since 1970);
        concepts ([name, kind, anchor, aliases] of each, all texts), method, family, model, base
        (fingerprint), prediction, rank, loss, scores, measured ([suite, [target]]), notes;
        picture (changes with the thumbnail), beside (names of companions); problem (a word of
        ``library_entry``, if the file cannot be used).

        Raises:
            ForgetError: a folder cannot be read.
        """
        with self._lock:
            before, self._contents = self._contents, {}
            entries, names, listed = [], set(), {}
            for number, folder in enumerate(self.folders):
                for patch in _walk(folder):
                    listed[number, patch.name] = patch
                    with suppress(FileNotFoundError):  # gone since the folder was read
                        entry = {"folder": number, "name": patch.name, **self._entry(patch, before)}
                        if patch.name in names:
                            entry["problem"] = entry.get("problem", HIDDEN)
                        names.add(patch.name)
                        entries.append(entry)
            self._listed = listed
            return entries

    def _entry(self, patch: PatchFiles, before: Contents) -> dict[str, Any]:
        try:
            entry = dict(self._read(patch.file, before, describe_file))
            if entry.pop("thumbnail", False) or patch.picture:
                entry["picture"] = f"{(patch.picture or patch.file).stat().st_mtime_ns:x}"
            for item in patch.companions:
                if item.name.endswith(NOTES):
                    entry["notes"] = self._read(item, before, lambda path, stat: _read_notes(path))
        except FileNotFoundError:
            raise
        except OSError:
            notes = patch.notes()
            return {"problem": UNREADABLE} | ({"notes": notes} if notes else {})
        if patch.companions:
            entry["beside"] = [item.name for item in patch.companions]
        return entry

    def _read(
        self, item: os.DirEntry[str], before: Contents,
        read: Callable[[Path, os.stat_result], Any],
    ) -> Any:  # fmt: skip
        """``read`` of a file, or what it gave before if the file has not changed."""
        stat = item.stat()
        key = item.path, stat.st_mtime_ns, stat.st_size
        content = before[key] if key in before else read(Path(item.path), stat)
        self._contents[key] = content
        return content

    def find(self, folder: object, name: object) -> PatchFiles:
        """The files of a patch in the list, as they are now.

        Raises:
            ForgetError: there is no such patch in the list.
        """
        if type(folder) is int and 0 <= folder < len(self.folders):
            for patch in _walk(self.folders[folder]):
                if patch.name == name:
                    return patch
        raise ForgetError(
            f"There is no patch {name!r:.200} in these folders: refresh the list and choose again."
        )

    def is_changed(self, folder: object, name: object) -> bool | None:
        """``library_entry.file_is_changed`` of a patch.

        Raises:
            ForgetError: there is no such patch, or it cannot be read.
        """
        return file_is_changed(self.find(folder, name).path)

    def picture(self, folder: int, name: str) -> bytes:
        """The thumbnail as a small JPEG, where the last listing saw it.

        Raises:
            ForgetError: there is no such file, or no thumbnail that can be shown.
        """
        known = type(folder) is int and isinstance(name, str)
        patch = self._listed.get((folder, name)) if known else None
        patch = patch or self.find(folder, name)  # newer than the list
        if patch.picture:
            return images.thumbnail_of_file(patch.picture.path)
        path = patch.path
        try:
            metadata = read_metadata(path)
        except OSError as error:
            raise ForgetError(
                f"'{path.name}' cannot be read ({error.strerror}): check its permissions."
            ) from error
        if THUMBNAIL not in metadata:
            raise ForgetError(f"'{path.name}' has no thumbnail: save the patch with one.")
        return images.thumbnail_of_uri(metadata[THUMBNAIL])

    def write_notes(
        self, folder: object, name: object, notes: object, before: object = None
    ) -> str:
        """Keep the user's notes beside the file; empty notes remove theirs.

        Args:
            before: the notes that the user saw. If others stand there by now, nothing is written.
                None: whatever stands there is replaced.

        Returns:
            The notes as they are kept.

        Raises:
            ForgetError: no such file, no text, too long, changed meanwhile, or the folder cannot
                be written to.
        """
        if not isinstance(notes, str) or len(notes) > MAX_NOTES:
            raise ForgetError(f"Notes are a text of at most {MAX_NOTES} letters: shorten them.")
        notes = notes.encode("utf-8", "replace").decode()
        with self._lock:
            patch = self.find(folder, name)
            target = patch.path.with_name(patch.file.name[: -len(SUFFIX)] + NOTES)
            if before is not None and patch.notes() not in (before, notes):
                raise ForgetError(
                    f"The notes of '{patch.file.name}' have been changed elsewhere meanwhile: look "
                    "at both, and save yours again to replace the others."
                )
            if not notes.strip():
                _remove(target, f"The notes of '{patch.file.name}'")
                return ""
            text = json.dumps({"notes": notes}, ensure_ascii=False, indent=2)
            write_whole(target, lambda file: file.write_text(text, encoding="utf-8"))
            return notes

    def delete(self, folder: object, name: object) -> list[str]:
        """Remove the file and its companions; returns the names of the removed files.

        Raises:
            ForgetError: no such file, or the folder cannot be written to.
        """
        with self._lock:
            patch = self.find(folder, name)
            items = [patch.file, *patch.companions]  # the patch first: alone they mean nothing
            for item in items:
                _remove(Path(item.path), f"'{item.name}'")
            self._listed = {}
            return [item.name for item in items]

    def rename(self, folder: object, name: object, to: object) -> str:
        """Give the file and its companions another name in the same folder; returns the new path
        in the list. Nothing is overwritten.

        Args:
            to: the new name, with or without .safetensors.

        Raises:
            ForgetError: no such file, a name that some system refuses, a name that is taken, or
                the folder cannot be written to.
        """
        stem = checked_stem(to, SUFFIX)
        with self._lock:
            patch = self.find(folder, name)
            kept = len(patch.file.name) - len(SUFFIX)  # the letters that the stem replaces
            items = [Path(item.path) for item in (*patch.companions, patch.file)]
            _move_all([(item, item.with_name(stem + item.name[kept:])) for item in items])
            self._listed = {}
            return patch.name.removesuffix(patch.file.name) + stem + patch.file.name[kept:]


def _walk(root: Path) -> Iterator[PatchFiles]:
    """Every patch below a folder.

    Links to folders are followed, as ComfyUI does, but each folder is read once.
    """
    waiting, seen = [(str(root), "")], set()
    while waiting:
        folder, prefix = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        files = {}
        for item in _items(folder):
            try:
                if item.is_dir():
                    waiting.append((item.path, f"{prefix}{item.name}/"))
                elif item.is_file():
                    files[item.name] = item
            except OSError:
                continue  # a link that leads to itself or to a forbidden place
        for name, file in files.items():
            # macOS leaves ._NAME beside files that it copies to other systems.
            if name.lower().endswith(SUFFIX) and name[:2] != "._" and _is_unicode(prefix + name):
                stem = name[: -len(SUFFIX)]
                beside = (files.get(stem + suffix) for suffix in (*PICTURES, NOTES, STATE_ENDING))
                yield PatchFiles(prefix + name, file, [item for item in beside if item])


def _items(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return sorted(items, key=lambda item: item.name)
    except (FileNotFoundError, NotADirectoryError):
        return []  # not made yet, gone, or a file is in its place
    except OSError as error:
        raise ForgetError(
            f"The folder '{folder}' cannot be read ({error.strerror}): check its permissions."
        ) from error


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # undecodable bytes: the page could not send the name back
        return False
    return True


def _read_notes(path: Path) -> str:
    """The notes in a file; "" if it is none of ours."""
    with open(path, "rb") as file:
        data = file.read(MAX_NOTES_FILE + 1)
    try:
        notes = json.loads(data)["notes"] if len(data) <= MAX_NOTES_FILE else ""
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return notes[:MAX_NOTES] if isinstance(notes, str) else ""


def _is_other_case(source: Path, target: Path) -> bool:
    """Whether ``target`` is the file itself, its name differing in upper and lower case alone, as
    on Windows and macOS."""
    if source.name.casefold() != target.name.casefold() or target.name in os.listdir(target.parent):
        return False
    with suppress(OSError):
        return os.path.samefile(source, target)
    return False


def _move_all(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename files, all or none. Each new name is first taken with an empty file, which fails if
    there is one already; a rename alone would overwrite it."""
    taken, moved = [], []
    try:
        for source, target in moves:
            if not _is_other_case(source, target):
                open(target, "xb").close()
                taken.append(target)
        for source, target in moves:
            os.replace(source, target)
            if target in taken:
                taken.remove(target)
            moved.append((source, target))
    except OSError as error:
        for source, target in reversed(moved):
            os.replace(target, source)
        if isinstance(error, FileExistsError):
            raise ForgetError(
                f"There is a file '{Path(error.filename).name}' already: choose another name."
            ) from error
        raise _no_right(f"'{moves[-1][0].name}'", "renamed", error) from error
    finally:
        for target in taken:
            target.unlink(missing_ok=True)


def _remove(path: Path, what: str) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _no_right(what, "deleted", error) from error


def _no_right(what: str, done: str, error: OSError) -> ForgetError:
    return ForgetError(
        f"{what} could not be {done} ({error.strerror}): check that you may write to its folder."
    )
