"""Training: stage one (`fit_vae`), stage two (`fit_ncp`), and the loop they share."""

from .engine import TrainingDiverged, TrainResult
from .ncp import NCPResult, fit_ncp
from .vae import fit_vae

__all__ = ["NCPResult", "TrainResult", "TrainingDiverged", "fit_ncp", "fit_vae"]
