"""What the SSD tier holds: one row per stored block, in SQLite (WAL), so that a restart is warm.

    meta        key, value                          schema version, fingerprint (JSON), directories (JSON), bound parts
    namespaces  id, labels                          labels: JSON list of strings; id 0 is the common namespace, []
    blocks      slot, hash, parent, checksum, namespace_id      hash, parent: 32 bytes; parent all zero for block 0
                `- the key: place of the data in the files       checksum: XXH3-64, as a signed integer

Order is what makes it safe to be killed at any moment:

    delete the old row, commit -> write data into the slot -> insert the new row, commit

A row that is there was committed after its data had been written in full, and no slot is written while a row names it.
Against kill -9 that order is the guarantee: what a process has handed to the kernel outlives it. Against a loss of
power it is not, since the disk may have kept a row and lost its data: there the checksum is the guarantee (a wrong
block is a miss), or `Durability.POWER`, for which the caller also syncs the data before it inserts their rows. The
checksum also tells when a request of the killed process reaches the disk late, in a slot that is in use again by then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flexkv.common.config import Durability
from flexkv.errors import CacheStateError, ConfigError, TransferError
from flexkv.storage.ssd_rows import HASH_BYTES, LoadedBlocks, StoredBlocks, link_rows, pack_rows

logger = logging.getLogger(__name__)

INDEX_NAME: Final = "index.sqlite"
SCHEMA_VERSION: Final = 1
_SIDE_FILES: Final = ("-wal", "-shm")
_LOAD_CHUNK: Final = 65536

SCHEMA: Final = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE namespaces (id INTEGER PRIMARY KEY, labels TEXT NOT NULL UNIQUE);
CREATE TABLE blocks (
  slot INTEGER PRIMARY KEY CHECK (slot >= 0),
  hash BLOB NOT NULL CHECK (length(hash) = {HASH_BYTES}),
  parent BLOB NOT NULL CHECK (length(parent) = {HASH_BYTES}),
  checksum INTEGER NOT NULL,
  namespace_id INTEGER NOT NULL
);
INSERT INTO namespaces VALUES (0, '[]');
"""
"""Version `SCHEMA_VERSION` of the tables."""

Fingerprint = Mapping[str, str]
"""Everything that gives the bytes of a block their meaning: model, layout, dtype, block size, TP size, slots, ..."""


