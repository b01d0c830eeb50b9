"""The embedding store: round trips, and writers that die."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr

from storage.embeddings import EmbeddingStore
from storage.geometry import Geometry

REPO = Path(__file__).resolve().parents[1]
GEOMETRY = Geometry((4, 9, 11), (6.0, 1.5, 1.5))
LAYOUT = {"blocks": [["position", 0, 3, 1.0]]}
COUNTS = (3, 0, 70, 5)


@pytest.fixture
def store(tmp_path) -> EmbeddingStore:
    return EmbeddingStore(tmp_path / "study" / "embeddings.zarr")


def _slices(seed=0):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(size=(3, 2, 4)).astype(np.float32),
            rng.random((n, 9, 11)) > 0.5,
            rng.random(n).astype(np.float32),
            rng.random(n).astype(np.float32),
        )
        for n in COUNTS
    ]


def _interrupted_after_two():
    yield from (0, 1)
    raise KeyboardInterrupt


def _write(store, subject, signature, seed=0, slices=range(4)):
    content = _slices(seed)
    with store.writer(subject, signature, GEOMETRY, LAYOUT, (2.0, 3.5), (9, 11)) as writer:
        for z in slices:
            writer.add_slice(z, *content[z])
    return content


@pytest.mark.parametrize("subject", ["p01", "a/../b", "名前", "x" * 200])
def test_round_trip(store, subject):
    content = _write(store, subject, {"weights": "abc"})
    read = store.read(subject)
    assert (read.geometry, read.signature, read.layout) == (GEOMETRY, {"weights": "abc"}, LAYOUT)
    assert read.extent == (2.0, 3.5)
    assert read.features.dtype == np.float16
    assert read.features.chunks == (1, 3, 2, 4)
    np.testing.assert_allclose(read.features[2], content[2][0], atol=2e-3)
    masks = np.concatenate([c[1] for c in content])
    np.testing.assert_array_equal(read.masks(), masks)
    np.testing.assert_array_equal(read.masks([70, 2, 5]), masks[[70, 2, 5]])
    assert read.masks([]).shape == (0, 9, 11)
    np.testing.assert_array_equal(read.roi_slice, np.repeat(range(4), COUNTS))
    np.testing.assert_array_equal(read.quality, np.concatenate([c[2] for c in content]))
    np.testing.assert_array_equal(read.stability, np.concatenate([c[3] for c in content]))
    assert store.subjects() == [subject]
    assert [p.name for p in store.root.parent.iterdir() if p.suffix == ".zarr"] == ["embeddings.zarr"]


def test_many_masks_are_flushed_in_order(store):
    geometry = Geometry((3, 9, 11), (6.0, 1.5, 1.5))
    masks = np.random.default_rng(0).random((3, 400, 9, 11)) > 0.5
    with store.writer("p", {}, geometry, LAYOUT, (2.0, 4.0), (9, 11)) as writer:
        for z in (2, 0, 1):
            writer.add_slice(z, np.ones((3, 2, 4)), masks[z], np.ones(400), np.ones(400))
    read = store.read("p")
    np.testing.assert_array_equal(read.masks(), masks[[2, 0, 1]].reshape(-1, 9, 11))
    assert read.roi_slice[[0, 400, 800]].tolist() == [2, 0, 1]


def test_subject_without_any_roi(store):
    with store.writer("p", {}, GEOMETRY, LAYOUT, (2.0, 4.0), (9, 11)) as writer:
        for z in range(4):
            writer.add_slice(z, np.ones((3, 2, 4)), np.zeros((0, 9, 11), bool), np.zeros(0), np.zeros(0))
    read = store.read("p")
    assert read.masks().shape == (0, 9, 11)
    assert read.roi_slice.shape == read.quality.shape == (0,)


def test_store_is_plain_zarr(store):
    _write(store, "p01", {"a": 1})
    group = zarr.open_group(store.root, mode="r")
    assert list(group.group_keys()) == ["p01"]
    assert set(group["p01"].array_keys()) == {"features", "masks", "roi_slice", "quality", "stability"}
    np.testing.assert_array_equal(group["p01/quality"][:], store.read("p01").quality)


def test_rewriting_replaces(store):
    _write(store, "p", {"v": 1})
    store.write_prototypes("p", {"q": 1}, {"a": np.ones(3)})
    content = _write(store, "p", {"v": 2}, seed=1)
    assert store.signature("p") == {"v": 2}
    assert store.read_prototypes("p") is None
    assert store.prototypes_signature("p") is None
    np.testing.assert_array_equal(store.read("p").quality[:3], content[0][2])


def test_nothing_is_left_of_a_failed_writer(store):
    _write(store, "p", {"v": 1})
    with pytest.raises(ValueError, match=r"slices \[1, 3\] of 4 were not added"):
        _write(store, "p", {"v": 2}, slices=(0, 2))
    with pytest.raises(KeyboardInterrupt):
        _write(store, "q", {}, slices=_interrupted_after_two())
    assert store.signature("p") == {"v": 1}
    assert store.signature("q") is None
    assert store.subjects() == ["p"]
    assert list((store.root.parent / ".embeddings.zarr.wip").iterdir()) == []


def _add_after_the_first(store, *arguments):
    with store.writer("p", {}, GEOMETRY, LAYOUT, (2.0, 3.5), (9, 11)) as writer:
        writer.add_slice(0, *_slices()[0])
        writer.add_slice(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, np.ones((3, 2, 4)), np.zeros((1, 9, 11), bool), [1], [1]), "outside 0..3"),
        ((1, np.ones((3, 2, 4)), np.zeros((1, 9, 10), bool), [1], [1]), "masks must be bool"),
        ((1, np.ones((3, 2, 4)), np.zeros((1, 9, 11)), [1], [1]), "masks must be bool"),
        ((1, np.ones((3, 2, 4)), np.zeros((1, 9, 11), bool), [1, 2], [1]), "1 masks but"),
        ((1, np.ones((3, 2, 5)), np.zeros((1, 9, 11), bool), [1], [1]), "earlier slices"),
        ((1, np.full((3, 2, 4), 1e6), np.zeros((1, 9, 11), bool), [1], [1]), "exceed float16"),
        ((1, np.full((3, 2, 4), np.nan), np.zeros((1, 9, 11), bool), [1], [1]), "NaN"),
        ((0, np.ones((3, 2, 4)), np.zeros((1, 9, 11), bool), [1], [1]), "added before"),
    ],
)
def test_bad_slices(store, arguments, message):
    z, features, masks, quality, stability = arguments
    with pytest.raises(ValueError, match=message):
        _add_after_the_first(store, z, features, masks, np.array(quality), np.array(stability))


def test_absent_subject(store):
    assert store.subjects() == []
    assert store.signature("p") is None
    assert store.read_prototypes("p") is None
    assert store.prototypes_signature("p") is None
    for action in (store.read, store.drop_features):
        with pytest.raises(FileNotFoundError, match="no whole embedding of subject 'p'"):
            action("p")
    with pytest.raises(FileNotFoundError):
        store.write_prototypes("p", {}, {})


def test_prototypes_keep_every_kind_of_array(store):
    _write(store, "p", {})
    arrays = {
        "vectors": np.random.default_rng(0).normal(size=(78, 5)).astype(np.float32),
        "centroid_mm": np.random.default_rng(1).normal(size=(78, 3)),
        "cov": np.random.default_rng(2).normal(size=(78, 3, 3)),
        "slice": np.arange(78, dtype=np.int32),
        "kept": np.arange(78) % 2 == 0,
        "bits": np.arange(78, dtype=np.uint8),
        "none": np.zeros((0, 3)),
        "zeros": np.zeros((2, 3), np.float32),
        "scalar": np.array(2.5),
    }
    store.write_prototypes("p", {"pool": 1}, {"old": np.ones(1)})
    store.write_prototypes("p", {"pool": 2}, arrays)
    assert store.prototypes_signature("p") == {"pool": 2}
    signature, read = store.read_prototypes("p")
    assert signature == {"pool": 2}
    assert list(read) == list(arrays)
    group = zarr.open_group(store.root / "p" / "prototypes", mode="r")
    for name, values in arrays.items():
        assert read[name].dtype == values.dtype
        np.testing.assert_array_equal(read[name], values)
        np.testing.assert_array_equal(group[name][...], values)
    with pytest.raises(ValueError, match="identifiers"):
        store.write_prototypes("p", {}, {"../x": np.ones(1)})


def test_prototypes_pooled_elsewhere_leave_those_of_the_store(store, tmp_path):
    _write(store, "p01", {"v": 1})
    other = EmbeddingStore(store.root, tmp_path / "study" / "sweeps" / "prototypes.zarr")
    assert other.read_prototypes("p01") is None
    for each, value in ((store, 1), (other, 2)):
        each.write_prototypes("p01", {"p": value}, {"roi": np.array([value])})
    for each, value in ((store, 1), (other, 2)):
        assert each.prototypes_signature("p01") == {"p": value}
        assert each.read_prototypes("p01")[1]["roi"].tolist() == [value]
    _write(store, "p01", {"v": 2})
    assert store.read_prototypes("p01") is None


def test_dropping_features_keeps_the_rest(store):
    content = _write(store, "p", {"v": 1})
    store.write_prototypes("p", {"pool": 1}, {"a": np.ones(2)})
    store.drop_features("p")
    store.drop_features("p")
    read = store.read("p")
    assert read.features is None
    assert not (store.root / "p" / "features").exists()
    np.testing.assert_array_equal(read.masks([0]), content[0][1][:1])
    assert store.signature("p") == {"v": 1}
    assert store.read_prototypes("p")[0] == {"pool": 1}


_ENDLESS = """
import itertools, sys
import numpy as np
from storage.embeddings import EmbeddingStore
from storage.geometry import Geometry
store = EmbeddingStore(sys.argv[1])
geometry, masks, scores = Geometry((4, 9, 11), (6.0, 1.5, 1.5)), np.ones((5, 9, 11), bool), np.ones(5)
for version in itertools.count():
    with store.writer("p", {"v": version}, geometry, {}, (2, 4), (9, 11)) as writer:
        for z in range(4):
            writer.add_slice(z, np.full((3, 2, 4), version + 1.0), masks, scores, scores)
    print(version, flush=True)
