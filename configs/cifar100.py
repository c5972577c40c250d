"""CIFAR-100 by the common protocol: a network alone, or a pair of networks and the method between them.

    main.py --config cifar100:resnet32x4 --workdir runs/cifar100/resnet32x4   # a teacher, or a student alone
    main.py --config cifar100:resnet32x4-resnet8x4,dkd                        # under that teacher

The protocol is RepDistiller's, which mdistiller and those after it follow: 240 epochs of SGD with momentum
0.9 and weight decay 5e-4 of every parameter, 0.05 (0.01 for MobileNetV2 and ShuffleNets) times 0.1 after
epochs 150, 180 and 210, batches of 64 and the last one of 16, crops of images padded by 4, flips. Methods
have their published weights; where none is published for a pair, the one that the authors use most. TaT has
no published recipe for CIFAR: ours is cross-entropy and TaT on the last map, in which the teacher's positions
ask where the grids differ.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tat_jax.configs import base
from tat_jax.schedules import linear


class Pair(NamedTuple):
    """A teacher and a student, and what is published of methods for the two.

    Attributes:
        teacher: its architecture.
        student: its architecture.
        rise: epochs over which mdistiller lets DKD and ReviewKD rise, of the protocol's 240.
        negatives: of CRD, for each image.
        dkd: β of DKD.
        review: the weight of ReviewKD.
        tat: the weight of TaT, of which none is published.
        catkd: weight, resolution and normalisation of CAT-KD.
        kd_standardized: temperature and weight of KD of standardised logits.
        dkd_standardized: temperature, weight and β of DKD of standardised logits.
    """

    teacher: str
    student: str
    rise: int = 20
    negatives: int = 16_384
    dkd: float = 8.0
    review: float = 5.0
    tat: float = 1.0
    catkd: tuple[float, int, bool] = (15.0, 2, False)
    kd_standardized: tuple[float, float] = (2.0, 9.0)
    dkd_standardized: tuple[float, float, float] = (2.0, 9.0, 8.0)

    @property
    def name(self) -> str:
        """Return what a config calls it."""
        return f"{self.teacher}-{self.student}"


_PAIRS = (
    Pair("wrn_40_2", "wrn_16_2", dkd=6.0, catkd=(12.0, 2, False), dkd_standardized=(2.0, 12.0, 2.0)),
    Pair("wrn_40_2", "wrn_40_1", dkd=6.0, catkd=(1.5, 2, False), dkd_standardized=(2.0, 12.0, 2.0)),
    Pair(
        "resnet56", "resnet20", dkd=2.0, review=0.6, catkd=(0.7, 2, False), dkd_standardized=(3.0, 18.0, 2.0)
    ),
    Pair("resnet110", "resnet20", dkd=2.0, kd_standardized=(4.0, 12.0), dkd_standardized=(2.0, 15.0, 2.0)),
    Pair(
        "resnet110", "resnet32", dkd=2.0, review=1.0, catkd=(1.8, 2, False), dkd_standardized=(2.0, 15.0, 2.0)
    ),
    Pair("resnet32x4", "resnet8x4"),
    Pair(
        "vgg13",
        "vgg8",
        dkd=6.0,
        catkd=(4.5, 2, False),
        kd_standardized=(3.0, 9.0),
        dkd_standardized=(2.0, 15.0, 2.0),
    ),
    Pair(
        "vgg13",
        "cifar_mobilenet_v2",
        dkd=6.0,
        catkd=(15.0, 2, True),
        kd_standardized=(3.0, 9.0),
        dkd_standardized=(3.0, 9.0, 2.0),
    ),
    Pair(
        "cifar_resnet50",
        "cifar_mobilenet_v2",
        catkd=(40.0, 2, True),
        kd_standardized=(3.0, 1.0),
        dkd_standardized=(2.0, 15.0, 2.0),
    ),
    Pair("cifar_resnet50", "vgg8"),
    Pair("resnet32x4", "shufflenet_v1", catkd=(600.0, 4, True)),
    Pair("resnet32x4", "shufflenet_v2", review=8.0, catkd=(600.0, 4, True)),
    Pair("wrn_40_2", "shufflenet_v1", catkd=(80.0, 4, True)),
)
DEFAULT = "resnet32x4-resnet8x4"
PAIRS: Mapping[str, Pair] = {pair.name: pair for pair in _PAIRS}
# Stages after the stem, whose maps are taps; the others have three.
_STAGES = {"vgg8": 4, "vgg13": 4, "cifar_mobilenet_v2": 4, "cifar_resnet50": 4}
_SMALLER = ("cifar_mobilenet_v2",)  # whose last maps have fewer positions than their teachers'
_LIGHT = ("cifar_mobilenet_v2", "shufflenet_v1", "shufflenet_v2")


def _stages(network: str) -> tuple[str, ...]:
    return tuple(f"stage{i + 1}" for i in range(_STAGES.get(network, 3)))


def _last(pair: Pair) -> dict[str, str]:
    """Return the taps of the last maps of both networks."""
    return {"student_tap": _stages(pair.student)[-1], "teacher_tap": _stages(pair.teacher)[-1]}


def _every(pair: Pair) -> dict[str, tuple[str, ...]]:
    return {"student_taps": _stages(pair.student), "teacher_taps": _stages(pair.teacher)}


def _reviewed(pair: Pair) -> dict[str, tuple[str, ...]]:
    before_relu = tuple(f"{stage}_preact" for stage in _stages(pair.teacher))
    return {
        "student_taps": (*_stages(pair.student), "pooled"),
        "teacher_taps": (*before_relu, "pooled"),
    }


def _risen(weight: float, pair: Pair) -> dict[str, Any] | float:
    """Return mdistiller's weight · min(epoch / rise, 1), whose first epoch is 1."""
    return linear(weight / pair.rise, weight, end=pair.rise - 1) if pair.rise > 1 else weight


