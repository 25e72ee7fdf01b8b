"""Training: stage one (`fit_vae`), stage two (`fit_ncp`), and the loop they share."""

from .checkpoint import CheckpointError
from .engine import TrainingDiverged, TrainResult
from .execution import Execution
from .interrupt import TrainingInterrupted
from .ncp import NCPResult, fit_ncp
from .vae import Aggressive, adamw, fit_vae

__all__ = [
    "Aggressive",
    "CheckpointError",
    "Execution",
    "NCPResult",
    "TrainResult",
    "TrainingDiverged",
    "TrainingInterrupted",
    "adamw",
    "fit_ncp",
    "fit_vae",
]
