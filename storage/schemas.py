"""Pinned columns of the result tables: name, type, unit, meaning. README's tables come from here."""

from __future__ import annotations

import pyarrow as pa

SCHEMA_VERSION = "3"

_TEXT, _INT, _SCORE, _MEASURE, _TIME = (
    pa.string(),
    pa.int32(),
    pa.float32(),
    pa.float64(),
    pa.timestamp("us", tz="UTC"),
)
_Columns = list[tuple[str, pa.DataType, str, str]]

_DATA_UNIT = "mm (px without spacing)"
_AREA_UNIT = "mm² (px² without spacing)"


def _zyx(prefix: str, suffix: str, unit: str, meaning: str) -> _Columns:
    return [(f"{prefix}_{axis}_{suffix}", _MEASURE, unit, f"{meaning}, {axis}") for axis in "zyx"]


def _schema(columns: _Columns) -> pa.Schema:
    fields = [
        pa.field(name, kind, metadata={"unit": unit, "description": meaning}) for name, kind, unit, meaning in columns
    ]
    return pa.schema(fields, metadata={"schema_version": SCHEMA_VERSION})


_KEY: _Columns = [("key", _TEXT, "", "digest of every input and setting this row depends on")]
_PAIR: _Columns = [
    ("pair", _TEXT, "", "pair id"),
    ("moving", _TEXT, "", "subject that is warped"),
    ("fixed", _TEXT, "", "subject whose grid the result lies on"),
]

ROIS = _schema(
    [
        ("subject", _TEXT, "", "subject name of the manifest"),
        ("roi", _INT, "", "row of the ROI in the embedding store, from 0"),
        ("slice", _INT, "voxel", "slice index along the analysis slice axis, from 0"),
        ("track", _INT, "", "number of the subject's track, a chain of ROIs through neighbouring slices, from 0"),
        ("area_px", _INT, "px", "pixels of the mask"),
        ("area_mm2", _MEASURE, _AREA_UNIT, "area of the mask"),
        ("area_fraction", _MEASURE, "1", "area of the mask over area of the slice"),
        *_zyx("centroid", "vox", "voxel", "centroid index"),
        *_zyx("centroid", "mm", _DATA_UNIT, "centroid, local position (index times spacing)"),
        ("bbox_y0", _INT, "px", "first row of the bounding box"),
        ("bbox_x0", _INT, "px", "first column of the bounding box"),
        ("bbox_y1", _INT, "px", "row after the last of the bounding box"),
        ("bbox_x1", _INT, "px", "column after the last of the bounding box"),
        ("quality", _SCORE, "1", "predicted IoU, the backend's analogue, or mean class probability"),
        ("stability", _SCORE, "1", "how little the mask changes with its threshold, 0 to 1"),
        ("roi_class", _INT, "", "class that this is one slice of; 0 for a candidate ROI, which has none"),
        *_KEY,
    ]
)

CORRESPONDENCES = _schema(
    [
        *_PAIR,
        ("moving_roi", _INT, "", "ROI row of the moving subject"),
        ("fixed_roi", _INT, "", "ROI row of the fixed subject"),
        ("moving_slice", _INT, "voxel", "slice of the moving ROI"),
        ("fixed_slice", _INT, "voxel", "slice of the fixed ROI"),
        (
            "roi_class",
            _INT,
            "",
            "class of the two ROIs, which go through all its slices; ROI, slice and area are those of the largest. "
            "0: a pair of slices by prototype",
        ),
        ("similarity", _SCORE, "1", "prototype similarity, Eq. 6; 1 for a class"),
        ("margin", _SCORE, "1", "similarity minus that of the best other candidate"),
        ("rank", _INT, "", "order in which the pair was selected, from 0"),
        (
            "confidence",
            _SCORE,
            "1",
            "how far the match is to be trusted, 0 to 1; by class: Eq. 1",
        ),
        *_zyx("moving_centroid", "mm", _DATA_UNIT, "centroid in the moving image's local frame"),
        *_zyx("fixed_centroid", "mm", _DATA_UNIT, "centroid in the fixed image's local frame"),
        ("moving_area_mm2", _MEASURE, _AREA_UNIT, "area of the moving ROI"),
        ("fixed_area_mm2", _MEASURE, _AREA_UNIT, "area of the fixed ROI"),
        *_KEY,
    ]
)

UNMATCHED = _schema([*_PAIR, *_KEY])

