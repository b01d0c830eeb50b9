"""ACDC, the Automated Cardiac Diagnosis Challenge: short-axis cine MR at end-diastole and end-systole."""

from __future__ import annotations

from pathlib import Path

from storage.cohort import Pair, Subject
from storage.layouts.derived import write_frame
from storage.layouts.found import Found, Layout, existing
from storage.sources import ImageError

TREE = """\
database/training/patient001/Info.cfg                         with the lines ED: 1 and ES: 12
database/training/patient001/patient001_frame01.nii.gz
database/training/patient001/patient001_frame01_gt.nii.gz     labels, optional
database/training/patient001/patient001_4d.nii.gz             used where a frame has no file of its own"""


def read(found: Found, select: str) -> None:
    """Two subjects per patient, `patient001_ED` and `patient001_ES`; the pair registers ES to ED."""
    for info in sorted(found.root.rglob("patient*/Info.cfg")):
        settings = _settings(info)
        for phase in ("ED", "ES"):
            if settings.get(phase, "").isdigit():
                _add_frame(found, info.parent, phase, int(settings[phase]), settings.get("Group", ""))
            else:
                found.problems.append(f"{found.shown(info)}: no line '{phase}: <number>'; the phase is left out")
        patient = info.parent.name
        found.add_pair(Pair(patient, f"{patient}_ES", f"{patient}_ED"))


def _add_frame(found: Found, folder: Path, phase: str, frame: int, pathology: str) -> None:
    patient = folder.name
    subject = f"{patient}_{phase}"
    image, cine = folder / f"{patient}_frame{frame:02d}.nii.gz", folder / f"{patient}_4d.nii.gz"
    place = str(image)
    if not image.exists() and cine.exists():
        try:
            place = write_frame(cine, frame - 1, found.files / f"{subject}.mha")
        except ImageError as error:
            found.problems.append(f"{subject}: {error}; left out")
            return
    label = existing(folder / f"{patient}_frame{frame:02d}_gt.nii.gz")
    found.add(Subject(subject, place, label, group=patient), phase=phase, pathology=pathology)


def _settings(info: Path) -> dict[str, str]:
    lines = (line.partition(":") for line in info.read_text(encoding="utf-8", errors="replace").splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


LAYOUT = Layout("acdc", TREE, "**/patient*/Info.cfg", read)
