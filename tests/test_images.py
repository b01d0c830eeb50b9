"""Reading images: formats, orientation, and every way a file can be bad."""

from __future__ import annotations

import errno
import shutil
import struct

import fsspec
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image as Picture

from storage.geometry import Geometry
from storage.images import Image, ImageError, content_digest, read_image, read_labels, to_uint8


@pytest.fixture
def volume() -> sitk.Image:
    values = np.random.default_rng(0).integers(0, 900, (5, 12, 10)).astype(np.int16)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((1.2, 1.4, 6.0))
    image.SetOrigin((3.0, -4.0, 5.0))
    return image


def _write(image, path, **tags):
    for tag, value in tags.items():
        image.SetMetaData(tag, value)
    sitk.WriteImage(image, str(path))
    return path


def _write_series(image, folder, *, gap=False):
    folder.mkdir()
    for z in range(image.GetDepth()):
        piece = image[:, :, z]
        plane = sitk.JoinSeries(piece)
        place = z + (2 if gap and z > 2 else 0)
        plane.SetSpacing(image.GetSpacing())
        for tag, value in {
            "0008|0060": "MR",
            "0010|0010": "Doe^Jane",
            "0020|000e": "1.2.3.4",
            "0020|000d": "1.2.3",
            "0020|0032": f"3\\-4\\{5 + 6 * place}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(z),
            "0018|0050": "6",
        }.items():
            plane.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{z}.dcm"))
        writer.Execute(plane)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.mhd", "a.nrrd"])
def test_volume_formats_agree(tmp_path, volume, name):
    image = read_image(_write(volume, tmp_path / name))
    assert image.array.dtype == np.float32
    np.testing.assert_array_equal(image.array, sitk.GetArrayFromImage(volume))
    np.testing.assert_allclose(image.geometry.spacing_mm, (6.0, 1.4, 1.2), rtol=1e-6)
    np.testing.assert_allclose(image.geometry.origin_mm, (3.0, -4.0, 5.0), rtol=1e-6)


def test_dicom_series_folder(tmp_path, volume):
    _write_series(volume, tmp_path / "series")
    image = read_image(tmp_path / "series")
    np.testing.assert_array_equal(image.array, sitk.GetArrayFromImage(volume))
    np.testing.assert_allclose(image.geometry.spacing_mm, (6.0, 1.4, 1.2))
    assert "Doe" not in repr(image.geometry)


def test_dicom_series_with_a_missing_slice_is_refused(tmp_path, volume):
    _write_series(volume, tmp_path / "series", gap=True)
    with pytest.raises(ImageError, match="not evenly spaced"):
        read_image(tmp_path / "series")


def test_same_anatomy_in_another_storage_order_reads_the_same(tmp_path, volume):
    turned = sitk.DICOMOrient(volume, "RAS")
    permuted = sitk.PermuteAxes(volume, [2, 0, 1])
    plain = read_image(_write(volume, tmp_path / "a.nii.gz"))
    for other in (turned, permuted):
        image = read_image(_write(other, tmp_path / "b.nrrd"))
        np.testing.assert_array_equal(image.array, plain.array)
        np.testing.assert_allclose(image.geometry.origin_mm, plain.geometry.origin_mm, atol=1e-4)
        np.testing.assert_allclose(image.geometry.direction, plain.geometry.direction, atol=1e-6)


def test_slice_axis_can_be_chosen(tmp_path, volume):
    image = read_image(_write(volume, tmp_path / "a.nii.gz"), "coronal")
    assert image.array.shape == (12, 5, 10)
    np.testing.assert_array_equal(image.array, sitk.GetArrayFromImage(volume).transpose(1, 0, 2))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_pictures_have_pixels_not_millimetres(tmp_path, name):
    values = np.random.default_rng(1).integers(0, 255, (8, 6), dtype=np.uint8)
    Picture.fromarray(values).save(tmp_path / name)
    image = read_image(tmp_path / name)
    np.testing.assert_array_equal(image.array, values[None])
    assert not image.geometry.has_spacing
    assert image.geometry.source_dimension == 2
    assert image.geometry.spacing_mm == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("mode", "name"), [("RGB", "a.png"), ("RGBA", "a.png"), ("RGB", "a.jpg")])
def test_colour_stays_colour(tmp_path, mode, name):
    values = np.random.default_rng(1).integers(0, 255, (8, 6, len(mode)), dtype=np.uint8)
    Picture.fromarray(values, mode).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.is_rgb
    assert image.array.shape == (1, 8, 6, 3)
    if name == "a.png":
        np.testing.assert_array_equal(to_uint8(image), values[None, ..., :3])


