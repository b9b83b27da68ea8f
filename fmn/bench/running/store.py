"""Finished cells in one SQLite file. One process writes; any number may read."""

import json
import os
import sqlite3
import time
from pathlib import Path

from ...errors import ForgetError
from ..measures.trial import Result

TABLE = """
CREATE TABLE IF NOT EXISTS cells (
    key TEXT PRIMARY KEY, cell TEXT NOT NULL, result TEXT NOT NULL, patch BLOB,
    seconds REAL NOT NULL, finished TEXT NOT NULL
)
"""


class Store:
    """One row a finished cell: its key, the cell, its result, and the patch it made if any."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(self.path, timeout=30)
            self.db.execute(TABLE)
        except (OSError, sqlite3.Error) as error:
            raise ForgetError(
                f"'{path}' cannot be used as the bench's store ({error}): name a file that is new "
                "or was made by a bench, in a folder you can write to."
            ) from error

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        self.db.close()

    def __contains__(self, key: str) -> bool:
        return bool(self.db.execute("SELECT 1 FROM cells WHERE key = ?", (key,)).fetchone())

    def __len__(self) -> int:
        return self.db.execute("SELECT COUNT(*) FROM cells").fetchone()[0]

    def add(
        self, key: str, cell: dict, result: Result, patch: bytes | None, seconds: float
    ) -> None:
        """Keep a result; a row is whole or absent, even if the machine dies meanwhile."""
        row = key, json.dumps(cell), json.dumps(result, allow_nan=False), patch, seconds
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self.db:
            self.db.execute("INSERT OR REPLACE INTO cells VALUES (?, ?, ?, ?, ?, ?)", (*row, now))

    def result(self, key: str) -> tuple[Result, float]:
        """(result, seconds) of a finished cell."""
        row = self.db.execute("SELECT result, seconds FROM cells WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]), row[1]

    def patch(self, key: str) -> bytes:
        """Bytes of the patch file that a cell made."""
        return self.db.execute("SELECT patch FROM cells WHERE key = ?", (key,)).fetchone()[0]
