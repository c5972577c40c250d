"""`optimizer` and `scheduler`; what they do not say is PyTorch's default.

Rates are taken as they stand: the authors' script, too, keeps torchdistill from multiplying them by the GPUs.
"""

from typing import Any

from tat_jax.torchdistill.section import Section


def optimizer(section: Section) -> dict[str, Any]:
    """Return the fields of the optimiser.

    Raises:
        ValueError: there is no such optimiser here.
    """
    section.allow("module_wise_params", None, [])
    fields: dict[str, Any] = {"accumulate": section.whole("grad_accum_step", 1)}
    if "max_grad_norm" in section:
        fields["clip_norm"] = section.number("max_grad_norm")
    section.allow("max_grad_norm", None)
    params = section.section("params")
    fields["learning_rate"] = params.number("lr")
    if section.one_of("type", "AdamW", "SGD") == "AdamW":
        params.allow("betas", [0.9, 0.999])
        params.allow("eps", 1e-8)
        params.allow("amsgrad", False)
        return fields | {"name": "adamw", "weight_decay": params.number("weight_decay", 0.01)}
    params.allow("dampening", 0, 0.0)
    return fields | {
        "name": "sgd",
        "weight_decay": params.number("weight_decay", 0.0),
        "momentum": params.number("momentum", 0.0),
        "nesterov": "nesterov" in params and params.one_of("nesterov", True, False),
    }


def schedule(section: Section) -> dict[str, Any]:
    """Return the fields of the rate's schedule by epoch; without one the rate stays as it is.

    Raises:
        ValueError: there is no such schedule here; cosine and polynomial go by step here, by epoch there.
    """
    section.allow("scheduling_step", None, 0)
    if "type" not in section:
        return {"schedule": "multistep", "milestones": ()}
    section.one_of("type", "MultiStepLR")
    params = section.section("params")
    params.allow("last_epoch", -1)
    params.ignore("verbose")
    return {
        "schedule": "multistep",
        "milestones": tuple(params.several("milestones", int)),
        "gamma": params.number("gamma", 0.1),
    }