def test_sixteen_bit_grey_keeps_its_values(tmp_path):
    values = np.random.default_rng(1).integers(0, 60000, (8, 6), dtype=np.uint16)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.png"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").array, values[None])


def test_two_dimensional_nrrd_keeps_its_spacing(tmp_path, volume):
    image = read_image(_write(volume[:, :, 2], tmp_path / "a.nrrd"))
    assert image.geometry.has_spacing
    np.testing.assert_allclose(image.geometry.spacing_mm, (1.0, 1.4, 1.2))


def test_single_frame_fourth_dimension_is_a_volume(tmp_path, volume):
    image = read_image(_write(sitk.JoinSeries([volume]), tmp_path / "a.nii.gz"))
    np.testing.assert_array_equal(image.array, sitk.GetArrayFromImage(volume))


def test_several_frames_are_refused_with_the_way_to_split(tmp_path, volume):
    with pytest.raises(ImageError, match=r"a\.nii\.gz: 4D image with 3 frames.*Split"):
        read_image(_write(sitk.JoinSeries([volume] * 3), tmp_path / "a.nii.gz"))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.mhd", "a.nrrd", "a.img", "a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.98])
@pytest.mark.parametrize("packed", [False, True])
def test_truncated_files_are_refused(tmp_path, volume, name, keep, packed):
    if name.endswith(("png", "jpg", "tif")):
        values = np.random.default_rng(1).integers(0, 255, (64, 60), dtype=np.uint8)
        Picture.fromarray(values).save(tmp_path / name)
    else:
        sitk.WriteImage(volume, str(tmp_path / name), useCompression=packed)
    data = "a.zraw" if packed else "a.raw"
    cut = tmp_path / (data if name == "a.mhd" else name)
    whole = cut.read_bytes()
    cut.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ImageError, match=name.replace(".", r"\.")):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: np.full_like(v, 7), "every voxel is 7"),
        (lambda v: np.where(v > 500, np.nan, v), "NaN or infinite"),
        (lambda v: np.where(v > 500, np.inf, v), "NaN or infinite"),
        (lambda v: v.astype(np.float64) * 1e300, "NaN or infinite"),
        (lambda v: np.stack([v, v], axis=-1), "2 values per voxel"),
    ],
)
def test_unusable_voxels(tmp_path, volume, change, message):
    values = change(sitk.GetArrayFromImage(volume).astype(np.float32))
    image = sitk.GetImageFromArray(values, isVector=values.ndim == 4)
    with pytest.raises(ImageError, match=message):
        read_image(_write(image, tmp_path / "a.mha"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize(
    "name", ["a.nii", "a.nii.gz", "a.hdr", "a.img", "a.img.gz", "a.mha", "a.mhd", "a.nrrd", "a.tif"]
)
def test_no_format_hides_voxels_that_are_not_numbers(tmp_path, volume, name, kind, value):
    values = sitk.GetArrayFromImage(volume).astype(kind)
    values[-1, -1, -1] = value  # the last voxel, so that every block is looked at
    if name == "a.tif":
        values = values[-1].astype(np.float32)
    with pytest.raises(ImageError, match=rf"{name}: 1 of {values.size} voxels are NaN or infinite"):
        read_image(_write(sitk.GetImageFromArray(values), tmp_path / name))


def _swapped(header, voxels):
    """The NIfTI-1 file in the other byte order."""
    made = bytearray(header)
    for start, count, size in ((0, 1, 4), (40, 8, 2), (68, 4, 2), (76, 8, 4), (108, 3, 4), (252, 2, 2), (256, 18, 4)):
        field = np.frombuffer(header, f"<u{size}", count, start)
        made[start : start + size * count] = field.astype(f">u{size}").tobytes()
    return bytes(made) + voxels.astype(">f4").tobytes()


@pytest.mark.parametrize("layout", ["swapped", "late voxels"])
def test_every_nifti_layout_is_checked(tmp_path, volume, layout):
    path = _write(sitk.Cast(volume, sitk.sitkFloat32), tmp_path / "a.nii")
    header = path.read_bytes()[:352]
    voxels = sitk.GetArrayFromImage(volume).astype(np.float32)

    def write():
        if layout == "late voxels":
            late = bytearray(header)
            struct.pack_into("<f", late, 108, 400.0)
            path.write_bytes(bytes(late) + bytes(48) + voxels.tobytes())
        else:
            path.write_bytes(_swapped(header, voxels))

    write()
    np.testing.assert_array_equal(np.sort(read_image(path).array, axis=None), np.sort(voxels, axis=None))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ImageError, match="truncated"):
        read_image(path)
    voxels[2, 3, 4] = np.nan
    write()
    with pytest.raises(ImageError, match=rf"1 of {voxels.size} voxels are NaN"):
        read_image(path)


def test_labels_that_are_not_numbers_are_refused(tmp_path, volume):
    geometry = read_image(_write(volume, tmp_path / "image.nii.gz")).geometry
    values = (sitk.GetArrayFromImage(volume) > 450).astype(np.float32)
    values[0, 0, 0] = np.nan
    labels = sitk.GetImageFromArray(values)
    labels.CopyInformation(volume)
    with pytest.raises(ImageError, match="NaN"):
        read_labels(_write(labels, tmp_path / "a.nii.gz"), geometry)


def test_what_is_not_an_image(tmp_path):
    for name, text in (("a.nii.gz", "hello"), ("a.png", "hello"), ("a.txt", "hello")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ImageError, match="expected NIfTI"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "none.nii.gz")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImageError, match="without a DICOM series"):
        read_image(tmp_path / "folder")


