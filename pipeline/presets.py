"""Named sets of overrides that a configuration can start from (`preset: paper`)."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The defaults: what measured best with the weight-free backend.
    "recommended": {},
    # Section 4.2: SAM, areas stated for 200 x 200 slices, the window of Algorithm 1, similarity alone. Predicted IoU
    # and stability are the segmenter's: 0.90 and 0.90, but 0.88 and 0.80 for MedSAM.
    "paper": {
        "segmenter": {"name": "sam_vit_h"},
        "rois": {
            "min_area": 200,
            "max_area": 7000,
            "area_unit": "ref200",
            "max_overlap": 0.8,
        },
        "prototypes": {"context": 0.0, "surround": 0.0, "area": 0.0, "shape": 0.0},
        "match": {
            "epsilon": 0.8,
            "scope": "window",
            "slice_range": 11,
            "slice_unit": "slices",
            "spatial": {"enabled": False},
        },
    },
    # What the authors' public demonstration does, which differs from the paper and handles single slices. With
    # sam_vit_b, sam_vit_l and slimsam it keeps masks from a predicted IoU of 0.88 (segmenter.pred_iou_threshold), and
    # it feeds MedSAM as SAM (segmenter.preprocess: sam).
    "official-demo": {
        "segmenter": {"name": "sam_vit_h"},
        "rois": {
            "min_area": 200,
            "max_area": 7000,
            "area_unit": "ref200",
            "max_overlap": 0.9,
        },
        "prototypes": {"context": 0.0, "surround": 0.0, "area": 0.0, "shape": 0.0},
        "match": {
            "epsilon": 0.8,
            "scope": "volume",
            "slice_range": 0,
            "slice_unit": "slices",
            "spatial": {"enabled": False},
        },
    },
}
