"""With `train.on_divergence = roll_back`, a training that diverges restarts its epoch at a lower learning rate.

It restarts the epoch, and not from the last checkpoint, which is written by the clock: so the result does not depend on when
checkpoints were written, or on whether the run was killed.
"""

from rcnn.errors import Diverged
from rcnn.progress import say
from rcnn.train.checkpoint import TrainState, copied
from rcnn.train.checkpoint_store import CheckpointStore

FACTOR = 1 / 3  # of the learning rate
MOST = 5  # times in a run: the rate is 1/243 then, and the fault is another


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
        """To be called before the first step of an epoch, or where a resumed run continues one."""
        if self._is_on and self._state.step == 0:
            self._start = self._state.snapshot()

    def go_back(self, error: Diverged) -> None:
        """Goes back, and lowers the learning rate.

        Raises:
            Diverged: this is not wanted, or it happened too often.
            TrainingError: the checkpoint of the start of the epoch is missing or damaged.
        """
        count = self._state.roll_backs + 1
        if not self._is_on:
            raise error
        if count > MOST:
            error.remedy = f"It was lowered {MOST} times: {error.remedy[:1].lower()}{error.remedy[1:]}"
            raise error
        if self._start["epoch"] != self._state.epoch and self._checkpoints is not None:  # another process began it
            self._start = self._checkpoints.read(self._checkpoints.start_of(self._state.epoch))
        self._state.load(copied(self._start))  # a copy: an optimizer takes over the tensors that it loads
        self._state.schedule.lower(FACTOR ** (count - self._state.roll_backs))
        self._state.roll_backs = count
        say(
            f"  {error.what}: going back to the start of epoch {self._state.epoch + 1}, with a third of the learning rate "
            f"({count} of at most {MOST} times)"
        )
