"""Every Triton launch of a training step meets Triton's compiler for a real GPU, with its very arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_triton import needs_triton

KERNELS = (
    *("_march_kernel", "_visible_kernel", "sdf_kernel", "forward_kernel", "backward_kernel"),
    *("table_gradient_kernel", "_weights_kernel", "_weights_backward_kernel", "_accumulate_kernel"),
    *("_accumulate_backward_kernel", "_update_kernel"),
)
SIZES_OF_A_GPU = (
    "model.sdf={hidden_width: 64, feature_width: 15, hash_grid: {num_levels: 16, log2_table_size: 14}}",
    "model.radiance.hidden_width=64",
)
OUTSIDE = ("dataset.apply_mask=false", "system.loss.mask=0", "model.background.enabled=true")
VOLSDF = ("model.density=volsdf",)
HALF = ("model.sdf.hash_grid.table_dtype=float16", "trainer.optimizer.skip_untouched=true")


@needs_triton
@pytest.mark.parametrize(
    ("capability", "overrides", "more"),
    [(80, SIZES_OF_A_GPU, ()), (90, (*SIZES_OF_A_GPU, *OUTSIDE, *HALF, *VOLSDF), ("interpolate_kernel",))],
    ids=["Ampere", "Hopper, background, half table, VolSDF"],
)
def test_launches_of_a_step_compile(
    capability: int, overrides: tuple[str, ...], more: tuple[str, ...]
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("launches.py")
    done = subprocess.run(
        [sys.executable, str(program), str(capability), *overrides],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kernel in (*KERNELS, *more):
        assert f"'{kernel}'" in done.stdout, (kernel, done.stdout)
