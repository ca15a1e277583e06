"""A stored value: a header that says what the payload must be, and the payload, one block.

      0       4         6        8                16               24         32                  64
      | KVSB  | version | hash_n | payload_bytes  | checksum       | zero     | block hash, padded | payload ...
      | magic | u16     | u16    | u64            | u64            | u64      | with zeros         |

Little-endian. The checksum is XXH3-64 of the payload, seeded with XXH3-64 of the whole key: a value that is truncated,
altered, or found under another key (namespace and fingerprint included) does not match.
"""

from __future__ import annotations

import struct
from typing import Final

import xxhash

from flexkv.storage.remote.keys import MAX_HASH_BYTES, key_hash

MAGIC: Final = b"KVSB"
VERSION: Final = 1
_HEADER: Final = struct.Struct(f"<4sHHQQQ{MAX_HASH_BYTES}s")
HEADER_BYTES: Final = _HEADER.size
"""Bytes before the payload."""


def value_bytes(payload_bytes: int) -> int:
    """Return the size of a stored value."""
    return HEADER_BYTES + payload_bytes


def make_header(key: str, payload: memoryview) -> bytes:
    """Return the header of `payload` stored under `key`."""
    block_hash = key_hash(key)
    checksum = xxhash.xxh3_64_intdigest(payload, seed=xxhash.xxh3_64_intdigest(key.encode()))
    return _HEADER.pack(MAGIC, VERSION, len(block_hash), payload.nbytes, checksum, 0, block_hash)


def is_intact(header: bytes | bytearray | memoryview, key: str, payload: memoryview) -> bool:
    """Return whether `payload` is what was stored under `key`: every byte of the header is as expected."""
    return bytes(header) == make_header(key, payload)
