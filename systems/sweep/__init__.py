"""Sweeps: a grid or a list of runs, one table of what came of them, and pictures side by side.

    SWEEP.yaml ─ plan.py ─> runs ─ conduct.py ─> processes (launchers.py) ─> folders on disk
                                        └─ standing.py reads those folders ─> table.py, strips.py

A sweep keeps no state of its own: what is left to do follows from the folders of its runs, so that a sweep
that was stopped in any way goes on when the same command is given again.
"""

from systems.sweep.conduct import run_sweep

__all__ = ["run_sweep"]
