"""Where a training run is."""

from typing import NamedTuple


class Position(NamedTuple):
    """Where a run is.

    Attributes:
        step: batches taken so far.
        steps_per_epoch: batches an epoch.
        epoch_images: images an epoch.
        batch_size: images a step; the last of an epoch has what is left.
    """

    step: int
    steps_per_epoch: int
    epoch_images: int
    batch_size: int

    @property
    def epoch(self) -> int:
        """Return how many epochs are behind."""
        return self.step // self.steps_per_epoch

    @property
    def batch(self) -> int:
        """Return how many batches of this epoch are behind."""
        return self.step % self.steps_per_epoch

    @property
    def images(self) -> int:
        """Return how many images are behind."""
        return self.epoch * self.epoch_images + self.batch * self.batch_size

    def after(self) -> "Position":
        """Return where the run is a step later."""
        return self._replace(step=self.step + 1)
