"""When to give up on a run that keeps losing its workers: failures and checkpoints in, another try or not out."""


class Restarts:
    """Counts failures since the run last got further than before."""

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._failures = 0
        self._step = 0

    def try_again(self, newest_step: int | None) -> bool:
        """A group failed, and the newest checkpoint holds ``newest_step`` steps: whether to start another one."""
        if newest_step is not None and newest_step > self._step:
            self._step, self._failures = newest_step, 0
        self._failures += 1
        return self._failures <= self._max_failures
