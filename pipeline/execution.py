"""Where and how wide a study runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ExecutionConfig:
    """Where and how wide the study runs; nothing here changes a result.

    Attributes:
        executor: `ray`, `serial` (this process), or `auto`: this process first, Ray as soon as a stage has so much
            left that starting it pays, or at once where RAY_ADDRESS names a cluster or a GPU is of use. Choose
            `ray` where a backend may crash: only a process of its own keeps the study going.
        workers: worker processes; None takes every core this process (or the cluster) has.
        device: `cuda`, `cpu`, or `auto`: a GPU if there is one and the backend uses it.
        gpu_fraction: share of a GPU that one encoding worker takes (0.25: four workers on a GPU).
        encode_workers: encoding workers; None takes one per GPU share, or `workers` without a GPU. On a cluster that
            starts its GPU nodes on demand, say how many (and device: cuda).
        worker_gib: memory that Ray reserves for each worker, GiB; None reserves none, so that only the cores limit how
            many there are. `samreg plan` says what the largest subject takes.
        threads: numerical threads per worker.
        tile: subjects along each side of a tile of pairs, the unit of matching.
        keep: `features` keeps feature maps for later re-pooling; `prototypes` drops them once pooled.
        attempts: how often a unit may lose its worker before it is blamed.
    """

    executor: Literal["auto", "ray", "serial"] = "auto"
    workers: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpu_fraction: float = 1.0
    encode_workers: int | None = None
    worker_gib: float | None = None
    threads: int = 1
    tile: int = 16
    keep: Literal["features", "prototypes"] = "features"
    attempts: int = 3

    def __post_init__(self) -> None:
        for name in ("workers", "encode_workers", "threads", "tile", "attempts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"execution.{name} is {value}; it must be 1 or more")
        if self.worker_gib is not None and not self.worker_gib > 0:
            raise ValueError(f"execution.worker_gib is {self.worker_gib}; it must be above 0")
        if not 0 < self.gpu_fraction <= 1:
            raise ValueError(f"execution.gpu_fraction is {self.gpu_fraction}; it must be in (0, 1]")
