"""Who may come in: a bounded number of requests in flight, and when a refused one should try again."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.gateway.call import Call
from deployments.gateway.errors import ApiError

_MEAN_WEIGHT = 0.1
_FIRST_GUESS_S = 1.0


def retry_after_s(mean_duration_s: float, num_permits: int, num_refused: int) -> float:
    """When the ``num_refused``-th client refused since the last permit came back can expect one, in whole seconds.

    ``num_permits`` requests of ``mean_duration_s`` each end at a rate of num_permits / mean_duration_s; refused
    clients are told successive ends, so that they do not all return at once. At least 1.
    """
    return float(max(1, math.ceil(mean_duration_s * max(1, num_refused) / max(1, num_permits))))


class Permits:
    """Counts requests in flight. Nothing waits here: a request has a permit at once or is refused."""

    def __init__(self) -> None:
        self.num_held = 0
        self._num_refused = 0
        self._mean_duration_s: float | None = None

    @contextmanager
    def hold(self, call: Call) -> Iterator[None]:
        """One permit for as long as the block runs; ApiError ``overloaded`` when ``max_streams`` are held."""
        limit = call.settings.max_streams
        if self.num_held >= limit:
            self._num_refused += 1
            raise self._full(limit, call.settings.request_timeout_s)
        self.num_held += 1
        try:
            yield
        finally:
            self.num_held -= 1
            self._num_refused = 0
            self._learn(call.elapsed_s)

    def _full(self, limit: int, timeout_s: float) -> ApiError:
        mean_s = _FIRST_GUESS_S if self._mean_duration_s is None else self._mean_duration_s
        wait_s = min(retry_after_s(mean_s, limit, self._num_refused), max(1.0, timeout_s))
        message = f"All {limit} places for requests in flight are taken; try again in {wait_s:g} s."
        return ApiError("overloaded", message, retry_after_s=wait_s)

    def _learn(self, duration_s: float) -> None:
        """Exponential moving average of how long a permit is held."""
        mean_s = duration_s if self._mean_duration_s is None else self._mean_duration_s
        self._mean_duration_s = mean_s + _MEAN_WEIGHT * (duration_s - mean_s)