def _kd_standardized(pair: Pair) -> dict[str, Any]:
    temperature, weight = pair.kd_standardized
    kd = {"weight": weight, "temperature": temperature, "standardize": True}
    return {"cross_entropy": {"weight": 0.1}, "kd": kd}


def _dkd_standardized(pair: Pair) -> dict[str, Any]:
    temperature, weight, beta = pair.dkd_standardized
    dkd = {"weight": _risen(weight, pair), "beta": beta, "temperature": temperature, "standardize": True}
    return {"dkd": dkd}


def _tat(pair: Pair) -> dict[str, Any]:
    asks = "teacher" if pair.student in _SMALLER else "student"
    return {"tat": {"last": {"weight": pair.tat, "asks": asks, **_last(pair)}}}


def _catkd(pair: Pair) -> dict[str, Any]:
    weight, resolution, normalize = pair.catkd
    return {"catkd": {"weight": weight, "resolution": resolution, "normalize": normalize}}


def _simkd(pair: Pair) -> dict[str, Any]:
    last = {"teacher_tap": _stages(pair.teacher)[-1]}
    return {"cross_entropy": {"weight": 0.0}, "simkd": {"weight": 1.0, **last}}


# What differs of the losses from cross-entropy alone.
METHODS: Mapping[str, Callable[[Pair], dict[str, Any]]] = {
    "kd": lambda pair: {"cross_entropy": {"weight": 0.1}, "kd": {"weight": 0.9, "temperature": 4.0}},
    "fitnet": lambda pair: {"fitnet": {"stage2": {"weight": 100.0}}},
    "at": lambda pair: {"at": {"weight": 1000.0, **_every(pair)}},
    "sp": lambda pair: {"sp": {"weight": 3000.0, **_last(pair)}},
    "crd": lambda pair: {"crd": {"weight": 0.8, "negatives": pair.negatives}},
    "cc": lambda pair: {"cc": {"weight": 0.02}},
    "vid": lambda pair: {"vid": {"weight": 1.0, **_every(pair)}},
    "rkd": lambda pair: {"rkd": {"weight": 1.0}},
    "pkt": lambda pair: {"pkt": {"weight": 30_000.0}},
    "review": lambda pair: {"review": {"weight": _risen(pair.review, pair), **_reviewed(pair)}},
    "dkd": lambda pair: {"dkd": {"weight": _risen(1.0, pair), "beta": pair.dkd}},
    "dist": lambda pair: {"dist": {"weight": 2.0}},
    "nkd": lambda pair: {"nkd": {"weight": 1.0}},
    "kd_standardized": _kd_standardized,
    "dkd_standardized": _dkd_standardized,
    "ickd": lambda pair: {"ickd": {"weight": 2.5, **_last(pair)}},
    "simkd": _simkd,
    "catkd": _catkd,
    "tat": _tat,
}
# Channels of the teachers' last maps.
_CHANNELS = {"wrn_40_2": 128, "resnet32x4": 256, "vgg13": 512, "cifar_resnet50": 2048}
# What differs of the student: methods that give it another head.
STUDENTS: Mapping[str, Callable[[Pair], dict[str, Any]]] = {
    "simkd": lambda pair: {"projected": _CHANNELS.get(pair.teacher, 64)},
    "catkd": lambda pair: {"head_bias": False},
}


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment NETWORK or PAIR,METHOD; with `,smoke` behind it, or `smoke` alone, its miniature.

    Raises:
        ValueError: there is no such pair or method.
    """
    named, _, rest = argument.removesuffix("smoke").rstrip(",").partition(",")
    smoke = "smoke" if argument.endswith("smoke") else ""
    if not rest and "-" not in named and named:
        return protocol(named, smoke)
    pair, method = find_pair(named or DEFAULT), rest or "kd"
    check_method(method)
    pair = small(pair) if smoke else pair
    config = protocol(pair.student, smoke)
    config.teacher.architecture = pair.teacher
    config.teacher.weights = "random" if smoke else f"runs/cifar100/{pair.teacher}"
    config.student.update(student_of(pair, method))
    base.update_losses(config, METHODS[method](pair))
    return config


def student_of(pair: Pair, method: str) -> dict[str, Any]:
    """Return the fields of the student of a pair as a method has it."""
    return {"architecture": pair.student, **STUDENTS.get(method, lambda pair: {})(pair)}


def protocol(student: str, argument: str = "") -> ConfigDict:
    """Return the common protocol, by which a network learns alone; `smoke` is its miniature."""
    config = base.base()
    config.epochs = 240
    config.batch_size = 64
    config.eval_every = 10
    config.student.architecture = config.teacher.architecture = student
    config.data.update({"source": "cifar100", "root": "data/cifar100", "crop_padding": 4, "threads": 2})
    config.optimizer.update(
        {
            "name": "sgd",
            "learning_rate": learning_rate(student),
            "weight_decay": 5e-4,
            "milestones": (150, 180, 210),
        }
    )
    config = base.finish(config, argument)
    config.data.update({"image_size": 32, "eval_resize": 32})
    if argument == "smoke":
        config.data.crop_padding = None  # of digits, which are smaller than their crops
    return config


def learning_rate(student: str) -> float:
    """Return the first learning rate of a network."""
    return 0.01 if student in _LIGHT else 0.05


def find_pair(name: str) -> Pair:
    """Return a pair by its name.

    Raises:
        ValueError: there is none.
    """
    if name not in PAIRS:
        raise ValueError(f"no pair {name!r} of CIFAR-100; there are {', '.join(PAIRS)}")
    return PAIRS[name]


def small(pair: Pair) -> Pair:
    """Return a pair as a miniature of one epoch and few images has it."""
    return pair._replace(rise=1, negatives=8)


def check_method(name: str) -> None:
    """Raise a ValueError unless there is such a method."""
    if name not in METHODS:
        raise ValueError(f"no method {name!r}; there are {', '.join(METHODS)}")
