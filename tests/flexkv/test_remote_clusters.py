"""What is S3's and Mooncake's own."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.flexkv.remote_servers import MooncakeServer, S3Server, eventually, require_backend, s3_url, soon

from flexkv.storage.remote.base import RemoteStoreError
from flexkv.storage.remote.factory import open_backend
from flexkv.storage.remote.keys import block_key

ROOT = Path(__file__).resolve().parents[2]
KEYS = [block_key(None, "m", bytes([i])) for i in range(40)]
VALUE = np.arange(250_000, dtype=np.uint32)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    require_backend("s3")
    server = S3Server()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def mooncake_server() -> Iterator[MooncakeServer]:
    require_backend("mooncake")
    server = MooncakeServer()
    yield server
    server.kill()


def test_credentials_come_from_the_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"s3://{s3_server.bucket}/mine?endpoint={s3_server.endpoint}&concurrency=2"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from-the-environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with open_backend(url, block_bytes=VALUE.nbytes) as store:
        assert store.put(KEYS[:1], [VALUE], soon()).all()
        assert store.exists(KEYS[:1], soon()).all()


def test_a_bucket_that_does_not_exist_is_no_miss_on_writes(s3_server: S3Server) -> None:
    url = s3_url(s3_server.endpoint).replace(s3_server.bucket, "nowhere")
    with open_backend(url, block_bytes=VALUE.nbytes) as store:
        assert not store.get(KEYS[:1], [VALUE.copy()], soon()).any()
        with pytest.raises(RemoteStoreError, match="bucket does not exist") as caught:
            store.put(KEYS[:2], [VALUE, VALUE], soon())
        assert not caught.value.is_transient


def test_prefixes_keep_stores_apart(s3_server: S3Server) -> None:
    with (
        open_backend(s3_url(s3_server.endpoint), block_bytes=100) as one,
        open_backend(s3_url(s3_server.endpoint).replace("prefix", "other"), block_bytes=100) as other,
    ):
        assert one.put(KEYS[:1], [VALUE], soon()).all()
        assert not other.exists(KEYS[:1], soon()).any()


def test_a_full_cluster_stores_what_fits_and_never_lies(mooncake_server: MooncakeServer) -> None:
    url = f"mooncake://127.0.0.1:{mooncake_server.port}?segment_mb=16&lanes=1"
    with open_backend(url, block_bytes=VALUE.nbytes) as store:
        with pytest.raises(RemoteStoreError, match="larger than what this store was opened for"):
            store.put(KEYS[:1], [np.zeros(40 * 2**20, np.uint8)], soon())
        store.put(KEYS, [VALUE + i for i in range(len(KEYS))], soon())
        buffers = np.zeros((len(KEYS), VALUE.size), np.uint32)
        found = store.get(KEYS, list(buffers), soon())
        assert 0 < found.sum() < len(KEYS)
        for i in np.flatnonzero(found):
            assert (buffers[i] == VALUE + i).all()


OWNER = """
import sys
import threading
from flexkv.storage.remote.factory import open_backend
store = open_backend(sys.argv[1], block_bytes=1000)
store.exists(["a/b/00"], float("inf"))
print(store._client._process.pid, flush=True)
sys.stdin.read()
"""


def test_the_client_process_goes_with_its_owner(mooncake_server: MooncakeServer) -> None:
    arguments = [sys.executable, "-c", OWNER, f"mooncake://127.0.0.1:{mooncake_server.port}?segment_mb=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    owner = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert owner.stdout is not None
    assert owner.stdin is not None
    client = psutil.Process(int(owner.stdout.readline()))
    owner.kill()
    owner.communicate()
    eventually(lambda: not client.is_running() or client.status() == psutil.STATUS_ZOMBIE)


def test_writers_of_the_same_block_disturb_nobody(mooncake_server: MooncakeServer) -> None:
    url = f"mooncake://127.0.0.1:{mooncake_server.port}?segment_mb=64&lanes=4"
    value, failures = np.full(1000, 7, np.uint8), []
    with open_backend(url, block_bytes=value.nbytes) as store:

        def run() -> None:
            for _ in range(40):
                buffer = np.zeros_like(value)
                try:
                    store.put(KEYS[:2], [value, value], soon())
                    store.delete(KEYS[1:2], soon())
                    found = store.get(KEYS[:1], [buffer], soon())
                except RemoteStoreError as error:
                    failures.append(str(error))
                else:
                    if found[0] and not (buffer == value).all():
                        failures.append("a wrong byte")

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        eventually(lambda: store.put(KEYS[:1], [value], soon())[0] and store.exists(KEYS[:1], soon())[0])
