"""Which Ray: the config's provider in, something that can be started, asked for its dashboard, and stopped out."""

from typing import Protocol

from cluster.config.nodes import LocalProvider
from cluster.config.schema import ClusterConfig
from cluster.control.dashboard import Dashboard
from cluster.control.existing import ExistingRay
from cluster.control.local import LocalRay, Say


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
