"""How many replicas a model should have: the replicas' own reports in, a number out.

Serve unpickles this class in its controller, so the module imports nothing of ours; Serve itself applies the
bounds and the delays.
"""

import math
from typing import Any


class WaitingTokensPolicy:
    """One more replica while prompt tokens wait above the target; one less when the rest could take all the work.

    Replicas report what waits as a multiple of the target: as an argument here, a change of it would restart them.
    A deployment at zero goes to one as soon as anybody asks for it.
    """

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """The desired number of replicas, and no state."""
        current = ctx.current_num_replicas
        if current == 0:
            return (1 if ctx.total_num_requests > 0 else 0), {}
        waiting = _total(ctx, "waiting")
        busy = _total(ctx, "kv_used_fraction")
        if waiting > current:
            return max(current + 1, math.ceil(waiting)), {}
        idle = _total(ctx, "running") == 0
        if waiting == 0 and (idle if current == 1 else busy <= (current - 1) * 0.5):
            return current - 1, {}
        return ctx.target_num_replicas, {}


def _total(ctx: Any, name: str) -> float:
    """Sum over the replicas of a metric they reported; 0 before the first report."""
    return float(sum((ctx.aggregated_metrics or {}).get(name, {}).values()))
