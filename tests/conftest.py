"""What every test starts from: one quiet thread, fixed seeds, and real captures where there are some."""

import os
from pathlib import Path

# Spinning OpenMP threads slow each other down on a busy machine. libgomp reads this when PyTorch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Without a GPU Triton kernels run in its interpreter; Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from utils.backend import seed_everything

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_and_fixed_seeds() -> None:
    # Again for each test: run.main, which some call, takes all cores, and sums then round otherwise.
    torch.set_num_threads(1)
    seed_everything(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real captures: $SURFACE_DATA, or ``shared/data`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SURFACE_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real captures in {folder}; set SURFACE_DATA to their folder")
    return folder
