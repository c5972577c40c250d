"""The published training step of semantic segmentation in PyTorch, written from the formulas.

Nothing here comes from `tat_jax` or from the published code.
"""

import math
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from proofs.torch_step import TorchEmbedding, take_step, tat_loss

IGNORED = 255
CHANNELS = 256  # of the decoders' maps
DROPOUTS = (0, 0.5, 0.1)  # of both networks: that behind the pyramid is left out


class TorchSegmentation(nn.Module):
    """What is trained: the student, query and value of its decoder's map, and key of the teacher's."""

    def __init__(self, student):
        super().__init__()
        self.student = student
        self.query, self.key, self.value = (TorchEmbedding(CHANNELS, CHANNELS, 1) for _ in range(3))

    def forward(self, images, told):
        """Return logits, and query, key and value, normalised over one image at a time."""
        logits, taps = self.student(images, taps=True)
        maps = ((self.query, taps["decoder"]), (self.key, told), (self.value, taps["decoder"]))
        return logits, *(torch.cat([embed(x[None]) for x in batch]) for embed, batch in maps)

    def groups(self, learning_rate):
        """Return the groups of parameters: ASPP and decoder at ten times the rate."""
        student = self.student
        heads = [*student.aspp.parameters(), *student.decoder.parameters()]
        embeddings = [p for module in (self.query, self.key, self.value) for p in module.parameters()]
        return [
            {"params": [*student.backbone.parameters()], "lr": learning_rate},
            {"params": heads, "lr": 10 * learning_rate},
            {"params": embeddings, "lr": learning_rate},
        ]


def patch_group_loss(query, key, value, target, patches, groups):
    """Return the TaT loss whose tokens are the pixels of a patch, and whose heads are groups of patches.

    Of n × m patches of ⌊H/n⌋ × ⌊W/m⌋ pixels, row by row, the channels stand one after the other.
    """
    height, width = (size // count for size, count in zip(target.shape[2:], patches, strict=True))

    def stack(x):
        rows, columns = x.shape[2] // height, x.shape[3] // width
        x = x[:, :, : rows * height, : columns * width]
        return rearrange(x, "b c (r h) (s w) -> b (r s c) h w", h=height, w=width)

    return tat_loss(stack(query), stack(key), stack(value), stack(target), groups)


def anchor_loss(query, key, value, target, anchors):
    """Return the TaT loss of one head between means of blocks of ⌊H/h⌋ × ⌊W/w⌋ pixels."""
    block = tuple(size // count for size, count in zip(target.shape[2:], anchors, strict=True))
    query, key, value, target = (functional.avg_pool2d(x, block) for x in (query, key, value, target))
    return tat_loss(query, key, value, target, 1)


def losses(model, teacher, images, labels, *, weight, patches, groups, anchors, patch_weight, anchor_weight):
    """Return CE/B + α · mean over images of β · PG + γ · AP, and the two terms without α.

    Both networks are as their modes say. Cross-entropy is the mean over the pixels that are not 255, divided
    by the number of images once more.
    """
    with torch.no_grad():
        _, taps = teacher(images, taps=True)
    told = taps["decoder"]
    logits, query, key, value = model(images, told)
    cross_entropy = functional.cross_entropy(logits, labels, ignore_index=IGNORED) / len(images)
    maps = query, key, value, told
    tat = patch_weight * patch_group_loss(*maps, patches, groups)
    tat = tat + anchor_weight * anchor_loss(*maps, anchors)
    return cross_entropy + weight * tat, cross_entropy, tat


def terms_of(config) -> dict[str, Any]:
    """Return the keyword arguments of `losses` that a config means whose cross-entropy has the weight 1."""
    options = config.losses.patch_anchor.decoder
    return {
        name: options[name]
        for name in ("weight", "patches", "groups", "anchors", "patch_weight", "anchor_weight")
    }


def make_optimizer(model, *, learning_rate, weight_decay, steps):
    """Return SGD with Nesterov's momentum, and half a cosine from the rate to 0 in so many steps."""
    optimizer = torch.optim.SGD(
        model.groups(learning_rate), lr=learning_rate, momentum=0.9, weight_decay=weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + math.cos(math.pi * t / steps)) / 2)
    return optimizer, schedule


def gradient_norm(model):
    """Return the norm of all gradients together."""
    return torch.stack([p.grad.norm() for p in model.parameters()]).norm()


def train(model, teacher, batches, *, learning_rate, weight_decay, steps, **terms):
    """Take a step on each batch of images and labels; yield its loss, its terms and its gradient's norm.

    The teacher normalises by the batch, too, and both networks drop out. `terms` are keyword arguments of
    `losses`.
    """
    optimizer, schedule = make_optimizer(
        model, learning_rate=learning_rate, weight_decay=weight_decay, steps=steps
    )
    model.train()
    teacher.train()
    for images, labels in batches:
        values = losses(model, teacher, images, labels, **terms)
        take_step(optimizer, values[0])
        schedule.step()
        yield tuple(value.item() for value in (*values, gradient_norm(model)))
