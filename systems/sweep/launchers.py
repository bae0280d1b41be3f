"""Where the processes of a sweep run: on this machine, or wherever Ray has room.

Every process is the leader of a session of its own. Ctrl-C in the terminal therefore reaches the sweep alone,
which passes it on once: a run stops at the end of a step after one signal, and amid it after two.
"""

import importlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from systems.sweep.standing import INTERRUPTED
from utils.errors import BackendError


@runtime_checkable
class Job(Protocol):
    """A process that was started."""

    def exit_code(self) -> int | None:
        """``None`` while it runs; negative: minus the signal that ended it."""

    def interrupt(self) -> None:
        """Ask it to stop, as Ctrl-C does."""


@runtime_checkable
class Launcher(Protocol):
    """Starts processes."""

    @property
    def slots(self) -> int:
        """So many may run at once."""

    def start(self, command: Sequence[str], output: Path) -> Job:
        """Start a command whose output replaces what a file held."""


class LocalLauncher:
    """Processes of this machine.

    Args:
        slots: processes at once.
        threads: CPU threads of each; ``None`` leaves that to them.
        gpus: devices among which the processes are spread, as in ``CUDA_VISIBLE_DEVICES``; without any they
            see what the sweep sees.
    """

    def __init__(self, slots: int, threads: int | None = None, gpus: Sequence[str] = ()) -> None:
        self.slots = slots
        self._threads, self._gpus = threads, list(gpus)
        self._jobs: list[tuple[LocalJob, str]] = []

    def start(self, command: Sequence[str], output: Path) -> "LocalJob":
        """Start a command on the GPU with the fewest processes."""
        environment = dict(os.environ)
        if self._threads is not None:
            environment |= {"OMP_NUM_THREADS": str(self._threads), "NUMBA_NUM_THREADS": str(self._threads)}
        self._jobs = [(job, gpu) for job, gpu in self._jobs if job.exit_code() is None]
        busy = [gpu for _, gpu in self._jobs]
        gpu = min(self._gpus, key=busy.count, default="")
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                close_fds=False,  # The sweep's lock is inherited on purpose, and nothing else is inheritable.
            )
        job = LocalJob(process)
        self._jobs.append((job, gpu))
        return job


class LocalJob:
    """A process of this machine."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def exit_code(self) -> int | None:
        """``None`` while it runs."""
        return self._process.poll()

    def interrupt(self) -> None:
        """Send what Ctrl-C sends."""
        self._process.send_signal(signal.SIGINT)


class RayLauncher:
    """Tasks of a Ray cluster whose machines see the same files under the same paths.

    Args:
        slots: tasks handed to Ray at once; it starts those that it has room for.
        resources: ``num_cpus`` and ``num_gpus`` that each task takes.

    Raises:
        BackendError: Ray is not installed, or no cluster can be reached or started.
    """

    def __init__(self, slots: int, resources: Mapping[str, int | float]) -> None:
        self.slots = slots
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise BackendError(
                "launcher", "ray is not installed", "pip install ray, or write launcher: local"
            ) from None
        try:
            # An address in RAY_ADDRESS is followed; otherwise Ray starts on this machine.
            self._ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
        except Exception as error:  # Ray raises nothing more particular than this.
            raise BackendError(
                "launcher", f"ray cannot start ({error})", "check RAY_ADDRESS, or write launcher: local"
            ) from error
        self._task = self._ray.remote(**resources, max_retries=0)(_task_function())

    def start(self, command: Sequence[str], output: Path) -> "RayJob":
        """Hand a command to Ray."""
        return RayJob(self._ray, self._task.remote(list(command), os.getcwd(), str(output)), output)


class RayJob:
    """A task of Ray."""

    def __init__(self, ray: Any, reference: Any, output: Path) -> None:
        self._ray, self._reference, self._output = ray, reference, output
        self._is_interrupted = False

    def exit_code(self) -> int | None:
        """``None`` while it waits or runs; a task that Ray lost is noted in the output."""
        ready, _ = self._ray.wait([self._reference], timeout=0)
        if not ready:
            return None
        try:
            return int(self._ray.get(self._reference))
        except Exception as error:  # Ray has a class for every way in which a task can be lost.
            if self._is_interrupted:
                return INTERRUPTED
            with self._output.open("a") as file:
                file.write(f"ray lost this run: {' '.join(str(error).split())}\n")
            return 1

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in the task, which passes it on; one that waits never starts."""
        self._is_interrupted = True
        self._ray.cancel(self._reference, force=False)


def _task_function() -> Any:
    """What Ray's workers execute; made inside a function, it is sent to them whole.

    They need not find this project's modules before the command itself does.
    """

    def run_command(command: list[str], folder: str, output: str) -> int:
        import signal
        import subprocess
        import time

        # Ray starts its workers with SIGINT blocked, which processes inherit.
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        with open(output, "wb") as file:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        try:
            # Ray's KeyboardInterrupt comes between two lines of Python; it wakes nobody who waits.
            while process.poll() is None:
                time.sleep(0.2)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
        return process.wait()

    return run_command
