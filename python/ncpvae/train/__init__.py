"""Training: stage one (`fit_vae`), stage two (`fit_ncp`), and the loop they share."""

from .checkpoint import CheckpointError
from .divergence import TrainingDiverged
from .engine import TrainResult
from .execution import Execution
from .hierarchical import HierarchicalNCPResult, fit_hierarchical_ncp
from .hierarchical_vae import WarmupCosine, adamax, fit_hierarchical_vae
from .interrupt import TrainingInterrupted
from .ncp import NCPResult, fit_ncp
from .vae import Aggressive, adamw, fit_vae

__all__ = [
    "Aggressive",
    "CheckpointError",
    "Execution",
    "HierarchicalNCPResult",
    "NCPResult",
    "TrainResult",
    "TrainingDiverged",
    "TrainingInterrupted",
    "WarmupCosine",
    "adamax",
    "adamw",
    "fit_hierarchical_ncp",
    "fit_hierarchical_vae",
    "fit_ncp",
    "fit_vae",
]
