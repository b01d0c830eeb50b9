"""The layouts of public data sets, on small trees as they are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from scipy.ndimage import gaussian_filter, map_coordinates
from skimage.transform import AffineTransform, warp

from storage.cohort import read_cohort, read_pairs
from storage.images import read_image, read_labels
from storage.landmarks import read_landmarks
from storage.layouts.found import Found
from storage.layouts.registry import LAYOUTS, read_layout
from storage.manifest import CohortError, read_rows
from tests import public_data
from tests.phantoms import samreg, write_volume
from tests.public_data import write_text

TURN = np.array([[0.98, -0.199, 9.0], [0.199, 0.98, -4.0]])


def read(name: str, root: Path, select: str = "") -> Found:
    return read_layout(name, root, root.parent / "files", select)


def names(found: Found) -> list[str]:
    return [subject.subject for subject in found.subjects]


def pairs(found: Found) -> list[tuple[str, str, str]]:
    return [tuple(pair) for pair in found.pairs]


def landmarks(found: Found, subject: str) -> np.ndarray:
    """Landmarks as the study reads them, voxels in array order."""
    entry = next(s for s in found.subjects if s.subject == subject)
    geometry = read_image(entry.image).geometry
    return read_landmarks(entry.landmarks, geometry) / np.array(geometry.spacing_mm)


def test_acdc(tmp_path: Path) -> None:
    found = read("acdc", public_data.acdc(tmp_path / "database" / "training").parent)
    assert names(found) == ["patient001_ED", "patient001_ES", "patient002_ED", "patient002_ES"]
    assert pairs(found)[0] == ("patient001", "patient001_ES", "patient001_ED")
    assert found.subjects[1].image.endswith("patient001_frame12.nii.gz")
    assert found.subjects[1].label.endswith("patient001_frame12_gt.nii.gz")
    assert [s.group for s in found.subjects] == ["patient001"] * 2 + ["patient002"] * 2
    assert found.columns["phase"]["patient002_ES"] == "ES"
    assert found.columns["pathology"]["patient002_ES"] == "DCM"
    assert not found.problems
    assert not found.files.exists()


def test_acdc_takes_frames_out_of_the_cine_and_says_what_it_cannot_find(tmp_path: Path) -> None:
    root = public_data.acdc(tmp_path / "training", patients=3)
    for number, frames in ((1, 12), (2, 5)):
        folder = root / f"patient00{number}"
        (folder / f"patient00{number}_frame12.nii.gz").unlink()
        values = np.arange(2 * 48 * 48, dtype=np.int16).reshape(2, 48, 48)
        public_data.write_cine(folder / f"patient00{number}_4d.nii.gz", [values + t for t in range(frames)])
    write_text(root / "patient003" / "Info.cfg", "ED: 1\nGroup: NOR\n")
    found = read("acdc", root)
    assert names(found) == ["patient001_ED", "patient001_ES", "patient002_ED", "patient003_ED"]
    assert read_image(found.subjects[1].image).array[0, 0, 0] == 11
    assert [pair.pair for pair in found.pairs] == ["patient001"]
    assert "5 frames, there is no frame 12" in found.problems[0]
    assert "no line 'ES: <number>'" in found.problems[2]


def test_mnms_frames_keep_their_grid_and_nothing_else_of_the_header(tmp_path: Path) -> None:
    found = read("mnms", public_data.mnms(tmp_path / "OpenDataset", ["A0S9V9", "B2D9M2"]))
    assert names(found) == ["A0S9V9_ED", "A0S9V9_ES", "B2D9M2_ED", "B2D9M2_ES"]
    assert pairs(found)[1] == ("B2D9M2", "B2D9M2_ES", "B2D9M2_ED")
    assert found.columns["vendor"]["B2D9M2_ED"] == "A"
    systole = found.subjects[1]
    image = read_image(systole.image)
    assert image.array[0, 0, 0] == 200
    assert image.geometry.spacing_mm == pytest.approx((8, 1.5, 1.5))
    assert (read_labels(systole.label, image.geometry) == 2).all()
    written = sitk.ReadImage(systole.image)
    assert written.GetOrigin() == pytest.approx((-10, 5, 2))
    assert b"somebody" not in Path(systole.image).read_bytes()
    assert "descrip" not in written.GetMetaDataKeys()


def test_mnms_keeps_the_good_hearts(tmp_path: Path) -> None:
    root = public_data.mnms(tmp_path / "OpenDataset", ["A0S9V9", "B2D9M2"])
    damaged = root / "Training/Labeled/A0S9V9/A0S9V9_sa.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    shutil.copytree(root / "Training/Labeled/B2D9M2", root / "Validation/X9X9X9")
    (root / "Validation/X9X9X9/B2D9M2_sa.nii.gz").rename(root / "Validation/X9X9X9/X9X9X9_sa.nii.gz")
    found = read("mnms", root)
    assert names(found) == ["B2D9M2_ED", "B2D9M2_ES"]
    assert [p.split(":")[0] for p in found.problems[:2]] == ["A0S9V9_ED", "A0S9V9_ES"]
    assert "X9X9X9 is not in the table" in found.problems[-1]
    assert names(read("mnms", root / "Training" / "Labeled")) == names(found)
    table = next(root.glob("*.csv"))
    table.write_text(
        table.read_text(encoding="utf-8").replace("B2D9M2,Siemens,A,6,0,2", "B2D9M2,Siemens,A,6,0,"), encoding="utf-8"
    )
    assert "the table gives '' for ES, not a frame" in "\n".join(read("mnms", root).problems)


def test_two_tables_of_hearts_above_the_folder_are_refused(tmp_path: Path) -> None:
    root = public_data.mnms(tmp_path / "OpenDataset", ["A0S9V9"])
    table = next(root.glob("*.csv"))
    shutil.copy(table, table.with_stem(f"{table.stem}_2"))
    with pytest.raises(CohortError, match=r"2 times table .*\.\./\.\./211230_M&Ms"):
        read("mnms", root / "Training" / "Labeled")


def test_a_frame_that_cannot_be_written_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **more: object) -> None:
        raise RuntimeError("ITK says little")

    root = public_data.mnms(tmp_path / "OpenDataset")
    monkeypatch.setattr("SimpleITK.WriteImage", fail)
    with pytest.raises(OSError, match="A0S9V9_ED"):
        read("mnms", root)


@pytest.mark.parametrize("name", ["mnms", "learn2reg", "fire"])
def test_hidden_files_are_none_of_the_data(tmp_path: Path, name: str) -> None:
    root = getattr(public_data, name)(tmp_path / name)
    before = read(name, root)
    for path in [path for path in root.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"resource fork")
    after = read(name, root)
    assert (after.subjects, after.pairs, after.problems) == (before.subjects, before.pairs, before.problems)


def test_learn2reg(tmp_path: Path) -> None:
    found = read("learn2reg", public_data.learn2reg(tmp_path / "LungCT"))
    assert names(found) == [f"LungCT_000{case}_000{time}" for case in (1, 2) for time in (0, 1)]
    assert all("masksTr" in s.label for s in found.subjects)
    assert found.subjects[3].group == "LungCT_0002"
    assert pairs(found) == [("LungCT_0002_0001__LungCT_0002_0000", "LungCT_0002_0001", "LungCT_0002_0000")]
    assert np.allclose(landmarks(found, "LungCT_0002_0001"), [[1, 21, 10.5], [2, 12.25, 30]])
    training = read("learn2reg", tmp_path / "LungCT", "training").pairs
    assert [pair.moving for pair in training] == ["LungCT_0001_0001"]


def test_learn2reg_images_in_a_folder_of_any_name_are_not_their_own_labels(tmp_path: Path) -> None:
    root = public_data.learn2reg(tmp_path / "LungCT")
    (root / "imagesTr").rename(root / "scans")
    listing = next(root.glob("*_dataset.json"))
    listing.write_text(listing.read_text(encoding="utf-8").replace("imagesTr", "scans"), encoding="utf-8")
    found = read("learn2reg", root)
    assert [bool(subject.label) for subject in found.subjects] == [True, True, False, False]  # as far as listed


def test_learn2reg_mistakes(tmp_path: Path) -> None:
    root = public_data.learn2reg(tmp_path / "LungCT")
    (root / "imagesTr/LungCT_0002_0001.nii.gz").unlink()
    write_text(root / "keypointsTr/LungCT_0001_0000.csv", "x,y,z\n1,2,3\n")
    found = read("learn2reg", root)
    assert names(found) == ["LungCT_0001_0000", "LungCT_0001_0001", "LungCT_0002_0000"]
    assert not found.subjects[0].landmarks
    assert [p.split(";")[0] for p in found.problems] == [
        f"LungCT_0001_0000: {root}/keypointsTr/LungCT_0001_0000.csv, line 1: expected 3 numbers, found 'x,y,z'",
        "LungCT_0002_0001: no image imagesTr/LungCT_0002_0001.nii.gz",
        "pair LungCT_0002_0001__LungCT_0002_0000: one of its subjects is missing",
    ]
    with pytest.raises(CohortError, match="no such part; choose val, training, test"):
        read("learn2reg", root, "vall")
    assert "no pairs under registration_test" in read("learn2reg", root, "test").problems[-1]


def test_msd(tmp_path: Path) -> None:
    found = read("msd", public_data.msd(tmp_path / "Task04_Hippocampus"))
    assert names(found) == ["hippocampus_001", "hippocampus_004"]
    assert all("labelsTr" in s.label for s in found.subjects)
    assert not found.pairs
    assert not found.files.exists()


@pytest.mark.parametrize(("select", "added"), [("", 0), ("T2", 0), ("ADC", 100)])
def test_msd_takes_one_modality(tmp_path: Path, select: str, added: int) -> None:
    root = public_data.msd(tmp_path / "Task05_Prostate", ("T2", "ADC"))
    found = read("msd", root, select)
    plain = sitk.GetArrayFromImage(sitk.ReadImage(str(root / "imagesTr/prostate_001.nii.gz")))[0]
    assert np.allclose(sitk.GetArrayFromImage(sitk.ReadImage(found.subjects[0].image)), plain + added)
    assert set(found.columns["modality"].values()) == {select or "T2"}


def test_msd_mistakes(tmp_path: Path) -> None:
    root = public_data.msd(tmp_path / "Task05_Prostate", ("T2", "ADC"))
    with pytest.raises(CohortError, match=r"no such modality; .*dataset.json has T2, ADC"):
        read("msd", root, "FLAIR")
    write_volume(root / "imagesTr/prostate_001.nii.gz", np.zeros((3, 4, 5), np.float32))
    found = read("msd", root)
    assert names(found) == ["prostate_004"]
    assert "3D image, expected a 4D one" in found.problems[0]
    public_data.msd(tmp_path / "Task04_Hippocampus")
    with pytest.raises(CohortError, match=r"2 times dataset.json \(Task04_Hippocampus/dataset.json, Task05_Prostate"):
        read("msd", tmp_path)
    write_text(root / "dataset.json", json.dumps({"training": ["a.nii.gz"], "modality": {"0": "T2"}}))
    with pytest.raises(CohortError, match=r"not a Decathlon dataset.json"):
        read("msd", root)


def test_promise12(tmp_path: Path) -> None:
    root = public_data.promise12(tmp_path / "TrainingData")
    found = read("promise12", root)
    assert names(found) == ["Case00", "Case01"]
    assert [bool(s.label) for s in found.subjects] == [True, False]
    assert read_labels(found.subjects[0].label, read_image(found.subjects[0].image).geometry).max() == 3
    (root / "Case01.raw").unlink()
    assert "Case01.mhd has no voxels beside it" in read("promise12", root).problems[0]
    public_data.promise12(tmp_path / "TestData")
    assert "TestData_Case01" in names(read("promise12", tmp_path))


@pytest.mark.parametrize("above", [False, True])
def test_fire(tmp_path: Path, above: bool) -> None:
    root = public_data.fire(tmp_path / "data" / "FIRE")
    found = read("fire", root.parent if above else root)
    assert names(found) == ["A01_1", "A01_2", "S03_1", "S03_2"]
    assert pairs(found) == [("A01", "A01_2", "A01_1"), ("S03", "S03_2", "S03_1")]
    assert found.columns["category"] == {"A01_1": "A", "A01_2": "A", "S03_1": "S", "S03_2": "S"}
    assert np.allclose(landmarks(found, "A01_1"), [[0, 20, 10.5], [0, 31, 30]])
    assert np.allclose(landmarks(found, "A01_2"), [[0, 21.25, 12], [0, 30, 33]])
    assert not found.subjects[2].landmarks


def test_fire_choice_and_mistakes(tmp_path: Path) -> None:
    root = public_data.fire(tmp_path / "FIRE")
    assert names(read("fire", root, "S")) == ["S03_1", "S03_2"]
    with pytest.raises(CohortError, match="no such category"):
        read("fire", root, "Q")
    (root / "Images" / "S03_2.jpg").unlink()
    write_text(root / "Ground Truth" / "control_points_A01_1_2.txt", "1 2 3\n")
    found = read("fire", root)
    assert names(found) == ["A01_1", "A01_2", "S03_1"]
    assert "line 1: expected 4 numbers, found '1 2 3'" in found.problems[0]
    assert "S03_2: no image Images/S03_2.jpg" in found.problems[1]


def test_aerial_landmarks_follow_the_published_transform(tmp_path: Path) -> None:
    root = public_data.aerial(tmp_path / "fold1" / "patch_tlevel2", {"zh5_03_02": TURN})
    found = read("aerial", root)
    assert names(found) == ["zh5_03_02_R", "zh5_03_02_T"]
    assert pairs(found) == [("zh5_03_02", "zh5_03_02_T", "zh5_03_02_R")]
    fixed, moving = (landmarks(found, name)[:, :0:-1] for name in names(found))
    assert 20 < len(fixed) < 36
    assert np.allclose(fixed @ TURN[:, :2].T + TURN[:, 2], moving, atol=1e-3)
    assert moving.min() >= 0
    assert moving.max() <= 59
    assert set(found.columns["level"].values()) == {"patch_tlevel2"}


def test_aerial_pixels_agree_at_the_landmarks(tmp_path: Path) -> None:
    reference = gaussian_filter(np.random.default_rng(3).normal(size=(60, 60)), 3)
    back = AffineTransform(matrix=np.linalg.inv(np.vstack([TURN, [0, 0, 1]])))
    moved = warp(reference, back, order=3, mode="reflect")  # MultiRegEval: transformed(p) = reference(back(p))
    found = read("aerial", public_data.aerial(tmp_path / "patch_tlevel1", {"zh5_03_02": TURN}))
    fixed, moving = (landmarks(found, name)[:, 1:].T for name in names(found))
    seen = map_coordinates(reference, fixed), map_coordinates(moved, moving)
    assert np.corrcoef(*seen)[0, 1] > 0.99


def test_aerial_modalities_levels_and_mistakes(tmp_path: Path) -> None:
    root = tmp_path / "Zurich_patches"
    for level in (1, 2):
        public_data.aerial(root / "fold1" / f"patch_tlevel{level}", {"zh5_03_02": TURN})
    found = read("aerial", root, "A2B")
    assert pairs(found)[0][1] == "fold1_patch_tlevel1_zh5_03_02_T"
    assert [Path(s.image).parts[-3] for s in found.subjects[:2]] == ["B", "A"]
    with pytest.raises(CohortError, match="choose A, B, A2B, B2A"):
        read("aerial", root, "RGB")
    write_text(root / "fold1/patch_tlevel1/info_test.csv", "Filename,X1_Ref\nzh5_03_02,0\n")
    found = read("aerial", root)
    assert len(found.subjects) == 2
    assert "zh5_03_02: not the coordinates of 8 corners" in found.problems[0]


def test_bids(tmp_path: Path) -> None:
    for name in ("sub-01/ses-a/anat/sub-01_ses-a_T1w", "sub-01/ses-b/anat/sub-01_ses-b_T1w", "sub-02/anat/sub-02_T2w"):
        write_text(tmp_path / "study" / f"{name}.nii.gz", "")
    found = read("bids", tmp_path / "study")
    assert names(found) == ["sub-01_ses-a", "sub-01_ses-b", "sub-02"]
    assert [(s.group, s.session) for s in found.subjects] == [("sub-01", "a"), ("sub-01", "b"), ("", "")]
    assert names(read("bids", tmp_path / "study", "T2w")) == ["sub-02"]
    with pytest.raises(CohortError, match="no such image; found T1w, T2w"):
        read("bids", tmp_path / "study", "FLAIR")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_of_another_layout_is_explained(tmp_path: Path, name: str) -> None:
    other = "promise12" if name != "promise12" else "acdc"
    getattr(public_data, other)(tmp_path / "data" / "TrainingData")
    with pytest.raises(CohortError) as refused:
        read(name, tmp_path / "data")
    message = str(refused.value)
    assert "found TrainingData" in message
    assert LAYOUTS[name].tree in message
    assert f"This folder looks like: {other}" in message


def test_what_is_asked_for_wrongly(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match=r"no layout 'acdcc'; did you mean 'acdc'\?"):
        read("acdcc", tmp_path)
    with pytest.raises(CohortError, match="no layout 'zzz'; choose acdc, mnms"):
        read("zzz", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read("acdc", tmp_path / "none")
    with pytest.raises(CohortError, match="nothing to choose in the layout promise12"):
        read("promise12", public_data.promise12(tmp_path / "TrainingData"), "T2")


def test_copies_of_the_same_subject_are_refused(tmp_path: Path) -> None:
    for copy in ("a", "b"):
        public_data.acdc(tmp_path / "data" / copy, patients=1)
    with pytest.raises(CohortError, match="patient001_ED, patient001_ES found more than once"):
        read("acdc", tmp_path / "data")


def test_the_command_writes_manifest_pairs_and_extra_columns(tmp_path: Path) -> None:
    public_data.mnms(tmp_path / "OpenDataset")
    out, listed = tmp_path / "c.csv", tmp_path / "p.parquet"
    done = samreg("cohort", "from", "mnms", tmp_path / "OpenDataset", "--out", out, "--pairs", listed)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"{out}: 2 subjects, 2 with labels, 0 with landmarks", f"{listed}: 1 pairs"]
    cohort = read_cohort(out)
    assert cohort.subjects[0].image == str(tmp_path / "c_files" / "A0S9V9_ED.mha")
    assert "c_files/A0S9V9_ED.mha" in out.read_text(encoding="utf-8")
    rows = read_rows(out, ("subject",), ("vendor", "phase"))
    assert [row["phase"] for _, row in rows] == ["ED", "ES"]
    assert read_pairs(listed, cohort)[0][0].pair == "A0S9V9"


def test_the_command_reports_what_is_missing_and_keeps_the_rest(tmp_path: Path) -> None:
    root = public_data.acdc(tmp_path / "training")
    (root / "patient001/patient001_frame12.nii.gz").unlink()
    done = samreg("cohort", "from", "acdc", root, "--out", tmp_path / "c.csv", "--pairs", tmp_path / "p.csv")
    assert done.returncode == 1
    assert "patient001_ES: no image patient001/patient001_frame12.nii.gz" in done.stderr
    assert len(read_cohort(tmp_path / "c.csv").subjects) == 3
    done = samreg("cohort", "from", "promise12", root, "--out", tmp_path / "d.csv")
    assert done.returncode == 2
    assert "This folder looks like: acdc" in done.stderr
    assert not (tmp_path / "d.csv").exists()
    public_data.msd(tmp_path / "Task04_Hippocampus")
    done = samreg(
        "cohort",
        "from",
        "msd",
        tmp_path / "Task04_Hippocampus",
        "--out",
        tmp_path / "d.csv",
        "--pairs",
        tmp_path / "e.csv",
    )
    assert done.returncode == 1
    assert "defines no pairs" in done.stderr
    assert (tmp_path / "d.csv").exists()
    assert not (tmp_path / "e.csv").exists()


def test_the_help_names_every_layout() -> None:
    text = samreg("cohort", "from", "--help").stdout
    assert not [name for name in LAYOUTS if name not in text]
