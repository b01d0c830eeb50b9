"""Everything mode beside segment_anything.SamAutomaticMaskGenerator: one process, same weights, same masks.

    python benchmarks/everything_mode.py --variant slimsam_77 --threads 1
    python benchmarks/everything_mode.py --variant slimsam_77 --actors 2
    python benchmarks/everything_mode.py --variant sam_vit_b --device cuda --slices 8 --precision bf16

Weights are random (no trained ones are needed to time arithmetic): the goldens' recipe if it is at
../shared/goldens, else seeded. Thresholds are set so that `--pass-share` of the masks pass the predicted IoU
and half of those the stability; box suppression is off, because noise boxes all cover the image. Random masks
are noise, on which the official run-length encoding is unrealistically slow: see ratio_without_rle. Fast mode has
fewer points, so it is also set beside the official generator on its own grid, where the masks are comparable.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator, automatic_mask_generator
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from actors.everything import CPU_PASS, CUDA_PASS, segment_everything, stability_score
from actors.preprocess import prepare
from actors.sam_config import FAST_POINTS_PER_SIDE, FAST_PREFILTER_SLACK, FAST_SKIP_BACKGROUND, EverythingConfig
from actors.sam_model import SamModel, build_from_state_dict

SIZES = {
    "slimsam_77": (168, 12, 12, 696, (2, 5, 8, 11)),
    "slimsam_50": (384, 12, 12, 1536, (2, 5, 8, 11)),
    "sam_vit_b": (768, 12, 12, 3072, (2, 5, 8, 11)),
    "sam_vit_l": (1024, 24, 16, 4096, (5, 11, 17, 23)),
    "sam_vit_h": (1280, 32, 16, 5120, (7, 15, 23, 31)),
}
RECIPE = Path(__file__).resolve().parents[1] / ".." / "shared" / "goldens" / "recipe.py"
Seconds = dict[str, float]


def official_model(variant: str) -> Sam:
    """segment-anything's own model with random weights."""
    dim, depth, heads, mlp, global_blocks = SIZES[variant]
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    encoder = ImageEncoderViT(
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp / dim,
        norm_layer=norm,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=global_blocks,
    )
    prompts = PromptEncoder(256, (64, 64), (1024, 1024), 16)
    decoder = MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(2, 256, 8, 2048))
    model = Sam(encoder, prompts, decoder, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    if RECIPE.is_file():
        spec = importlib.util.spec_from_file_location("golden_recipe", RECIPE)
        assert spec is not None
        assert spec.loader is not None
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        model.load_state_dict(recipe.make_state_dict(model))
    else:
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def test_slices(count: int, height: int, width: int) -> np.ndarray:
    """Dark slices with bright ellipses and noise, uint8 [count, height, width, 3]."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    slices = generator.normal(12, 4, (count, height, width))
    for image in slices:
        inside = ((y - height / 2) / (0.42 * height)) ** 2 + ((x - width / 2) / (0.36 * width)) ** 2 < 1
        image[inside] += 70
        for _ in range(8):
            at, radius = generator.random(2) * 0.5 + 0.25, generator.random(2) * 0.1 + 0.03
            image[((y / height - at[0]) / radius[0]) ** 2 + ((x / width - at[1]) / radius[1]) ** 2 < 1] += 50
    return np.repeat(slices.clip(0, 255).astype(np.uint8)[..., None], 3, axis=3)


class Stopwatch:
    """Wall seconds per stage, of nested calls wrapped with `timed`."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: Seconds = defaultdict(float)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, processor = self.now(), time.process_time()
        yield
        self.seconds[name] += self.now() - start
        if name == "total":
            self.seconds["processor"] = time.process_time() - processor

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return run


def run_official(model: Sam, slices: np.ndarray, config: EverythingConfig, device: str) -> tuple[Seconds, list[Any]]:
    """Seconds per stage and masks of the official generator."""
    watch = Stopwatch(device)
    generator = SamAutomaticMaskGenerator(
        model,
        points_per_side=config.points_per_side,
        pred_iou_thresh=config.pred_iou_threshold,
        stability_score_thresh=config.stability_threshold,
        box_nms_thresh=config.box_nms,
    )
    originals = automatic_mask_generator.mask_to_rle_pytorch, automatic_mask_generator.rle_to_mask
    set_image = generator.predictor.set_image
    automatic_mask_generator.mask_to_rle_pytorch = watch.timed("rle", originals[0])
    automatic_mask_generator.rle_to_mask = watch.timed("rle", originals[1])
    generator.predictor.set_image = watch.timed("encode", set_image)
    try:
        with watch.stage("total"):
            found = [generator.generate(image) for image in slices]
    finally:
        automatic_mask_generator.mask_to_rle_pytorch, automatic_mask_generator.rle_to_mask = originals
    return watch.seconds, found


def run_ours(
    model: SamModel, slices: np.ndarray, config: EverythingConfig, device: str, precision: str
) -> tuple[Seconds, list[Any]]:
    """Seconds per stage and candidates of this project's everything mode."""
    watch = Stopwatch(device)
    decoder = model.prompt_decoder()
    decoder.decode = watch.timed("decode", decoder.decode)  # type: ignore[method-assign]
    decoder.logits = watch.timed("upscale", decoder.logits)  # type: ignore[method-assign]
    half = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
    with torch.inference_mode(), half, watch.stage("total"):
        with watch.stage("encode"):
            pixels, geometry = prepare(slices, model.model_size, "sam")
            embedding, early = model.encode(pixels.to(device))
        context = decoder.context(embedding, early)
        size = CUDA_PASS if device == "cuda" else CPU_PASS
        found = segment_everything(decoder, context, slices, geometry, config, size)
    return watch.seconds, found


def calibrate(model: SamModel, image: np.ndarray, points_per_side: int, pass_share: float) -> EverythingConfig:
    """Thresholds that `pass_share` of the masks pass by predicted IoU, and half of those by stability."""
    decoder = model.prompt_decoder()
    generator = np.random.default_rng(1)
    with torch.inference_mode():
        pixels, geometry = prepare(image[None], model.model_size, "sam")
        context = decoder.context(*model.encode(pixels.to(model.device)))
        xy = torch.from_numpy(generator.random((48, 1, 2)) * (geometry.input_width, geometry.input_height))
        labels = torch.ones(len(xy), 1, device=model.device)
        decoded = decoder.decode(context, [0] * len(xy), decoder.embed_points(xy.to(model.device), labels))
        quality, token = decoder.choose(decoded.iou, multimask=True)
        threshold = float(torch.quantile(quality.flatten(), 1 - pass_share))
        rows, columns = (quality > threshold).nonzero(as_tuple=True)
        logits = decoder.logits(context, decoded, rows, token[rows, columns])
        maps = geometry.mask_maps(logits.shape[-1], model.device)
        stability = stability_score(maps[0] @ logits @ maps[1].T, 1.0).nan_to_num()
    return EverythingConfig(points_per_side, threshold, max(float(stability.median()), 1e-6), box_nms=1.0)


def shared_masks(official: list[Any], ours: list[Any]) -> dict[str, float]:
    """How many of the official masks we have with an IoU of at least 0.999, over all slices."""
    counts = {"official": 0, "ours": 0, "shared": 0}
    for theirs, mine in zip(official, ours, strict=True):
        masks = np.array([mask["segmentation"] for mask in theirs], dtype=np.float32).reshape(len(theirs), -1)
        own = mine.masks.reshape(len(mine.masks), -1).astype(np.float32)
        inner = masks @ own.T
        union = masks.sum(1)[:, None] + own.sum(1) - inner
        counts["official"] += len(masks)
        counts["ours"] += len(own)
        counts["shared"] += int(((inner / np.maximum(union, 1)).max(axis=1, initial=0) >= 0.999).sum())
    return {key: float(value) for key, value in counts.items()}


def compare(seconds: Seconds, masks: list[Any], own_seconds: Seconds, own: list[Any]) -> dict[str, Any]:
    """How many times faster we are than an official run, and which of its masks we have.

    On a machine that others use too, the ratio of processor seconds is the one to trust.
    """
    return {
        "ratio": round(seconds["total"] / own_seconds["total"], 2),
        "ratio_of_processor_seconds": round(seconds["processor"] / own_seconds["processor"], 2),
        "ratio_without_rle": round((seconds["total"] - seconds["rle"]) / own_seconds["total"], 2),
        "masks": shared_masks(masks, own),
    }


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=SIZES, default="slimsam_77")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of our side only")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pass-share", type=float, default=0.2)
    parser.add_argument("--skip-official", action="store_true")
    parser.add_argument("--actors", type=int, default=1, help="only time this many one-thread processes of exact mode")
    return parser.parse_args()


