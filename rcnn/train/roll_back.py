"""Training that diverges goes back to the start of its epoch and goes on with a lower learning rate, if it is to.

It goes back to the start of an epoch, and not to the last checkpoint, which is written by the clock: so the result does not
depend on when checkpoints were written, or on whether the run was killed.
"""

from rcnn.errors import TrainingError
from rcnn.progress import say
from rcnn.train.checkpoint import TrainState, copied
from rcnn.train.checkpoint_store import CheckpointStore

FACTOR = 1 / 3  # of the learning rate
MOST = 5  # times in a run: the rate is 1/243 then, and the fault is another


class Diverged(TrainingError):
    """The loss is no longer a number."""


class RollBack:
    """The start of the epoch that is being trained, in memory, on each worker.

    Args:
        state: what is trained, before it takes up a checkpoint.
        checkpoints: where to find the start of an epoch that an earlier run began.
    """

    def __init__(self, state: TrainState, checkpoints: CheckpointStore | None):
        self._state, self._checkpoints = state, checkpoints
        self._is_on = state.config.train.on_divergence == "roll_back"
        self._start = state.snapshot() if self._is_on else {}

    def begin(self) -> None:
        """To be called before the first step of an epoch, or where a resumed run goes on in one."""
        if not self._is_on or (self._state.step and self._state.epoch == self._start["epoch"]):
            return
        if self._state.step == 0:
            self._start = self._state.snapshot()
        elif self._checkpoints is not None:
            self._start = self._checkpoints.read(self._checkpoints.start_of(self._state.epoch))

    def go_back(self, error: Diverged) -> None:
        """Goes back, and lowers the learning rate.

        Raises:
            Diverged: this is not wanted, or it happened too often.
        """
        count = self._state.roll_backs + 1
        if not self._is_on:
            raise error
        if count > MOST:
            error.remedy = f"It was lowered {MOST} times: {error.remedy[:1].lower()}{error.remedy[1:]}"
            raise error
        self._state.load(copied(self._start))  # a copy: an optimizer takes over the tensors that it loads
        self._state.schedule.lower(FACTOR ** (count - self._state.roll_backs))
        self._state.roll_backs = count
        say(
            f"  {error.what}: going back to the start of epoch {self._state.epoch + 1}, with a third of the learning rate "
            f"({count} of at most {MOST} times)"
        )
