"""Make `import torchvision` work where its wheel was built for CUDA and torch was not.

Such a torchvision cannot load its compiled operators, and then stops at the first fake kernel it
registers for one of them ("operator torchvision::nms does not exist"). Transformers, diffusers and
open_clip import torchvision whenever it is installed, so all of them stop too. What they need of it
is plain Python; giving the missing operators a schema is enough. The operators themselves stay
absent: calling one raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import metadata
from typing import Literal

_MISSING = "operator torchvision::"
_OPERATORS = ("nms", "qnms")  # the two that torchvision registers fake kernels for without asking
_kept: list[object] = []  # a torch Library takes its definitions with it when it is collected


def _build(name: str) -> str | None:
    """The build of an installed version: "cpu" for 2.13.0+cpu, else ""; None if absent."""
    try:
        return metadata.version(name).partition("+")[2]
    except metadata.PackageNotFoundError:
        return None


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)


def ensure_torchvision() -> Literal["absent", "unneeded", "works", "mended"]:
    """Call before anything that may import torchvision. Safe and cheap to call again.

    Two installed wheels with the same build label ("cpu", "cu128" or none) need nothing, and then
    nothing is imported; only an unequal pair is tried. Any error but the one described above is
    raised as it is.

    Returns:
        "absent" (not installed), "unneeded" (same build), "works" (imports by itself) or "mended".
    """
    builds = _build("torch"), _build("torchvision")
    if None in builds or importlib.util.find_spec("torchvision") is None:
        return "absent"
    if builds[0] == builds[1]:
        return "unneeded"
    if _kept:
        return "mended"
    try:
        importlib.import_module("torchvision")
        return "works"
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_operators()
    importlib.import_module("torchvision")
    return "mended"