def time_actors(options: argparse.Namespace) -> dict[str, float]:
    """Slices per second of one process, and of `options.actors` side by side, one thread each.

    `ratio_of_processor_seconds` is what the ratio would be if nothing else took the cores.
    """
    context = multiprocessing.get_context("spawn")
    rates, rates_by_cpu = {}, {}
    for count in (1, options.actors):
        ready, seconds = context.Barrier(count), context.Queue()
        arguments = (options.variant, tuple(options.size), options.points_per_side, ready, seconds)
        actors = [context.Process(target=_run_actor, args=arguments) for _ in range(count)]
        for actor in actors:
            actor.start()
        wall, cpu = zip(*(seconds.get() for _ in actors), strict=True)
        rates[count], rates_by_cpu[count] = count / max(wall), count / max(cpu)
        for actor in actors:
            actor.join()
    (one, many), (one_by_cpu, many_by_cpu) = rates.values(), rates_by_cpu.values()
    return {
        "one": round(one, 4),
        f"{options.actors}": round(many, 4),
        "ratio": round(many / one, 2),
        "ratio_of_processor_seconds": round(many_by_cpu / one_by_cpu, 2),
        "load_average": os.getloadavg()[0],
    }


def _run_actor(variant: str, size: tuple[int, int], points_per_side: int, ready: Any, seconds: Any) -> None:
    """Build the model, wait for the others, time one slice."""
    torch.set_num_threads(1)
    model = build_from_state_dict(official_model(variant).state_dict(), variant)
    config = EverythingConfig(points_per_side, 0.5, 1e-4, box_nms=1.0)
    ready.wait()
    start = time.process_time()
    wall = run_ours(model, test_slices(1, *size), config, "cpu", "fp32")[0]["total"]
    seconds.put((wall, time.process_time() - start))


