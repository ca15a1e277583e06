"""The name of a block in a remote store.

    <namespace>/<fingerprint>/<hash>      e.g.   _common/v1_3blayers_3d28/6f1c...e2 (hex digits, two per byte)

Namespace and fingerprint keep their letters A-Z a-z, digits and `-`; every other byte of their UTF-8 becomes `_` and
two hex digits, so that different ones never meet and every store, and every file system, takes the name as it is.
`.` joins the labels of a namespace of several; a name that would be longer than 120 characters becomes its SHA-256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from flexkv.common.block import Namespace, normalise_namespace
from flexkv.errors import InvalidRequestError

MAX_HASH_BYTES: Final = 32
"""Longest block hash a key can carry."""

_NO_NAMESPACE: Final = "_common"
_EMPTY_LABEL: Final = "_"
_LONGEST_NAME: Final = 120
# None of _common, a lone _ and _sha256- can come from escaping: there, two hex digits follow every underscore.
_UNSAFE: Final = re.compile(rb"[^A-Za-z0-9-]")
_NAME: Final = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}"
_KEY: Final = re.compile(rf"{_NAME}/{_NAME}/(?:[0-9a-f]{{2}}){{1,{MAX_HASH_BYTES}}}")


def block_key(namespace: Namespace, fingerprint: str, block_hash: bytes) -> str:
    """Return the key of a block.

    Args:
        namespace: who may share the block.
        fingerprint: names model, layout and everything else that decides what the bytes of a block mean.
        block_hash: the block's digest, at most 32 bytes.

    Raises:
        InvalidRequestError: a namespace of the wrong type, an empty fingerprint, or a hash that is empty or too long.
    """
    if not 1 <= len(block_hash) <= MAX_HASH_BYTES:
        raise InvalidRequestError(f"a block hash has 1..{MAX_HASH_BYTES} bytes, this one has {len(block_hash)}")
    return f"{_prefix(normalise_namespace(namespace), fingerprint)}{block_hash.hex()}"


def key_hash(key: str) -> bytes:
    """Return the block hash at the end of a key."""
    return bytes.fromhex(key[key.rindex("/") + 1 :])


def require_keys(keys: Sequence[str]) -> None:
    """Check that `block_key` could have made every key.

    Raises:
        InvalidRequestError: it could not; the message names the key.
    """
    for key in keys:
        if not isinstance(key, str) or _KEY.fullmatch(key) is None:
            raise InvalidRequestError(f"{key!r} is not a key of the form namespace/fingerprint/hash")


@lru_cache(maxsize=1024)
def _prefix(namespace: tuple[str, ...], fingerprint: str) -> str:
    if not fingerprint:
        raise InvalidRequestError("the fingerprint of a block's model and layout is empty")
    labels = ".".join(_escape(label) or _EMPTY_LABEL for label in namespace) or _NO_NAMESPACE
    return f"{_shorten(labels)}/{_shorten(_escape(fingerprint))}/"


def _escape(label: str) -> str:
    data = label.encode("utf-8", "surrogatepass")
    return _UNSAFE.sub(lambda match: b"_%02x" % match[0][0], data).decode("ascii")


def _shorten(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    return f"_sha256-{hashlib.sha256(name.encode()).hexdigest()}"
