"""The patches in some folders: a fast list of them, and what may be done to their files.

Beside ``dog.safetensors`` may lie ``dog.jpg`` (or .jpeg, .png, .webp), its thumbnail,
``dog.fmn.json``, the user's notes, and ``dog.fmn-train``, from which its training can be
resumed. They move and go with it. A file is only ever named by its folder's number and its path in
the list, so no name leads out of the folders.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from threading import RLock

from .. import images
from ..errors import ForgetError
from ..files import STATE_ENDING, checked_stem, write_whole
from .library_entry import HIDDEN, UNREADABLE, described, metadata_of
from .metadata import THUMBNAIL

SUFFIX = ".safetensors"
NOTES = ".fmn.json"
PICTURES = ".jpg", ".jpeg", ".png", ".webp"
MAX_NOTES = 4000  # letters
MAX_NOTES_FILE = 1 << 16  # bytes


class Shelf:
    """The list of patches below ``folders``. What was read is kept until a file changes.

    Args:
        folders: paths, searched in this order; of two files with one name the first is loaded.
    """

    def __init__(self, folders):
        self.folders = [Path(folder) for folder in folders]
        self._held = {}  # path -> (time and size, what was read)
        self._lock = RLock()

    def entries(self):
        """One dict a file, JSON-able and without what is empty.

        Keys: folder (number), name (path with /), size (bytes), date (seconds since 1970);
        concepts ([name, kind, anchor, aliases] each, all texts), method, family, model, base
        (fingerprint), prediction, rank, loss, scores, measured ([suite, [target]]), notes;
        picture (changes with the thumbnail), beside (names of the files that go with it); problem
        (a word of ``shelf_header``, if it cannot be used).

        Raises:
            ForgetError: a folder cannot be read.
        """
        with self._lock:
            before, self._held = self._held, {}
            found, names = [], set()
            for number, folder in enumerate(self.folders):
                for name, file, beside in _walk(folder):
                    with suppress(FileNotFoundError):  # gone since the folder was read
                        entry = {"folder": number, "name": name}
                        entry |= self._entry(file, beside, before)
                        if name in names:
                            entry["problem"] = entry.get("problem", HIDDEN)
                        names.add(name)
                        found.append(entry)
            return found

    def _entry(self, file, beside, before):
        try:
            entry = dict(self._read(file, before, described))
            drawn = [item for item in beside if item.name.lower().endswith(PICTURES)]
            if entry.pop("thumbnail", False) or drawn:
                entry["picture"] = f"{(drawn or [file])[0].stat().st_mtime_ns:x}"
            for item in (item for item in beside if item.name.endswith(NOTES)):
                entry["notes"] = self._read(item, before, lambda path, stat: _notes(path))
        except FileNotFoundError:
            raise
        except OSError:
            notes = _notes_in(beside)
            return {"problem": UNREADABLE} | ({"notes": notes} if notes else {})
        if beside:
            entry["beside"] = [item.name for item in beside]
        return entry

    def _read(self, item, before, read):
        stat = item.stat()
        stamp = stat.st_mtime_ns, stat.st_size
        held = before.get(item.path)
        if held is None or held[0] != stamp:
            held = stamp, read(Path(item.path), stat)
        self._held[item.path] = held
        return held[1]

    def find(self, folder, name):
        """The path of a file in the list, and those of the files beside it.

        Raises:
            ForgetError: there is no such file in the list.
        """
        if type(folder) is int and 0 <= folder < len(self.folders):
            for listed, file, beside in _walk(self.folders[folder]):
                if listed == name:
                    return Path(file.path), [Path(item.path) for item in beside]
        raise ForgetError(
            f"There is no patch {name!r:.200} in these folders: refresh the list and choose again."
        )

    def picture(self, folder, name):
        """The thumbnail as a small JPEG.

        Raises:
            ForgetError: there is no such file, or no thumbnail that can be shown.
        """
        path, beside = self.find(folder, name)
        pictures = [item for item in beside if item.suffix.lower() in PICTURES]
        if pictures:
            return images.of_file(pictures[0])
        try:
            metadata = metadata_of(path, path.stat().st_size) or {}
        except OSError as error:
            raise ForgetError(
                f"'{path.name}' cannot be read ({error.strerror}): check its permissions."
            ) from error
        if THUMBNAIL not in metadata:
            raise ForgetError(f"'{path.name}' has no thumbnail: save the patch with one.")
        return images.of_uri(metadata[THUMBNAIL])

    def write_notes(self, folder, name, notes, before=None):
        """Keep the user's notes beside the file; without notes their file goes.

        Args:
            before: the notes that the user has found there. If others stand there by now,
                nothing is written. None: whatever stands there.

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
            path, beside = self.find(folder, name)
            target = path.with_name(path.name[: -len(SUFFIX)] + NOTES)
            if before is not None and _notes_in(beside) not in (before, notes):
                raise ForgetError(
                    f"The notes of '{path.name}' have been changed elsewhere meanwhile: look at "
                    "both, and save yours again if they shall stand there."
                )
            if notes.strip():
                text = json.dumps({"notes": notes}, ensure_ascii=False, indent=2)
                write_whole(target, lambda file: file.write_text(text, encoding="utf-8"))
            else:
                _changed(path.name, "notes", lambda: target.unlink(missing_ok=True))
                return ""
            return notes

    def delete(self, folder, name):
        """Remove the file and those beside it; the names of what went.

        Raises:
            ForgetError: no such file, or the folder cannot be written to.
        """
        with self._lock:
            path, beside = self.find(folder, name)
            for item in (path, *beside):  # the patch first: without it the others mean nothing
                _changed(path.name, "deleted", lambda item=item: item.unlink(missing_ok=True))
            return [item.name for item in (path, *beside)]

    def rename(self, folder, name, to):
        """Give the file and those beside it another name in the same folder; its new path in the
        list. Nothing is overwritten.

        Args:
            to: the new name, with or without .safetensors.

        Raises:
            ForgetError: no such file, a name that some system refuses, a name that is taken, or
                the folder cannot be written to.
        """
        stem = checked_stem(to, SUFFIX)
        with self._lock:
            path, beside = self.find(folder, name)
            old = path.name[: -len(SUFFIX)]
            moves = [
                (item, item.with_name(stem + item.name[len(old) :])) for item in (*beside, path)
            ]
            _move_all(moves)
            return name[: len(name) - len(path.name)] + stem + path.name[len(old) :]


