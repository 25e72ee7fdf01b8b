"""`ncpvae bench sir_update`, with the same flags; the cases live in the package."""

import sys

from ncpvae.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "sir_update", *sys.argv[1:]]))
