"""Manifests, pair lists, safe names and scanning folders."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.cohort import (
    Cohort,
    CohortError,
    Pair,
    Subject,
    read_cohort,
    read_pairs,
    subject_key,
    write_cohort,
)
from storage.layouts.scan import scan
from storage.signature import SignatureMismatch, check_signature, digest

NAMES = [
    "p01",
    "a b",
    "a/b",
    "../../etc/passwd",
    "..",
    "é",
    "名前",
    "x" * 200,
    "-rf",
    ".hidden",
    "CON:1",
    "a\nb",
]


def _write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def _touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


@given(st.text(min_size=1))
def test_keys_are_safe_and_stable(name):
    key = subject_key(name)
    assert key == subject_key(name)
    assert len(key) <= 80
    assert set(key) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-~")
    assert key[0].isalnum()


def test_keys_keep_ordinary_names_and_tell_the_others_apart():
    assert subject_key("patient067_ED") == "patient067_ED"
    assert subject_key("zarr.json") != "zarr.json"
    keys = [subject_key(name) for name in [*NAMES, "a-b", "a?b", "e"]]
    assert len(set(keys)) == len(keys)


def test_manifest_paths_are_relative_to_it(tmp_path):
    manifest = _write(
        tmp_path / "cohort.csv",
        "subject,image,label,group,age\np1,img/a.nii.gz,s3://b/l.nii.gz,ctl,3\n\n p2 ,/abs/b.nii.gz,,,\n",
    )
    first, second = read_cohort(manifest).subjects
    assert first == Subject("p1", str(tmp_path / "img/a.nii.gz"), "s3://b/l.nii.gz", group="ctl")
    assert second == Subject("p2", "/abs/b.nii.gz")


@pytest.mark.parametrize("name", ["cohort.csv", "cohort.parquet"])
def test_any_name_survives_a_round_trip(tmp_path, name):
    subjects = tuple(Subject(n.replace("\n", ""), str(tmp_path / "a.nii.gz"), session="2") for n in NAMES)
    write_cohort(Cohort(subjects), tmp_path / name)
    assert read_cohort(tmp_path / name).subjects == subjects


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column subject, image; found none"),
        ("name,image\na,b\n", "no column subject; found name, image"),
        ("subject,image\n", "lists no subjects"),
        ("subject,image\na,x\nb,y\na,z\n", "row 4: subject 'a' appears before in row 2"),
        ("subject,image\nP01,x\np01,y\n", "row 3: subject 'p01' appears before in row 2; .* case of their letters"),
        ("subject,image\n,x\n", "row 2: empty subject"),
        ("subject,image\na,\n", "row 2: empty image"),
        ("subject,image\na,x,y\n", "row 2: 3 cells but 2 columns"),
        ("subject,image,lable\na,x,y\n", "'lable' is not known; did you mean 'label'"),
    ],
)
def test_bad_manifests(tmp_path, text, message):
    with pytest.raises(CohortError, match=message):
        read_cohort(_write(tmp_path / "cohort.csv", text))


def test_unreadable_manifests(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_cohort(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes(b"subject,image\n\xff\xfe,x\n")
    with pytest.raises(CohortError, match="UTF-8"):
        read_cohort(tmp_path / "a.csv")
    with pytest.raises(CohortError, match="Parquet"):
        read_cohort(_write(tmp_path / "a.parquet", "hello"))


def test_numeric_names_in_parquet_become_text(tmp_path):
    pq.write_table(pa.table({"subject": [1, 2], "image": ["a", "b"], "label": [None, "c"]}), tmp_path / "a.parquet")
    assert [s.subject for s in read_cohort(tmp_path / "a.parquet").subjects] == ["1", "2"]


def test_pairs_and_the_unknown_among_them(tmp_path):
    cohort = Cohort((Subject("a", "x"), Subject("b", "y")))
    listed = _write(tmp_path / "pairs.csv", "moving,fixed,pair\na,b,\nb,a,back\na,ghost,\n")
    pairs, unknown = read_pairs(listed, cohort)
    assert pairs == (Pair("a__b", "a", "b"), Pair("back", "b", "a"))
    assert unknown == [(4, Pair("a__ghost", "a", "ghost"), "ghost")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moving\na\n", "no column fixed"),
        ("moving,fixed\n", "no pairs"),
        ("moving,fixed\na,\n", "row 2: empty fixed"),
        ("moving,fixed\na,b\na,b\n", "row 3: pair 'a__b' appears before in row 2"),
    ],
)
def test_bad_pair_lists(tmp_path, text, message):
    with pytest.raises(CohortError, match=message):
        read_pairs(_write(tmp_path / "pairs.csv", text), Cohort((Subject("a", "x"), Subject("b", "y"))))


def test_scan_real_folders(shared_data):
    acdc = scan(shared_data / "acdc_cardiac").subjects
    assert [s.subject for s in acdc] == ["patient067_ED", "patient067_ES", "patient068_ED", "patient068_ES"]
    assert all(s.label.endswith(f"{s.subject}_gt.nii.gz") for s in acdc)
    hippocampus = scan(shared_data / "msd_hippocampus").subjects
    assert all("/labels/" in s.label for s in hippocampus)


def test_scan_folder_with_equal_names(tmp_path):
    _touch(tmp_path, "a/t1.nii.gz", "a/t1_seg.nii.gz", "b/t1.nii.gz", "b/t1_landmarks.csv")
    first, second = scan(tmp_path).subjects
    assert (first.subject, second.subject) == ("a/t1.nii.gz", "b/t1.nii.gz")
    assert first.label.endswith("a/t1_seg.nii.gz")
    assert second.landmarks.endswith("b/t1_landmarks.csv")


def test_scan_bids(tmp_path):
    _touch(
        tmp_path,
        "dataset_description.json",
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_T2w.nii.gz",
        "derivatives/manual/sub-01/anat/sub-01_space-orig_dseg.nii.gz",
    )
    first, *second = scan(tmp_path).subjects
    assert first.subject == "sub-01"
    assert first.label.endswith("sub-01_space-orig_dseg.nii.gz")
    assert [s.subject for s in second] == ["sub-02_ses-a_T1w", "sub-02_ses-a_T2w"]
    assert second[0].session == "a"


def test_scan_learn2reg(tmp_path):
    listing = {
        "name": "X",
        "training": {"0": [{"image": "./imagesTr/X_0001.nii.gz", "label": "./labelsTr/X_0001.nii.gz"}]},
        "registration_val": [{"fixed": "./imagesTr/X_0002.nii.gz", "moving": "./imagesTr/X_0001.nii.gz"}],
    }
    _write(tmp_path / "X_dataset.json", json.dumps(listing))
    first, second = scan(tmp_path).subjects
    assert first == Subject(
        "X_0001", str(tmp_path / "imagesTr/X_0001.nii.gz"), str(tmp_path / "labelsTr/X_0001.nii.gz")
    )
    assert second.subject == "X_0002"
    with pytest.raises(CohortError, match="Learn2Reg"):
        scan(_write(tmp_path / "other.json", "{}"))


def test_scan_nothing(tmp_path):
    with pytest.raises(CohortError, match="no image found"):
        scan(tmp_path)
    with pytest.raises(FileNotFoundError):
        scan(tmp_path / "none")


def test_digest_ignores_key_order_and_sees_every_value():
    assert digest({"a": 1, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest(None)) == 16
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))


def test_signature_mismatch_names_both_values():
    check_signature("x", {"a": (1, 2)}, {"a": [1, 2]})
    with pytest.raises(SignatureMismatch, match=r"of p1 .*match\.epsilon: stored 0\.8, asked for 0\.7"):
        check_signature("embedding of p1", {"match": {"epsilon": 0.8}}, {"match": {"epsilon": 0.7}})
