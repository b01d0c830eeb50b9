"""Settings of the evaluation, apart from `pipeline.algorithms.pseudo_rois` so that reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the evaluation.

    Attributes:
        pseudo_folds: folds of the pseudo-ROI evaluation (Table 2), each of which fits again without its ROIs; 0 does
            none, a number above that of the matched ROIs leaves one out at a time.
    """

    pseudo_folds: int = 0

    def __post_init__(self) -> None:
        if self.pseudo_folds < 0 or self.pseudo_folds == 1:
            raise ValueError(f"evaluate.pseudo_folds is {self.pseudo_folds}; expected 0, or 2 or more")
