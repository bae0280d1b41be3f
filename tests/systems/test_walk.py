"""The walk of one training step through the rooms: which of the project's files it enters."""

import sys
from pathlib import Path
from types import FrameType

from tiny import new_trainer

ROOT = Path(__file__).resolve().parents[2]
WALK = [
    *("systems/trainer.py", "systems/neus.py", "systems/system.py", "systems/schedules.py"),
    *("systems/step.py", "process_data/batches.py", "process_data/cameras.py", "utils/types.py"),
    *("models/neus.py", "models/bounded.py", "models/marching/__init__.py", "models/marching/cpu.py"),
    *("models/marching/packing.py", "models/opacity.py", "models/appearance.py"),
    *("models/fields.py", "models/sdf_network/__init__.py", "models/sdf_network/cpu.py"),
    *("encoder/hashgrid/__init__.py", "encoder/hashgrid/autograd.py"),
    *("encoder/hashgrid/geometry.py", "encoder/hashgrid/cpu.py"),
    *("encoder/spherical.py", "models/mlp/__init__.py", "models/mlp/reference.py", "utils/padding.py"),
    *("models/compositing/__init__.py", "models/compositing/cpu.py"),
    *("systems/losses.py", "systems/bad_steps.py", "systems/ray_budget.py"),
    *("models/occupancy.py", "models/chunks.py"),
]
"""In the order in which a step enters them first."""


def test_a_warm_step_enters_these_files_and_no_others(tmp_path: Path) -> None:
    training = new_trainer(tmp_path)
    training.train_step()
    # A step that updates the occupancy grid, too.
    training.step = training.config.occupancy_every
    rooms = {str(ROOT / room): room for room in ("encoder", "models", "process_data", "systems", "utils")}
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(tuple(rooms)):
            entered.add(str(Path(path).relative_to(ROOT)))

    sys.setprofile(note)
    try:
        training.train_step()
    finally:
        sys.setprofile(None)
    assert sorted(entered) == sorted(WALK)
