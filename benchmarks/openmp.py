"""Whether waiting OpenMP threads should sleep or spin: training speed, alone and beside a busy process.

    python benchmarks/openmp.py [--steps 100]

Every combination runs in a process of its own, twice, alternating. The busy process keeps one core to itself.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def spin() -> None:
    while True:
        pass


def train(steps: int) -> None:
    """Print milliseconds per step (median) of a warm training run."""
    import tempfile

    from benchmarks.throughput import make_trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer("auto", 8192, Path(folder))
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            trainer.train_step()
            trainer.step += 1
            times.append(time.perf_counter() - start)
    print(f"{1e3 * statistics.median(times[steps // 3 :]):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--train", action="store_true", help="what the measured processes are started with")
    args = parser.parse_args()
    if args.train:
        train(args.steps)
        return
    results: dict[tuple[str, bool], list[float]] = {}
    command = [sys.executable, __file__, "--train", "--steps", str(args.steps)]
    for _ in range(2):
        for is_busy in (False, True):
            for policy in ("PASSIVE", "ACTIVE"):
                neighbour = multiprocessing.Process(target=spin, daemon=True)
                if is_busy:
                    neighbour.start()
                environment = os.environ | {"OMP_WAIT_POLICY": policy}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                results.setdefault((policy, is_busy), []).append(float(done.stdout.split()[-1]))
                if is_busy:
                    neighbour.terminate()
    for (policy, is_busy), times in results.items():
        beside = "beside a busy process" if is_busy else "alone"
        print(f"OMP_WAIT_POLICY={policy:8s} {beside:22s} {' and '.join(f'{t:.1f}' for t in times)} ms a step")


if __name__ == "__main__":
    main()
