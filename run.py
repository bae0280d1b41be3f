"""Photos in, surface out. Parse the command line, load the config, build what it names, dispatch, exit.

Exit codes: 0 done, 2 bad input (one line says what and where), 130 interrupted, 1 a bug (traceback).
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from utils.command_line import parse
from utils.errors import CheckpointError, UserError

# libgomp's threads spin while they wait for one another. On a machine that others use as well, a spinning
# thread holds the core that the awaited one needs, and training runs up to thirty times slower. libgomp reads
# this variable when PyTorch loads it, hence it is set before any such import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def latest_checkpoint(runs: Path) -> Path:
    """The last checkpoint of that run below ``runs`` which was saved most recently."""
    found = sorted(runs.glob("*/ckpt/last.pth"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise CheckpointError(runs, "nothing to resume", "run with --train first, or give --resume CKPT")
    return found[-1]


def sections() -> dict[str, Any]:
    """The config's sections, each with its dataclass or its dataclasses by name."""
    from models import MODELS
    from process_data import DATASETS
    from systems import SYSTEMS, evaluate, export, trainer_config

    named: dict[str, Any] = {"dataset": DATASETS, "model": MODELS, "system": SYSTEMS}
    return {key: {name: pair[0] for name, pair in known.items()} for key, known in named.items()} | {
        "trainer": trainer_config.TrainerConfig,
        "export": export.ExportConfig,
        "test": evaluate.TestConfig,
    }


def load_settings(args: argparse.Namespace, device: str = "cpu") -> tuple[Any, Path | None]:
    """The config for a device, from a file or from a checkpoint's run, and that checkpoint if any."""
    from utils.config import load_config

    ckpt = None if args.resume in (None, "latest") else Path(args.resume).absolute()
    if ckpt is not None and not ckpt.is_file():
        raise CheckpointError(args.resume, "no such checkpoint", "give e.g. outputs/NAME/TRIAL/ckpt/last.pth")
    source = args.config or Path(args.resume).absolute().parent.parent / "config" / "parsed.yaml"
    settings = load_config(source, args.overrides, sections(), device, args.vram)
    return settings, latest_checkpoint(args.outputs_dir / settings.name) if args.resume == "latest" else ckpt


def execute(args: argparse.Namespace, argv: list[str]) -> None:
    """Build scene, model and run from the config, and do what was asked for."""
    # These imports take seconds, which --help and a mistyped option need not wait for.
    from models import build_model
    from process_data import load_scene
    from systems import SYSTEMS, checkpoint, evaluate, preflight, record, trainer
    from utils import backend

    device = backend.resolve_device(args.device)
    backend.limit_memory(device, args.vram)
    settings, ckpt = load_settings(args, device.type)
    preflight.check_overrides(settings.tree, args.overrides)
    early = record.EarlyLog()
    backend.set_cpu_threads()
    backend.seed_everything(settings.seed)
    scene = load_scene(preflight.dataset_to_load(settings, args.train))
    # Whatever can be refused is refused before there is a folder for it.
    model = build_model(settings.model, scene, device)
    system = SYSTEMS[settings.system.name][1](settings.system, model.num_levels, scene.masks is not None)
    preflight.check_model_keys(model, args.overrides)
    if args.train:
        preflight.check_priors(scene, system.priors, settings.trainer.max_rays)
        system.check_training(model)
        preflight.check_refinement(settings.trainer.poses, scene, system)
    if args.test:
        preflight.check_video(scene, settings.test)
    if args.test or args.mesh:
        preflight.check_extent(model, settings.export)
    if ckpt is not None:
        checkpoint.load_model(ckpt, model, settings.tree)
    # A checkpoint that was copied out of its run's folder starts a run of its own.
    if ckpt is not None and (ckpt.parent.parent / "config" / "parsed.yaml").is_file():
        run = record.Run.reopen(ckpt.parent.parent, args.logs_dir)
    else:
        run = record.Run.start(settings, args.outputs_dir, args.logs_dir, argv)
    early.pour()
    last = run.folder / "ckpt" / "last.pth"
    if args.train:
        training = trainer.Trainer(settings, scene, model, system, run, device)
        if ckpt is not None:
            training.restore(ckpt)
        training.train()
        ckpt = last
    if args.test or args.mesh:
        assert ckpt is not None  # The command line asks for one where nothing is trained.
        step, fraction = checkpoint.load_model(ckpt, model, settings.tree)
        progress = system.progress_at(fraction)
        if args.test:
            evaluate.test(settings, scene, model, progress, run, step)
        else:
            evaluate.export_and_compare(settings, scene, model, progress, run, step)
    is_trained_only = not (args.test or args.mesh)
    next_step = (
        f"--test --resume {last}" if is_trained_only else f"--mesh --resume {last} export.resolution=1024"
    )
    print(f"everything is in {run.folder}; next: python run.py {next_step}")


def look_at_data(args: argparse.Namespace) -> None:
    """Commands about the capture alone: place photos, draw a capture, write it in another format."""
    from process_data import load_scene
    from systems import preflight, record

    record.log_to(None)
    if args.prepare is not None:
        from process_data.prepare import prepare

        prepare(args.prepare, args.out, args.overrides)
        return
    settings, _ = load_settings(args)
    scene = load_scene(preflight.dataset_to_load(settings, trains=False))
    if args.convert is not None:
        from process_data.writers import write_capture

        written = write_capture(scene, args.out, args.convert)
        print(f"wrote {len(written)} files to {args.out.absolute()}")
        return
    from process_data.inspection import inspect_scene

    for path in inspect_scene(scene, args.out or args.outputs_dir / settings.name / "inspect"):
        print(f"wrote {path}")
    source = ["--config", str(args.config)] if args.config else ["--resume", str(args.resume)]
    print("next: " + shlex.join(["python", "run.py", *source, "--train", *args.overrides]))


def measure_mesh(args: argparse.Namespace) -> dict[str, Any]:
    """Distances between a mesh and the truth: another mesh or points, or DTU's scan by its protocol."""
    if args.dtu is None:
        from utils.metrics import evaluate_meshes

        return evaluate_meshes(args.eval, args.gt)
    from process_data import load_scene
    from utils.dtu_evaluation import evaluate_dtu

    # With the capture's config the mesh is cut to its masks first, as published numbers ask for.
    scene = load_scene(load_settings(args)[0].dataset) if args.config or args.resume else None
    return evaluate_dtu(args.eval, args.dtu, args.scan, scene)


def main(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    args = parse(argv)
    try:
        if args.eval is not None:
            print(json.dumps(measure_mesh(args), indent=2))
        elif args.doctor:
            from utils.doctor import doctor

            print(doctor())
        elif args.sweep:
            from systems.sweep import run_sweep

            where = {"logs_dir": args.logs_dir, "device": args.device, "vram": args.vram}
            return run_sweep(args.sweep, args.overrides, sections(), args.outputs_dir, **where)
        elif args.prepare or args.convert or args.inspect:
            look_at_data(args)
        else:
            execute(args, argv)
    except UserError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        remedy = "; go on with --resume latest" if args.train else ""
        print(f"run.py: interrupted{remedy}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
