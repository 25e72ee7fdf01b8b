"""Pictures of a hierarchical run: the paper's Figure 4, and samples of both priors with their nearest training images.

    python benchmarks/nvae_pictures.py RUN docs/pictures/nvae-groups.png docs/pictures/nvae-samples.png

Prints the correlation of classification loss and effective sample size over the groups. The run has been evaluated.
"""

import sys
from pathlib import Path

from ncpvae import plots
from ncpvae.report.groups import correlation
from ncpvae.runs import hierarchical, open_run
from ncpvae.runs.evaluation import read_evaluation, read_groups
from ncpvae.runs.sampling import nearest_training
from ncpvae.samplers import SIR

IMAGES = 36


def main(folder: Path, groups_picture: Path, samples_picture: Path) -> None:
    run = open_run(folder, "cpu")
    groups, record = read_groups(run), read_evaluation(run)
    if record is None:
        sys.exit(f"{folder} has not been evaluated: ncpvae evaluate {folder}")
    proposals = record["settings"]["evaluation"]["sir_proposals"]
    plots.save_groups(groups_picture, groups, proposals)
    _, losses, sizes = zip(*plots.paired(groups), strict=True)
    print(correlation(losses, sizes))
    prior, seed, panels = run.hierarchical_prior(), run.recipe.seed, []
    for temperature in (1.0, 0.7):
        base = hierarchical.draw(run, prior.vae, IMAGES, None, temperature, seed)
        ncp = hierarchical.draw(run, prior, IMAGES, SIR(proposals), temperature, seed)
        panels += [(f"base, t = {temperature:g}", base.x), (f"NCP, t = {temperature:g}", ncp.x)]
        if temperature == 1.0:
            panels.append(("nearest to the NCP's, t = 1", nearest_training(run, ncp.x)[1]))
    plots.save_images(samples_picture, panels)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: nvae_pictures.py RUN GROUPS.png SAMPLES.png")
    main(*map(Path, sys.argv[1:]))
