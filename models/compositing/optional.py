"""Whether nerfacc can serve here: asked only when it is wanted by name, since asking imports it."""

import importlib
import importlib.util

import torch

_REMEDY = (
    "nerfacc 0.5.3 compiles against CUDA <= 12 only; "
    "install a prebuilt wheel for your torch, or use backend cuda"
)


def available_nerfacc(device: torch.device) -> str | None:
    """Check of nerfacc (>= 0.5.3): ``None`` where it runs on ``device``, else the reason and the remedy.

    It compiles its kernels when it is first used, which takes minutes. Where it cannot, it says so on the
    console and goes on without them, to fail in the midst of a step: here that is a reason.
    """
    if device.type != "cuda":
        return f"nerfacc needs a GPU, this run uses the {device.type}"
    if importlib.util.find_spec("nerfacc") is None:
        return "nerfacc is not installed: pip install nerfacc, or use backend cuda"
    try:
        nerfacc = importlib.import_module("nerfacc")
        kernels = importlib.import_module("nerfacc.cuda._backend")._C
    except Exception as error:  # A compiler's complaint, a linker's, a missing dependency: all end here.
        cause = (str(error).splitlines() or [""])[0]
        return f"nerfacc cannot be loaded ({type(error).__name__}: {cause}): {_REMEDY}"
    if not hasattr(nerfacc, "traverse_grids"):
        return "this nerfacc is older than 0.5.3: pip install --upgrade nerfacc, or use backend cuda"
    if kernels is None:
        return f"nerfacc found no CUDA toolkit and disabled itself: {_REMEDY}"
    return None
