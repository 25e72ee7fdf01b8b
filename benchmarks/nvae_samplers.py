"""Samplers of a hierarchical noise contrastive prior against each other: the trend of NCP-VAE's Table 6.

    python benchmarks/nvae_samplers.py RUN --features FOLDER --output benchmarks/results/nvae-samplers.json

For the base, for SIR by its number of proposals and for Langevin dynamics by its number of steps: the Fréchet distance
in the features of a classifier (`ncpvae train-features`), density and coverage of samples against test images, seconds
for a sample, and the peak memory of one walk. All draw with the same seed; samples are the decoder's means.
"""

import argparse
import json
import math
import multiprocessing
import os
from pathlib import Path

import torch

from ncpvae import metrics
from ncpvae.bench.machine import description
from ncpvae.bench.memory import ENVIRONMENT, peak_bytes
from ncpvae.metrics import FeatureClassifier
from ncpvae.runs import hierarchical, open_run
from ncpvae.samplers import SIR, Langevin, Sampler

WALKS = 100  # samples of one walk


def main() -> None:
    parser = argparse.ArgumentParser(description="Samplers of a hierarchical noise contrastive prior, compared.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--features", type=Path, required=True, help="folder of a classifier by train-features")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--proposals", type=int, nargs="*", default=[5, 50, 500, 5000])
    parser.add_argument("--steps", type=int, nargs="*", default=[5, 50, 500, 1000])
    parser.add_argument("--step-size", type=float, default=1e-2, help="of Langevin dynamics, in squared units of ε")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    samplers: dict[str, Sampler | None] = {"base": None}
    samplers |= {f"SIR, {m:,} proposals": SIR(m) for m in args.proposals}
    samplers |= {f"Langevin, {t:,} steps": Langevin(t, args.step_size, "epsilon") for t in args.steps}
    rows = measured(args, samplers)
    os.environ |= ENVIRONMENT  # of the process that measures memory, where no other sampler has been
    for row, sampler in zip(rows, samplers.values(), strict=True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row["peak_bytes"] = pool.apply(peak, (args.run, sampler))
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("output", "run")}
    record = {"run": args.run.name, "settings": settings, "walks": WALKS, "rows": rows}
    device = open_run(args.run).device
    args.output.write_text(json.dumps(record | {"machine": description(device)}, indent=1, ensure_ascii=False) + "\n")


def peak(folder: Path, sampler: Sampler | None) -> int | None:
    """Bytes that a walk of `WALKS` samples adds at its peak."""
    run = open_run(folder)
    model = run.nvae() if sampler is None else run.hierarchical_prior()
    return peak_bytes(lambda: hierarchical.draw(run, model, WALKS, sampler, walks=WALKS), run.device)


def measured(args: argparse.Namespace, samplers: dict[str, Sampler | None]) -> list[dict[str, object]]:
    run = open_run(args.run)
    prior, extractor = run.hierarchical_prior(), FeatureClassifier.from_pretrained(args.features).to(run.device)

    def space(x: torch.Tensor) -> metrics.Features:
        return metrics.extract_features(x, extractor, device=run.device)

    test = run.dataset.splits.test.float() / (run.dataset.levels or 1)
    real, some = space(test), space(test[: args.samples])
    rows: list[dict[str, object]] = []
    for name, sampler in samplers.items():
        model = prior.vae if sampler is None else prior
        draws = hierarchical.draw(run, model, args.samples, sampler, seed=args.seed, walks=WALKS)
        found = space(draws.x)
        near = metrics.density_coverage(some, found, device=run.device)
        rows.append(
            {
                "sampler": name,
                "frechet": metrics.frechet_distance(real, found).value,
                "density": near.density,
                "coverage": near.coverage,
                "ess": [None if math.isnan(value) else value for value in draws.ess.mean(0).tolist()],
                "seconds_per_sample": draws.seconds / args.samples,
            }
        )
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    return rows


if __name__ == "__main__":
    main()
