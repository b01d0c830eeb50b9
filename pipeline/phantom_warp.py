"""The known deformation of a phantom subject: an affine of a diffeomorphic flow (see pipeline/phantom.py).

    phi(q) = A · exp(v)(q),    exp(v)(q) = x(1),  dx/dt = v(x),  x(0) = q,

with v a sum of Gaussian bumps, so that phi and its inverse can be evaluated anywhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.geometry import Geometry

Array = npt.NDArray[np.float64]
Triple = tuple[float, float, float]

_STEPS = 4  # of the Runge-Kutta integration of the flow


@dataclass(frozen=True)
class Variation:
    """How much the subjects differ. Values are standard deviations unless said otherwise.

    Attributes:
        rotation_deg: about the slice axis.
        scale: relative size along each axis.
        translation_mm: in-plane; a third of it through-plane.
        warp_mm: largest displacement of the smooth warp in the body.
        noise: Gaussian noise, part of the full intensity range (255).
        bias: largest relative intensity error of the bias field.
    """

    rotation_deg: float = 4.0
    scale: float = 0.05
    translation_mm: float = 4.0
    warp_mm: float = 5.0
    noise: float = 0.015
    bias: float = 0.12


@dataclass(frozen=True)
class SubjectWarp:
    """Map from subject to template positions.

    Attributes:
        affine: 4x4 rows, template position of the flowed subject position.
        centers: [K][3] mm, of the bumps of the velocity.
        amplitudes: [K][3] mm, their velocity at the centre.
        widths_mm: (z, y, x) standard deviations of every bump.
    """

    affine: tuple[tuple[float, ...], ...]
    centers: tuple[Triple, ...]
    amplitudes: tuple[Triple, ...]
    widths_mm: Triple

    def to_template(self, points: Array) -> Array:
        """Template positions [..., 3] mm of subject positions [..., 3] mm."""
        return _apply(np.asarray(self.affine), self._flow(points, 1.0))

    def from_template(self, points: Array) -> Array:
        """Inverse of to_template."""
        return self._flow(_apply(self._inverse, points), -1.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe record."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> SubjectWarp:
        """Inverse of to_dict, also after a trip through JSON."""
        nested = {name: tuple(map(tuple, record[name])) for name in ("affine", "centers", "amplitudes")}
        return cls(**nested, widths_mm=tuple(record["widths_mm"]))

    @cached_property
    def _inverse(self) -> Array:
        return np.linalg.inv(np.asarray(self.affine))

    def _velocity(self, points: Array) -> Array:
        velocity = np.zeros_like(points)
        widths = np.asarray(self.widths_mm)
        for center, amplitude in zip(self.centers, self.amplitudes, strict=True):
            distance = ((points - center) / widths) ** 2
            velocity += np.exp(-0.5 * distance.sum(axis=-1, keepdims=True)) * amplitude
        return velocity

    def _flow(self, points: Array, time: float) -> Array:
        """Positions after following the velocity for `time`, by the classical Runge-Kutta method."""
        step = time / _STEPS
        for _ in range(_STEPS):
            k1 = self._velocity(points)
            k2 = self._velocity(points + 0.5 * step * k1)
            k3 = self._velocity(points + 0.5 * step * k2)
            k4 = self._velocity(points + step * k3)
            points = points + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return points


def draw_warp(geometry: Geometry, variation: Variation, generator: np.random.Generator, bumps: int = 6) -> SubjectWarp:
    """A random subject. In 2D nothing moves through the plane."""
    half = half_extent(geometry)
    planar = np.array([0.0 if geometry.shape[0] == 1 else 1.0, 1.0, 1.0])
    angle = np.deg2rad(variation.rotation_deg) * generator.standard_normal()
    linear = np.eye(3)
    linear[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    linear = linear @ np.diag(1 + variation.scale * planar * generator.standard_normal(3).clip(-2, 2))
    shift = variation.translation_mm * planar * [1 / 3, 1, 1] * generator.standard_normal(3).clip(-2, 2)
    center = geometry.center_mm()
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, center - linear @ center + shift
    centers = center + 0.7 * half * planar * generator.uniform(-1, 1, (bumps, 3))
    amplitudes = generator.standard_normal((bumps, 3)) * planar * [0.5, 1, 1]
    unscaled = SubjectWarp(_rows(affine), _rows(centers), _rows(amplitudes), _triple(0.4 * half + 1e-6))
    fastest = np.linalg.norm(unscaled._velocity(centers), axis=-1).max()
    scaled = _rows(amplitudes * (variation.warp_mm / fastest))
    return SubjectWarp(unscaled.affine, unscaled.centers, scaled, unscaled.widths_mm)


def half_extent(geometry: Geometry) -> Array:
    """Half the field of view, mm (z, y, x)."""
    half: Array = np.asarray(geometry.shape) / 2 * np.asarray(geometry.spacing_mm)
    return half


def _apply(matrix: Array, points: Array) -> Array:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _rows(matrix: Array) -> tuple[Any, ...]:
    return tuple(tuple(float(v) for v in row) for row in matrix)


def _triple(values: Array) -> Triple:
    return (float(values[0]), float(values[1]), float(values[2]))
