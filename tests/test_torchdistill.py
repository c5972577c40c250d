"""A YAML of the published code is our config, field by field; what it says beyond that is refused by name."""

import copy
import functools
import json
import operator
import re
from pathlib import Path

import pytest
import yaml
from flax.traverse_util import flatten_dict

from tat_jax import experiment, overrides
from tat_jax.configs import r18_r34, r18_r34_kd, torchdistill
from tat_jax.data import eval_resize
from tat_jax.torchdistill import read

TAT = Path(__file__).parent / "torchdistill" / "tat.yaml"
UNLIKE = TAT.with_name("unlike.yaml")
# What says nothing that a student comes to know: names, reports, folders, and how evaluation is fed.
EVALUATION = ("batch_size", "num_workers", "random_sample")
IGNORED = (
    *(
        "datasets.photographs.name",
        "datasets.photographs.root",
        "datasets.images.name",
        "datasets.images.root",
    ),
    *(
        "experiment",
        "ckpt",
        "progress",
        "verbose",
        "inplace",
        "opt_level",
        "pin_memory",
        "find_unused_parameters",
    ),
    *(f"{loader}_data_loader.{name}" for loader in ("val", "test") for name in EVALUATION),
    "forward_hook.input",
)


class Loader(yaml.SafeLoader):
    """Another reader of the same files, for the tests."""


Loader.add_constructor("!join", lambda loader, node: "".join(map(str, loader.construct_sequence(node, True))))


@functools.cache
def tree(file):
    """Return what a file holds, as one would write it without aliases."""
    return json.loads(json.dumps(yaml.load(file.read_text(), Loader)))


def leaves(values, path=()):
    """Yield each value with its path; empty mappings and lists are values, lists of scalars are one."""
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def mappings(values, path=()):
    """Yield the path of each mapping."""
    if isinstance(values, dict):
        yield path
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from mappings(value, (*path, name))


def dotted(path):
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def parts(path):
    """Return the parts of a dotted path."""
    return [int(part[1:]) if part[0] == "[" else part for part in re.findall(r"[^].[]+|\[\d+", path)]


def is_ignored(path):
    return any(f".{dotted(path)}".endswith(f".{name}") for name in IGNORED)


@pytest.fixture
def changed(tmp_path):
    """Return a function that writes a file with some values changed, by dotted path, and returns its path."""

    def write(file=TAT, changes=None):
        values = copy.deepcopy(tree(file))
        for path, value in (changes or {}).items():
            *within, last = parts(path) if isinstance(path, str) else path
            here = functools.reduce(operator.getitem, within, values)
            if value is ...:
                del here[last]
            else:
                here[last] = value
        (tmp_path / "changed.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "changed.yaml"

    return write


@pytest.fixture
def config(changed):
    """Return a function that makes the config of a file with some values changed."""
    return lambda *changes: torchdistill.get_config(str(changed(*changes)))


@pytest.fixture
def text(tmp_path):
    """Return a function that reads a file of the given bytes."""

    def read(content):
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "file.yaml").write_bytes(content)
        return torchdistill.get_config(str(tmp_path / "file.yaml"))

    return read


def flat(config):
    return flatten_dict(config.to_dict(), sep=".")


def differences(config, other):
    """Return the fields in which two configs differ, also by the type of their values."""
    ours, theirs = ({name: repr(value) for name, value in flat(each).items()} for each in (config, other))
    return {name for name in ours | theirs if ours.get(name) != theirs.get(name)}


# What it comes to

# The side from which evaluation cuts is said in the recipe, and follows from the image size here.
# Said as such, which a config leaves to the architecture.
STATISTICS = {f"{which}.{name}" for which in ("student", "teacher") for name in ("mean", "std")}
DIFFERENT = {"gpus", "log_every", "data.root", "data.threads", "data.eval_resize"}