"""


def test_killed_writer_leaves_a_whole_subject_or_none(store):
    """SIGKILL at odd moments of rewriting: what is visible is always whole, and what is left is cleared."""
    aside = store.root.parent / ".embeddings.zarr.wip"
    left_behind = 0
    for delay in (0.0, 0.013, 0.029, 0.041):
        process = subprocess.Popen([sys.executable, "-c", _ENDLESS, str(store.root)], stdout=subprocess.PIPE, cwd=REPO)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        left_behind += len(list(aside.iterdir()))
        signature = store.signature("p")
        if signature is not None:
            read = store.read("p")
            assert read.roi_slice.tolist() == np.repeat(range(4), 5).tolist()
            assert (np.asarray(read.features[:]) == signature["v"] + 1).all()
            assert read.masks().all()
    assert left_behind > 0
    store.clear_abandoned()
    _write(store, "p", {"v": "after"})
    assert list(aside.iterdir()) == []
    assert store.signature("p") == {"v": "after"}


def test_live_writer_is_not_taken_for_a_dead_one(store):
    content = _slices()
    with store.writer("p", {"v": 1}, GEOMETRY, LAYOUT, (2.0, 3.5), (9, 11)) as slow:
        slow.add_slice(0, *content[0])
        store.clear_abandoned()
        _write(store, "p", {"v": 2})
        for z in (1, 2, 3):
            slow.add_slice(z, *content[z])
    assert store.signature("p") == {"v": 1}


def test_full_disk_names_the_store(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code = f"""
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import numpy as np
from storage.embeddings import EmbeddingStore
from storage.geometry import Geometry
store = EmbeddingStore({str(tmp_path / "embeddings.zarr")!r})
noise = np.random.default_rng(0).normal(size=(64, 32, 32))
try:
    with store.writer("p", {{}}, Geometry((1, 9, 11), (6.0, 1.5, 1.5)), {{}}, (2, 4), (9, 11)) as writer:
        writer.add_slice(0, noise, np.ones((5, 9, 11), bool), np.ones(5), np.ones(5))
except OSError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        cwd=REPO,
        check=True,
    )
    assert str(tmp_path) in done.stdout
    assert sorted(os.listdir(tmp_path / "embeddings.zarr")) == ["zarr.json"]
