"""Nothing in an image header that could identify a patient reaches a table, log, store, transform, report or record."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from storage import tables
from tests import phantoms

SECRETS = ("DOE^JANE", "19520229", "MRN-777", "St. Elsewhere", "jane doe follow-up")


def _write_dicom(folder: Path, volume: np.ndarray) -> None:
    """A DICOM series whose headers say who, when and where."""
    folder.mkdir(parents=True)
    tags = {
        "0010|0010": SECRETS[0],
        "0010|0030": SECRETS[1],
        "0010|0020": SECRETS[2],
        "0008|0080": SECRETS[3],
        "0008|103e": SECRETS[4],
        "0008|0020": SECRETS[1],
        "0008|0060": "MR",
        "0020|000d": "1.2.826.0.1.1",
        "0020|000e": "1.2.826.0.1.1.1",
    }
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z, plane in enumerate(volume.astype(np.int16)):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing((1.5, 1.5, 6.0))
        image.SetOrigin((0.0, 0.0, 6.0 * z))
        slice_tags = {"0020|0032": f"0\\0\\{6 * z}", "0020|0013": str(z), "0008|0018": f"1.2.826.0.1.1.1.{z}"}
        for tag, value in {**tags, **slice_tags, "0020|0037": "1\\0\\0\\0\\1\\0"}.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{z}.dcm"))
        writer.Execute(image)


def _write_nifti(path: Path, volume: np.ndarray) -> None:
    """A NIfTI whose free-text fields name the patient."""
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((1.5, 1.5, 6.0))
    sitk.WriteImage(image, str(path))
    header = bytearray(path.read_bytes())
    for offset, text in ((148, SECRETS[4]), (228, SECRETS[0]), (328, SECRETS[2])):  # descrip, aux_file, intent_name
        header[offset : offset + len(text)] = text.encode()
    path.write_bytes(bytes(header))


def test_headers_stay_behind(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "study"
    _write_dicom(data / "series", phantoms.ellipses()[0])
    _write_nifti(data / "n.nii", phantoms.ellipses(shift=(2, 1))[0])
    whole = (data / "n.nii").read_bytes()
    assert SECRETS[4].encode() in whole
    (data / "cut.nii").write_bytes(whole[:2000])
    rows = [{"subject": s, "image": i} for s, i in (("p1", "series"), ("p2", "n.nii"), ("p3", "cut.nii"))]
    manifest = phantoms.write_csv(data / "cohort.csv", rows)
    fit = ["--set", f"fit={json.dumps(phantoms.QUICK_FIT)}"]
    done = phantoms.samreg("run", "--cohort", manifest, "--out", out, "--executor", "serial", *fit)
    assert done.returncode == 1, done.stderr
    report = phantoms.samreg("report", out)
    assert report.returncode == 0, report.stderr
    exported = phantoms.samreg("export", out, "--out", out / "exported", "--pairs", "p1__p2", "--images")
    applied = phantoms.samreg("apply", out, "p2__p1", "--out", out / "applied", "--image", data / "n.nii")
    assert (exported.returncode, applied.returncode) == (0, 0), exported.stderr + applied.stderr
    said = "".join(call.stdout + call.stderr for call in (done, report, exported, applied))
    for command in (["status", out], ["plan", "--cohort", manifest, "--out", out]):
        shown = phantoms.samreg(*command)
        said += shown.stdout + shown.stderr
    assert "cut.nii" in said
    for name in tables.SCHEMAS:
        said += json.dumps(tables.read_table(out, name).to_pylist(), default=str)
    assert set(tables.read_table(out, "metrics").column("pair").to_pylist()) == {"p1__p2", "p2__p1"}
    for kind in ("transforms/*.h5", "report/index.html", "report/*.png", "failures/*.parquet", "run.yaml", "plan.json"):
        assert list(out.glob(kind)), kind
    stored = b"".join(path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file())
    warped = out / "exported" / "sub-p2" / "sub-p2_from-p1_image.nii.gz"
    stored += gzip.decompress(warped.read_bytes()) + (out / "applied" / "n_in-p1.nii").read_bytes()
    for secret in SECRETS:
        assert secret not in said
        assert secret.encode() not in stored
