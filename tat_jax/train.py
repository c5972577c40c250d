"""One training run: from a config to a folder of checkpoints, metrics and a picture."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from tat_jax import costs, experiment, mirror, pictures, provenance, run_folder, sharding
from tat_jax.batch import Batch
from tat_jax.buckets import Place, place
from tat_jax.checkpoints import Restored, RunCheckpoints, read_provenance
from tat_jax.data.source import class_names, some
from tat_jax.distill import Metrics, TrainState, student_views
from tat_jax.evaluate import Evaluation, Stopped, open_evaluator
from tat_jax.gallery import Gallery
from tat_jax.losses import Own
from tat_jax.metrics import MetricWriter, Row, StepLog, is_evaluation, last_and_best, progress, read_rows
from tat_jax.networks import OwnNetwork
from tat_jax.parts import Parts, open_parts
from tat_jax.position import Position
from tat_jax.signals import Interrupted, StopSignals
from tat_jax.step import FlatState, TrainStep, flatten_state, places_of
from tat_jax.summary import opening, summarize
from tat_jax.usage import as_json, usage_of


def run(
    config: ConfigDict,
    folder: str | Place,
    *,
    student: OwnNetwork | None = None,
    teacher: OwnNetwork | None = None,
    losses: Own | None = None,
) -> dict[str, Row]:
    """Train the student of `config` in `folder`, continuing where an earlier run of the same config stopped.

    The order within an epoch is fixed: steps, evaluation, log, checkpoint. So a checkpoint lacks nothing of
    what its step did, and what was logged after the latest one is dropped and done again.

    Args:
        config: as the functions in `configs/` return it.
        folder: where the run lives, on this machine or in a bucket.
        student: a network of your own instead of the config's: called as `student(images, train=…, where=…)`
            it returns logits and sows its taps; a `View` says of another what it is called with and returns.
            Or a function that builds one, called as `build(num_classes=…, rngs=…)`.
        teacher: likewise.
        losses: further terms of the loss by name, each with its weight, a number or a schedule: a `Loss`, or
            a function of the student's outputs, the teacher's and the batch.

    Returns:
        The rows of the evaluation after the `last` epoch and after the `best` (of equal ones, the later).

    Raises:
        FileNotFoundError: data or weights are missing.
        ValueError: the config is no training, or not that of `folder`, or another run is at work there.
        OSError: the folder cannot be written.
        FloatingPointError: a loss term or the gradient is not finite, more often than `steps_left_out`.
        Interrupted: SIGINT or SIGTERM came.
    """
    parts = open_parts(config, student=student, teacher=teacher, losses=losses)
    with Training(config, place(folder), parts, StopSignals()) as training:
        while not training.is_done():
            for batch in training.batches():
                training.take_step(batch)
                training.save_if_asked()
            if training.is_evaluation_due():
                training.log_and_save(training.evaluate())
        return training.finish()


class Training:
    """A run at work, and all that it holds open.

    Args:
        config: of the run.
        place: where it lives.
        parts: what the config says, opened.
        signals: that stop it, and whichever else is at work with it.
    """

    def __init__(self, config: ConfigDict, place: Place, parts: Parts, signals: StopSignals):
        mesh, built, data, eval_data, held_out = parts
        self._config, self._place, self._mesh, self._built = config, place, mesh, built
        self._data, self._eval_data, self._signals = data, eval_data, signals
        self._show = jax.process_index() == 0
        self._evaluator = open_evaluator(config, eval_data, mesh, built, held_out)
        self._step_fn = TrainStep(built.recipe, mesh, built.teacher)
        self._agreement = sharding.Agreement(mesh)
        source = data.source
        made_of = class_names(source), built.teacher_digest, len(eval_data.source)
        self._provenance = provenance.provenance_of(*made_of)
        self._usage = usage_of(config, built.student, source)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Training":
        """Lock the folder, and continue from its latest checkpoint if there is one."""
        config, place = self._config, self._place
        of_config = run_folder.changes(config, place, experiment.FIELDS)
        with contextlib.ExitStack() as opened:
            work = opened.enter_context(mirror.work_in(place))
            folder, self._folder, self._check_is_there = work.folder, work.folder, work.check
            self._checkpoints = opened.enter_context(RunCheckpoints(folder, is_shared=work.is_shared))
            opened.enter_context(self._signals)
            for data in (self._data, self._eval_data, self._evaluator):
                opened.callback(data.close)
            of_parts = provenance.changes(read_provenance(folder), self._provenance, place)
            restored = self._restore()
            if not (of_config and self.is_done()):  # nothing is trained with what changed
                run_folder.write_config(config, folder, self._position.step, changed=bool(of_config))
            if self._show:
                (folder / "usage.json").write_bytes(as_json(self._usage))
                costs.note(folder, **costs.parameters(self._built.state))
                print(self._summary(restored, of_config + of_parts), flush=True)
                pictures.draw_images(self._data, self._eval_data, folder / "images.png")
            of_networks = self._built.recipe, self._built.teacher
            self._gallery = Gallery(folder, self._eval_data, *of_networks, self._mesh, show=self._show)
            writes = self._show or not work.is_shared
            self._bar = opened.enter_context(
                progress(
                    config.epochs * self._position.epoch_images,
                    initial=self._position.images,
                    description=place.name,
                    show=self._show,
                )
            )
            self._writer = opened.enter_context(
                MetricWriter(folder, self._position.step, evaluated=self._evaluated, active=writes)
            )
            self._log = StepLog(
                self._writer,
                self._bar,
                config.log_every,
                terms=[term.name for term in self._built.terms],
                describe=self._describe,
                leave_out=config.steps_left_out,
                position=restored.position.get("log") if restored else None,
            )
            self._note_saved()
            self._open = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.__exit__(*error)

    def _restore(self) -> Restored | None:
        """Take up the latest checkpoint, or the beginning.

        Raises:
            ValueError: it is of other images.
        """
        images = len(self._data.source)
        # Whole, as it is saved: one process may have to write it, and other devices to go on from it.
        restored = self._checkpoints.restore(self._whole(self._built.state))
        if restored and restored.position["images"] != images:
            there = f"{self._place} was trained on {restored.position['images']:,} images"
            raise ValueError(f"{there}, and data.root holds {images:,} now")
        state = restored.state if restored else self._built.state
        state = sharding.resharded(state, places_of(state, self._mesh))
        self._read_state: Callable[[], TrainState] = flatten_state(state)
        step, steps_per_epoch = int(state.step), self._data.steps_per_epoch
        self._position = Position(step, steps_per_epoch, images, self._config.batch_size)
        first = self._built.recipe.task.evaluates_first
        self._evaluated = restored.position["evaluated"] if restored else not first
        if restored and not restored.can_go_on and self._position.step < self._last_step:
            kept = f"{self._place} kept its networks alone (keep='networks')"
            raise ValueError(f"{kept} and cannot go on; choose another --workdir")
        if self.is_done() and not self._last_evaluation_is_logged():
            self._evaluated = False
        return restored

    def _last_evaluation_is_logged(self) -> bool:
        return self._position.step in [row["step"] for row in read_rows(self._folder) if is_evaluation(row)]

    @property
    def state(self) -> TrainState:
        """Return what is trained, as it is after the steps so far."""
        return self._read_state()

    @property
    def step(self) -> int:
        """Return how many steps are taken."""
        return self._position.step

    @property
    def _last_step(self) -> int:
        return self._config.epochs * self._position.steps_per_epoch

    def is_done(self) -> bool:
        """Return whether all steps are taken and evaluated."""
        return self._position.step >= self._last_step and self._evaluated

    def is_evaluation_due(self) -> bool:
        """Return whether the steps so far wait for their evaluation."""
        return not self._evaluated

    def batches(self) -> Iterator[Batch]:
        """Yield what is left of the epoch; nothing where it is its evaluation that is left."""
        if self._evaluated:
            position = self._position
            rows = self._data.epoch(position.epoch, start_step=position.batch)
            yield from sharding.put_batches(rows, self._mesh)

    def take_step(self, batch: Batch) -> None:
        """Take a step, and log the one before; see `count_step`."""
        read_state = self._read_state
        before = read_state if isinstance(read_state, FlatState) else flatten_state(read_state())
        with jax.transfer_guard("disallow"):  # all that a step needs is on the devices
            after, metrics = self._step_fn(before, batch)
        self.count_step(after, metrics)

    def count_step(self, read_state: Callable[[], TrainState], metrics: Metrics) -> None:
        """Go on from the state after a step, and log the step before.

        Args:
            read_state: returns that state, and is asked where it is evaluated, saved or trained further.
            metrics: what the step measured.

        Raises:
            FloatingPointError: a loss or the gradient of the step before is not finite.
        """
        self._read_state = read_state
        self._signals.listen()
        before, self._position = self._position, self._position.after()
        self._log.add(metrics, before.step, images=self._position.images - before.images)
        ends_epochs = self._position.step % (self._config.eval_every * self._position.steps_per_epoch) == 0
        self._evaluated = self._position.step < self._last_step and not ends_epochs

    def save_if_asked(self) -> None:
        """Save where a signal came or a checkpoint is overdue.

        Raises:
            Interrupted: it was a signal.
            OSError: a checkpoint could not be written.
        """
        stop, overdue = self._wishes()
        if stop or (overdue and self._evaluated):
            self.save()
        if stop:
            raise self._interrupted(stop)
        self._checkpoints.check()

    def evaluate(self) -> Evaluation:
        """Evaluate the student.

        Raises:
            Interrupted: a signal came meanwhile.
        """
        self._signals.listen()  # of a run that continues with its evaluation
        self._log.flush()
        try:
            found = {
                name: self._evaluator(
                    *view,
                    self.state,
                    show=self._show,
                    stop_signal=lambda: self._wishes()[0],
                )
                for name, view in student_views(self._built.recipe, self.state).items()
            }
            return found[""].with_ema(found["ema"]) if "ema" in found else found[""]
        except Stopped as stopped:
            self.save()
            raise self._interrupted(*stopped.args) from None

    def log_and_save(self, evaluation: Evaluation) -> None:
        """Write the row of an evaluation, and the checkpoint that goes with it."""
        self._evaluated = True
        step, epoch, skipped = self._position.step, self._position.epoch, len(self._data.skipped)
        row = {f"eval/{name}": value for name, value in evaluation.measures.items()}
        self._writer.write(step, row | {"epoch": epoch, "skipped": skipped})
        if self._show:
            self._bar.write(f"{self._place.name}: epoch {epoch}/{self._config.epochs}  {evaluation}")
            if skipped:
                self._bar.write(f"  {skipped} unreadable training images skipped")
        self.save(evaluation.measures)
        # After the save, which a picture that cannot be drawn must not cost.
        self._gallery.draw(*student_views(self._built.recipe, self.state)[""])
        if self.is_done():
            self._gallery.draw_confusion(evaluation)

    def finish(self) -> dict[str, Row]:
        """Draw the run, keep of it what is asked for, and return its last and its best evaluation."""
        rows, task = read_rows(self._folder), self._built.recipe.task
        if self._show:
            costs.note(self._folder, step_memory=self._step_fn.memory)
            terms = [term.name for term in self._built.terms]
            pictures.plot_run(rows, self._folder / "curves.png", terms, task)
        if self._config.keep == "networks":
            self._checkpoints.drop_training()
        return last_and_best(rows, f"eval/{task.best}")

    def _wishes(self) -> list[int]:
        """Return the signal that any process received, and whether any finds a checkpoint overdue."""
        overdue = time.monotonic() - self._saved_at > 60 * self._config.checkpoint_minutes
        return self._agreement((self._signals.received, overdue))

    def save(self, measures: dict[str, float] | None = None) -> None:
        """Save a checkpoint, with the measures of its evaluation if any, unless it is there.

        Raises:
            OSError: it could not be written, or the one before.
        """
        self._log.flush()
        if self._position.step != self._saved_step or measures:
            self._writer.sync()
            self._check_is_there()
            position = self._position
            where = {"epoch": position.epoch, "batch": position.batch, "images": position.epoch_images}
            self._checkpoints.save(
                self._whole(self.state),
                arguments=self._built.student.arguments,
                usage=self._usage,
                provenance=self._provenance,
                position=where | {"evaluated": self._evaluated, "log": self._log.position},
                metrics=measures,
            )
        self._note_saved()

    def _whole(self, state: TrainState) -> TrainState:
        return sharding.resharded(state, sharding.everywhere(state, self._mesh))

    def _note_saved(self) -> None:
        self._saved_step, self._saved_at = self._position.step, time.monotonic()

    def _interrupted(self, number: int) -> Interrupted:
        return Interrupted(f"stopped at step {self._position.step} of {self._last_step}", number)

    def _describe(self, step: int) -> str:
        """Say what a step was made of, where a run that ends with it stands, and what to do."""
        names = self._data.names(*divmod(step, self._position.steps_per_epoch))
        if set(names) <= set(self._data.skipped.values()):
            return f"none of its images could be read; replace or remove them: {some(names)}"
        path = self._folder / f"step{step}_process{jax.process_index()}_images.txt"
        path.write_bytes(os.fsencode("\n".join(names) + "\n"))  # of whatever bytes files are named
        saved = self._checkpoints.latest_step()
        return (
            f"its images: {', '.join(names[:3])}{' …' * (len(names) > 3)}, all {len(names)} in {path}. "
            f"{'Nothing was saved before' if saved is None else f'The checkpoint of step {saved} is kept'}. "
            "Look at the images, lower optimizer.learning_rate in another --workdir, or go on without some "
            "such steps: --config.steps_left_out=10"
        )

    def _describe_start(self, restored: Restored | None) -> str:
        if self.is_done():
            return f"is finished, all {self._last_step:,} steps of it"
        return f"continues from step {self._position.step}" if restored else "starts"

    def _summary(self, restored: Restored | None, differences: list[str]) -> str:
        start = f"{self._place}: {self._describe_start(restored)}"
        first = opening(start, restored, differences, is_done=self.is_done())
        return "\n".join(
            [*first, *summarize(self._config, self._built, self._data, self._eval_data, self._mesh)]
        )
