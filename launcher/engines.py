"""Whether every host has the engine that a run asks for. Pure."""

from __future__ import annotations

from typing import Final

from launcher.cluster import Cluster
from launcher.config import LaunchConfig
from launcher.errors import HostError

IPEX: Final = "intel-extension-for-pytorch"
"""Distribution behind ``--engine ipex``."""


def check(config: LaunchConfig, cluster: Cluster) -> None:
    """Raises UserError for the first host that lacks the engine; one whose versions are not known is let pass."""
    if config.program is not None or config.train.engine.kind != "ipex":
        return
    for node in cluster.nodes:
        if node.facts.versions and IPEX not in node.facts.versions:
            raise HostError(
                f'--engine: {IPEX} is not installed on {node.host}, beside {node.facts.python}: "ipex"; '
                "run make ipex-venv there and start .venv-ipex/bin/falcon-launch, or leave --engine out",
                (node.host,),
            )
