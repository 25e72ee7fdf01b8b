"""Test images, what each run's decoder makes of their codes, and samples by its noise contrastive prior, side by side.

    python benchmarks/critics_pictures.py docs/pictures/critics-omniglot.png runs/omniglot-pixelcnn/none-0 …

Of a decoder that ignores z the copies are other images altogether.
"""

import sys
from pathlib import Path

from ncpvae import plots
from ncpvae.runs import open_run
from ncpvae.runs.sampling import decoded, reconstructions_of
from ncpvae.samplers import SIR
from ncpvae.sharding import sample_sharded

IMAGES = 36
NAMES = {"none": "plain VAE"}


def main(target: Path, folders: list[Path]) -> None:
    panels = []
    for folder in folders:
        run = open_run(folder, "cpu")
        vae, kind = run.vae(), run.recipe.critic.kind
        name = NAMES.get(kind, f"{kind} critic")
        originals, copies = reconstructions_of(run, vae, run.dataset.splits.test[:IMAGES])
        z = sample_sharded(run.prior()(), IMAGES, SIR(run.recipe.evaluation.sir_proposals), run.recipe.seed).z
        panels += [("test images", originals)] if not panels else []
        panels += [(f"{name}: from their codes", copies)]
        panels += [(f"{name}: samples with NCP", decoded(run, vae, z, run.recipe.seed))]
    plots.save_images(target, panels)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: critics_pictures.py PICTURE.png RUN …")
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
