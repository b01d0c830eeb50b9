"""Networks of the user's: both file formats, the input they are given, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors.build import segmenter_signature, uses_gpu
from actors.class_config import LabelsConfig, NetworkConfig
from actors.input_config import InputConfig
from actors.network import NetworkSegmenter, blend_patches, network_input
from actors.sam_variants import CheckpointError
from storage.geometry import Geometry
from storage.images import Image, ImageError
from tests.phantoms import write_threshold_network

SHAPE = (3, 10, 9)


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)[..., ::2]


def _image(spacing: tuple[float, float, float] = (4.0, 1.0, 1.0)) -> Image:
    array = np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.float32)
    return Image(array, Geometry(SHAPE, spacing))


def _segment(path: Path, image: Image | None = None, **settings: object) -> np.ndarray:
    segmenter = NetworkSegmenter(NetworkConfig(checkpoint=str(path), **settings), "cpu")
    return segmenter.segment(image or _image(), InputConfig(), "").labels


@pytest.mark.parametrize("kind", ["script", "export"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_both_formats_run_on_volumes_and_on_slices(tmp_path: Path, kind: str, dimensions: int) -> None:
    path = write_threshold_network(tmp_path / "net.pt2", kind, dimensions)
    image = _image()
    expected = (image.array > image.array.mean()).astype(np.int32)
    np.testing.assert_array_equal(_segment(path, image, dimensions=dimensions), expected)


def test_the_probability_is_that_of_the_class(tmp_path: Path) -> None:
    path, image = write_threshold_network(tmp_path / "net.pt", "script", 3), _image()
    found = NetworkSegmenter(NetworkConfig(checkpoint=str(path)), "cpu").segment(image, InputConfig(), "")
    scored = (image.array - image.array.mean()) / image.array.std()
    np.testing.assert_allclose(found.probability, 1 / (1 + np.exp(-np.abs(scored))), atol=1e-5)


def test_sizes_are_padded_to_a_multiple_and_cut_back(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    segmenter = NetworkSegmenter(
        NetworkConfig(checkpoint=str(write_threshold_network(tmp_path / "n.pt", "script", 3)), multiple=(4, 8, 8)),
        "cpu",
    )
    program = segmenter.program
    segmenter.program = lambda x: (seen.append(tuple(x.shape)), program(x))[1]
    image = _image()
    found = segmenter.segment(image, InputConfig(), "")
    assert seen == [(1, 1, 4, 16, 16)]
    np.testing.assert_array_equal(found.labels, image.array > image.array.mean())


def test_patches_cover_everything(tmp_path: Path) -> None:
    path, image = write_threshold_network(tmp_path / "n.pt", "script", 3), _image()
    expected = image.array > image.array.mean()
    np.testing.assert_array_equal(_segment(path, image, patch=(4, 4, 4)), expected)


def test_blending_patches_of_a_local_function_changes_nothing() -> None:
    x = torch.randn(1, 1, 7, 11, generator=torch.Generator().manual_seed(0))
    shapes: set[tuple[int, ...]] = set()

    def run(part: Tensor) -> Tensor:
        shapes.add(tuple(part.shape))
        return torch.cat([part, 2 * part], 1)

    torch.testing.assert_close(blend_patches(run, x, (4, 5)), torch.cat([x, 2 * x], 1))
    assert shapes == {(1, 1, 4, 5)}


def test_the_image_is_brought_to_the_spacing_of_the_network(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    config = NetworkConfig(
        checkpoint=str(write_threshold_network(tmp_path / "n.pt", "script", 3)), spacing_mm=(0.0, 2.0, 0.5)
    )
    segmenter = NetworkSegmenter(config, "cpu")
    program = segmenter.program
    segmenter.program = lambda x: (seen.append(tuple(x.shape[2:])), program(x))[1]
    assert segmenter.segment(_image(), InputConfig(), "").labels.shape == SHAPE
    assert seen == [(3, 5, 18)]


def test_the_input_is_normalised_as_asked() -> None:
    image = _image()
    scored = network_input(image, InputConfig(), NetworkConfig(checkpoint="n"))
    assert scored.shape == (1, 1, *SHAPE)
    assert scored.dtype == torch.float32
    assert float(scored.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scored.std(correction=0)) == pytest.approx(1, abs=1e-4)
    unit = network_input(image, InputConfig(window=(80, 120)), NetworkConfig(checkpoint="n", normalise="unit"))
    np.testing.assert_allclose(unit[0, 0].numpy(), np.clip((image.array - 80) / 40, 0, 1), atol=1e-6)
    raw = network_input(image, InputConfig(), NetworkConfig(checkpoint="n", normalise="none", dimensions=2))
    np.testing.assert_array_equal(raw[:, 0].numpy(), image.array)


def test_colour_makes_three_channels() -> None:
    array = np.random.default_rng(0).integers(0, 256, (1, 4, 5, 3)).astype(np.uint8)
    image = Image(array, Geometry((1, 4, 5), (1.0, 1.0, 1.0)))
    x = network_input(image, InputConfig(), NetworkConfig(checkpoint="n", normalise="unit", dimensions=2))
    np.testing.assert_allclose(x[0].numpy(), array[0].transpose(2, 0, 1) / 255, atol=1e-6)


def test_what_is_no_network_is_refused_before_it_is_run(tmp_path: Path) -> None:
    for checkpoint, message in (("", "needs segmenter.checkpoint"), (str(tmp_path / "no.pt"), "no network at")):
        with pytest.raises(FileNotFoundError, match=message):
            segmenter_signature(NetworkConfig(checkpoint=checkpoint))
    torch.save(nn.Conv3d(1, 2, 3).state_dict(), tmp_path / "weights.pth")
    (tmp_path / "text.pt").write_text("not a network", encoding="utf-8")
    for name in ("weights.pth", "text.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}: neither a TorchScript nor a torch.export file"):
            segmenter_signature(NetworkConfig(checkpoint=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (TwoOutputs(), {}, "returns a tuple; wrap the network"),
        (Halved(), {}, r"returns \[1, 2, 3, 10, 5\] for an input \[1, 1, 3, 10, 9\]"),
        (nn.Conv3d(1, 2, 1), {"dimensions": 2}, "fails on an input|returns"),
        (nn.Conv3d(4, 2, 1), {}, r"fails on an input \[1, 1, 3, 10, 9\]"),
    ],
    ids=["two outputs", "another size", "another dimension", "other channels"],
)
def test_a_network_off_the_contract_is_named(
    tmp_path: Path, module: nn.Module, settings: dict[str, object], message: str
) -> None:
    torch.jit.save(torch.jit.script(module), tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=f"net.pt: ({message})"):
        _segment(tmp_path / "net.pt", **settings)


def test_logits_are_not_taken_for_probabilities(tmp_path: Path) -> None:
    path = write_threshold_network(tmp_path / "net.pt", "script", 3)
    with pytest.raises(ImageError, match=r"net.pt \(segmenter.output: probabilities\): class probabilities must lie"):
        _segment(path, output="probabilities")


def test_the_signature_holds_the_weights_and_not_their_place(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    a = write_threshold_network(tmp_path / "a.pt", "script", 3)
    b = tmp_path / "b" / "renamed.pt"
    b.write_bytes(a.read_bytes())
    signatures = [segmenter_signature(NetworkConfig(checkpoint=str(path))) for path in (a, b)]
    assert signatures[0] == signatures[1]
    assert len(signatures[0]["weights_sha256"]) == 64
    other = write_threshold_network(tmp_path / "c.pt", "script", 3, scale=2.0)
    assert segmenter_signature(NetworkConfig(checkpoint=str(other))) != signatures[0]
    assert segmenter_signature(NetworkConfig(checkpoint=str(a), normalise="unit")) != signatures[0]


def test_only_the_network_asks_for_a_gpu() -> None:
    assert uses_gpu(NetworkConfig(checkpoint="n"))
    assert not uses_gpu(LabelsConfig())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["script", "export"])
def test_a_gpu_gives_the_same_classes(tmp_path: Path, kind: str) -> None:
    config = NetworkConfig(checkpoint=str(write_threshold_network(tmp_path / "n.pt2", kind, 3)))
    found = [NetworkSegmenter(config, d).segment(_image(), InputConfig(), "").labels for d in ("cpu", "cuda")]
    np.testing.assert_array_equal(*found)
