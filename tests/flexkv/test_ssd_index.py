"""The SSD tier's index: rows survive restarts, strangers and damage are recognised, families stay in order."""

import os
import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.common.config import Durability
from flexkv.errors import CacheStateError, ConfigError, TransferError
from flexkv.storage.ssd_index import INDEX_NAME, SsdIndex, read_meta
from flexkv.storage.ssd_rows import StoredBlocks, link_rows

FINGERPRINT = {"model": "m", "dtype": "bfloat16"}
NONE = bytes(32)


def name(i: int) -> bytes:
    """The hash of block i."""
    return i.to_bytes(4, "little") * 8


def make_blocks(rows: list[tuple[int, bytes, bytes]], checksum: int = 2**64 - 1, namespace_id: int = 0) -> StoredBlocks:
    """Rows of (slot, hash, parent)."""
    return StoredBlocks(
        np.array([row[0] for row in rows], np.int64),
        np.frombuffer(b"".join(row[1] for row in rows), np.uint8).reshape(-1, 32),
        np.frombuffer(b"".join(row[2] for row in rows), np.uint8).reshape(-1, 32),
        np.full(len(rows), checksum, np.uint64),
        np.full(len(rows), namespace_id, np.int64),
    )


def names(hashes: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in hashes]


@pytest.mark.parametrize("durability", Durability)
def test_rows_survive_a_restart(tmp_path, durability):
    index = SsdIndex(tmp_path, FINGERPRINT, durability)
    number = index.namespace_id(("tenant", "a"))
    assert number == index.namespace_id(("tenant", "a")) != 0
    assert index.namespace_id(()) == 0
    index.insert(make_blocks([(7, name(2), name(1))], checksum=5, namespace_id=number))
    index.insert(make_blocks([(9, name(1), NONE), (3, name(9), NONE)]))
    index.delete(np.array([3, 1000]))
    index.close()
    index = SsdIndex(tmp_path, FINGERPRINT, durability)
    assert not index.is_new
    assert index.num_blocks == 2
    loaded = index.load(num_slots=10)
    assert loaded.blocks.slots.tolist() == [9, 7]
    assert names(loaded.blocks.hashes) == [name(1), name(2)]
    assert names(loaded.blocks.parents) == [NONE, name(1)]
    assert loaded.blocks.checksums.tolist() == [2**64 - 1, 5]
    assert loaded.blocks.namespace_ids.tolist() == [0, number]
    assert index.namespaces() == {0: (), number: ("tenant", "a")}
    assert loaded.parent_rows.tolist() == [-1, 0]
    assert loaded.orphan_slots.tolist() == []
    index.clear()
    assert len(index.load(10).blocks) == 0
    index.close()