def test_no_header_text_in_errors(tmp_path, volume):
    path = _write(volume, tmp_path / "a.nrrd", PatientName="Jane Doe")
    whole = path.read_bytes()
    assert b"Jane Doe" in whole
    path.write_bytes(whole[:-40])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert "Jane" not in str(caught.value)


def test_acdc_spacing_comes_from_pixdim(shared_data):
    geometry = read_image(shared_data / "acdc_cardiac" / "patient067_ED.nii.gz").geometry
    np.testing.assert_allclose(geometry.spacing_mm, (10.0, 1.3671875, 1.3671875))
    assert geometry.shape == (10, 216, 256)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("acdc_cardiac/patient068_ES.nii.gz", "acdc_cardiac/patient068_ES_gt.nii.gz"),
        ("cardiac_2d_cohort/A_B4O3V3_z05_ED.png", "cardiac_2d_cohort/A_B4O3V3_z05_ED_gt.png"),
        ("msd_hippocampus/images/hippocampus_006.nii.gz", "msd_hippocampus/labels/hippocampus_006.nii.gz"),
    ],
)
def test_real_labels_lie_on_their_image(shared_data, image, label):
    read = read_image(shared_data / image)
    labels = read_labels(shared_data / label, read.geometry)
    assert labels.shape == read.array.shape
    assert labels.max() in (2, 3)


def test_labels_follow_their_image_into_analysis_orientation(tmp_path, volume):
    labels = sitk.Cast(volume > 450, sitk.sitkUInt8)
    for order in ("LPS", "RAS", "PSR"):
        _write(sitk.DICOMOrient(volume, order), tmp_path / "image.nii.gz")
        _write(sitk.DICOMOrient(labels, "LAS"), tmp_path / "label.nii.gz")
        image = read_image(tmp_path / "image.nii.gz", "sagittal")
        np.testing.assert_array_equal(
            read_labels(tmp_path / "label.nii.gz", image.geometry), (image.array > 450).astype(np.int32)
        )


def test_labels_on_another_grid_name_both(tmp_path, volume):
    geometry = read_image(_write(volume, tmp_path / "image.nii.gz")).geometry
    labels = sitk.Cast(volume > 450, sitk.sitkUInt8)
    with pytest.raises(ImageError, match=r"another grid: labels 4 x 12 x 10 .*image 5 x 12 x 10"):
        read_labels(_write(labels[:, :, :4], tmp_path / "a.nii.gz"), geometry)
    labels.SetOrigin((3.0, -4.0, 11.0))
    with pytest.raises(ImageError, match="another grid"):
        read_labels(_write(labels, tmp_path / "b.nii.gz"), geometry)


def test_labels_must_be_whole_numbers(tmp_path, volume):
    geometry = read_image(_write(volume, tmp_path / "image.nii.gz")).geometry
    with pytest.raises(ImageError, match="whole"):
        read_labels(_write(sitk.Cast(volume, sitk.sitkFloat32) / 7, tmp_path / "a.nii.gz"), geometry)
    as_float = sitk.Cast(volume > 450, sitk.sitkFloat32)
    assert read_labels(_write(as_float, tmp_path / "b.nii.gz"), geometry).dtype == np.int32


