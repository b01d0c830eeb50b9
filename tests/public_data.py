"""Small trees with the official layout of public data sets, made of phantoms or of given files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813
from skimage import io

from tests.phantoms import ellipses, write_csv, write_volume

CORNERS = ((0, 0), (0, 60), (60, 60), (60, 0))


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_cine(path: Path, frames: Sequence[npt.NDArray[Any]]) -> Path:
    """A 4D image of [z, y, x] frames with a spacing of 1.5, 1.5, 8 mm and free text in its header."""
    volumes = [sitk.GetImageFromArray(frame) for frame in frames]
    for volume in volumes:
        volume.SetSpacing((1.5, 1.5, 8.0))
        volume.SetOrigin((-10.0, 5.0, 2.0))
    cine = sitk.JoinSeries(volumes)
    cine.SetMetaData("descrip", "somebody's name")
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(cine, str(path))
    return path


def acdc(root: Path, patients: int = 2, shape: tuple[int, int, int] = (2, 48, 48)) -> Path:
    """ACDC training folder, end-diastole in frame 1 and end-systole in frame 12."""
    for number in range(1, patients + 1):
        name = f"patient{number:03d}"
        for frame, scale in ((1, 1.2), (12, 1.0)):
            image, labels = ellipses(shape, (number, 0.0), scale)
            write_volume(root / name / f"{name}_frame{frame:02d}.nii.gz", image)
            write_volume(root / name / f"{name}_frame{frame:02d}_gt.nii.gz", labels)
        write_text(root / name / "Info.cfg", "ED: 1\nES: 12\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n")
    return root


def mnms(root: Path, codes: Sequence[str] = ("A0S9V9",), frames: int = 4) -> Path:
    """M&Ms OpenDataset folder: frame 0 is end-diastole, frame 2 end-systole, and intensity 10 t marks frame t."""
    rows = []
    for code in codes:
        ramp = np.arange(2 * 6 * 5, dtype=np.int16).reshape(2, 6, 5)
        folder = root / "Training" / "Labeled" / code
        write_cine(folder / f"{code}_sa.nii.gz", [ramp + 100 * t for t in range(frames)])
        write_cine(folder / f"{code}_sa_gt.nii.gz", [np.full((2, 6, 5), t, np.uint8) for t in range(frames)])
        rows.append({"": len(rows), "External code": code, "VendorName": "Siemens", "Vendor": "A", "Centre": "6"})
        rows[-1] |= {"ED": 0, "ES": 2, "Age": 61, "Pathology": "HCM", "Sex": "M"}
    write_csv(root / "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv", rows)
    return root


def learn2reg(root: Path, task: str = "LungCT") -> Path:
    """A paired task: case 1 for training with keypoints and masks, case 2 for validation."""
    entries = []
    for case in (1, 2):
        for time in (0, 1):
            name = f"{task}_{case:04d}_{time:04d}"
            image, labels = ellipses((3, 48, 48), (time, 0))
            write_volume(root / "imagesTr" / f"{name}.nii.gz", 5 * image - 900)  # as in Hounsfield units
            write_volume(root / "masksTr" / f"{name}.nii.gz", (labels > 0).astype(np.uint8))
            write_text(root / "keypointsTr" / f"{name}.csv", f"10.5,{20 + time},1\n30,12.25,2\n")
            if case == 1:
                listed = {"image": f"./imagesTr/{name}.nii.gz", "mask": f"./masksTr/{name}.nii.gz"}
                entries.append(listed | {"keypoints": f"./keypointsTr/{name}.csv"})
    pairs = {
        case: [{key: f"./imagesTr/{task}_{case:04d}_{t}.nii.gz" for key, t in (("fixed", "0000"), ("moving", "0001"))}]
        for case in (1, 2)
    }
    record = {
        "name": task,
        "tensorImageSize": {"0": "3D"},
        "training": entries,
        "training_paired_images": pairs[1],
        "registration_val": pairs[2],
    }
    write_text(root / f"{task}_dataset.json", json.dumps(record))
    return root


def msd(root: Path, modalities: Sequence[str] = ("MRI",)) -> Path:
    """A task with two training images, 4D where there are several modalities; channel c of them is 100 c brighter."""
    names = [f"{root.name.split('_')[-1].lower()}_{number:03d}" for number in (1, 4)]
    for name in names:
        image, labels = ellipses((3, 40, 40))
        if len(modalities) > 1:
            write_cine(root / "imagesTr" / f"{name}.nii.gz", [image + 100 * c for c in range(len(modalities))])
        else:
            write_volume(root / "imagesTr" / f"{name}.nii.gz", image)
        write_volume(root / "labelsTr" / f"{name}.nii.gz", labels, (1.5, 1.5, 8.0))
        write_text(root / "imagesTr" / f"._{name}.nii.gz", "left by an archiver")
    record = {
        "name": root.name,
        "modality": {str(n): name for n, name in enumerate(modalities)},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": ["./imagesTs/x_002.nii.gz"],
    }
    write_text(root / "dataset.json", json.dumps(record))
    return root


def promise12(root: Path) -> Path:
    """Two cases, the second without labels."""
    image, labels = ellipses((3, 40, 40))
    write_volume(root / "Case00.mhd", image)
    write_volume(root / "Case00_segmentation.mhd", labels)
    write_volume(root / "Case01.mhd", image)
    return root


def fire(root: Path) -> Path:
    """Pair A01 with control points and pair S03 without."""
    for name in ("A01_1", "A01_2", "S03_1", "S03_2"):
        image = np.repeat(ellipses((1, 48, 48))[0][0, :, :, None], 3, axis=2)
        (root / "Images").mkdir(parents=True, exist_ok=True)
        io.imsave(root / "Images" / f"{name}.jpg", np.clip(image, 0, 255).astype(np.uint8), check_contrast=False)
    write_text(root / "Ground Truth" / "control_points_A01_1_2.txt", "10.5 20 12 21.25\n30 31 33 30\n")
    write_text(root / "Masks" / "mask.png", "")
    return root


def aerial(
    root: Path, matrices: dict[str, npt.NDArray[np.float64]], images: Path | None = None, side: int = 60
) -> Path:
    """One level of MultiRegEval: 2 x 3 maps from reference to transformed pixels (x, y), by name of the pair.

    Args:
        images: folder with NAME_R.png and NAME_T.png; blank pictures without one.
    """
    corners = np.array(CORNERS) / 60 * side
    rows = []
    for name, matrix in matrices.items():
        there = (corners - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T
        rows.append({"Filename": name})
        for kind, points in (("Ref", corners), ("Trans", there)):
            rows[-1] |= {f"{axis}{n}_{kind}": p[i] for n, p in enumerate(points, 1) for i, axis in enumerate("XY")}
        for end in "RT":
            for modality in "AB":
                target = root / modality / "test" / f"{name}_{end}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                if images:
                    shutil.copy(images / target.name, target)
                else:
                    io.imsave(target, np.eye(side, dtype=np.uint8) * 200, check_contrast=False)
    write_csv(root / "info_test.csv", rows)
    return root
