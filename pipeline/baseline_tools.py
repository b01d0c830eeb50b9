# mypy: disable-error-code="no-untyped-call"
"""Baselines of other programs, each through its own package or commands: ANTs SyN, elastix, NiftyReg."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 (its own documentation's name)

from pipeline.baseline_images import (
    NotRegisteredError,
    PairImages,
    Registered,
    affine_matrix,
    ddf_of_transform,
    ddf_of_vectors,
)

_SEED = 1
_SHOWN = 400  # characters of what a command said
_LIMIT_SECONDS = 4 * 3600.0
_DISPLACEMENT = "1006"  # NIfTI's intent code, whose vectors ITK turns from RAS to LPS by itself


def ants_syn(images: PairImages) -> Registered:
    """ANTs' default: affine, then SyN."""
    import ants

    fixed, moving = (_ants_image(image) for image in images.itk)
    with TemporaryDirectory() as folder:
        found = ants.registration(
            fixed=fixed, moving=moving, type_of_transform="SyN", outprefix=f"{folder}/", random_seed=_SEED
        )
        field, matrix = found["fwdtransforms"]
        linear = sitk.ReadTransform(matrix)
        curved = sitk.DisplacementFieldTransform(sitk.ReadImage(field, sitk.sitkVectorFloat64))
    whole = sitk.CompositeTransform([linear, curved])  # points go through the field first
    return Registered(ddf_of_transform(whole, images.itk[0]), affine_matrix(linear))


def elastix(images: PairImages) -> Registered:
    """elastix with its default parameter maps: affine, then B-splines."""
    import itk

    fixed, moving = (_itk_image(image) for image in images.itk)
    parameters = itk.ParameterObject.New()
    for name in ("affine", "bspline"):
        parameters.AddParameterMap(parameters.GetDefaultParameterMap(name))
    parameters.SetParameter("RandomSeed", str(_SEED))
    _, found = itk.elastix_registration_method(fixed, moving, parameter_object=parameters)
    with TemporaryDirectory() as folder:  # where transformix also writes the field, else into the working folder
        field = itk.transformix_deformation_field(moving, found, output_directory=folder)
        return Registered(ddf_of_vectors(itk.array_from_image(field)))


def niftyreg(images: PairImages) -> Registered:
    """`reg_aladin`, then `reg_f3d`, with their defaults."""
    with TemporaryDirectory() as folder:
        path = {name: Path(folder, f"{name}.nii.gz") for name in ("fixed", "moving", "warped", "control", "field")}
        matrix = Path(folder, "affine.txt")
        for name, image in zip(("fixed", "moving"), images.itk, strict=True):
            sitk.WriteImage(image, str(path[name]))
        pair: list[str | Path] = ["-ref", path["fixed"], "-flo", path["moving"], "-res", path["warped"]]
        _call(["reg_aladin", *pair, "-aff", matrix])
        _call(["reg_f3d", *pair, "-aff", matrix, "-cpp", path["control"]])
        _call(["reg_transform", "-ref", path["fixed"], "-disp", path["control"], path["field"]])
        vectors = _read_ras(path["field"], images.dimension)
    return Registered(ddf_of_vectors(vectors))


def _ants_image(image: sitk.Image) -> Any:
    import ants

    n = image.GetDimension()
    return ants.from_numpy(
        sitk.GetArrayFromImage(image).T,
        origin=image.GetOrigin(),
        spacing=image.GetSpacing(),
        direction=np.asarray(image.GetDirection()).reshape(n, n),
    )


def _itk_image(image: sitk.Image) -> Any:
    import itk

    n = image.GetDimension()
    found = itk.image_from_array(sitk.GetArrayFromImage(image))
    found.SetSpacing(image.GetSpacing())
    found.SetOrigin(image.GetOrigin())
    found.SetDirection(itk.matrix_from_array(np.asarray(image.GetDirection()).reshape(n, n)))
    return found


def _read_ras(path: Path, dimension: int) -> Any:
    """Displacements [..., dimension] as ITK's (x, y, z), of a file that holds them as NIfTI's."""
    image = sitk.ReadImage(str(path))
    vectors = np.squeeze(sitk.GetArrayFromImage(image))
    if image.GetNumberOfComponentsPerPixel() == 1:  # components along the fifth axis
        vectors = np.moveaxis(vectors, 0, -1)
    if vectors.shape[-1] not in (2, 3) or vectors.ndim != dimension + 1:
        raise NotRegisteredError(f"reg_transform wrote a field of the shape {vectors.shape}")
    turned = "intent_code" in image.GetMetaDataKeys() and image.GetMetaData("intent_code") == _DISPLACEMENT
    signs = np.ones(vectors.shape[-1]) if turned else np.array([-1.0, -1.0, 1.0])[: vectors.shape[-1]]
    return (vectors * signs)[..., :dimension]


def _call(command: Sequence[str | Path]) -> None:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise NotRegisteredError(f"{command[0]} took more than {_LIMIT_SECONDS:g} s and was stopped") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-_SHOWN:]
        raise NotRegisteredError(f"{command[0]} ended with {done.returncode}: {said}")
