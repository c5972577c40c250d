"""What the images of a split are, seen before a training from some of them."""

import time

from ml_collections import ConfigDict

from tat_jax.data.pipeline import Pipeline, open_pipeline
from tat_jax.data.source import Example, Source, class_colours, class_names, largest_image, notes, spread
from tat_jax.quantities import count
from tat_jax.tasks import task_of

_IMAGES = 64


class Sample:
    """Images of a source, evenly spaced over it, as a source of their own.

    Args:
        source: any one.
    """

    def __init__(self, source: Source):
        self.num_classes = source.num_classes
        self.classes, self.colours = class_names(source), class_colours(source)
        self._source = source
        self._indices = spread(len(source), _IMAGES).tolist()

    @property
    def largest(self) -> tuple[int, int]:
        """Return the largest height and width of the whole split, where labels are maps."""
        return largest_image(self._source)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._indices[index]]


def open_data(config: ConfigDict, split: str) -> tuple[str, Pipeline]:
    """Open the split `train` or `val` of a config's data, and say how much it is and what was passed over.

    Raises:
        FileNotFoundError: the images are not there.
        ValueError: the config does not fit them or itself.
    """
    data = open_pipeline(config, split)
    if split == "train":
        more = f"{count(data.steps_per_epoch, 'step')} an epoch"
    else:
        more = task_of(config).preparation(config.data)
    lines = [
        f"{count(len(data.source), 'image')}, {count(data.source.num_classes, 'class', 'classes')}, {more}"
    ]
    return "\n".join([*lines, *(f"NOTE: {note}" for note in notes(data.source))]), data


def read_sample(config: ConfigDict, data: Pipeline, split: str) -> tuple[str, Sample]:
    """Read images of a split one by one, and say how fast.

    Raises:
        ValueError: some cannot be read; each one is named.
    """
    sample = Sample(data.source)
    reader = Pipeline(
        sample,
        task_of(config),
        config.data,
        batch_size=1,
        train=split == "train",
        seed=config.seed,
        threads=0,
    )
    wrong = []
    since = time.monotonic()
    for i in range(len(sample)):
        try:
            next(reader.epoch(0, start_step=i))
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    rate = len(sample) / (time.monotonic() - since)
    if wrong:
        way_out = "replace them; --config.data.skip_broken=True goes on without files that are no images"
        raise ValueError(
            "\n".join([f"{len(wrong)} of {len(sample)} images cannot be read; {way_out}", *wrong])
        )
    skipped = "".join(f"\nskipped, for it is no image: {name}" for name in reader.skipped.values())
    return f"{len(sample)} images over the whole split, {rate:,.0f} images/s in one thread{skipped}", sample
