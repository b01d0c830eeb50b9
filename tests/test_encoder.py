"""The slice encoder: batches change nothing, no slice is encoded twice, and the planned segmenter is insisted on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.component_tree import ComponentTree, ComponentTreeConfig
from actors.encoder import SliceEncoder
from actors.input_config import InputConfig
from actors.segmenter import Features
from pipeline.stages.encode import EncodeUnit, run_unit
from storage.signature import SignatureMismatch
from tests import phantoms


class CountingTree(ComponentTree):
    """Remembers how many slices each call of `encode` was given."""

    def __init__(self) -> None:
        super().__init__(ComponentTreeConfig())
        self.calls: list[int] = []

    def encode(self, slices: Any) -> Features:
        self.calls.append(len(slices))
        return super().encode(slices)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.write_volume(tmp_path_factory.mktemp("image") / "i.nii.gz", phantoms.ellipses()[0])


@pytest.mark.parametrize(("batch", "calls"), [(1, [1] * 5), (2, [2, 2, 1]), (8, [5])])
def test_batches_change_nothing_and_no_slice_is_encoded_twice(
    image: Path, tmp_path: Path, batch: int, calls: list[int]
) -> None:
    single = SliceEncoder(CountingTree, tmp_path / "single")
    single.encode("s", str(image), {}, InputConfig())
    encoder = SliceEncoder(CountingTree, tmp_path / "batched", batch)
    done = encoder.encode("s", str(image), {}, InputConfig())
    assert encoder.segmenter.calls == calls  # type: ignore[attr-defined]
    assert done.n_slices == 5
    expected, found = single.store.read("s"), encoder.store.read("s")
    np.testing.assert_array_equal(found.masks(), expected.masks())
    np.testing.assert_array_equal(found.roi_slice, expected.roi_slice)
    assert expected.features is not None
    assert found.features is not None
    np.testing.assert_array_equal(found.features[:], expected.features[:])


def test_a_worker_with_another_segmenter_than_planned_refuses(image: Path, tmp_path: Path) -> None:
    encoder = SliceEncoder(CountingTree, tmp_path)
    planned = {"segmenter": {**encoder.segmenter.signature, "levels": 7}}
    with pytest.raises(SignatureMismatch, match=r"this worker's segmenter.*levels: stored 48, asked for 7"):
        run_unit(encoder, InputConfig(), EncodeUnit("s", str(image), planned))
    assert encoder.store.subjects() == []