class SsdIndex:
    """The rows of one store. Used by one thread at a time, `bind` by any; the directory's lock is the caller's."""

    def __init__(self, directory: Path, fingerprint: Fingerprint, durability: Durability = Durability.PROCESS) -> None:
        """Open the index of a directory, or make one. A damaged one is moved aside, and the tier starts cold.

        Raises:
            ConfigError: it was made for another fingerprint or by another version, or cannot be opened.
        """
        self._path = directory / INDEX_NAME
        self._fingerprint = dict(fingerprint)
        self._durability = durability
        self.is_new = False
        self._lock = threading.Lock()  # `bind` comes from another thread than the rest
        try:
            self._db = self._open()
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise ConfigError(f"cannot open {str(self._path)!r}: {error}") from error
            self._move_aside(error)
            self._db = self._open()
        self._namespace_ids = {labels: i for i, labels in self.namespaces().items()}

    def _open(self) -> sqlite3.Connection:
        try:
            db = _connect(self._path)
        except sqlite3.OperationalError as error:
            raise ConfigError(f"cannot open {str(self._path)!r}: {error}") from error
        try:
            db.execute("PRAGMA journal_mode = WAL")
            # NORMAL syncs at checkpoints only: after a loss of power the database is whole, without its last commits.
            db.execute(f"PRAGMA synchronous = {'FULL' if self._durability is Durability.POWER else 'NORMAL'}")
            if db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                self._create(db)
            _check_whole(db)
            _check_meta(db, self._path, self._fingerprint)
        except BaseException:
            db.close()
            raise
        return db

    def _create(self, db: sqlite3.Connection) -> None:
        meta = {"schema_version": str(SCHEMA_VERSION), "fingerprint": _to_json(self._fingerprint)}
        db.executescript(f"BEGIN; {SCHEMA}")
        db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        db.execute("COMMIT")
        self.is_new = True

    def _move_aside(self, error: Exception) -> None:
        aside = self._path.with_name(f"{INDEX_NAME}.damaged")
        logger.warning("SSD index is damaged, starting cold path=%s moved_to=%s error=%s", self._path, aside, error)
        for suffix in ("", *_SIDE_FILES):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self._path}{suffix}", f"{aside}{suffix}")

    def load(self, num_slots: int) -> LoadedBlocks:
        """Return all rows, parents before children; rows nobody can reach are named for deletion.

        An index that turns out to be damaged is moved aside, and nothing is returned.
        """
        try:
            rows = self._db.execute("SELECT slot, hash, parent, checksum, namespace_id FROM blocks")
            chunks = iter(lambda: rows.fetchmany(_LOAD_CHUNK), [])
            blocks = StoredBlocks.concatenate([pack_rows(chunk) for chunk in chunks])
        except (sqlite3.DatabaseError, ValueError) as error:
            self._db.close()
            self._move_aside(error)
            self._db = self._open()
            self._namespace_ids = {(): 0}
            blocks = StoredBlocks.concatenate([])
        return link_rows(blocks, num_slots)

    def insert(self, blocks: StoredBlocks) -> None:
        """Add rows, all in one transaction. REQUIRES: their data have been written (and synced, for POWER).

        Raises:
            CacheStateError: a slot has a row already; none was added.
            TransferError: the disk refused; none was added.
        """
        raw_hashes, raw_parents = blocks.hashes.tobytes(), blocks.parents.tobytes()
        rows = zip(
            blocks.slots.tolist(),
            (raw_hashes[at : at + HASH_BYTES] for at in range(0, len(raw_hashes), HASH_BYTES)),
            (raw_parents[at : at + HASH_BYTES] for at in range(0, len(raw_parents), HASH_BYTES)),
            blocks.checksums.view(np.int64).tolist(),
            blocks.namespace_ids.tolist(),
            strict=True,
        )
        with self._transaction():
            self._db.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?, ?)", rows)

    def delete(self, slots: npt.NDArray[np.int64]) -> None:
        """Forget slots, all in one transaction; only then may they be written again. Unknown ones are ignored.

        Raises:
            TransferError: the disk refused; none was forgotten.
        """
        with self._transaction():
            self._db.executemany("DELETE FROM blocks WHERE slot = ?", ((slot,) for slot in slots.tolist()))

    def clear(self) -> None:
        """Forget everything. Raises TransferError."""
        with self._transaction():
            self._db.execute("DELETE FROM blocks")

    def namespace_id(self, labels: tuple[str, ...]) -> int:
        """Return the number that stands for a namespace in rows, a new one the first time. Raises TransferError."""
        known = self._namespace_ids.get(labels)
        if known is not None:
            return known
        with self._transaction():
            row = self._db.execute("INSERT INTO namespaces (labels) VALUES (?) RETURNING id", (_to_json(labels),))
            number = int(row.fetchone()[0])
        self._namespace_ids[labels] = number
        return number

    def namespaces(self) -> dict[int, tuple[str, ...]]:
        """Return the labels of every namespace id."""
        return {i: tuple(json.loads(labels)) for i, labels in self._db.execute("SELECT id, labels FROM namespaces")}

    def set_directories(self, directories: list[str]) -> None:
        """Note where the data files are, for tools that are given this directory only. Raises TransferError."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('directories', ?)", (json.dumps(directories),))

    def bind(self, name: str, value: str) -> None:
        """Add a part of the fingerprint that is known only now; an index without rows takes another one.

        Raises:
            ConfigError: its rows were stored with another value.
            TransferError: the disk refused.
        """
        key = f"bound {name}"
        stored = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        if stored == (value,):
            return
        if stored is not None and self.num_blocks > 0:
            raise _made_for_another(self._path, f"{name} was {stored[0]!r}, is {value!r}")
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @property
    def num_blocks(self) -> int:
        """Number of rows; counts them."""
        return int(self._db.execute("SELECT count(*) FROM blocks").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with self._lock:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
        except sqlite3.IntegrityError as error:
            raise CacheStateError(
                f"the SSD index has one of these slots already, or it is malformed: {error}"
            ) from error
        except sqlite3.DatabaseError as error:
            raise TransferError(f"the SSD index {str(self._path)!r} cannot be changed: {error}") from error

    def close(self) -> None:
        """Close it; idempotent."""
        self._db.close()


def read_meta(directory: Path) -> tuple[dict[str, str], list[Path]]:
    """Return the fingerprint and the directories of the store in a directory, which may be in use.

    Raises:
        ConfigError: there is no readable index.
    """
    path = directory / INDEX_NAME
    if not path.is_file():
        raise ConfigError(f"{str(directory)!r} holds no SSD tier: there is no {INDEX_NAME}")
    try:
        with contextlib.closing(_connect(path)) as db:
            meta = dict(db.execute("SELECT key, value FROM meta"))
            return json.loads(meta["fingerprint"]), [Path(text) for text in json.loads(meta.get("directories", "[]"))]
    except (sqlite3.DatabaseError, KeyError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} is not a readable index: {error!r}") from error


def remove_index(directory: Path) -> None:
    """Remove the index of a directory, damaged ones included. REQUIRES: its lock is held, and it is not open."""
    for name in (INDEX_NAME, f"{INDEX_NAME}.damaged"):
        for suffix in ("", *_SIDE_FILES):
            (directory / f"{name}{suffix}").unlink(missing_ok=True)


def _connect(path: Path) -> sqlite3.Connection:
    # Made by the thread that starts the store, used by the one that writes. Transactions are spelled out.
    return sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)


def _to_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file's contents are at fault, not the disk or its permissions."""
    return not isinstance(error, sqlite3.OperationalError) or "malformed" in str(error) or "no such table" in str(error)


def _check_whole(db: sqlite3.Connection) -> None:
    problems = [str(row[0]) for row in db.execute("PRAGMA quick_check(3)")]
    if problems != ["ok"]:
        raise sqlite3.DatabaseError("; ".join(problems))


def _check_meta(db: sqlite3.Connection, path: Path, fingerprint: dict[str, str]) -> None:
    meta = dict(db.execute("SELECT key, value FROM meta"))
    try:
        version = int(meta["schema_version"])
        stored = json.loads(meta["fingerprint"])
    except (KeyError, ValueError) as error:
        raise sqlite3.DatabaseError(f"no readable meta table: {error!r}") from error
    if version != SCHEMA_VERSION:
        raise ConfigError(f"{str(path)!r} has version {version}, this program reads {SCHEMA_VERSION}; {_remedy(path)}")
    if stored != fingerprint:
        names = sorted(name for name in stored.keys() | fingerprint.keys() if stored.get(name) != fingerprint.get(name))
        sides = ", ".join(f"{n} was {stored.get(n, 'absent')!r}, is {fingerprint.get(n, 'absent')!r}" for n in names)
        raise _made_for_another(path, sides)


def _made_for_another(path: Path, difference: str) -> ConfigError:
    where = str(path.parent)
    return ConfigError(f"the SSD tier in {where!r} was made for something else: {difference}; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"use another directory, or empty it with `kvstrata flexkv clear {path.parent}`"
