"""Choose TaT's weight for `compare_cifar100:short`: none is published for CIFAR-100.

    main.py --config tat_weight_cifar100 --config.data.source=imagefolder --config.data.root=ROOT

One seed, which the study does not have. That with the best top-1 on held-out images is taken.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base, compare_cifar100

WEIGHTS = (0.1, 1.0, 10.0, 100.0)
SEED = 9


def get_config(argument: str = "") -> ConfigDict:
    """Return a study whose students differ in the weight of TaT."""
    config = compare_cifar100.get_config(",".join(("short", "tat", *filter(None, [argument]))))
    student = config.study.students.tat.to_dict()
    tat = student["losses"]["tat"]["last"]
    students = {
        f"tat_{weight:g}".replace(".", "_"): student | {"losses": {"tat": {"last": tat | {"weight": weight}}}}
        for weight in WEIGHTS
    }
    config.study = base.study(seeds=(SEED,), students=students, teachers=config.study.teachers)
    return config
