"""``engine.kind="ipex"``: Intel Extension for PyTorch 2.8 under the same loop, and what it really changed.

The extension does two things on import and call. On import its kernels take the place of some of torch's own, for
every tensor of the process. ``ipex.optimize`` replaces layers, but only those whose class is exactly one it knows:
transformers' Falcon has a subclass of Linear and keeps all of its own. Weights are not packed into the extension's
layout: that saves little (benchmarks/ipex_packing.py), and every checkpoint and optimizer state would have to be
unpacked again. Precision and the optimizer stay ours.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from falcon_dist.contract import UserError

PACKAGE: Final = "intel_extension_for_pytorch"
CURE: Final = "run make ipex-venv and start .venv-ipex/bin/falcon-launch, or leave --engine ipex out"
_KEYS: Final = ("CPU", "AutogradCPU", "AutocastCPU")
"""torch's dispatch keys under which the extension registers kernels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What the extension changed in this process."""

    version: str
    isa: str
    """Instruction set that its kernels were chosen for."""
    layers: Mapping[str, int]
    """{"Linear -> _IPEXLinear": 14} for replaced ones."""
    kept: Mapping[str, int]
    """{"FalconLinear": 8} for layers that multiply by a weight and are as they were."""
    operators: tuple[str, ...]
    """torch's operators that run on the extension's kernels."""

    def line(self) -> str:
        """For a person."""
        replaced = ", ".join(f"{count} {name}" for name, count in self.layers.items()) or "none"
        kept = ", ".join(f"{count} {name}" for name, count in self.kept.items())
        return (
            f"ipex {self.version} ({self.isa}): layers replaced: {replaced}; kept: {kept}; "
            f"{len(self.operators)} of torch's operators run on its kernels "
            f"({', '.join(self.operators)})"
        )

    def as_dict(self) -> dict[str, Any]:
        """For the rank's result."""
        return asdict(self)


def check_installed() -> None:
    """Asks the installed packages, not the extension: with another torch than its own, importing it ends the process.

    Raises:
        UserError: the extension is missing, or torch is not the one it was built for.
    """
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise UserError(f'engine.kind: {PACKAGE} is not installed: "ipex"; {CURE}') from None
    if version.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise UserError(f'engine.kind: {PACKAGE} {version} does not fit torch {torch.__version__}: "ipex"; {CURE}')


def optimize(model: PreTrainedModel) -> Changes:
    """Imports the extension, lets it optimize the model in place, and looks at what is different.

    Raises:
        UserError: see ``check_installed``.
    """
    check_installed()
    ipex = importlib.import_module(PACKAGE)
    before = {name: type(module) for name, module in model.named_modules()}
    # It wants an optimizer of a model in training, and writes another step into it: it gets one to keep.
    decoy = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.0)
    ipex.optimize(
        model,
        optimizer=decoy,
        inplace=True,
        weights_prepack=False,
        split_master_weight_for_bf16=False,
        fuse_update_step=False,
    )
    after = {name: type(module) for name, module in model.named_modules()}
    changed = Counter(
        f"{old.__name__} -> {after[name].__name__}" for name, old in before.items() if _new(after, name, old)
    )
    kept = Counter(
        old.__name__ for name, old in before.items() if issubclass(old, torch.nn.Linear) and not _new(after, name, old)
    )
    return Changes(
        version=ipex.__version__,
        isa=str(ipex._C._get_current_isa_level()),
        layers=dict(changed),
        kept=dict(kept),
        operators=tuple(overridden()),
    )


def _new(after: Mapping[str, type], name: str, old: type) -> bool:
    return name in after and after[name] is not old


def overridden() -> list[str]:
    """torch's operators whose CPU kernels are the extension's, as "layer_norm", by torch's own dispatch table."""
    found = set()
    for key in _KEYS:
        for name in torch._C._dispatch_get_registrations_for_dispatch_key(key):
            namespace, _, short = name.partition("::")
            if namespace == "aten" and _is_theirs(torch._C._dispatch_dump(name), key):
                found.add(short.partition(".")[0])
    return sorted(found)


def _is_theirs(table: str, key: str) -> bool:
    return any(line.startswith(f"{key}:") and "ipex" in line for line in table.splitlines())
