"""The sections of a report that find the bad ones: quality control, pairs and subjects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from pipeline import report_figures as figures
from pipeline.algorithms.quality import FEWEST, LARGEST, LIMIT, WORST
from pipeline.report_album import Album
from pipeline.report_data import ReportData, Values
from pipeline.report_page import Html, element, folded, glossary, section
from pipeline.report_quality import FOLDED, LOST, PAIR_MEASURES, SUBJECT_MEASURES, Measure
from pipeline.report_subjects import Subjects
from pipeline.report_tables import Column, data_table
from storage.atomic import replace_file


def quality_section(data: ReportData, subjects: Subjects, album: Album) -> Html:
    """What the scores are and how they are spread."""
    known = int(np.isfinite(data.quality.score).sum())
    rule = (
        f"Every pair is compared with all others of this study, measure by measure: z is the distance from the median "
        f"over the spread (1.4826 × the median absolute deviation, or a least spread that matters), positive "
        f"where worse. The score is the mean of a pair's {WORST} largest z, each at most {LARGEST:g}; a pair stands "
        f"out from {LIMIT:g} on, as 1 to 5 % of pairs do by chance alone. It is computed twice, without labels and, "
        f"where there are any, from them; the larger counts. "
        f"Subjects are scored likewise, by the medians over their pairs and by their ROIs."
    )
    parts: list[object] = [element("p", "Which results are unlike the rest, found without looking at them.")]
    if known:
        numbers = _numbers(data, subjects)
        alt = f"Scores of {known} pairs, {int(data.suspect.sum())} to look at. {_trust(data)}"
        caption = f"Triangles: pairs to look at. Dashed: {LIMIT:g}, where standing out begins. {_trust(data)}"
        parts.append(album.add_chart("quality", lambda: figures.check(data, numbers), alt, caption))
    else:
        parts.append(
            element("p", f"There are no scores, which need {FEWEST} pairs to compare with. Alarms count anyway.")
        )
    alarms = (
        f"Whatever the others are like, a pair raises an alarm when it is worse than its affine part or fell back to a "
        f"simpler map, when more than {FOLDED:.0%} of its grid folds, and when Dice fell by more than {LOST:g}."
    )
    measures = [(m.title, _explain(m)) for m in dict.fromkeys((*PAIR_MEASURES, *SUBJECT_MEASURES))]
    inside = [element("p", rule), element("p", alarms), glossary(measures)]
    parts.append(folded("How the scores are made, and what they look at", *inside))
    return section("Quality control", *parts)


def pairs_section(data: ReportData) -> Html:
    """All pairs, those to look at first."""
    if not data.pairs:
        return section("Pairs", element("p", "No pair was registered."))
    order = data.worst_first
    columns = _pair_columns(data, order)
    n_suspect = int(data.suspect.sum())
    caption = f"{len(data.pairs):,} pairs: {n_suspect:,} to look at first, then by {data.ranking[0]}, worst first"
    score, folded_share = (np.round(v, 2) for v in (data.quality.score, 100 * data.columns["fold_fraction"]))
    presets = [(f"Stand out ({int((score >= LIMIT).sum()):,})", f"score>={LIMIT:g}")]  # of what is shown, as the filter
    presets += [(f"Folding ({int((folded_share > 100 * FOLDED).sum()):,})", f"folded>{100 * FOLDED:g}")]
    if data.count("dice"):
        presets.append(("Dice below 0.5", "dice<0.5"))
    found = data_table("pairs-table", caption, columns, presets)
    words = [(f"{c.title} ({c.key})" if c.key else c.title, _MEANINGS[c.key or c.title]) for c in columns]
    more = "All measures of every pair and label are in metrics/, these scores in report/pairs.parquet."
    return section("Pairs", found, folded("What the columns mean", glossary(words), element("p", more)))


def subjects_section(data: ReportData, subjects: Subjects) -> Html:
    """All subjects, those that stand out first, then those without a result, then as in the manifest."""
    score = subjects.quality.score
    unfinished = np.array([state != "encoded" for state in subjects.states], dtype=bool)
    order = np.lexsort((np.arange(len(score)), ~unfinished, -np.where(score >= LIMIT, score, 0)))
    pick = subjects.columns
    measured = data.count("dice") > 0
    columns = [
        Column("subject", [subjects.names[i] for i in order]),
        Column("score", score[order], 2, "score", LIMIT),
        Column("why", [subjects.quality.reasons[i] for i in order], wide=True),
        *_texts(subjects, order),
        Column("ROIs", pick["rois"][order], 0, "rois"),
        Column("pairs", pick["pairs"][order], 0, "pairs"),
        Column("to look at (%)", 100 * pick["suspect"][order], 0, "look"),
        *([Column("Dice, median", pick["dice"][order], 3, "dice")] if measured else []),
        Column("confidence, median", pick["confidence"][order], 3, "confidence"),
        Column("grid", [subjects.grids[i] for i in order], wide=True),
    ]
    typical = pick["rois"][np.isfinite(pick["rois"])]
    caption = f"{len(order):,} subjects" + (f", median {np.median(typical):.0f} ROIs" if len(typical) else "")
    return section("Subjects", data_table("cohort-table", caption, columns))


def write_scores(folder: Path, data: ReportData, subjects: Subjects) -> None:
    """Write `pairs.parquet` and `subjects.parquet`: the scores, what they are made from, and the reasons."""
    for name, names, quality, columns in (
        ("pairs", {k: data.means.column(k) for k in ("pair", "moving", "fixed")}, data.quality, data.columns),
        ("subjects", {"subject": subjects.names}, subjects.quality, subjects.columns),
    ):
        scores = {"score": quality.score, "score_unlabelled": quality.check, "score_labelled": quality.accuracy}
        numbers = {key: pa.array(values, pa.float64(), from_pandas=True) for key, values in (scores | columns).items()}
        more = {"alarms": data.alarms} if name == "pairs" else {"state": subjects.states}
        texts = {key: pa.array(values, pa.string()) for key, values in ({"reasons": quality.reasons} | more).items()}
        with replace_file(folder / f"{name}.parquet") as temporary:
            pq.write_table(pa.table({**names, **texts, **numbers}), temporary, compression="zstd")


_MEANINGS = {
    "pair": "Name of the pair; moving__fixed unless the list of pairs names it otherwise.",
    "moving": "Subject that is warped.",
    "fixed": "Subject whose grid the result lies on.",
    "score": f"How unlike the other pairs this one is, for the worse; marked from {LIMIT:g} on.",
    "why": "The measures behind the score with their z, from 2 on.",
    "alarm": "What is wrong whatever the others are like.",
    "before": "Dice of the labels as the images lie in world space, mean over labels.",
    "affine": "The same after the affine step.",
    "dice": "The same after registration (of the refined field, where refinement was asked for).",
    "tre_before": "Target registration error before registration.",
    "tre": "Target registration error after registration.",
    "hd95": "95 % Hausdorff distance of the labels after registration.",
    "rois": "Matched ROI pairs in the fit.",
    "similarity": "Median similarity of the matched ROIs.",
    "confidence": "Median confidence of the matches.",
    "residual": "Median distance of the matches from one affine map fitted to them robustly.",
    "roi_dice": "Mean Dice of the matched ROIs after registration: how well the field follows them.",
    "folded": "Part of the fixed grid with a Jacobian determinant of 0 or less.",
    "sdlogj": "Standard deviation of the log Jacobian determinant: roughness of the field.",
    "jacobian_min": "Smallest Jacobian determinant anywhere in the field.",
    "seconds": "Wall time of matching, fit, refinement and inversion.",
}


def _pair_columns(data: ReportData, order: npt.NDArray[np.int64]) -> list[Column]:
    names = {role: data.means.column(role).take(pa.array(order)).to_pylist() for role in ("pair", "moving", "fixed")}
    trios = zip(names["pair"], names["moving"], names["fixed"], strict=True)
    plain = all(pair == f"{moving}__{fixed}" for pair, moving, fixed in trios)
    _, unit, _ = data.distance
    pick = {name: values[order] for name, values in data.columns.items()}
    numbers: list[tuple[str, Values, int, str]] = [
        ("Dice before", pick["dice_before"], 3, "before"),
        ("Dice affine", pick["dice_affine"], 3, "affine"),
        ("Dice after", pick["dice"], 3, "dice"),
        (f"TRE before ({unit})", pick["distance_before"], 2, "tre_before"),
        (f"TRE after ({unit})", pick["distance"], 2, "tre"),
        (f"HD95 ({data.unit})", pick["hd95"], 2, "hd95"),
        ("ROI pairs", pick["n_rois"], 0, "rois"),
        ("similarity", pick["similarity"], 3, "similarity"),
        ("confidence", pick["confidence"], 3, "confidence"),
        ("residual (mm)" if data.unit == "mm" else "residual (px)", pick["residual"], 2, "residual"),
        ("ROI Dice", pick["roi_dice"], 3, "roi_dice"),
        ("folded (%)", 100 * pick["fold_fraction"], 2, "folded"),
        ("SD log J", pick["sdlogj"], 3, "sdlogj"),
        ("least det J", pick["jacobian_min"], 3, "jacobian_min"),
        ("seconds", pick["seconds"], 2, "seconds"),
    ]
    shown = [Column(title, values, digits, key) for title, values, digits, key in numbers if np.isfinite(values).any()]
    return [
        *(Column(role, names[role]) for role in (("pair",) if plain else ("pair", "moving", "fixed"))),
        Column("score", data.quality.score[order], 2, "score", LIMIT),
        Column("why", [data.quality.reasons[i] if data.suspect[i] else "" for i in order], wide=True),
        *([Column("alarm", [data.alarms[i] for i in order])] if any(data.alarms) else []),
        *shown,
    ]


def _texts(subjects: Subjects, order: npt.NDArray[np.int64]) -> list[Column]:
    texts = {"state": subjects.states, "group": subjects.groups, "session": subjects.sessions}
    return [Column(title, [values[i] for i in order]) for title, values in texts.items() if any(values)]


def _numbers(data: ReportData, subjects: Subjects) -> npt.NDArray[np.int64]:
    """Places in the cohort of the moving and fixed subject of every pair; those not in it come last."""
    places = {name: number for number, name in enumerate(subjects.names)}
    roles = [[places.get(name, len(places)) for name in data.means.column(r).to_pylist()] for r in ("moving", "fixed")]
    return np.array(roles, dtype=np.int64)


def _trust(data: ReportData) -> str:
    """How the label-free score goes with Dice in this study."""
    check, dice = data.quality.check, data.columns["dice"]
    known = np.isfinite(check) & np.isfinite(dice)
    if known.sum() < FEWEST or np.ptp(check[known]) == 0 or np.ptp(dice[known]) == 0:
        return ""
    rho = float(spearmanr(check[known], dice[known]).statistic)
    return f"The label-free score and Dice have a rank correlation of {rho:.2f} here (-1 would be perfect)."


def _explain(measure: Measure) -> str:
    worse = "more" if measure.sign > 0 else "less"
    spread = f"a factor of {np.exp(measure.floor):.2f}" if measure.ratio else f"{measure.floor:g}"
    labelled = ", needs labels or landmarks" if measure.labelled else ""
    return f"{measure.column}: {worse} is worse, least spread {spread}{labelled}"