def _walk(root):
    """(name, file, [files beside it]) of every patch below a folder, as ``os.DirEntry``s.

    Links to folders are followed, as ComfyUI does, but each folder is read once.
    """
    waiting, seen = [(root, "")], set()
    while waiting:
        folder, prefix = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        files = {}
        for item in _listed(folder):
            try:
                if item.is_dir():
                    waiting.append((item.path, f"{prefix}{item.name}/"))
                elif item.is_file():
                    files[item.name] = item
            except OSError:
                continue  # a link that leads to itself or nowhere we may go
        for name, file in files.items():
            if name.lower().endswith(SUFFIX) and _is_text(prefix + name):
                stem = name[: -len(SUFFIX)]
                beside = (files.get(stem + suffix) for suffix in (*PICTURES, NOTES, STATE_ENDING))
                yield prefix + name, file, [item for item in beside if item]


def _listed(folder):
    try:
        with os.scandir(folder) as items:
            return sorted(items, key=lambda item: item.name)
    except (FileNotFoundError, NotADirectoryError):
        return []  # nobody has made the folder yet, or it has gone, or a file is in its place
    except OSError as error:
        raise ForgetError(
            f"The folder '{folder}' cannot be read ({error.strerror}): check its permissions."
        ) from error


def _is_text(name):
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8: nothing could send the name back
        return False
    return True


def _notes(path):
    """The notes in a file; "" if it is none of ours."""
    with open(path, "rb") as file:
        data = file.read(MAX_NOTES_FILE + 1)
    try:
        notes = json.loads(data)["notes"] if len(data) <= MAX_NOTES_FILE else ""
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    return notes[:MAX_NOTES] if isinstance(notes, str) else ""


def _notes_in(beside):
    """The notes in the files beside a patch; "" if there are none, or none that may be read."""
    for item in beside:
        if item.name.endswith(NOTES):
            with suppress(OSError):
                return _notes(item)
    return ""


def _is_other_case(source, target):
    """Is ``target`` the file itself, as its name differs in upper and lower case alone? So it is
    on Windows and macOS."""
    if source.name.casefold() != target.name.casefold() or target.name in os.listdir(target.parent):
        return False
    with suppress(OSError):
        return os.path.samefile(source, target)
    return False


def _move_all(moves):
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
            told = f"There is a file '{Path(error.filename).name}' already: choose another name."
            raise ForgetError(told) from error
        raise ForgetError(
            f"'{moves[-1][0].name}' could not be renamed ({error.strerror}): "
            "check that you may write to its folder."
        ) from error
    finally:
        for target in taken:
            target.unlink(missing_ok=True)


def _changed(name, what, change):
    try:
        change()
    except OSError as error:
        raise ForgetError(
            f"'{name}' could not be {what} ({error.strerror}): "
            "check that you may write to its folder."
        ) from error
