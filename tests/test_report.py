"""The report: complete without a network, safe against hostile names, and true to the tables."""

from __future__ import annotations

import base64
import gzip
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from benchmarks import report as synthetic
from pipeline import report_figures, report_page, report_pairs, report_panels, report_tables
from pipeline.algorithms.quality import LIMIT
from pipeline.errors import UsageError
from pipeline.report import write_report
from pipeline.report_album import Album
from pipeline.report_check import pairs_section
from pipeline.report_data import best_median_worst, read_report_data
from pipeline.report_matches import BINS, read_matches
from pipeline.report_pairs import PairView, choose_slices
from storage import tables
from storage.geometry import Geometry
from tests.sample_study import HOSTILE, write_study

FIGURES = {"accuracy", "fits", "dice_by_label", "pair_best", "pair_worst"}  # two pairs are too few for scores


class _Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("report"), hostile=True)


@pytest.fixture(scope="module")
def page(study: Path) -> _Page:
    return _Page(write_report(study).read_text(encoding="utf-8"))


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the charts out, which take most of the time; pictures of pairs stay."""
    monkeypatch.setattr(Album, "add_chart", lambda *_: report_page.Html(""))


def test_every_picture_is_inside_the_page_and_beside_it(study: Path, page: _Page) -> None:
    pictures = page.of("img")
    beside = {path.stem: Image.open(path) for path in (study / "report").glob("*.png")}
    assert set(beside) == FIGURES
    light = [_decoded(tag["src"] or "") for tag in pictures]
    dark = [_decoded(tag["srcset"] or "") for tag in page.of("source")]
    assert sorted(image.size for image in light) == sorted(image.size for image in beside.values())
    charts = [image for image in light if image.getpixel((0, 0)) == (255, 255, 255, 255)]
    assert [image.size for image in charts] == [image.size for image in dark]
    assert all(image.convert("L").getpixel((0, 0)) < 40 for image in dark)
    assert all(len(p["alt"] or "") > 30 for p in pictures)


def _decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,")))).convert("RGBA")


def test_nothing_outside_the_page_is_referred_to(page: _Page) -> None:
    references = [
        value or "" for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")
    ]
    assert references
    assert all(value.startswith(("data:", "#")) for value in references)
    anchors = {attributes.get("id") for _, attributes in page.tags}
    assert {value.removeprefix("#") for value in references if value.startswith("#")} <= anchors


def test_names_and_messages_are_shown_not_run(page: _Page) -> None:
    assert HOSTILE in page.text
    assert f"{HOSTILE}: labels are on another grid" in page.text
    assert not [p for p in page.of("img") if "onerror" in p]
    assert "<dt>" not in page.text  # what is made here is markup, not text


def test_ids_are_unique_and_tables_have_headers(page: _Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(page.of("table")) == len(page.of("caption")) == 8
    assert {head["scope"] for head in page.of("th")} == {"col", "row"}


def test_numbers_of_the_tables_reach_the_page(page: _Page) -> None:
    assert "0.50 → 0.70 → 0.80" in page.text
    assert "2 of 3" in page.text
    assert "Not complete: 1 pair failed" in page.text
    assert "Dice rose in 2 of 2 pairs" in page.text


@pytest.mark.usefixtures("no_charts")
def test_without_images_the_rest_is_still_reported(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    for image in tmp_path.glob("subject-01.nii.gz"):
        image.unlink()
    text = write_report(study).read_text(encoding="utf-8")
    assert "No picture:" in text
    assert "subject-01.nii.gz" in text
    plan = json.loads((study / "plan.json").read_text(encoding="utf-8"))
    del plan["manifest"]
    (study / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert "give the manifest with --cohort" in write_report(study).read_text(encoding="utf-8")
    again = write_report(study, tmp_path / "cohort.csv").read_text(encoding="utf-8")
    assert "Worst: " in again


@pytest.mark.usefixtures("no_charts")
def test_a_file_that_may_not_be_read_costs_its_picture_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(report_pairs, "read_ddf", forbidden)
    text = write_report(write_study(tmp_path)).read_text(encoding="utf-8")
    assert ".h5: Permission denied" in text
    assert "Worst: " in text


@pytest.mark.usefixtures("no_charts")
def test_a_study_without_labels_is_ranked_by_similarity(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    for part in tables.part_names(study, "metrics"):
        kept = [
            {c: v for c, v in row.items() if not c.startswith(("dice", "tre"))}
            for row in tables.read_part(study, "metrics", part).to_pylist()
            if row["label"] == 0
        ]
        tables.write_part(study, "metrics", part, tables.table_from_rows("metrics", kept))
    text = write_report(study).read_text(encoding="utf-8")
    assert "worst by median similarity of the matched ROIs" in text
    assert "neither labels nor landmarks" in text


@pytest.mark.usefixtures("no_charts")
def test_a_study_that_was_only_matched_has_a_report_without_pairs(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    for part in tables.part_names(study, "metrics"):
        tables.remove_part(study, "metrics", part)
    page = _Page(write_report(study).read_text(encoding="utf-8"))
    assert "Best: " not in page.text
    assert "No pair was registered yet." in page.text
    assert f"{tables.read_table(study, 'correspondences').num_rows:,}" in page.text


@pytest.mark.usefixtures("no_charts")
def test_pictures_of_a_2d_study(tmp_path: Path) -> None:
    study = write_study(tmp_path, shape=(1, 96, 96))
    write_report(study)
    assert (study / "report" / "pair_best.png").stat().st_size > 10_000


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a study folder"):
        write_report(tmp_path)


def test_roles_are_different_pairs() -> None:
    assert best_median_worst([]) == []
    assert best_median_worst(["a"]) == [("best", "a")]
    assert best_median_worst(["a", "b"]) == [("best", "a"), ("worst", "b")]
    assert best_median_worst(["a", "b", "c"]) == [("best", "a"), ("median", "b"), ("worst", "c")]


def test_the_slices_that_share_most_matches_are_shown() -> None:
    grid = Geometry((9, 8, 8), (1.0, 1.0, 1.0))
    matches = [
        {"fixed_slice": z, "moving_slice": w, "rank": rank} for rank, (z, w) in enumerate([(1, 2), (3, 3), (3, 3)])
    ]
    assert choose_slices(matches, grid, grid)[:2] == (3, 3)
    assert [m["rank"] for m in choose_slices(matches[::-1], grid, grid)[2]] == [1, 2]
    assert choose_slices([], grid, grid) == (4, 4, [])


def test_overlay_is_grey_where_images_agree() -> None:
    image = np.array([[0.0, 1.0, 0.5]], dtype=np.float32)
    overlay = report_panels.composite(image, np.array([[0.0, 1.0, 0.0]], dtype=np.float32))
    np.testing.assert_array_equal(overlay, [[[0, 0, 0], [1, 1, 1], [0, 0.5, 0]]])


def test_labels_are_outlined_along_the_border_of_the_image() -> None:
    grey, labels = np.zeros((12, 12), np.float32), np.ones((12, 12), np.int32)
    shared: dict[str, Any] = {"rois": [], "sampled": np.indices((12, 12)) * 1.0, "shift_mm": np.zeros((12, 12))}
    shared |= dict.fromkeys(("fixed", "moving", "before", "moved"), grey)
    shared |= {"unit": "mm", "fixed_slice": 0, "moving_slice": 0, "aspect": 1.0, "moving_aspect": 1.0}
    without, outlined = (
        report_panels.pair_panels(PairView(**shared, fixed_labels=found, before_labels=None, moved_labels=None))
        for found in (None, labels)
    )
    assert without != outlined


def test_a_filter_is_announced_with_as_many_pairs_as_it_will_show(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_tables, "_FILTER_FROM", 1)
    data = read_report_data(study)
    data.__dict__["quality"] = replace(data.quality, check=np.array([1.996, 1.994]))
    data.columns["fold_fraction"][:] = [0.010001, 0.0102]
    shown = pairs_section(data)
    assert "Stand out (1)" in shown
    assert "Folding (1)" in shown


def test_text_is_escaped_and_markup_is_not() -> None:
    cell = report_page.element("td", "<b>", report_page.element("i", 'a"&'), title='"x"')
    assert cell == '<td title="&quot;x&quot;">&lt;b&gt;<i>a&quot;&amp;</i></td>'


def test_long_tables_carry_their_rows_as_columns_and_show_the_first() -> None:
    rows = report_tables.WHOLE + 1
    numbers = np.arange(float(rows))
    numbers[2] = np.nan
    columns = [
        report_tables.Column("name", [f"</script>{i % 2}" for i in range(rows)]),
        report_tables.Column("x", numbers / 3, 2, "x", mark=1.0),
    ]
    page = _Page(report_tables.data_table("t", "c", columns))
    assert len(page.of("tr")) == 1 + report_tables.PAGE
    assert [tag.get("data-v") for tag in page.of("td")][:3] == ["0.00", "0.33", None]
    packed = json.loads(gzip.decompress(base64.b64decode(report_tables.pack(columns))))
    assert packed["rows"] == rows
    names, values = packed["columns"]
    assert names["words"] == ["</script>0", "</script>1"]
    assert names["values"][:3] == [0, 1, 0]
    assert values["values"][:4] == [0, 0.33, None, 1]
    assert (values["digits"], values["mark"], values["key"]) == (2, 1.0, "x")


def test_short_tables_have_no_filter_and_no_pages() -> None:
    short, long = (report_tables.table("t", "c", ["n"], [[i] for i in range(n)]) for n in (3, 30))
    assert "search" not in short
    assert 'type="search"' in long
    assert "data-pack" not in long


def test_bad_subjects_of_many_are_found_without_a_look(tmp_path: Path) -> None:
    _, bad = synthetic.write_study(tmp_path / "study", pairs=300, matches=20, share=0.1)
    assert bad
    text = write_report(tmp_path / "study").read_text(encoding="utf-8")
    subjects = pq.read_table(tmp_path / "study" / "report" / "subjects.parquet").to_pylist()
    assert {row["subject"] for row in subjects if row["score"] >= LIMIT} == bad
    pairs = pq.read_table(tmp_path / "study" / "report" / "pairs.parquet").to_pylist()
    standing = [row for row in pairs if row["score_unlabelled"] >= LIMIT]
    assert sum(bool({row["moving"], row["fixed"]} & bad) for row in standing) >= 0.9 * len(standing) > 0
    assert any("folding" in row["reasons"] for row in standing)
    assert all(f"subject {name} stands out" in text for name in sorted(bad)[:3])
    assert (tmp_path / "study" / "report" / "quality.png").exists()


def test_matches_are_summarised_a_part_at_a_time_as_they_would_be_at_once(tmp_path: Path) -> None:
    written, _ = synthetic.write_study(tmp_path / "study", pairs=200, matches=15)
    found = read_matches(tmp_path / "study")
    assert len(tables.part_names(tmp_path / "study", "correspondences")) > 1
    whole = tables.read_table(tmp_path / "study", "correspondences").to_pandas().groupby("pair")
    summary = found.pairs.to_pandas().set_index("pair")
    assert found.total == written == summary.n_matches.sum()
    np.testing.assert_allclose(summary.confidence, whole.confidence.median()[summary.index], rtol=1e-6)
    assert found.counts["similarity"].sum() == written
    assert len(found.counts["confidence"]) == BINS
    assert np.isfinite(summary.residual[summary.n_matches >= 8]).all()


def test_sweeps_and_an_atlas_are_shown(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    sweep = study / "sweeps" / "try"
    sweep.mkdir(parents=True)
    (sweep / "sweep.yaml").write_text(
        yaml.safe_dump({"grid": {"set": {"fit.a": 1}, "match.epsilon": [0.7, 0.8]}}), encoding="utf-8"
    )
    numbers = {name: [0.5, 0.6] for name in ("dice", "dice_sd", "dice_before", "n_rois", "seconds_fit")}
    empty = {f"{name}tre_{unit}": pa.nulls(2, pa.float64()) for name in ("", "landmark_") for unit in ("mm", "vox")}
    table = pa.table({"match.epsilon": [0.7, 0.8], "label": [0, 0], "n_pairs": [2, 2], **numbers, **empty})
    pq.write_table(table, sweep / "sweep.parquet")
    (study / "atlas").mkdir()
    Image.new("RGB", (300, 200), (90, 90, 90)).save(study / "atlas" / "montage.png")
    rows = {"iteration": [1, 1, 2], "subject": ["a", "b", "a"], "sharpness": [1.0, 2.0, 3.0]}
    pq.write_table(pa.table(rows), study / "atlas" / "atlas.parquet")
    page = _Page(write_report(study).read_text(encoding="utf-8"))
    assert {"atlas.png", "sweep_try_match.epsilon.png"} <= {path.name for path in (study / "report").glob("*.png")}
    assert "1.500" in page.text
    assert "match.epsilon" in page.text


@pytest.mark.usefixtures("no_charts")
def test_labels_that_were_fitted_to_and_held_out_rois_are_named(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    part = tables.part_names(study, "metrics")[0]
    rows = [row | {"flag": "labels_in_fit"} for row in tables.read_part(study, "metrics", part).to_pylist()]
    rows[0] |= {"pseudo_dice_before": 0.25, "pseudo_dice_affine": 0.5, "pseudo_dice": 0.625}
    tables.write_part(study, "metrics", part, tables.table_from_rows("metrics", rows))
    page = _Page(write_report(study).read_text(encoding="utf-8"))
    assert "1 of 2 pairs were fitted to the labels that measure them" in page.text
    assert "held-out ROIs, Dice after" in page.text
    assert "0.625" in page.text


def test_failures_are_counted_by_kind_with_advice(page: _Page) -> None:
    assert "1 failures of 1 kinds" in page.text
    assert "labels and landmarks must be on the grid" in page.text


@pytest.mark.usefixtures("no_charts")
def test_refined_results_are_what_counts(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    for part in tables.part_names(study, "metrics"):
        rows = tables.read_part(study, "metrics", part).to_pylist()
        changed = [row | {"dice_refined": row["dice"] + 0.05} for row in rows]
        tables.write_part(study, "metrics", part, tables.table_from_rows("metrics", changed))
    data = read_report_data(study)
    np.testing.assert_allclose(sorted(data.columns["dice"]), [0.75, 0.95])
    assert "Dice refined" in write_report(study).read_text(encoding="utf-8")


_PROTAN = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]])
_DEUTAN = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])


@pytest.mark.parametrize("sight", [np.eye(3), _PROTAN, _DEUTAN], ids=["all cones", "protanopia", "deuteranopia"])
@pytest.mark.parametrize("colours", [tuple(report_figures.STAGE_COLOURS.values()), report_panels.OKABE_ITO])
def test_colours_differ_for_colour_blind_readers(sight: np.ndarray, colours: tuple[str, ...]) -> None:
    """Seen as by Machado, Oliveira and Fernandes (2009), whose matrices are for linear RGB."""
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ sight.T, 0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))
    different = deltaE_ciede2000(lab[:, None], lab[None])[~np.eye(len(lab), dtype=bool)]
    assert different.min() > 7