COHORT_ROIS = _schema(
    [
        ("subject", _TEXT, "", "subject name of the manifest"),
        ("track", _INT, "", "track of the subject, as in `rois`"),
        (
            "cohort_roi",
            _INT,
            "",
            "the structure that it shows, numbered over the whole cohort from the most frequent",
        ),
        ("n_subjects", _INT, "", "subjects that have this cohort ROI"),
        ("frequency", _SCORE, "1", "share of the subjects that have it"),
        ("n_matches", _INT, "", "other subjects to which a match leads from this track"),
        ("support", _INT, "", "those of them where it leads to the same cohort ROI"),
        ("first_slice", _INT, "voxel", "first slice of the track"),
        ("last_slice", _INT, "voxel", "last slice of the track"),
        ("n_rois", _INT, "", "ROIs of the track"),
        *_zyx("centroid", "mm", _DATA_UNIT, "centroid of the track in the image's local frame"),
        ("key", _TEXT, "", "digest of the matches that it was made from"),
    ]
)

SUBMISSION = _schema(
    [
        *_PAIR,
        ("file", _TEXT, "", "displacement file, beside the table"),
        ("l2r_dice", _MEASURE, "1", "Dice as Learn2Reg's evaluator has it: mean over the labels of both images"),
        (
            "l2r_hd95_vox",
            _MEASURE,
            "voxel",
            "95 % Hausdorff distance as Learn2Reg's evaluator has it: between surface elements weighted by area",
        ),
        ("l2r_tre_mm", _MEASURE, "mm", "mean landmark distance as Learn2Reg's evaluator has it, the field by splines"),
        (
            "l2r_sdlogj",
            _MEASURE,
            "1",
            "standard deviation of log(det J + 3) of the field in voxels, its outer two voxels left out: what "
            "Learn2Reg's evaluator computes, and not `sdlogj`",
        ),
        ("lumir_ndv_percent", _MEASURE, "%", "non-diffeomorphic volume as LUMIR has it, in percent of the grid"),
    ]
)

QUERIES = _schema(
    [
        ("query", _TEXT, "", "name of the query"),
        ("asked", _TEXT, "", "subject that the region asked for is on"),
        ("subject", _TEXT, "", "subject that it was looked for in; one row without a ROI where it was not found"),
        ("rank", _INT, "", "place of the subject by its confidence, from 1"),
        ("subject_confidence", _SCORE, "1", "mean of `confidence` weighted by area; 0 where it was not found"),
        ("n_rois", _INT, "", "ROIs found in the subject, one per slice"),
        ("roi", _INT, "", "row of the ROI in the embedding store, as in `rois`"),
        ("slice", _INT, "voxel", "slice of the ROI"),
        ("track", _INT, "", "track of the ROI, as in `rois`"),
        ("asked_slice", _INT, "voxel", "slice of the region asked for that it is most like"),
        (
            "similarity",
            _SCORE,
            "1",
            "cosine with the prototype of the region, or of the ROI that led to it, Eq. 6",
        ),
        ("overlap", _SCORE, "1", "overlap with the ellipse of that region where it was to be expected"),
        (
            "confidence",
            _SCORE,
            "1",
            "how far the ROI is to be trusted, as in `correspondences`; mean over the subjects that led to it",
        ),
        *_zyx("centroid", "mm", _DATA_UNIT, "centroid of the ROI in its image's local frame"),
        ("area_mm2", _MEASURE, _AREA_UNIT, "area of the ROI"),
        ("key", _TEXT, "", "digest of the prototypes and the region"),
    ]
)


def _tre(prefix: str, meaning: str) -> _Columns:
    stages = (
        ("_before", "before registration"),
        ("_affine", "after the affine step"),
        ("", "after registration"),
    )
    return [
        (f"{prefix}_{unit}{ending}", _MEASURE, shown, f"{meaning}, {stage}{note}")
        for unit, shown, note in (
            ("mm", "mm", "; empty without spacing"),
            ("vox", "voxel", ", in voxels of the fixed grid"),
        )
        for ending, stage in stages
    ]


_REFINED: _Columns = [
    (f"{name}_refined", _MEASURE, unit, f"{name} after the intensity refinement; empty when that is off")
    for name, unit in (
        ("dice", "1"),
        ("tre_mm", "mm"),
        ("tre_vox", "voxel"),
        ("landmark_tre_mm", "mm"),
        ("landmark_tre_vox", "voxel"),
        ("hd95_mm", "mm"),
        ("hd95_vox", "voxel"),
        ("sdlogj", "1"),
        ("fold_fraction", "1"),
        ("fold_fraction_rois", "1"),
        ("roi_dice", "1"),
        ("roi_dice_min", "1"),
    )
]

_INVERSE_ERROR: _Columns = [
    (
        f"inverse_error_{unit}{ending}",
        _MEASURE,
        shown,
        f"{which} distance that going there and back by the inverse "
        f"leads away from a fixed voxel, where it stays in the moving image{note}",
    )
    for unit, shown, note in (
        ("mm", "mm", "; empty without spacing"),
        ("vox", "voxel", ", in voxels of the fixed grid"),
    )
    for ending, which in (("", "mean"), ("_p95", "95th percentile of the"))
]

