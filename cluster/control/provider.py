"""Which Ray: the config's provider in, something that can be started, asked for its dashboard, and stopped out."""

from pathlib import Path
from typing import Protocol

from cluster.config.nodes import LocalProvider
from cluster.config.schema import ClusterConfig
from cluster.control.dashboard import Dashboard
from cluster.control.existing import ExistingRay
from cluster.control.local import LocalRay, Say
from cluster.errors import ControlError


class Ray(Protocol):
    """A Ray cluster as the control path sees it."""

    def dashboard(self) -> Dashboard | None:
        """Its dashboard; None when it does not run."""

    def start(self, say: Say) -> Dashboard:
        """Make it run, if that is ours to do, and return its dashboard."""

    def stop(self, say: Say) -> bool:
        """End what Manta started on it, and it too if Manta started it; False when there was nothing to end."""


def ray_of(config: ClusterConfig) -> Ray:
    """The Ray cluster that ``config`` names."""
    provider = config.cluster.provider
    return LocalRay(config) if isinstance(provider, LocalProvider) else ExistingRay(provider, config.name)


def running_dashboard(config: ClusterConfig, path: Path) -> Dashboard:
    """The dashboard of the cluster that the config at ``path`` names; ControlError when it does not run."""
    dashboard = ray_of(config).dashboard()
    if dashboard is None:
        raise ControlError(f"cluster {config.name} does not run; start it with `manta up {path}`")
    return dashboard
