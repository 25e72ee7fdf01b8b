"""`python -m ncpvae`."""

import sys

from .cli import main

sys.exit(main())
