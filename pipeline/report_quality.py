"""Quality control of a study in numbers: which pairs and subjects are unlike the others, by how much, and in what.

Every measure becomes a robust z over the study, positive where it is worse. A pair's score is the mean of its
three largest: `check` over what needs no labels, `accuracy` over what does. `score` is the larger of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.algorithms import quality

Values = npt.NDArray[np.float64]

FOLDED = 0.01  # part of the grid that folds, above which a pair needs a look whatever the others do
LOST = 0.02  # Dice below that before registration
_REASONS_FROM = 2.0  # z worth naming
_ALARMS = {
    "worse_than_affine": "worse than its affine part",
    "fallback_affine": "affine only",
    "fallback_rigid": "rigid only",
    "fallback_translation": "translation only",
    "fallback_identity": "not moved at all",
}


@dataclass(frozen=True)
class Measure:
    """A quantity that tells good from bad.

    Attributes:
        column: of the values it is made from.
        title: what it is called when it is the reason.
        sign: 1 where larger is worse, -1 where smaller is.
        floor: least spread of the z, in the unit of the column, or of its natural logarithm if `ratio`.
        labelled: whether it needs labels or landmarks.
    """

    column: str
    title: str
    sign: int
    floor: float
    ratio: bool = False
    labelled: bool = False


PAIR_MEASURES = (
    Measure("n_rois", "few ROI pairs", -1, 0.25, ratio=True),
    Measure("similarity", "low similarity", -1, 0.02),
    Measure("confidence", "low confidence", -1, 0.05),
    Measure("residual", "matches disagree in space", 1, 0.25, ratio=True),
    Measure("roi_dice", "ROIs not met", -1, 0.03),
    Measure("roi_dice_min", "worst ROI not met", -1, 0.1),
    Measure("pseudo_dice", "held-out ROIs not met", -1, 0.03),
    Measure("sdlogj", "rough field", 1, 0.03),
    Measure("fold_fraction", "folding", 1, 0.002),
    Measure("fold_fraction_rois", "folding at ROIs", 1, 0.005),
    Measure("jacobian_min", "strong compression", -1, 0.05),
    Measure("dice", "low Dice", -1, 0.03, labelled=True),
    Measure("gain", "little gained over affine", -1, 0.03, labelled=True),
    Measure("distance", "large TRE", 1, 0.25, ratio=True, labelled=True),
    Measure("hd95", "large HD95", 1, 0.25, ratio=True, labelled=True),
)
SUBJECT_MEASURES = (
    Measure("rois", "few ROIs", -1, 0.25, ratio=True),
    Measure("roi_quality", "poor ROIs", -1, 0.05),
    *(m for m in PAIR_MEASURES if m.column not in ("roi_dice_min", "fold_fraction_rois", "gain", "hd95")),
)


@dataclass(frozen=True)
class Quality:
    """Scores of the rows of a table.

    Attributes:
        check, accuracy: float64 [n], without and with labels; NaN where unknown.
        reasons: the largest z of each row that has any to speak of, in words.
    """

    check: Values
    accuracy: Values
    reasons: list[str]

    @property
    def score(self) -> Values:
        """The larger of the two, NaN where both are unknown."""
        return np.fmax(self.check, self.accuracy)


def assess(columns: Mapping[str, Values], measures: Sequence[Measure]) -> Quality:
    """Score every row; measures without a column are left out."""
    used = [measure for measure in measures if measure.column in columns]
    z = np.stack([quality.badness(_oriented(columns[m.column], m), m.floor) for m in used])
    labelled = np.array([measure.labelled for measure in used])
    reasons = _reasons(z, [measure.title for measure in used])
    return Quality(quality.combine(z[~labelled]), quality.combine(z[labelled]), reasons)


def alarms(flags: Sequence[str], folded: Values, dice_before: Values, dice: Values) -> list[str]:
    """What is wrong with a pair whatever the others are like, in words; "" where nothing is."""
    found = []
    for flag, fold, lost in zip(flags, folded > FOLDED, dice < dice_before - LOST, strict=True):
        named = [_ALARMS[word] for word in flag.split() if word in _ALARMS]
        named += ["Dice fell"] * bool(lost) + ["folds"] * bool(fold)
        found.append(", ".join(named))
    return found


def _oriented(values: Values, measure: Measure) -> Values:
    """Larger is worse; the logarithm of a ratio, whose zeros count as the smallest value there is."""
    if measure.ratio:
        positive = values[values > 0]
        values = np.log(np.maximum(values, positive.min() if len(positive) else 1.0))
    return measure.sign * values


def _reasons(z: Values, titles: Sequence[str]) -> list[str]:
    known = np.nan_to_num(z, nan=0.0)
    order = np.argsort(-known, axis=0, kind="stable")[: quality.WORST]
    worst = np.take_along_axis(known, order, axis=0)
    texts = [""] * z.shape[1]
    for row in np.flatnonzero((worst > _REASONS_FROM).any(axis=0)):
        named = zip(order[:, row], worst[:, row], strict=True)
        texts[row] = ", ".join(f"{titles[i]} +{min(x, 99):.0f}" for i, x in named if x > _REASONS_FROM)
    return texts
