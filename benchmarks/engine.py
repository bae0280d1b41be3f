"""The engine on this machine: is it right, where does the time go, what does that buy.

python benchmarks/engine.py check          every operation against PyTorch in float64, recorded steps against
                                           eager ones; exit code 1 if anything fails
python benchmarks/engine.py phases         milliseconds of each phase of a step, and shares of the ceilings
python benchmarks/engine.py backends       each operation's implementations in alternation
python benchmarks/engine.py time-to-psnr   [--config confs/neus-blender.yaml --data DIR] [--steps 20000]
python benchmarks/engine.py profile        the kernels that take the most time, and a trace
python benchmarks/engine.py vram           run.py --vram 4, 8, 12, 24: train, render, mesh under each cap
python benchmarks/engine.py all            all of these, one process each; below 25 minutes on an H100

Tables are printed as they grow and written to --out as Markdown and JSON. Without a GPU sizes are tiny and
the CUDA kernels run in Triton's interpreter. Further arguments key=value are config keys of what is trained.
"""

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")  # bars would be drawn over the tables

import torch

# Read by Triton when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.engine_backends import run_backends
from benchmarks.engine_checks import run_checks
from benchmarks.engine_phases import run_phases, run_profile
from benchmarks.engine_tools import FULL, ROOT, SYNTHETIC, TINY, Report
from benchmarks.engine_training import run_time_to_psnr
from utils.backend import resolve_device, set_cpu_threads
from utils.command_line import VRAM
from utils.errors import UserError

_COMMANDS = ("check", "phases", "backends", "time-to-psnr", "profile", "vram")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=[*_COMMANDS, "all"])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "engine", help="folder for the tables")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="sizes for trying this script, as on a CPU")
    parser.add_argument("--only", default="", help="check: operations whose name contains this")
    parser.add_argument("--backend", help="check: this implementation alone (cpu, cuda)")
    parser.add_argument("--config", default=SYNTHETIC, help="time-to-psnr: what to train")
    parser.add_argument("--data", help="time-to-psnr: root_dir of the capture")
    parser.add_argument("--steps", type=int, default=20000, help="time-to-psnr: steps of training")
    parser.add_argument(
        "--views", type=int, default=4, help="time-to-psnr: held-out views rendered on the way"
    )
    parser.add_argument(
        "overrides", nargs="*", help="config keys, e.g. model.sdf.hash_grid.table_dtype=float16"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run one command; 0, or 1 if a check failed."""
    args = _parse(argv)
    if args.command == "all":
        return _run_all(argv)
    try:
        return _run(args)
    except UserError as error:
        print(f"engine.py: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    device = resolve_device(args.device)
    sizes = TINY if args.tiny or device.type == "cpu" else FULL
    set_cpu_threads()
    report = Report(args.command, device, args.out)
    start, passed = time.perf_counter(), True
    with _quiet_log():
        try:
            if args.command == "check":
                passed = run_checks(report, sizes, device, args.only, args.backend)
            elif args.command == "phases":
                run_phases(report, sizes, device, *args.overrides)
            elif args.command == "backends":
                run_backends(report, sizes, device)
            elif args.command == "vram":
                passed = run_under_caps(report, device, args.out, *args.overrides)
            elif args.command == "profile":
                run_profile(report, sizes, device, *args.overrides)
            else:
                run_time_to_psnr(
                    *(report, sizes, device, *args.overrides),
                    config=args.config,
                    data=args.data,
                    steps=args.steps,
                    views=args.views,
                )
        finally:
            report.write()
    print(f"{args.command}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0 if passed else 1


def run_under_caps(report: Report, device: torch.device, out: Path, *overrides: str) -> bool:
    """Train, render, measure and mesh the embedded scene under each cap on the GPU's memory.

    Without a GPU, where there is nothing to cap, once without.
    """
    table = report.table("Under a cap on the GPU's memory", "cap, GiB", "exit code", "seconds")
    codes = []
    for cap in VRAM if device.type == "cuda" else (None,):
        options = [] if cap is None else ["--vram", str(cap)]
        start = time.perf_counter()
        command = [sys.executable, "run.py", "--config", SYNTHETIC, "--train", "--test", *options]
        command += ["--device", device.type, "--outputs_dir", str(out / "runs"), *overrides]
        codes.append(subprocess.run(command, cwd=ROOT, check=False).returncode)
        table.add("none" if cap is None else cap, codes[-1], time.perf_counter() - start)
    return not any(codes)


@contextlib.contextmanager
def _quiet_log():
    """Only warnings of what the benchmarks run."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _run_all(argv: Sequence[str]) -> int:
    """Every command in a process of its own: what one breaks, the device included, the next one has whole."""
    codes = {}
    for command in _COMMANDS:
        arguments = [command if argument == "all" else argument for argument in argv]
        if command == "time-to-psnr" and not any(one.startswith("--steps") for one in argv):
            arguments += ["--steps", "10000"]
        codes[command] = subprocess.run([sys.executable, __file__, *arguments], check=False).returncode
    print(", ".join(f"{command}: exit code {code}" for command, code in codes.items()), flush=True)
    return max(map(abs, codes.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