METRICS = _schema(
    [
        *_PAIR,
        ("label", _INT, "", "label value; 0 is the mean over the labels that both images hold"),
        ("dice_before", _MEASURE, "1", "Dice of the labels as they lie in world space"),
        ("dice_centered", _MEASURE, "1", "Dice with the volume centres aligned"),
        ("dice_affine", _MEASURE, "1", "Dice after the affine step"),
        ("dice", _MEASURE, "1", "Dice after registration"),
        *_tre("tre", "distance of the label centroids"),
        *_tre("landmark_tre", "mean distance of the landmarks"),
        (
            "hd95_mm_before",
            _MEASURE,
            "mm",
            "95 % Hausdorff distance before registration",
        ),
        ("hd95_mm", _MEASURE, "mm", "95 % Hausdorff distance after registration"),
        (
            "hd95_vox",
            _MEASURE,
            "voxel",
            "95 % Hausdorff distance after registration, fixed voxels",
        ),
        ("pseudo_dice_before", _MEASURE, "1", "Dice of the held-out ROIs (evaluate.pseudo_folds), before registration"),
        ("pseudo_dice_affine", _MEASURE, "1", "Dice of the held-out ROIs, after the affine step"),
        ("pseudo_dice", _MEASURE, "1", "Dice of the held-out ROIs, after registration"),
        *_tre("pseudo_tre", "mean distance of the held-out ROIs' centroids"),
        ("n_pseudo", _INT, "", "held-out ROI pairs; empty when not asked for"),
        ("sdlogj", _MEASURE, "1", "standard deviation of the log Jacobian determinant of the field"),
        (
            "fold_fraction",
            _MEASURE,
            "1",
            "part of the fixed grid with Jacobian determinant <= 0",
        ),
        (
            "fold_fraction_rois",
            _MEASURE,
            "1",
            "the same of the matched fixed ROIs and the voxels within two shortest voxel edges of them",
        ),
        ("roi_dice", _MEASURE, "1", "mean Dice of the matched ROIs, which the field was fitted to, after registration"),
        ("roi_dice_min", _MEASURE, "1", "that of the worst of them"),
        (
            "jacobian_min",
            _MEASURE,
            "1",
            "lower bound of the Jacobian determinant anywhere in the written field; empty without fit.diffeomorphic",
        ),
        *_INVERSE_ERROR,
        *_REFINED,
        ("n_rois", _INT, "", "matched ROI pairs in the fit"),
        ("n_slices", _INT, "", "fixed slices that hold a matched ROI"),
        ("fallback", _TEXT, "", "simpler model used instead: none, affine, rigid, translation or identity"),
        (
            "flag",
            _TEXT,
            "",
            "what to look at: fallback_*, worse_than_affine, labels_in_fit (fitted to these labels), damped and "
            "inverse_damped (drawn back so as not to fold)",
        ),
        ("seconds_match", _MEASURE, "s", "wall time of matching"),
        ("seconds_fit", _MEASURE, "s", "wall time of the fit, of those fitted at once a share"),
        ("seconds_refine", _MEASURE, "s", "wall time of the intensity refinement; empty when that is off"),
        (
            "seconds_inverse",
            _MEASURE,
            "s",
            "wall time of checking the field and inverting it; empty when not asked for",
        ),
        *_KEY,
    ]
)

_ONLY_OURS = (
    "pseudo_",
    "n_",
    "roi_",
    "fold_fraction_rois",
    "jacobian_min",
    "inverse_",
    "fallback",
    "flag",
    "seconds_",
    "key",
)
BASELINE_METRICS = _schema(
    [
        ("method", _TEXT, "", "baseline"),
        *(
            (field.name, field.type, field.metadata[b"unit"].decode(), field.metadata[b"description"].decode())
            for field in METRICS
            if not field.name.startswith(_ONLY_OURS) and not field.name.endswith("_refined")
        ),
        ("seconds", _MEASURE, "s", "wall time of the registration alone, without reading and evaluating"),
        ("processor_seconds", _MEASURE, "s", "processor time of the same, that of programs it calls included"),
        (
            "peak_memory_bytes",
            pa.int64(),
            "byte",
            "largest resident memory of the process while it read, registered and evaluated; not of programs it calls",
        ),
        *_KEY,
    ]
)

