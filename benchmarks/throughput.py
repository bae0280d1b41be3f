"""Training throughput: the fast backend against the plain PyTorch reference, alternating within one run.

Both train the same NeuS on the embedded scene from the same state, at --samples a step (2^15 unless told).
The reference starts from the fast one's checkpointed weights and ray budget, so that both do the same work.

    python benchmarks/throughput.py [--samples 32768] [--rounds 5] [key=value ...]

Samples are counted once they are trained on. By default a step also evaluates the distance of those it then
drops as hidden, two to three times as many; model.min_transmittance=0 trains on all that are marched, which
shows the engine alone.
"""

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks.machine import describe_machine, load
from models import build_model
from systems import SYSTEMS
from systems.record import Run
from systems.trainer import Trainer


def make_trainer(backend: str, samples: int, folder: Path, *overrides: str) -> Trainer:
    config, scene = load(
        "confs/neus-synthetic.yaml",
        f"model.backend={backend}",
        f"trainer.samples_per_step={samples}",
        "trainer.max_minutes=null",
        "system.levels_end=0",
        *overrides,
    )
    device = torch.device("cpu")
    run = Run.start(config, folder, folder / "tf-logs", sys.argv)
    model = build_model(config.model, scene, device)
    system = SYSTEMS["neus"][1](config.system, model.num_levels, scene.masks is not None)
    return Trainer(config, scene, model, system, run, device)


def take_steps(trainer: Trainer, count: int) -> tuple[float, int]:
    """Seconds for some steps, and the samples they trained on."""
    start, samples = time.perf_counter(), 0
    for _ in range(count):
        samples += trainer.train_step().num_samples
        trainer.step += 1
    return time.perf_counter() - start, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2**15)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="config keys, e.g. model.min_transmittance=0")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        fast = make_trainer("auto", args.samples, Path(folder), *args.overrides)
        logging.disable(logging.INFO)
        take_steps(fast, 200)  # the ray budget settles and the sphere becomes an object
        reference = make_trainer("reference", args.samples, Path(folder), *args.overrides)
        reference.restore(fast.save_checkpoint())
        take_steps(reference, 1)
        rates: dict[str, list[float]] = {"fast": [], "reference": []}
        for _ in range(args.rounds):
            for name, trainer, count in (("fast", fast, 20), ("reference", reference, 2)):
                seconds, samples = take_steps(trainer, count)
                rates[name].append(samples / seconds)
    print(describe_machine())
    for name, values in rates.items():
        rounds = ", ".join(f"{value / 1e3:.0f}k" for value in values)
        print(f"{name:10s} median {statistics.median(values) / 1e3:8.1f}k samples/s   (rounds: {rounds})")
    ratios = [a / b for a, b in zip(rates["fast"], rates["reference"], strict=True)]
    print(f"ratio      median {statistics.median(ratios):.1f} times the reference")


if __name__ == "__main__":
    main()
