"""The table of published weights: cache folder, resumable download against a local server, verification."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from actors import sam_weights
from actors.sam_variants import VARIANTS
from actors.sam_weights import (
    WEIGHTS,
    WeightsFile,
    WeightsUnavailableError,
    fetch_weights,
    identify_file,
    resolve_weights,
    verify_file,
    weights_table,
)
from tests.recipe_weights import seeded_slimsam_77

CONTENT = bytes(range(256)) * 5000


class RangeServer(BaseHTTPRequestHandler):
    """Serves CONTENT with or without byte ranges, and can hang up half way."""

    ranges = True
    cut_after: int | None = None
    requested: list[str | None]

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        type(self).requested.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : self.cut_after])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server() -> Iterator[type[RangeServer]]:
    handler = type("Handler", (RangeServer,), {"requested": []})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    handler.url = f"http://127.0.0.1:{httpd.server_port}/weights.pth"  # type: ignore[attr-defined]
    yield handler
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def entry_at(url: str, sha256: str | None = None) -> WeightsFile:
    return replace(WEIGHTS["sam_vit_b"], file="weights.pth", url=url, size=len(CONTENT), sha256=sha256)


def test_every_variant_has_a_source() -> None:
    assert set(WEIGHTS) == set(VARIANTS)
    for entry in WEIGHTS.values():
        assert entry.page.startswith("https://")
        assert entry.url == "" or entry.url.endswith(entry.file)
        assert entry.sha256 is None or len(bytes.fromhex(entry.sha256)) == 32
        assert entry.licence


def test_download_checks_the_hash_and_reports_progress(server: type[RangeServer], tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    entry = entry_at(server.url, hashlib.sha256(CONTENT).hexdigest())  # type: ignore[attr-defined]
    path = fetch_weights(entry, tmp_path, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert fetch_weights(entry, tmp_path) == path
    assert server.requested == [None]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_resumes(server: type[RangeServer], tmp_path: Path, ranges: bool) -> None:
    entry = entry_at(server.url, hashlib.sha256(CONTENT).hexdigest())  # type: ignore[attr-defined]
    server.cut_after = 70000
    with pytest.raises(WeightsUnavailableError, match=r"70000 bytes kept, the same command resumes"):
        fetch_weights(entry, tmp_path)
    server.cut_after, server.ranges = None, ranges
    assert fetch_weights(entry, tmp_path).read_bytes() == CONTENT
    assert server.requested == [None, "bytes=70000-"]


def test_a_complete_part_file_needs_no_more_bytes(server: type[RangeServer], tmp_path: Path) -> None:
    (tmp_path / "weights.pth.part").write_bytes(CONTENT)
    entry = entry_at(server.url, hashlib.sha256(CONTENT).hexdigest())  # type: ignore[attr-defined]
    assert fetch_weights(entry, tmp_path).read_bytes() == CONTENT


def test_another_file_than_the_published_one_is_deleted(server: type[RangeServer], tmp_path: Path) -> None:
    entry = entry_at(server.url, "0" * 64)  # type: ignore[attr-defined]
    with pytest.raises(WeightsUnavailableError, match=r"expected .* deleted"):
        fetch_weights(entry, tmp_path)
    assert not list(tmp_path.iterdir())


def test_offline_the_message_holds_url_and_place(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/weights.pth"
    with pytest.raises(WeightsUnavailableError) as error:
        fetch_weights(entry_at(url), tmp_path)
    assert url in str(error.value)
    assert str(tmp_path / "weights.pth") in str(error.value)


def test_files_without_a_direct_download_say_where_to_go(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailableError, match=r"drive\.google\.com"):
        fetch_weights(WEIGHTS["medsam"], tmp_path)


def test_the_cache_folder_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMREG_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="samreg weights fetch sam_vit_b"):
        resolve_weights("sam_vit_b")
    path = tmp_path / "sam_vit_b_01ec64.pth"
    path.write_bytes(b"x")
    assert resolve_weights("sam_vit_b") == path
    assert [row["variant"] for row in weights_table() if row["present"]] == ["sam_vit_b"]
    own = tmp_path / "own.pth"
    own.write_bytes(b"x")
    assert resolve_weights("medsam", own) == own
    assert resolve_weights("medsam", f"file://{own}").read_bytes() == b"x"
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        resolve_weights("medsam", tmp_path / "absent.pth")


def test_verify_knows_published_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "medsam_vit_b.pth"
    path.write_bytes(CONTENT)
    assert verify_file(path).variant is None
    assert "another hash" in verify_file(path).note
    known = replace(WEIGHTS["medsam"], sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(sam_weights.WEIGHTS, "medsam", known)
    assert verify_file(path).variant == "medsam"


def test_identify_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(seeded_slimsam_77(), path)
    assert identify_file(path).variants == ("slimsam_77",)
