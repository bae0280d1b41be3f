"""The command line of ``run.py``: its options, and which of them make sense together.

Imports nothing heavy, so that ``--help`` and a mistyped option are answered at once.
"""

import argparse
from pathlib import Path
from typing import NoReturn

DESCRIPTION = """Photos in, surface out: train a neural surface, measure it, export its mesh.

python run.py --config confs/neus-dtu.yaml --train [key=value ...]
python run.py --config confs/neus-dtu.yaml --train --resume latest
python run.py --test --resume outputs/NAME/TRIAL/ckpt/last.pth
python run.py --eval mesh.ply --gt reference.ply
python run.py --eval mesh.ply --dtu DTU --scan 65 --config confs/neus-dtu-wmask.yaml dataset.root_dir=DIR
python run.py --sweep confs/sweeps/losses.yaml [key=value ...]
python run.py --prepare PHOTOS_OR_VIDEO --out inputs/NAME [key=value ...]
python run.py --config confs/neus-colmap.yaml --inspect dataset.root_dir=inputs/NAME
python run.py --config confs/neus-colmap.yaml --convert neus --out inputs/OTHER dataset.root_dir=inputs/NAME

Exit codes: 0 done, 2 bad input (one line says what and where), 130 interrupted, 1 a bug."""


CAPTURE_KINDS = ("neus", "blender", "transforms", "colmap")
"""Formats that ``--convert`` writes."""
VRAM = (4, 8, 12, 24)
"""Sizes of GPU memory, GiB, that the configs know settings for."""


class Parser(argparse.ArgumentParser):
    """Argparse, with its errors in one line like all others."""

    def error(self, message: str) -> NoReturn:  # noqa: D102 - argparse documents it
        self.exit(2, f"run.py: {message}; see python run.py --help\n")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; leave with exit code 2 and one line where it makes no sense.

    Returns:
        The options by their names; ``outputs_dir`` and ``logs_dir`` are absolute, overrides a list of
        ``key=value`` strings. One of the commands is there, with all that it needs.
    """
    parser = Parser("run.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--config",
        metavar="YAML",
        type=Path,
        help="a file in confs/, or config/parsed.yaml of an earlier run",
    )
    add("--train", action="store_true", help="train")
    add("--test", action="store_true", help="measure held-out views; write pictures, video and mesh")
    add("--mesh", action="store_true", help="write the mesh only")
    add("--resume", metavar="CKPT|latest", help="checkpoint to go on from, or that of the config's last run")
    add("--inspect", action="store_true", help="draw cameras, sphere and points over photos")
    add("--convert", choices=CAPTURE_KINDS, help="write the loaded capture in this format to --out")
    add("--prepare", metavar="PATH", type=Path, help="place a folder of photos, or a video, with COLMAP")
    add("--out", metavar="DIR", type=Path, help="where --prepare, --convert, --inspect write")
    add(
        "--doctor",
        action="store_true",
        help="list what this machine has and which optional tools are missing",
    )
    add("--eval", metavar="MESH", type=Path, help="measure this mesh against --gt, print the result as JSON")
    add("--gt", metavar="MESH", type=Path, help="reference mesh or points for --eval")
    add(
        "--dtu",
        metavar="DIR",
        type=Path,
        help="with --eval: DTU's folder of ObsMask/ and Points/; measure by its protocol",
    )
    add("--scan", metavar="N", type=int, help="number of the DTU scan for --dtu")
    add(
        "--sweep",
        metavar="YAML",
        type=Path,
        help="do all runs of a sweep and write one table of them; go on where it stopped",
    )
    add("--outputs_dir", metavar="DIR", type=Path, default=Path("outputs"), help="where runs go (./outputs)")
    add("--logs_dir", metavar="DIR", type=Path, help="where tensorboard logs go (<outputs_dir>/tf-logs)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one")
    add(
        "--vram",
        metavar="GIB",
        type=int,
        choices=VRAM,
        help="use no more than so much of the GPU's memory (4, 8, 12, 24 GiB): smaller batches and tables",
    )
    add("overrides", metavar="key=value", nargs="*", help="config keys to change: trainer.max_minutes=5")
    args = parser.parse_intermixed_args(argv)

    _check(args, parser)
    args.outputs_dir = args.outputs_dir.expanduser().resolve()
    args.logs_dir = (args.logs_dir or args.outputs_dir / "tf-logs").expanduser().resolve()
    return args


def _check(args: argparse.Namespace, parser: Parser) -> None:
    """Leave with one line where the options do not go together."""
    if (args.eval is None) != (args.gt is None and args.dtu is None):
        parser.error("--eval MESH and --gt MESH, or --eval MESH and --dtu DIR --scan N, belong together")
    if (args.dtu is None) != (args.scan is None):
        parser.error("--dtu DIR and --scan N belong together")
    runs = args.train or args.test or args.mesh
    others = ("eval", "prepare", "convert", "inspect", "doctor", "sweep")
    alone = [name for name in others if getattr(args, name) not in (None, False)]
    if not (runs or alone):
        parser.error(
            "nothing to do: give --train, --test, --mesh, --eval, " + ", ".join(f"--{x}" for x in others[1:])
        )
    if len(alone) + bool(runs) > 1:
        parser.error(f"--{alone[0]} does one thing alone; leave out the other commands")
    if (args.prepare or args.convert) and not args.out:
        parser.error("no folder to write to: add --out inputs/NAME")
    if args.out and not (args.prepare or args.convert or args.inspect):
        parser.error("--out belongs to --prepare, --convert and --inspect; runs go to --outputs_dir")
    if (runs or args.convert or args.inspect) and not args.config and args.resume in (None, "latest"):
        parser.error("no config: give --config confs/NAME.yaml, or --resume CKPT of an earlier run")
    if args.sweep and (args.config or args.resume):
        parser.error("--sweep names its config in its file; leave out --config and --resume")
    if runs and not (args.resume or args.train):
        parser.error("no trained model: add --resume CKPT, --resume latest, or --train")