def test_the_recipe_is_that_of_r18_r34_but_for_what_it_says_otherwise():
    config = torchdistill.get_config(str(TAT))
    experiment.check(config)
    assert differences(config, r18_r34.get_config()) == DIFFERENT | STATISTICS
    assert eval_resize(config.data) == eval_resize(r18_r34.get_config().data) == 256
    assert (config.gpus, config.log_every, config.data.threads) == (8, 70, 12)
    assert config.data.root == "/disk/imagenet"


def kd_recipe():
    text = TAT.read_text().replace("alpha: 0.1, beta: 0.0", "alpha: 0.5, beta: 0.5")
    return text.replace("factor: 0.2", "factor: 0.1")


def test_the_recipe_with_kd_is_that_of_r18_r34_kd(text):
    differ = differences(text(kd_recipe()), r18_r34_kd.get_config())
    assert differ == DIFFERENT | STATISTICS


def test_a_file_that_is_indented_but_for_its_first_line_is_read_as_the_published_recipe_with_kd_is(text):
    _, models = kd_recipe().split("\nmodels:", 1)
    first, *rest = ("models:" + models).split("\n")
    slipped = "\n".join([first, *(f"  {line}" for line in rest)])
    with pytest.raises(yaml.YAMLError):
        yaml.load(slipped, Loader)
    assert not differences(text(slipped), text(kd_recipe()))


def test_the_miniature_is_that_of_r18_r34():
    config = torchdistill.get_config(f"{TAT}:smoke")
    experiment.check(config)
    assert differences(config, r18_r34.get_config("smoke")) == {"gpus", "data.root"} | STATISTICS


def test_a_file_of_other_values_gives_them():
    config = torchdistill.get_config(str(UNLIKE))
    experiment.check(config)
    fields = flat(config)
    expected = {
        "epochs": 12,
        "log_every": 5,
        "batch_size": 8 * 48,
        "bn_group": 48,
        "student.architecture": "resnet18",
        "student.weights": "random",
        "teacher.architecture": "resnet50",
        "teacher.weights": "weights/resnet50",
        "losses.cross_entropy.weight": 0.5,
        "losses.kd.weight": 0.0,
        "losses.tat.layer1.weight": 0.0,
        "losses.tat.layer2.weight": 0.0,
        "losses.tat.layer3.weight": 0.5,
        "losses.tat.layer3.heads": 8,
        "losses.tat.layer4.weight": 2.0,
        "losses.tat.layer4.heads": 8,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.1,
        "optimizer.momentum": 0.75,
        "optimizer.nesterov": True,
        "optimizer.weight_decay": 1e-4,
        "optimizer.accumulate": 3,
        "optimizer.clip_norm": 2.0,
        "optimizer.milestones": (8,),
        "optimizer.gamma": 0.5,
        "data.source": "imagefolder",
        "data.root": str(Path.home() / "images"),
        "data.image_size": 176,
        "data.eval_resize": 200,
        "data.crop_scale": (0.25, 1.0),
        "data.crop_ratio": (0.5, 2.0),
        "data.flip": False,
        "data.threads": 0,
    }
    expected |= {
        f"{side}.{name}": value
        for side in ("student", "teacher")
        for name, value in {"mean": (0.5, 0.25, 0.0), "std": (1.0, 1.0, 0.5)}.items()
    }
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("params", "cross_entropy", "kd"),
    [
        ({"alpha": 0.3}, 0.3, 0.7),  # beta is 1 - alpha
        ({"alpha": 0.3, "beta": None}, 0.3, 0.7),
        ({"alpha": 0.3, "beta": 2}, 0.3, 2),
        ({"alpha": 0, "beta": 2}, 0, 1 / 16),  # KL alone, without T² and beta
        ({"alpha": None, "beta": 1}, 0, 1 / 16),
    ],
)
@pytest.mark.parametrize("factor", [1, 0.5, 0, None])
def test_the_kd_loss_has_the_weights_that_the_published_code_gives_it(
    config, params, cross_entropy, kd, factor
):
    term = {"criterion": {"type": "KDLoss", "params": params | {"temperature": 4}}, "factor": factor}
    losses = config(TAT, {"train.criterion.org_term": term}).losses
    factor = factor or 0  # a term without a factor is not added
    assert losses.cross_entropy.weight == factor * cross_entropy
    assert losses.kd.weight == pytest.approx(factor * kd, rel=1e-15)
    assert losses.kd.temperature == 4


