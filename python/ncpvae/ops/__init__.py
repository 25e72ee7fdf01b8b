"""The package's four ops, as `ncpvae.ops.<name>` and `torch.ops.ncpvae.<name>`.

Each has one name everywhere: `<name>.py` here for its contract, `reference.py` for its plain-torch kernel,
`csrc/<name>.h`, `csrc/cpu/<name>.cpp` and `csrc/cuda/<name>.cu` for its native ones. All are pure functions;
randomness enters as a `seed` tensor from `draw_seed`.
"""

from . import _library, reference
from .gaussian_logsumexp import gaussian_logsumexp
from .langevin_step import langevin_step, langevin_step_
from .seed import draw_seed
from .similarity_logsumexp import similarity_logsumexp
from .sir_resample import SIRState, sir_merge, sir_resample, sir_state, sir_update

_library.load_native()

__all__ = [
    "SIRState",
    "draw_seed",
    "gaussian_logsumexp",
    "langevin_step",
    "langevin_step_",
    "reference",
    "similarity_logsumexp",
    "sir_merge",
    "sir_resample",
    "sir_state",
    "sir_update",
]