def test_intensities_to_bytes():
    geometry = Geometry((1, 1, 5), (1.0, 1.0, 1.0))
    ramp = Image(np.array([[[0, 1, 2, 3, 4]]], np.float32), geometry)
    np.testing.assert_array_equal(to_uint8(ramp, (0, 100))[0, 0, :, 1], [0, 64, 128, 191, 255])
    np.testing.assert_array_equal(to_uint8(ramp, window=(1, 3))[0, 0, :, 0], [0, 0, 128, 255, 255])
    with pytest.raises(ValueError, match="must increase"):
        to_uint8(ramp, window=(3, 1))
    lone = Image(np.eye(1, 1000, dtype=np.float32)[None], Geometry((1, 1, 1000), (1.0, 1.0, 1.0)))
    assert to_uint8(lone).max() == 255


def test_remote_files_are_fetched(tmp_path, volume):
    path = _write(volume, tmp_path / "a.nii.gz")
    memory = fsspec.filesystem("memory")
    memory.pipe("/cohort/a.nii.gz", path.read_bytes())
    for address in ("memory://cohort/a.nii.gz", path.as_uri()):
        np.testing.assert_array_equal(read_image(address).array, read_image(path).array)
        assert content_digest(address) == content_digest(path)
    for address in ("memory://cohort/none.nii.gz", "file:///none/a.nii.gz"):
        with pytest.raises(ImageError, match="no such file"):
            read_image(address)
    with pytest.raises(ImageError, match="could not be fetched"):
        read_image("nosuchscheme://a/b.nii.gz")


def test_a_full_disk_while_fetching_is_no_fault_of_the_image(monkeypatch):
    fsspec.filesystem("memory").pipe("/cohort/b.nii.gz", b"0")

    def get_file(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", get_file)
    with pytest.raises(OSError, match="No space left") as caught:
        read_image("memory://cohort/b.nii.gz")
    assert caught.value.errno == errno.ENOSPC


def _changes(named, changed):
    """Whether the digest of a file sees the last byte of another."""
    before, content = content_digest(named), changed.read_bytes()
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    after = content_digest(named)
    changed.write_bytes(content)
    return before != after


@pytest.mark.parametrize("header", [".hdr", ".hdr.gz"])
@pytest.mark.parametrize("voxels", [".img", ".img.gz"])
def test_digest_covers_both_of_a_pair(tmp_path, header, voxels):
    files = tmp_path / f"a{header}", tmp_path / f"a{voxels}"
    for file in files:
        file.write_bytes(b"content")
    assert all(_changes(named, changed) for named in files for changed in files)


@pytest.mark.parametrize("suffix", [".mhd", ".mha"])
@pytest.mark.parametrize("clause", ["b 2.raw", "LIST\nb 2.raw\nc3.raw", "LIST 2\nc3.raw\n", "c%d.raw 1 3 2"])
def test_digest_covers_the_files_that_a_metaimage_names(tmp_path, suffix, clause):
    for name in ("b 2.raw", "c1.raw", "c3.raw"):
        (tmp_path / name).write_bytes(b"content")
    header = tmp_path / f"a{suffix}"
    header.write_text(f"ObjectType = Image\nElementDataFile = {clause}\n", encoding="utf-8")
    for name in ("b 2.raw", "c3.raw"):
        assert _changes(header, tmp_path / name) == (name in clause.replace("%d", "3"))


@pytest.mark.parametrize(
    "clause",
    ["data file: b.raw", "datafile: LIST\nb.raw\n", "data file: %c.raw 98 98 1", "\ndata file: no.raw"],
)
def test_digest_covers_the_files_that_an_nrrd_names(tmp_path, clause):
    (tmp_path / "b.raw").write_bytes(b"content")
    header = tmp_path / "a.nhdr"
    header.write_text(f"NRRD0004\ntype: uchar\n{clause}\n", encoding="utf-8")
    if "%c" in clause:
        with pytest.raises(ImageError, match="names files of voxels that are not there"):
            content_digest(header)
    else:
        assert _changes(header, tmp_path / "b.raw") == ("b.raw" in clause)


def test_digest_covers_every_byte(tmp_path, volume):
    _write(volume, tmp_path / "a.mhd")
    before = content_digest(tmp_path / "a.mhd")
    data = bytearray((tmp_path / "a.raw").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.raw").write_bytes(data)
    assert content_digest(tmp_path / "a.mhd") != before
    _write_series(volume, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert content_digest(tmp_path / "one") == content_digest(tmp_path / "two")
    (tmp_path / "two" / "4.dcm").unlink()
    assert content_digest(tmp_path / "one") != content_digest(tmp_path / "two")
