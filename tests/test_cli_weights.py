"""`samreg weights`: every command through the command line, with a real weights file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from actors import sam_weights
from actors.sam_variants import VARIANTS
from pipeline.cli import app
from pipeline.cli_weights import PROBED
from tests.recipe_weights import GOLDENS, load_recipe, recipe_state_dict, seeded_slimsam_77


def _weights(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["weights", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SAMREG_WEIGHTS", str(folder))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "own.pth"
    torch.save(seeded_slimsam_77(), path)
    return path


def test_list_names_every_variant_with_its_source(cache: Path) -> None:
    shown = _weights("list")
    assert shown.exit_code == 0
    lines = {line.split()[0]: line for line in shown.stdout.splitlines() if line}
    assert set(VARIANTS) < set(lines)
    assert "sam_vit_b_01ec64.pth" in lines["sam_vit_b"]
    assert "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912" in lines["sam_vit_b"]
    assert "https://" in lines["medsam"]
    assert str(cache) in shown.stdout
    cache.mkdir()
    (cache / "mobile_sam.pt").write_bytes(b"x")
    rows = json.loads(_weights("list", "--json").stdout)
    assert [row["variant"] for row in rows if row["present"]] == ["mobile_sam"]


def test_fetch_without_a_connection_says_url_and_place(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = sam_weights.WEIGHTS["sam_vit_b"]
    offline = {**vars(entry), "url": "http://127.0.0.1:9/sam_vit_b_01ec64.pth"}
    monkeypatch.setitem(sam_weights.WEIGHTS, "sam_vit_b", type(entry)(**offline))
    failed = _weights("fetch", "sam_vit_b")
    assert failed.exit_code == 1
    assert offline["url"] in failed.stderr
    assert str(cache / "sam_vit_b_01ec64.pth") in failed.stderr
    by_hand = _weights("fetch", "medsam")
    assert (by_hand.exit_code, "drive.google.com" in by_hand.stderr) == (1, True)


def test_fetch_says_when_the_file_at_hand_is_another(cache: Path) -> None:
    cache.mkdir()
    (cache / "sam_vit_b_01ec64.pth").write_bytes(b"something else")
    found = _weights("fetch", "sam_vit_b")
    assert found.exit_code == 1
    assert "another hash" in found.stdout


def test_identify_and_verify(checkpoint: Path, tmp_path: Path) -> None:
    found = _weights("identify", checkpoint)
    assert (found.exit_code, "slimsam_77" in found.stdout) == (0, True)
    checked = _weights("verify", checkpoint)
    assert checked.exit_code == 0
    assert sam_weights.file_sha256(checkpoint) in checked.stdout
    assert checked.stdout.splitlines()[-1] == "loads   strictly, as slimsam_77"
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(2)}, other)
    for command in ("identify", "verify"):
        refused = _weights(command, other)
        assert (refused.exit_code, "not a SAM checkpoint" in refused.stdout) == (1, True)
    other.write_bytes(checkpoint.read_bytes()[:100_000])
    for command in ("identify", "verify"):
        damaged = _weights(command, other)
        assert (damaged.exit_code, "truncated" in damaged.stderr) == (2, True)


def test_probe_writes_the_official_arrays(tmp_path: Path) -> None:
    recipe, golden = load_recipe(), "slimsam_77_uniform"
    weights, image, out = tmp_path / "w.pth", tmp_path / "i.png", tmp_path / "probe.npz"
    torch.save(recipe_state_dict(golden), weights)
    Image.fromarray(recipe.test_image()).save(image)
    points = ";".join(f"{x},{y}" for x, y in recipe.POINTS_XY)
    box = ",".join(map(str, np.ravel(recipe.BOX_XYXY)))
    prompts = ["--points", points, "--box", box, "--out", out]
    done = _weights("probe", "--variant", "slimsam_77", "--checkpoint", weights, "--image", image, *prompts)
    assert (done.exit_code, done.stdout.strip()) == (0, str(out)), done.output
    with np.load(out) as got, np.load(GOLDENS / f"{golden}.npz") as expected:
        assert set(got.files) == set(PROBED)
        meta = json.loads(str(expected["meta"]))
        tolerance, stride = meta["tolerance"], meta["input_stride"]
        close = np.testing.assert_allclose
        close(got["input"][:, ::stride, ::stride], expected["input_sub"], rtol=0, atol=tolerance["input_abs"])
        close(got["features"][::8, ::8, ::8], expected["feat_sub"], rtol=0, atol=tolerance["feat_abs"])
        for name in ("multi", "single", "boxsingle"):
            logits = got[f"logits_{name}"][..., ::8, ::8]
            close(logits, expected[f"logits_{name}"], rtol=0, atol=tolerance["logit_abs"])
            close(got[f"iou_{name}"], expected[f"iou_{name}"], rtol=0, atol=tolerance["iou_abs"])


def test_probe_without_a_file_prints_its_health(checkpoint: Path, tmp_path: Path) -> None:
    image = tmp_path / "grey.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)).save(image)
    done = _weights("probe", "--variant", "slimsam_77", "--checkpoint", checkpoint, "--image", image, "--no-out")
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["input", "features"]
    assert "NOT FINITE" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "slimsam_7", "--no-out"], "did you mean slimsam_77?"),
        (["--variant", "slimsam_77"], "either --out FILE.npz or --no-out"),
        (["--variant", "slimsam_77", "--no-out", "--points", "1,2;3"], "--points: '3' is not x,y"),
        (["--variant", "slimsam_77", "--no-out", "--box", "1,2,3"], "--box: '1,2,3' is not x0,y0,x1,y1"),
        (["--variant", "slimsam_77", "--no-out", "--preprocess", "hf"], "'hf' is none of sam, medsam, sam_med2d"),
        (["--variant", "slimsam_77", "--no-out"], "no weights of slimsam_77"),
        (["--variant", "mobile_sam", "--no-out", "--checkpoint", "OWN"], "these weights are not mobile_sam"),
    ],
)
def test_probe_refuses_with_one_line(checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    image = tmp_path / "i.png"
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(image)
    given = [str(checkpoint) if argument == "OWN" else argument for argument in arguments]
    refused = _weights("probe", "--image", image, *given)
    assert refused.exit_code == 2, refused.output
    assert message in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_probe_on_a_gpu_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--variant", "slimsam_77", "--image", tmp_path / "i.png", "--no-out", "--device", "cuda"]
    refused = _weights("probe", *arguments)
    assert (refused.exit_code, "there is no GPU here" in refused.stderr) == (2, True)
