"""The existing provider: the address of somebody else's Ray in, its dashboard out. Never starts or stops Ray."""

from cluster.config.nodes import ExistingProvider
from cluster.control.dashboard import Dashboard
from cluster.control.local import Say
from cluster.control.observe import observe
from cluster.control.wait import await_gone, longest_drain_s
from cluster.errors import ControlError
from cluster.plan.diff import belongs_to_another
from cluster.plan.serve_app import serve_config

_STOP_TIMEOUT_S = 180.0
"""Beyond the longest drain of the applications."""


class ExistingRay:
    """A Ray that runs already and serves ``cluster``; the token it may want is read from RAY_AUTH_TOKEN."""

    def __init__(self, provider: ExistingProvider, cluster: str) -> None:
        self._cluster = cluster
        self._dashboard = Dashboard.with_token_from_environment(provider.dashboard)

    def dashboard(self) -> Dashboard:
        """Its dashboard; ControlError unless it answers, and takes the token."""
        self._dashboard.version()
        return self._dashboard

    def start(self, say: Say) -> Dashboard:
        """Nothing to start: the dashboard, as :meth:`dashboard` gives it."""
        say(f"Using the Ray cluster at {self._dashboard.url}.")
        return self.dashboard()

    def stop(self, say: Say) -> bool:
        """Remove what Manta deployed and leave everything else as it is; False when there is nothing of Manta's.

        ControlError when what runs there belongs to a cluster of another name.
        Applications that were deployed by other means than REST are not in the body, and Serve leaves them alone.
        """
        dashboard = self.dashboard()
        observed = observe(dashboard)
        if not observed.own:
            return False
        if observed.owner not in (None, self._cluster):
            raise ControlError(f"cluster {self._cluster}: {belongs_to_another(observed.owner)}")
        for name in observed.own:
            say(f"Removing application {name}.")
        assert observed.proxies is not None, "applications without a running Serve; this is a bug"
        dashboard.put_applications(serve_config(observed.proxies, observed.foreign_configs()))
        drain_s = longest_drain_s(app.config for app in observed.own.values())
        await_gone(dashboard, sorted(observed.own), timeout_s=drain_s + _STOP_TIMEOUT_S)
        return True
