"""Student and teacher: `models`, and the sections of `train` that say what of them the losses reach."""

from typing import NamedTuple

from tat_jax.torchdistill.section import Section

EMBEDDED = "embed_dict."  # before the name of an embedding, in a path
# torchvision's names, with the channels of layer4; each layer before it has half of them.
_CHANNELS = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048, "resnet152": 2048}
_TAPS = ("layer1", "layer2", "layer3", "layer4")


class Embedding(NamedTuple):
    """A convolution of `AttnEmbed`: of which tap, and its channels in and out."""

    tap: str
    channels: tuple[int, int]


class Side(NamedTuple):
    """Student or teacher: its network, and what of it the losses can reach."""

    architecture: str
    weights: str
    prefix: str  # of the network's own modules in a path
    hooks: list[str]
    embeddings: dict[str, Embedding]

    def tap(self, path: str) -> str | None:
        """Return the tap that a path leads to, itself or embedded; None where it leads to none."""
        if path not in self.hooks:
            return None
        if path.startswith(EMBEDDED):
            embedding = self.embeddings.get(path.removeprefix(EMBEDDED))
            return embedding.tap if embedding else None
        tap = path.removeprefix(self.prefix)
        return tap if tap in _TAPS and path == self.prefix + tap else None

    def channels(self, tap: str) -> int:
        """Return the channels of a tap."""
        return _CHANNELS[self.architecture] >> (len(_TAPS) - 1 - _TAPS.index(tap))


def student(model: Section, section: Section) -> Side:
    """Return the student, which is trained as a whole.

    Raises:
        ValueError: it is no network or has no embedding that there is here.
    """
    architecture, weights = _network(model)
    section.allow("wrapper", None, "DistributedDataParallel")
    section.allow("requires_grad", True)
    section.allow("frozen_modules", None, [])
    return Side(architecture, weights or "random", *_reach(section, ("query", "value")))


def teacher(model: Section, section: Section) -> Side:
    """Return the teacher.

    Raises:
        ValueError: it is not frozen, its weights are not published ones, or there is no such network here.
    """
    architecture, weights = _network(model)
    if weights is None:
        raise model.section("params").wrong(
            "pretrained",
            f"leaves the teacher to its ckpt: convert that with `python -m tat_jax.convert {architecture} "
            f"--from CKPT --to weights/{architecture}`, and say True",
        )
    section.allow("wrapper", None, "DataParallel", "DistributedDataParallel")  # it has no gradient to share
    side = Side(architecture, weights, *_reach(section))
    frozen = side.prefix.removesuffix(".") in section.several("frozen_modules", str, [])
    if not frozen and section.one_of("requires_grad", True, False):
        raise section.wrong("requires_grad", "trains the teacher, which is frozen here")
    section.allow("requires_grad", True, False)
    return side


def _network(model: Section) -> tuple[str, str | None]:
    """Return the architecture and its published weights; None for random ones."""
    model.ignore("experiment", "ckpt")
    params = model.section("params")
    params.ignore("progress")
    params.allow("num_classes", 1000)
    architecture = model.one_of("name", *_CHANNELS)
    return architecture, f"weights/{architecture}" if params.one_of("pretrained", True, False) else None


def _reach(section: Section, kinds: tuple[str, ...] = ("",)) -> tuple[str, list[str], dict[str, Embedding]]:
    """Return the network's prefix in a path, the modules that are hooked, and the embeddings by name."""
    section.ignore("find_unused_parameters")
    section.allow("sequential", None, [])
    section.allow("adaptations", None, {})
    section.allow("forward_proc", None, "forward_batch_only")
    hook = section.section("forward_hook")
    hook.ignore("input")  # no loss that is read asks for one
    hooks = hook.several("output", str, [])
    special = section.section("special")
    if "type" not in special:
        return "", hooks, {}
    special.one_of("type", "AttnEmbed")
    embeddings = special.section("params").section("embedings")
    found = {}
    for name, embedding in embeddings.sections().items():
        if not any(kind in name for kind in kinds):
            raise embeddings.wrong(name, f"is called neither {' nor '.join(kinds)}")
        found[name] = _embedding(embedding, hooks)
    return "model.", hooks, found


def _embedding(section: Section, hooks: list[str]) -> Embedding:
    section.one_of("io", "output")
    tap = Side("", "", "model.", hooks, {}).tap(section.text("path"))
    if tap is None:
        raise section.wrong("path", f"is not hooked, or none of {', '.join(f'model.{tap}' for tap in _TAPS)}")
    # The published module gives the teacher's tap itself as its key; what it says of channels is not used.
    return Embedding(tap, (section.whole("in_channels", 512), section.whole("out_channels", 128)))
