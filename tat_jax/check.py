"""All that a training needs, tried before it starts: a line for each item, and a picture of its images."""

import jax
from ml_collections import ConfigDict

from tat_jax import inspection, networks, pods, sharding, study, trial, variants
from tat_jax.buckets import Place, place
from tat_jax.data import sample
from tat_jax.items import Failed, Items
from tat_jax.losses import Own
from tat_jax.networks import OwnNetwork
from tat_jax.topology import Pod
from tat_jax.weights import folders


def run(
    config: ConfigDict,
    folder: str | Place,
    *,
    student: OwnNetwork | None = None,
    teacher: OwnNetwork | None = None,
    losses: Own | None = None,
    pod: Pod | None = None,
    price: float | None = None,
) -> bool:
    """Check all that training `config` in `folder` needs, first steps included; of a study, every training.

    Prints a line for each item as it goes. One that fails leaves out only those that need it, so that one
    call finds all that is wrong. The teachers of a study are random here until they are trained. All that is
    written is a picture, `check.png` in the folder: training crops with their labels, of a study those of its
    first training.

    Args:
        config: as the functions in `configs/` return it.
        folder: of the run, on this machine or in a bucket; of a study its teachers' are looked at alone.
        student: a network of your own instead of the config's, as in `train.run`.
        teacher: likewise.
        losses: further terms of the loss, as in `train.run`.
        pod: of TPUs, for which the steps are compiled instead of being taken; no image is read.
        price: US dollars an hour for one of its chips.

    Returns:
        Whether all items hold.
    """

    def check(training: ConfigDict, folder: Place | None, draw_in: Place | None) -> bool:
        if pod:
            return _check_for_pod(training, pod, price, student, teacher, losses)
        return _check(training, folder, draw_in, student, teacher, losses)

    if "study" not in config:
        return check(config, place(folder), None)
    variants.check(config)
    here, teachers = study.folder_of(folder), variants.teachers_of(config)
    students = {name: of_seeds[0] for name, of_seeds in variants.students_of(config, here).items()}
    trainings = teachers | students
    untrained = [str(here / name) for name in teachers if not folders.steps(here / name)]
    for training in trainings.values():
        if training.teacher.weights in untrained:
            training.teacher.weights = networks.RANDOM
    hold: list[bool] = []
    for name, training in trainings.items():
        if jax.process_index() == 0:
            print(f"study, {name}:", flush=True)
        hold.append(check(training, None, None if hold else here))
    return all(hold)


def _check(
    config: ConfigDict,
    folder: Place | None,
    draw_in: Place | None,
    student: OwnNetwork | None,
    teacher: OwnNetwork | None,
    losses: Own | None,
) -> bool:
    mesh = sharding.make_mesh()
    items = Items()
    checked = items.check("config", inspection.check_config, config, losses)
    if folder:
        draw_in = items.check("folder", inspection.describe_folder, checked, folder)
    devices = items.check("devices", inspection.describe_devices, config, mesh)
    train_data = items.check("training data", sample.open_data, config, "train")
    train_sample = items.check("training sample", sample.read_sample, config, train_data, "train")
    if draw_in:
        items.check("picture", inspection.draw_crops, train_data, train_sample, draw_in)
    eval_data = items.check("validation data", sample.open_data, config, "val")
    eval_sample = items.check("validation sample", sample.read_sample, config, eval_data, "val")
    # Weights can be read without the data; only the head depends on its classes.
    classes = None if isinstance(train_data, Failed) else train_data.source.num_classes
    learner = items.check("student", inspection.inspect_student, config, classes, student)
    master = items.check("teacher", inspection.inspect_teacher, config, classes, teacher, losses)
    measure = f"teacher's {inspection.title_of_measure(config)}"
    items.check(measure, inspection.measure_teacher, config, master, eval_sample, mesh)
    built = items.check(
        "task", inspection.build_training, checked, train_data, learner, master, losses, mesh, folder
    )
    items.check("taps", inspection.describe_taps, config, built, learner, master)
    reading = items.check("reading", trial.time_reading, config, train_data)
    few = items.check("first look", trial.look, config, built, reading, devices)
    step = items.check("memory", trial.compile_step, built, reading, devices)
    first = items.check("loss at step 0", trial.take_first_step, config, built, step, few)
    items.check("time", trial.time_steps, config, train_data, reading, step, first)
    return items.hold()


def _check_for_pod(
    config: ConfigDict,
    pod: Pod,
    price: float | None,
    student: OwnNetwork | None,
    teacher: OwnNetwork | None,
    losses: Own | None,
) -> bool:
    items = Items()
    checked = items.check("config", inspection.check_config, config, losses)
    place = items.check("pod", pods.describe_pod, config, pod)
    data = items.check("data", pods.find_data, config)
    learner = items.check("student", pods.inspect_student, config, data, student)
    master = items.check("teacher", pods.inspect_teacher, config, data, teacher, losses)
    built = items.check("task", pods.build_training, checked, data, learner, master, losses)
    step = items.check("training step", pods.compile_step, config, data, built, place)
    evaluation = items.check("evaluation step", pods.compile_evaluation, config, data, built, place)
    items.check("time", pods.reckon, config, place, data, step, evaluation, price)
    items.check("largest batch", pods.find_largest_batch, config, built, place, data, step)
    return items.hold()
