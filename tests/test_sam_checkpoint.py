"""Reading weights files: what is accepted, what is refused, and that nothing in a file is ever executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.sam_checkpoint import CheckpointError, read_checkpoint
from actors.sam_model import build_from_state_dict
from actors.sam_variants import identify
from tests.recipe_weights import seeded_slimsam_77

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return seeded_slimsam_77()


def assert_same(read: Weights, expected: Weights) -> None:
    assert set(read) == set(expected)
    for key, value in expected.items():
        assert torch.equal(read[key], value), key


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "sam.", "_orig_mod.", "_orig_mod.module.", "module.sam."])
def test_prefixes_are_removed(weights: Weights, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save({prefix + key: value for key, value in weights.items()}, path)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.weights, weights)
    assert bool(checkpoint.notes) == bool(prefix)


def test_mixed_prefixes_are_refused(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({("module." if i % 2 else "") + key: v for i, (key, v) in enumerate(weights.items())}, path)
    with pytest.raises(CheckpointError, match=r"different prefixes: .*module\."):
        read_checkpoint(path)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict"])
def test_training_files_are_unwrapped(weights: Weights, tmp_path: Path, wrapper: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save({wrapper: {f"module.{k}": v for k, v in weights.items()}, "epoch": 3, "optimizer": {"lr": 1.0}}, path)
    assert_same(read_checkpoint(path).weights, weights)


def test_an_optimizer_object_beside_the_model_stays_inert(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "sam-med2d_b.pth"
    torch.save({"model": weights, "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert_same(read_checkpoint(path).weights, weights)


class Hostile:
    """Pickles as a call of os.system."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_checkpoint_is_executed(weights: Weights, tmp_path: Path, zipped: bool) -> None:
    target, path = tmp_path / "executed", tmp_path / "weights.pth"
    few = dict(list(weights.items())[:3])
    torch.save({"model": few, "extra": Hostile(target)}, path, _use_new_zipfile_serialization=zipped)
    if zipped:
        assert_same(read_checkpoint(path).weights, few)
    else:
        with pytest.raises(CheckpointError, match="code"):
            read_checkpoint(path)
    assert not target.exists()


def test_a_pickled_module_is_refused_with_the_file_to_use(tmp_path: Path) -> None:
    path = tmp_path / "SlimSAM-77.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match=re.escape("SlimSAM-77-uniform.pth")):
        read_checkpoint(path)
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(CheckpointError, match="pickled module"):
        read_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_exactly(weights: Weights, tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "weights.pth"
    half = {key: value.to(dtype) for key, value in weights.items()}
    torch.save(half, path)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.weights, {key: value.float() for key, value in half.items()})
    assert "exactly" in " ".join(checkpoint.notes)


def test_float64_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.tensor([1.5], dtype=torch.float64)}, path)
    assert read_checkpoint(path).weights["a"].dtype == torch.float32
    torch.save({"a": torch.tensor([0.1], dtype=torch.float64)}, path)
    with pytest.raises(CheckpointError, match="float64"):
        read_checkpoint(path)


def test_weights_that_are_not_finite_are_refused(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    broken = weights | {"image_encoder.pos_embed": weights["image_encoder.pos_embed"] * torch.nan}
    torch.save(broken, path)
    with pytest.raises(CheckpointError, match=r"image_encoder\.pos_embed.*NaN"):
        read_checkpoint(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused(weights: Weights, tmp_path: Path, share: float) -> None:
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="download it again"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>Google Drive - Virus scan warning</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"not weights at all, only text " * 9, "not a torch checkpoint"),
        (bytes(range(256)) * 4, "not a torch checkpoint"),
    ],
)
def test_files_that_are_no_weights_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_damage_inside_the_archive_is_refused(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": weights, "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])}, path)
    slim = tmp_path / "slim.pth"
    with zipfile.ZipFile(path) as full, zipfile.ZipFile(slim, "w") as cut:
        for name in full.namelist():
            if not name.endswith("/data/0"):
                cut.writestr(name, full.read(name))
    with pytest.raises(CheckpointError, match=r"truncated|no readable state dict"):
        read_checkpoint(slim)


def test_a_missing_file_says_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="samreg weights list"):
        read_checkpoint(tmp_path / "absent.pth")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, {"model": {"a": "text"}}])
def test_other_objects_are_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="state dict"):
        read_checkpoint(path)


def write_safetensors(path: Path, weights: Weights) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for key, value in weights.items():
        raw = value.contiguous().numpy().tobytes()
        header[key] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def to_hugging_face(weights: Weights) -> Weights:
    """transformers' conversion as its convert_sam_to_hf.py documents it."""
    table = {
        "iou_prediction_head.layers.0": "iou_prediction_head.proj_in",
        "iou_prediction_head.layers.1": "iou_prediction_head.layers.0",
        "iou_prediction_head.layers.2": "iou_prediction_head.proj_out",
        "mask_decoder.output_upscaling.0": "mask_decoder.upscale_conv1",
        "mask_decoder.output_upscaling.1": "mask_decoder.upscale_layer_norm",
        "mask_decoder.output_upscaling.3": "mask_decoder.upscale_conv2",
        "mask_downscaling.0": "mask_embed.conv1",
        "mask_downscaling.1": "mask_embed.layer_norm1",
        "mask_downscaling.3": "mask_embed.conv2",
        "mask_downscaling.4": "mask_embed.layer_norm2",
        "mask_downscaling.6": "mask_embed.conv3",
        "point_embeddings": "point_embed",
        "pe_layer.positional_encoding_gaussian_matrix": "shared_embedding.positional_embedding",
        "image_encoder": "vision_encoder",
        "neck.0": "neck.conv1",
        "neck.1": "neck.layer_norm1",
        "neck.2": "neck.conv2",
        "neck.3": "neck.layer_norm2",
        "patch_embed.proj": "patch_embed.projection",
        ".norm": ".layer_norm",
        "blocks": "layers",
    }
    hypernetwork = {"layers.0": "proj_in", "layers.1": "layers.0", "layers.2": "proj_out"}
    converted = {}
    for official, value in weights.items():
        key = official
        for old, new in table.items():
            key = key.replace(old, new)
        found = re.match(r".*output_hypernetworks_mlps\.\d+\.(layers\.\d)", key)
        if found:
            key = key.replace(found[1], hypernetwork[found[1]])
        converted[key] = value
    places = converted["prompt_encoder.shared_embedding.positional_embedding"]
    return converted | {"shared_image_embedding.positional_embedding": places}


