"""What Serve would be to a router: replicas over real channels that come, drain and die when a test says so."""

from collections.abc import Sequence

from cluster.plan.types import GatewaySettings, Route, RouteTarget, RoutingTable
from deployments.channel import Channel, Listener
from deployments.replica.session import GatewaySession, Service
from deployments.router.connection import ReplicaEndpoint
from deployments.router.pool import ReplicaPool

SETTINGS = GatewaySettings(
    max_body_bytes=1000, max_streams=10, request_timeout_s=5, max_choices=4, max_stop_strings=4, max_logprobs=5
)


class FakeCluster:
    """Replicas by application and name; each listens on the loopback."""

    def __init__(self) -> None:
        self.endpoints: dict[str, dict[str, ReplicaEndpoint]] = {}
        self._listeners: dict[str, Listener] = {}
        self._channels: dict[str, list[Channel]] = {}
        self._sessions: dict[str, list[GatewaySession]] = {}

    async def add(self, app: str, name: str, service: Service, *, produces: str = "") -> None:
        """Start a replica; routers find it at their next look."""
        channels: list[Channel] = []
        sessions: list[GatewaySession] = []

        async def converse(channel: Channel) -> None:
            channels.append(channel)
            sessions.append(GatewaySession(channel, service))
            await sessions[-1].run()

        listener = Listener(converse)
        address = await listener.start("127.0.0.1")
        endpoint = ReplicaEndpoint(replica_id=name, address=address, secret=listener.secret, produces=produces)
        self.endpoints.setdefault(app, {})[name] = endpoint
        self._listeners[name] = listener
        self._channels[name] = channels
        self._sessions[name] = sessions

    def hide(self, app: str, name: str) -> None:
        """No longer list a replica; its connections live on, as those of a replica that Serve stops."""
        self.endpoints[app].pop(name, None)

    def cut(self, app: str, name: str) -> None:
        """Break every connection of a replica at once, in the middle of whatever it says, and let nobody in again."""
        self.hide(app, name)
        for channel in self._channels[name]:
            channel._wire.transport.abort()
        listener = self._listeners[name]
        if listener._server is not None:
            listener._server.close()

    def announce(self, name: str) -> None:
        """Tell every gateway the replica's load now."""
        for session in self._sessions[name]:
            session.report_load()

    def open_pool(self, app: str) -> ReplicaPool:
        """The pool of one application, as the gateway would open it."""

        async def discover() -> list[ReplicaEndpoint]:
            found = list(self.endpoints.get(app, {}).values())
            if not found:
                raise ConnectionError(f"{app} has no replica")
            return found

        async def wake() -> ReplicaEndpoint:
            return (await discover())[0]

        return ReplicaPool(app, discover, wake)

    async def stop(self) -> None:
        """End every replica's conversations."""
        for listener in self._listeners.values():
            await listener.stop()


def table(**targets: Sequence[tuple[str, float]]) -> RoutingTable:
    """A routing table: model to (application, weight) pairs."""
    routes = tuple(
        Route(
            model=model,
            task="generate",
            context_tokens=64,
            created=0,
            targets=tuple(RouteTarget(app=app, version="v1", weight=weight) for app, weight in apps),
        )
        for model, apps in targets.items()
    )
    return RoutingTable(settings=SETTINGS, routes=routes)
