"""`ncpvae bench langevin_step`, with the same flags; the cases live in the package."""

import sys

from ncpvae.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "langevin_step", *sys.argv[1:]]))