@pytest.mark.parametrize("tied", [True, False])
def test_the_hugging_face_layout_is_renamed_exactly(weights: Weights, tmp_path: Path, tied: bool) -> None:
    renamed = to_hugging_face(weights)
    if tied:
        del renamed["prompt_encoder.shared_embedding.positional_embedding"]
    path = tmp_path / "model.safetensors"
    write_safetensors(path, renamed)
    assert_same(read_checkpoint(path).weights, weights)


def test_a_truncated_safetensors_file_is_refused(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, weights)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        read_checkpoint(path)


def test_hugging_face_hq_sam_is_refused(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(to_hugging_face(weights) | {"mask_decoder.hq_token.weight": torch.ones(1, 256)}, path)
    with pytest.raises(CheckpointError, match=re.escape("sam_hq_vit_b.pth")):
        read_checkpoint(path)


def test_the_wrong_variant_is_refused(weights: Weights) -> None:
    with pytest.raises(CheckpointError, match="not sam_vit_b: they are slimsam_77"):
        build_from_state_dict(weights, "sam_vit_b")
    with pytest.raises(ValueError, match="did you mean slimsam_77"):
        build_from_state_dict(weights, "slimsam77")


def test_loading_is_strict(weights: Weights) -> None:
    missing = dict(weights)
    del missing["image_encoder.blocks.3.attn.qkv.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: image_encoder\.blocks\.3\.attn\.qkv\.bias"):
        build_from_state_dict(missing, "slimsam_77")
    extra = weights | {"mask_decoder.surprise": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"1 unexpected: mask_decoder\.surprise"):
        build_from_state_dict(extra, "slimsam_77")
    misshapen = weights | {"mask_decoder.iou_token.weight": torch.ones(2, 256)}
    with pytest.raises(CheckpointError, match=r"1 wrong shape: mask_decoder\.iou_token\.weight \[2, 256\]"):
        build_from_state_dict(misshapen, "slimsam_77")


SIZES = {"b": (768, 12, 3072), "l": (1024, 24, 4096), "h": (1280, 32, 5120)}


def shapes_of(size: tuple[int, int, int], side: int = 1024, *extra: str) -> Weights:
    """The few keys that identify a variant, as meta tensors."""
    dim, depth, mlp = size
    keys = {f"image_encoder.blocks.{i}.mlp.lin1.weight": (mlp, dim) for i in range(depth)}
    keys["image_encoder.pos_embed"] = (1, side // 16, side // 16, dim)
    keys["image_encoder.patch_embed.proj.weight"] = (dim, 3, 16, 16)
    keys |= dict.fromkeys(("mask_decoder.iou_token.weight", "prompt_encoder.no_mask_embed.weight", *extra), (1, 256))
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


@pytest.mark.parametrize(
    ("weights_like", "variants"),
    [
        (shapes_of(SIZES["b"]), ("sam_vit_b", "medsam")),
        (shapes_of(SIZES["l"]), ("sam_vit_l",)),
        (shapes_of(SIZES["h"]), ("sam_vit_h",)),
        (shapes_of((384, 12, 1536)), ("slimsam_50",)),
        (shapes_of((168, 12, 696)), ("slimsam_77",)),
        (shapes_of(SIZES["b"], 256, "image_encoder.blocks.0.Adapter.norm.weight"), ("sam_med2d",)),
        (shapes_of(SIZES["b"], 256), ("sam_med2d_ft",)),
        (shapes_of(SIZES["b"], 1024, "mask_decoder.hf_token.weight"), ("hq_sam_b",)),
        (shapes_of(SIZES["l"], 1024, "mask_decoder.hf_token.weight"), ("hq_sam_l",)),
        (shapes_of(SIZES["h"], 1024, "mask_decoder.hf_token.weight"), ("hq_sam_h",)),
        (shapes_of(SIZES["b"], 1024, "image_encoder.patch_embed.seq.0.c.weight"), ("mobile_sam",)),
        (shapes_of((512, 12, 2048)), ()),
        (shapes_of(SIZES["b"], 1024, "image_encoder.blocks.0.attn.q.weight"), ()),
        ({"image_encoder.trunk.pos_embed": torch.ones(1)}, ()),
        ({"layer1.weight": torch.ones(1)}, ()),
    ],
)
def test_identify_by_keys_and_shapes(weights_like: Weights, variants: tuple[str, ...]) -> None:
    found = identify(weights_like)
    assert found.variants == variants
    assert found.note


def test_identify_says_when_only_the_hash_can_tell() -> None:
    assert "sha256" in identify(shapes_of(SIZES["b"])).note
    assert "SlimSAM-77-uniform" in identify(shapes_of(SIZES["b"], 1024, "image_encoder.blocks.0.attn.q.weight")).note