def main() -> None:
    """Print one JSON report."""
    options = parse_options()
    report: dict[str, Any] = {**vars(options), "torch": torch.__version__}
    load_before = os.getloadavg()[0]
    if options.actors > 1:
        print(json.dumps({**report, **time_actors(options)}, indent=1))
        return
    torch.set_num_threads(options.threads)
    slices = test_slices(options.slices, *options.size)
    official = official_model(options.variant)
    weights = {key: value.clone() for key, value in official.state_dict().items()}
    ours = build_from_state_dict(weights, options.variant).to(options.device)
    exact = calibrate(ours, slices[0], options.points_per_side, options.pass_share)
    fast = replace(
        exact,
        points_per_side=max(1, exact.points_per_side * FAST_POINTS_PER_SIDE // 32),
        skip_background=FAST_SKIP_BACKGROUND,
        prefilter_slack=FAST_PREFILTER_SLACK,
    )
    report["thresholds"] = vars(exact)
    found = {}
    for name, config in (("exact", exact), ("fast", fast)):
        seconds, found[name] = run_ours(ours, slices, config, options.device, options.precision)
        report[name] = {key: round(value, 3) for key, value in seconds.items()}
        report[name]["slices_per_second"] = round(options.slices / seconds["total"], 3)
    report["our_peak_rss_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    if options.device == "cuda":
        report["our_peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    if not options.skip_official:
        same_grid = replace(exact, points_per_side=fast.points_per_side)
        official.to(options.device)
        for label, config, names in (
            ("official", exact, ("exact", "fast")),
            ("official_fast_grid", same_grid, ("fast",)),
        ):
            seconds, masks = run_official(official, slices, config, options.device)
            report[label] = {key: round(value, 3) for key, value in seconds.items()}
            for name in names:
                report[name][f"beside_{label}"] = compare(seconds, masks, report[name], found[name])
    report["load_average"] = [load_before, os.getloadavg()[0]]
    print(json.dumps(report, indent=1, default=str))


if __name__ == "__main__":
    main()
