"""A run as a folder, and what can be done with one: train, fit a prior, sample, evaluate, report."""

from .folder import Run, open_run

__all__ = ["Run", "open_run"]