def test_what_is_not_said_is_pytorchs_default(config):
    of_sgd = config(UNLIKE, {"train.optimizer": {"type": "SGD", "params": {"lr": 1}}}).optimizer
    assert (of_sgd.momentum, of_sgd.nesterov, of_sgd.weight_decay) == (0, False, 0)
    assert (of_sgd.accumulate, of_sgd.clip_norm) == (1, None)
    of_adamw = config(TAT, {"train.optimizer.params.weight_decay": ...}).optimizer
    assert of_adamw.weight_decay == 0.01
    assert config(TAT, {"train.scheduler.params.gamma": ...}).optimizer.gamma == 0.1
    assert config(TAT, {"train.scheduler": ...}).optimizer.milestones == ()


def test_a_pair_of_taps_of_different_names_is_called_after_the_students(config):
    teacher = {"forward_hook.output": ["model.layer3", "embed_dict.a_key"]}
    teacher["special.params.embedings.a_key.path"] = "model.layer3"
    path = ("train", "criterion", "sub_terms", "attention", "criterion", "params", "feature_pairs", "last")
    embedded = "train.student.special.params.embedings"
    made = config(
        TAT,
        {f"train.teacher.{name}": value for name, value in teacher.items()}
        | {(*path, "teacher", "path"): ["model.layer3", "embed_dict.a_key"]}
        | {f"{embedded}.{name}.out_channels": 256 for name in ("a_query", "a_value")},
    )
    tat = made.losses.tat.layer4
    assert (tat.weight, tat.student_tap, tat.teacher_tap) == (0.2, "layer4", "layer3")


# GPUs and the command line


def parsed(*arguments):
    config = torchdistill.get_config(str(TAT)).lock()
    others, said = overrides.split(arguments, experiment.FIELDS)
    assert others == []
    overrides.apply(config, said, experiment.FIELDS)
    return config


@pytest.mark.parametrize("gpus", [1, 4, 8])
def test_the_batch_is_that_of_one_gpu_times_their_number_whenever_that_is_said(gpus):
    config = parsed(f"--config.gpus={gpus}")
    assert (config.batch_size, config.bn_group) == (256 * gpus, 256)
    assert config.copy_and_resolve_references().to_dict()["batch_size"] == 256 * gpus
    assert json.loads(config.to_json())["batch_size"] == 256 * gpus


def test_fields_can_be_said_on_the_command_line():
    config = parsed(
        "--config.data.root=/elsewhere", "--config.batch_size=64", "--config.losses.kd.weight=0.5"
    )
    assert (config.data.root, config.batch_size, config.losses.kd.weight) == ("/elsewhere", 64, 0.5)
    experiment.check(config)


# Nothing is passed over


@pytest.mark.parametrize("file", [TAT, UNLIKE])
def test_every_value_is_translated_or_refused_or_is_known_to_change_nothing(changed, file):
    as_it_is = read(changed(file))

    def matters(path):
        try:
            return read(changed(file, {path: "nonsense"})) != as_it_is
        except ValueError:
            return True

    of_file = [path for path, _ in leaves(tree(file))]
    assert {dotted(path) for path in of_file if not matters(path)} == {
        *map(dotted, filter(is_ignored, of_file))
    }


@pytest.mark.parametrize("file", [TAT, UNLIKE])
@pytest.mark.parametrize("value", [1, None, [], {}])
def test_every_key_that_is_not_known_is_named_with_its_value_and_line(changed, file, value):
    named_by_user = ("datasets", "splits", "embedings", "sub_terms", "feature_pairs")
    keys = [(*path, "surprise") for path in mappings(tree(file)) if not path or path[-1] not in named_by_user]
    path = changed(file, dict.fromkeys(keys, value))
    with pytest.raises(ValueError, match="no counterpart") as error:
        read(path)
    lines = path.read_text().splitlines()
    for key in map(dotted, keys):
        _, line = str(error.value).split(f" {key}={value!r} (line ")
        assert "surprise" in lines[int(line.split(")")[0]) - 1]


