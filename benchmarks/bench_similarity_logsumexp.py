"""`ncpvae bench similarity_logsumexp`, with the same flags; the cases live in the package."""

import sys

from ncpvae.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "similarity_logsumexp", *sys.argv[1:]]))
