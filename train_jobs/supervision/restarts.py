"""When to give up on a run that keeps losing its workers: losses and checkpoints in, another try or not out."""


class Restarts:
    """Counts losses since the run last got further than before."""

    def __init__(self, max_losses: int) -> None:
        self._max_losses = max_losses
        self._losses = 0
        self._step = 0

    @property
    def losses(self) -> int:
        """One after the other, without a new checkpoint between."""
        return self._losses

    def try_again(self, newest_step: int) -> bool:
        """A group was lost, and the newest checkpoint holds ``newest_step`` steps: whether to start another one."""
        if newest_step > self._step:
            self._step, self._losses = newest_step, 0
        self._losses += 1
        return self._losses <= self._max_losses