def test_all_that_has_no_counterpart_is_named_at_once(config):
    changes = {"train.student.frozen_modules": ["model.layer1"], "train.optimizer.params.betas": [0.8, 0.9]}
    with pytest.raises(ValueError, match="no counterpart") as error:
        config(TAT, changes)
    assert all(f"{name}={value!r} (line " in str(error.value) for name, value in changes.items())


CRITERION = "train.criterion"
PAIR = f"{CRITERION}.sub_terms.attention.criterion.params.feature_pairs.last"
TRAIN_SPLIT, VAL_SPLIT = (f"datasets.photographs.splits.{split}.params" for split in ("train", "val"))
EMBEDDINGS = "train.student.special.params.embedings"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("datasets.photographs.type", "CocoDetection"),
        (f"{TRAIN_SPLIT}.root", "/disk/imagenet/training"),
        (f"{VAL_SPLIT}.root", "/other/disk/val"),
        (f"{TRAIN_SPLIT}.transform_params[0].params.size", [224, 192]),
        (f"{TRAIN_SPLIT}.transform_params[0].params.interpolation", "bicubic"),
        (f"{TRAIN_SPLIT}.transform_params[1].params.p", 0.25),
        (f"{VAL_SPLIT}.transform_params[0].params.size", [256, 256]),
        (f"{VAL_SPLIT}.transform_params[1].params.size", 192),
        (f"{VAL_SPLIT}.transform_params[3].params.mean", [0.5, 0.5, 0.5]),
        ("models.student_model.name", "mobilenet_v2"),
        ("models.student_model.params.num_classes", 100),
        ("models.student_model.params.pretrained", "yes"),
        ("models.teacher_model.params.pretrained", False),
        ("train.num_epochs", 2.5),
        ("train.num_epochs", ...),
        ("train.stage1", {"num_epochs": 5}),
        ("train.train_data_loader.dataset_id", "another"),
        ("train.train_data_loader.drop_last", True),
        ("train.train_data_loader.random_sample", False),
        ("train.train_data_loader.batch_size", 0),
        ("train.train_data_loader.cache_output", "cache"),
        ("train.val_data_loader.drop_last", True),
        ("test.test_data_loader.dataset_id", "imagenet learnt"),
        ("train.student.frozen_modules", ["model.layer1"]),
        ("train.student.requires_grad", False),
        ("train.student.wrapper", "DataParallel"),
        ("train.student.sequential", ["conv1", "layer1"]),
        ("train.student.special.type", "ChannelSimilarityEmbed"),
        ("train.apex.requires", True),
        ("train.optimizer.type", "Adam"),
        ("train.optimizer.params.lr", "fast"),
        ("train.optimizer.params.lr", True),
        ("train.optimizer.params.amsgrad", True),
        ("train.optimizer.module_wise_params", [{"module": "fc"}]),
        ("train.scheduler.type", "ReduceLROnPlateau"),
        ("train.scheduler.scheduling_step", 100),
        (f"{CRITERION}.type", "CustomLoss"),
        (f"{CRITERION}.org_term.criterion.type", "DKDLoss"),
        (f"{CRITERION}.org_term.criterion.params.reduction", "mean"),
        (f"{CRITERION}.org_term.criterion.params.temperature", 0),
        (f"{CRITERION}.sub_terms.attention.criterion.type", "ATLoss"),
        (f"{CRITERION}.sub_terms.attention.factor", ...),
        (f"{PAIR}.student.io", "input"),
        (f"{PAIR}.student.path", ["model.layer4", "embed_dict.a_query"]),
        (f"{PAIR}.teacher.path", ["model.layer4", "embed_dict.unknown"]),
    ],
)
def test_what_is_otherwise_in_the_published_code_is_refused_with_its_place(config, path, value):
    with pytest.raises(ValueError, match=rf"changed\.yaml: .*{re.escape(path)}") as error:
        config(TAT, {path: value})
    assert str(error.value).isprintable()
    assert "(line " in str(error.value) or value is ...


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            f"{TRAIN_SPLIT}.transform_params[1].type",
            "ColorJitter",
            "but RandomResizedCrop, ColorJitter, ToTensor",
        ),
        ("train.teacher.frozen_modules", [], "trains the teacher"),
        (f"{EMBEDDINGS}.a_query.path", "model.avgpool", "model.avgpool"),
        (f"{EMBEDDINGS}.a_query.path", "model.layer3", "is not hooked"),
        (f"{EMBEDDINGS}.a_query.out_channels", 256, "from 512 channels into 512"),
        (f"{EMBEDDINGS}.a_key", {"io": "output", "path": "model.layer4"}, "neither query nor value"),
        ("train.student.forward_hook.output", ["model.layer4"], f"{PAIR}.student.path"),
    ],
)
def test_what_does_not_fit_together_is_refused(config, path, value, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        config(TAT, {path: value})


def test_two_pairs_of_one_tap_are_refused(config):
    pair = tree(TAT)["train"]["criterion"]["sub_terms"]["attention"]
    with pytest.raises(ValueError, match="layer4 a second time"):
        config(TAT, {f"{CRITERION}.sub_terms.again": pair})


# Read safely


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no mapping"),
        ("- a\n- b", "holds no mapping"),
        ("just a text", "holds no mapping"),
        ("something: else", "models.student_model.name is missing; the file has something"),
        ("a: [1, 2", "is no YAML, line 1: expected ',' or ']'"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \0", "is no YAML"),
        (b"a: \xff\xfe", "is not UTF-8"),
        ("a: 1\nb: 2\na: 3", "line 3: the key a is there twice"),
        ("a: &a {b: 1}\nc:\n  <<: *a", "line 3: '<<' is no text"),
        ("1: a", "line 1: '1' is no text"),
        ("a: *b", "undefined alias"),
        ("a: 2024-01-01", "timestamp is not read"),
        ("a: !!int x", "line 1: 'x' is no int"),
        (
            "\n\na: !!python/object/apply:os.mkdir [/tmp/tat_jax_was_here]",
            "line 3: tag:yaml.org,2002:python/",
        ),
        ("%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system x", "python/name:os.system is not read"),
        ("a: !import_get {key: os.system}", "!import_get is not read"),
        ("a: !getattr [a, b]", "!getattr is not read"),
        ("a: !pathjoin [a, b]", "!pathjoin is not read"),
        ("a: !join text", "!join is not read; !join of a list"),
        ("a: !join [a, [b]]", "!join joins scalars only"),
        ("a: &a [*a]", "an alias in itself"),
        ("a: &a !join [*a]", "an alias in itself"),
        ("- " * 20_000, "too deep"),
        ("a: " + "b" * 200_000, "more than 100,000 bytes"),
        ("a: &a " + "b" * 90_000 + "\nc: !join [" + "*a, " * 1_000 + "x]", "with aliases written out"),
    ],
)
def test_what_is_no_such_file_is_refused_in_a_line(text, content, said):
    with pytest.raises(ValueError, match=r"file\.yaml") as error:
        text(content)
    assert said in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("tag", ["", "!join"])
def test_aliases_of_aliases_end_at_a_bound(text, tag):
    levels = [f"a0: &a0 {tag} [x, x]"]
    levels += [f"a{i}: &a{i} {tag} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    with pytest.raises(ValueError, match="with aliases written out"):
        text("\n".join(levels))


def test_a_file_that_is_missing_or_none_is_refused_in_a_line(tmp_path):
    for path, said in ((tmp_path / "gone.yaml", "is missing"), (tmp_path, "is no file")):
        with pytest.raises(ValueError, match=said):
            torchdistill.get_config(str(path))


def test_control_characters_of_a_file_do_not_reach_the_terminal(text):
    with pytest.raises(ValueError, match="no counterpart") as error:
        text(TAT.read_text() + '"\\e[31m\\n": "\\e[32m"\n')
    assert str(error.value).isprintable()
