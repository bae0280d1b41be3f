"""The quality that the README claims: trains, tests and reports wall time, peak memory and held-out metrics.

python benchmarks/quality.py demo
python benchmarks/quality.py dtu-wmask --data DIR/dtu_scan65
python benchmarks/quality.py dtu --data DIR/dtu_scan65
python benchmarks/quality.py lego --data DIR/nerf_synthetic/lego
python benchmarks/quality.py alexander --data DIR/alexander
python benchmarks/quality.py fox --data DIR/fox
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine

DTU = ["dataset.holdout=8", "dataset.img_downscale=2"]
QUARTER_HOUR = ["trainer.max_minutes=15", "trainer.max_steps=100000", "test.video=false"]
COMMANDS = {
    "demo": ["--config", "confs/neus-synthetic.yaml"],
    "dtu-wmask": ["--config", "confs/neus-dtu-wmask.yaml", *DTU],
    "dtu": ["--config", "confs/neus-dtu.yaml", *DTU],
    "lego": ["--config", "confs/neus-blender.yaml", "dataset.img_downscale=2", *QUARTER_HOUR],
    "alexander": ["--config", "confs/neus-colmap-wmask.yaml", *DTU, *QUARTER_HOUR],
    "fox": [
        "--config",
        "confs/neus-transforms.yaml",
        *("dataset.holdout=8", "dataset.img_downscale=4"),
        *QUARTER_HOUR,
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--data", help="root_dir of the capture, for all but demo")
    parser.add_argument("--outputs_dir", default="outputs")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    command = [
        sys.executable,
        "run.py",
        *COMMANDS[args.what],
        "--train",
        "--test",
        "--outputs_dir",
        args.outputs_dir,
    ]
    if args.what != "demo":
        command.append(f"dataset.root_dir={args.data}")
    start = time.perf_counter()
    subprocess.run([*command, *args.overrides], cwd=ROOT, check=True)
    minutes = (time.perf_counter() - start) / 60
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    runs = (ROOT / args.outputs_dir).resolve().glob("*/*/save/metrics.json")
    path = max(runs, key=lambda file: file.stat().st_mtime)
    metrics = json.loads(path.read_text())
    print(describe_machine())
    print(f"{args.what}: {minutes:.1f} min in all, {metrics['step']} steps, peak memory {peak:.2f} GiB")
    print(f"held-out {metrics['mean']}  geometry {metrics['geometry']}")
    print(path.parent)


if __name__ == "__main__":
    main()
