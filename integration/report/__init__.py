"""Seeing runs: tables, figures, and one HTML page of everything (`python -m integration.report runs/A runs/B`)."""

from .figures import entropy_and_accuracy, plot, style, sweep_of_k, training_dynamics
from .runs import Run, read
from .tables import format_table, summary, table

__all__ = [
    "Run", "entropy_and_accuracy", "format_table", "plot", "read", "style", "summary", "sweep_of_k", "table",
    "training_dynamics",
]  # fmt: skip