ATLAS = _schema(
    [
        ("iteration", _INT, "", "iteration, from 1; all but what is said of a subject is the same in all of its rows"),
        ("subject", _TEXT, "", "subject that took part"),
        ("n_subjects", _INT, "", "subjects that took part"),
        (
            "mean_displacement",
            _MEASURE,
            _DATA_UNIT,
            "how far the mean shape was from the template before: root mean square over the foreground",
        ),
        ("image_change", _MEASURE, "1", "1 minus the correlation of the template with that before"),
        (
            "sharpness",
            _MEASURE,
            "1/mm (1/px without spacing)",
            "mean length of the template's gradient over its foreground, its 2nd to 98th percentile being 1",
        ),
        (
            "shape_distance",
            _MEASURE,
            _DATA_UNIT,
            "distance of the shape, without its pose, from the mean shape: root mean square over the foreground",
        ),
        ("log_jacobian", _MEASURE, "1", "mean over the template of the natural logarithm of det J of the subject"),
        ("correlation", _MEASURE, "1", "of the warped subject with the template"),
        ("dice_pairwise", _MEASURE, "1", "mean Dice with the labels of each other subject, on the template"),
        ("dice_majority", _MEASURE, "1", "Dice with the majority of all, on the template"),
        (
            "dice_propagated",
            _MEASURE,
            "1",
            "Dice in the subject's own image of what the labels of all others say, brought there through the template",
        ),
        ("dice_reference", _MEASURE, "1", "the same of the reference's labels alone; in iteration 1 by one direct fit"),
        ("dice_best_single", _MEASURE, "1", "the same of the labels of `best_single` alone"),
        (
            "best_single",
            _TEXT,
            "",
            "subject whose labels alone do best: of the reference and the two with the highest `dice_pairwise`",
        ),
        *_KEY,
    ]
)

FAILURES = _schema(
    [
        (
            "stage",
            _TEXT,
            "",
            "encode, prototypes, match or fit; in an atlas also shape, warp, propagate or cohort_rois; "
            "beside baselines the method",
        ),
        ("unit", _TEXT, "", "id of the unit of work"),
        ("subject", _TEXT, "", "subject, empty for a pair"),
        ("pair", _TEXT, "", "pair id, empty for a subject"),
        ("error", _TEXT, "", "type of the error"),
        ("message", _TEXT, "", "its message"),
        ("traceback", _TEXT, "", "where it was raised"),
        ("attempt", _INT, "", "how often the unit was tried, from 1"),
    ]
)

RUNS = _schema(
    [
        ("run", _TEXT, "", "id of the run"),
        ("started", _TIME, "UTC", "when it started"),
        ("finished", _TIME, "UTC", "when it finished; empty when it was cut short"),
        ("config_digest", _TEXT, "", "digest of the resolved configuration"),
        ("samreg_version", _TEXT, "", "version of this program"),
        ("python", _TEXT, "", "version of Python"),
        ("packages", _TEXT, "JSON", "versions of the packages that decide the result"),
        ("executor", _TEXT, "", "execution.executor as it was asked for: auto, ray or serial"),
        ("workers", _INT, "", "workers of the stage"),
        ("stage", _TEXT, "", "stage this row counts"),
        ("units_done", _INT, "", "units finished in this run"),
        ("units_failed", _INT, "", "units that failed in this run"),
        ("seconds", _MEASURE, "s", "wall time of the stage"),
        ("peak_memory_bytes", pa.int64(), "byte", "largest resident memory of a worker"),
    ]
)

UNITS = _schema(
    [
        ("run", _TEXT, "", "id of the run"),
        ("stage", _TEXT, "", "stage"),
        ("unit", _TEXT, "", "id of the unit of work: a subject, a tile of pairs, or a few pairs of one"),
        ("host", _TEXT, "", "machine that it ran on"),
        ("started", _TIME, "UTC", "when it started, by the clock of that machine"),
        ("seconds", _MEASURE, "s", "wall time"),
        ("processor_seconds", _MEASURE, "s", "processor time of the whole process meanwhile"),
        ("bytes_read", pa.int64(), "byte", "read from files, cached or not; units sent together share equally"),
        ("bytes_written", pa.int64(), "byte", "written to files; units sent together share equally"),
        ("peak_memory_bytes", pa.int64(), "byte", "largest resident memory of the process while it ran"),
        ("gpu_seconds", _MEASURE, "s", "time for which it held a GPU, times the share of it"),
        ("failed", pa.bool_(), "", "whether it failed as a whole"),
    ]
)

SCHEMAS = {
    "rois": ROIS,
    "correspondences": CORRESPONDENCES,
    "unmatched": UNMATCHED,
    "cohort_rois": COHORT_ROIS,
    "metrics": METRICS,
    "baseline_metrics": BASELINE_METRICS,
    "queries": QUERIES,
    "submission": SUBMISSION,
    "atlas": ATLAS,
    "failures": FAILURES,
    "runs": RUNS,
    "units": UNITS,
}