def test_the_schema_is_version_1(tmp_path):
    SsdIndex(tmp_path, FINGERPRINT).close()
    db = sqlite3.connect(tmp_path / INDEX_NAME)
    tables = [" ".join(row[0].split()) for row in db.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL")]
    assert tables == [
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE namespaces (id INTEGER PRIMARY KEY, labels TEXT NOT NULL UNIQUE)",
        "CREATE TABLE blocks ( slot INTEGER PRIMARY KEY CHECK (slot >= 0), "
        "hash BLOB NOT NULL CHECK (length(hash) = 32), parent BLOB NOT NULL CHECK (length(parent) = 32), "
        "checksum INTEGER NOT NULL, namespace_id INTEGER NOT NULL )",
    ]
    assert dict(db.execute("SELECT * FROM meta")) == {
        "schema_version": "1",
        "fingerprint": '{"dtype":"bfloat16","model":"m"}',
    }
    assert db.execute("SELECT * FROM namespaces").fetchall() == [(0, "[]")]
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def test_a_taken_slot_is_refused_and_the_batch_with_it(tmp_path):
    index = SsdIndex(tmp_path, FINGERPRINT)
    index.insert(make_blocks([(1, name(1), NONE)]))
    with pytest.raises(CacheStateError, match="slots already"):
        index.insert(make_blocks([(2, name(2), NONE), (1, name(3), NONE)]))
    assert index.load(9).blocks.slots.tolist() == [1]
    index.close()


def test_another_fingerprint_is_refused_by_both_sides_and_the_remedy(tmp_path):
    SsdIndex(tmp_path, FINGERPRINT).close()
    with pytest.raises(ConfigError, match=r"dtype was 'bfloat16', is 'float16'.*kvstrata flexkv clear"):
        SsdIndex(tmp_path, {**FINGERPRINT, "dtype": "float16"})
    with pytest.raises(ConfigError, match="tp_size was 'absent', is '2'"):
        SsdIndex(tmp_path, {**FINGERPRINT, "tp_size": "2"})
    assert read_meta(tmp_path) == (FINGERPRINT, [])


def test_another_version_is_refused(tmp_path):
    SsdIndex(tmp_path, FINGERPRINT).close()
    with sqlite3.connect(tmp_path / INDEX_NAME) as db:
        db.execute("UPDATE meta SET value = '2' WHERE key = 'schema_version'")
    db.close()
    with pytest.raises(ConfigError, match="has version 2, this program reads 1"):
        SsdIndex(tmp_path, FINGERPRINT)


def damage_header(path):
    path.write_bytes(b"not a database" + path.read_bytes()[14:])


def damage_pages(path):
    content = bytearray(path.read_bytes())
    for at in range(4096, len(content), 4096):
        content[at : at + 64] = os.urandom(64)
    path.write_bytes(content)


def drop_meta(path):
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE meta")
    db.close()


def spoil_meta(path):
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '{' WHERE key = 'fingerprint'")
    db.close()


@pytest.mark.parametrize("damage", [damage_header, damage_pages, drop_meta, spoil_meta])
def test_a_damaged_index_is_moved_aside_and_the_tier_starts_cold(tmp_path, caplog, damage):
    index = SsdIndex(tmp_path, FINGERPRINT)
    index.insert(make_blocks([(i, name(i), NONE) for i in range(500)]))
    index.close()
    damage(tmp_path / INDEX_NAME)
    index = SsdIndex(tmp_path, FINGERPRINT)
    assert "SSD index is damaged, starting cold" in caplog.text
    assert index.is_new
    assert index.num_blocks == 0
    assert (tmp_path / f"{INDEX_NAME}.damaged").exists()
    index.insert(make_blocks([(1, name(1), NONE)]))
    index.close()


def test_damage_found_while_loading_starts_cold_too(tmp_path, caplog):
    index = SsdIndex(tmp_path, FINGERPRINT)
    index.namespace_id(("a",))
    index.insert(make_blocks([(i, name(i), NONE) for i in range(50)]))
    db = sqlite3.connect(tmp_path / INDEX_NAME)
    db.execute("PRAGMA ignore_check_constraints = 1")
    db.execute("UPDATE blocks SET hash = x'00' WHERE slot = 7")
    db.commit()
    db.close()
    assert len(index.load(50).blocks) == 0
    assert "SSD index is damaged" in caplog.text
    assert index.namespace_id(("a",)) == 1
    index.insert(make_blocks([(7, name(7), NONE)]))
    assert index.load(50).blocks.slots.tolist() == [7]
    index.close()


def test_an_index_that_cannot_be_written_says_so(tmp_path):
    index = SsdIndex(tmp_path, FINGERPRINT)
    index.insert(make_blocks([(1, name(1), NONE)]))
    index._db.execute("PRAGMA query_only = 1")
    for change in (lambda: index.delete(np.array([1])), index.clear, lambda: index.namespace_id(("x",))):
        with pytest.raises(TransferError, match="cannot be changed"):
            change()
    index._db.execute("PRAGMA query_only = 0")
    assert index.load(9).blocks.slots.tolist() == [1]
    index.close()


def test_a_full_disk_fails_the_batch_and_leaves_the_index_usable(tmp_path):
    index = SsdIndex(tmp_path, FINGERPRINT)
    index.insert(make_blocks([(0, name(0), NONE)]))
    index._db.execute(f"PRAGMA max_page_count = {index._db.execute('PRAGMA page_count').fetchone()[0] + 2}")
    with pytest.raises(TransferError, match="full"):
        index.insert(make_blocks([(i, name(i), NONE) for i in range(1, 2000)]))
    index.insert(make_blocks([(1, name(1), NONE)]))
    assert index.load(9).blocks.slots.tolist() == [0, 1]
    index.close()


def test_a_directory_without_an_index_is_named(tmp_path):
    with pytest.raises(ConfigError, match="holds no SSD tier"):
        read_meta(tmp_path)
    (tmp_path / INDEX_NAME).write_text("something else entirely, and long enough to be read as a header")
    with pytest.raises(ConfigError, match="not a readable index"):
        read_meta(tmp_path)


@settings(deadline=None)
@given(data=st.data())
def test_rows_are_linked_as_a_naive_model_does(data):
    num_slots = 12
    # Few different hashes, the same first 64 bits in half of them: repetitions, missing parents and circles occur.
    hashes = [name(i) for i in range(1, 6)] + [name(77)[:8] + bytes([i]) * 24 for i in range(1, 6)]
    choice = st.sampled_from(hashes)
    slots = data.draw(st.lists(st.integers(0, 15), unique=True, max_size=14))
    rows = [(slot, data.draw(choice), data.draw(st.one_of(st.just(NONE), choice))) for slot in sorted(slots)]

    reachable: dict[bytes, tuple[int, bytes]] = {}
    known: dict[bytes, tuple[int, bytes]] = {}
    for slot, own, parent in rows:
        if slot < num_slots:
            known.setdefault(own, (slot, parent))
    for own in known:
        chain = [own]
        while (parent := known[chain[-1]][1]) != NONE and parent in known and parent not in chain:
            chain.append(parent)
        if parent == NONE:
            reachable[own] = known[own]

    loaded = link_rows(make_blocks(rows), num_slots)
    assert dict(zip(names(loaded.blocks.hashes), loaded.blocks.slots.tolist(), strict=True)) == {
        own: slot for own, (slot, _) in reachable.items()
    }
    assert set(loaded.orphan_slots.tolist()) == set(slots) - {slot for slot, _ in reachable.values()}
    for row, (parent_row, parent) in enumerate(
        zip(loaded.parent_rows.tolist(), names(loaded.blocks.parents), strict=True)
    ):
        assert parent_row < row
        assert (names(loaded.blocks.hashes)[parent_row] if parent_row >= 0 else NONE) == parent
    on_paths = [path.tolist() for path in loaded.leaf_paths()]
    assert {row for path in on_paths for row in path} == set(range(len(loaded.blocks)))
    for path in on_paths:
        assert loaded.parent_rows[path].tolist() == [-1, *path[:-1]]


def test_long_chains_are_put_in_order():
    count = 20_000
    order = np.random.default_rng(0).permutation(count).tolist()
    rows = [(slot, name(i + 1), name(i) if i else NONE) for slot, i in enumerate(order)]
    loaded = link_rows(make_blocks(rows), count)
    assert names(loaded.blocks.hashes) == [name(i + 1) for i in range(count)]
    assert [len(path) for path in loaded.leaf_paths()] == [count]
