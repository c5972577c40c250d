"""CIFAR's residual networks and four methods in PyTorch, written from the formulas.

An independent reference: nothing here comes from `tat_jax` or from published code. The methods are modules,
called with a `Seen` of the student and of the teacher and the labels; what they hold is trained.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from proofs.torch_step import TorchEmbedding, tat_loss

CLASSES = 100


class Seen(NamedTuple):
    """What a network makes of images: logits, the sums of stages before their last ReLU, pooled features."""

    logits: torch.Tensor
    sums: list[torch.Tensor]
    pooled: torch.Tensor


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut; the sum is returned before its ReLU."""

    def __init__(self, fan_in, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(fan_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and fan_in == width
            else nn.Sequential(nn.Conv2d(fan_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return y + self.shortcut(x)


class TorchCifarResNet(nn.Module):
    """A residual network of 6n + 2 layers for images of 32 pixels, of the widths of its stem and stages."""

    def __init__(self, depth, widths):
        super().__init__()
        stem, *stages = widths
        self.conv, self.bn = nn.Conv2d(3, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem)
        self.depths = []
        self.blocks = nn.ModuleList()
        for i, (fan_in, width) in enumerate(zip(widths, stages, strict=False)):
            self.depths.append((depth - 2) // 6)
            self.blocks.append(Block(fan_in, width, 1 if i == 0 else 2))
            self.blocks.extend(Block(width, width, 1) for _ in range(self.depths[-1] - 1))
        self.fc = nn.Linear(stages[-1], CLASSES)

    def forward(self, images):
        x, sums = functional.relu(self.bn(self.conv(images))), []
        blocks = iter(self.blocks)
        for depth in self.depths:
            for _ in range(depth):
                y = next(blocks)(x)
                x = functional.relu(y)
            sums.append(y)
        pooled = x.mean((2, 3))
        return Seen(self.fc(pooled), sums, pooled)


class KD(nn.Module):
    """0.1·CE + 0.9·T²·KL at T = 4."""

    temperature = 4.0

    def forward(self, student, teacher, labels):
        log_q = functional.log_softmax(student.logits / self.temperature, 1)
        log_p = functional.log_softmax(teacher.logits / self.temperature, 1)
        kl = (log_p.exp() * (log_p - log_q)).sum(1).mean()
        return 0.1 * functional.cross_entropy(student.logits, labels) + 0.9 * self.temperature**2 * kl


class TaT(nn.Module):
    """CE and TaT on the last maps after their ReLU, of one head."""

    def __init__(self, student, teacher):
        super().__init__()
        self.query, self.value = TorchEmbedding(student, teacher), TorchEmbedding(student, teacher)

    def forward(self, student, teacher, labels):
        ours, theirs = functional.relu(student.sums[-1]), functional.relu(teacher.sums[-1])
        tat = tat_loss(self.query(ours), theirs, self.value(ours), theirs, 1)
        return functional.cross_entropy(student.logits, labels) + tat


class CRD(nn.Module):
    """CE and 0.8 · CRD of the pooled features, with so many negatives drawn anew for each image."""

    temperature = 0.07

    def __init__(self, student, teacher, images, negatives=16_384, features=128):
        super().__init__()
        self.images, self.negatives = images, negatives
        self.embed = nn.ModuleList([nn.Linear(student, features), nn.Linear(teacher, features)])
        bound = (features / 3) ** -0.5
        self.memories = [torch.empty(images, features).uniform_(-bound, bound) for _ in range(2)]
        self.scales: list[torch.Tensor] = []
        self.index = torch.arange(0)  # of the images of a batch

    def forward(self, student, teacher, labels):
        made = [
            functional.normalize(embed(x.pooled))
            for embed, x in zip(self.embed, (student, teacher), strict=True)
        ]
        drawn = torch.randint(self.images, (len(labels), self.negatives), device=labels.device)
        chosen = torch.cat([self.index[:, None], drawn], 1)
        noise, loss = self.negatives / self.images, functional.cross_entropy(student.logits, labels)
        for i, (v, rows) in enumerate(zip(made, self.memories[::-1], strict=True)):
            likeness = torch.exp(torch.einsum("bkd,bd->bk", rows[chosen], v) / self.temperature)
            if i == len(self.scales):
                self.scales.append(likeness.detach().mean() * self.images)
            q = likeness / self.scales[i]
            own = q[:, 0] / (q[:, 0] + noise + 1e-7)
            others = noise / (q[:, 1:] + noise + 1e-7)
            loss = loss - 0.8 * (own.log() + others.log().sum(1)).mean()
        with torch.no_grad():
            for v, rows in zip(made, self.memories, strict=True):
                rows[self.index] = functional.normalize((rows[self.index] + v) / 2)
        return loss


class Fusion(nn.Module):
    """A level of ReviewKD: to the middle width, joined with the level above by gates, to the teacher's."""

    def __init__(self, student, middle, teacher, *, deepest):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(student, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.leave = nn.Sequential(
            nn.Conv2d(middle, teacher, 3, padding=1, bias=False), nn.BatchNorm2d(teacher)
        )
        self.gates = None if deepest else nn.Conv2d(2 * middle, 2, 1)

    def forward(self, x, above):
        x = self.enter(x)
        if self.gates is not None:
            above = functional.interpolate(above, x.shape[2:], mode="nearest")
            gates = torch.sigmoid(self.gates(torch.cat([x, above], 1)))
            x = x * gates[:, :1] + above * gates[:, 1:]
        return self.leave(x), x


class Review(nn.Module):
    """CE and 5 · ReviewKD: student's stages after, teacher's before their ReLU, and the pooled features."""

    def __init__(self, student, teacher):
        super().__init__()
        middle = min(512, student[-1])
        widths = list(zip((*student, student[-1]), (*teacher, teacher[-1]), strict=True))
        self.levels = nn.ModuleList(
            Fusion(ours, middle, theirs, deepest=i == 0) for i, (ours, theirs) in enumerate(widths[::-1])
        )

    def forward(self, student, teacher, labels):
        ours = [*(functional.relu(x) for x in student.sums), student.pooled[..., None, None]]
        theirs = [*teacher.sums, teacher.pooled[..., None, None]]
        loss, above = functional.cross_entropy(student.logits, labels), None
        for level, x, target in zip(self.levels, ours[::-1], theirs[::-1], strict=True):
            made, above = level(x, above)
            loss = loss + 5 * _by_pyramid(made, target)
        return loss


def _by_pyramid(made, target):
    """Return the mean squared error of maps and of what is pooled of them to 4, 2 and 1 positions a side."""
    total, weight, weights = functional.mse_loss(made, target), 1.0, 1.0
    for side in (4, 2, 1):
        if side < made.shape[2]:
            weight /= 2
            ours, theirs = (functional.adaptive_avg_pool2d(x, side) for x in (made, target))
            total, weights = total + weight * functional.mse_loss(ours, theirs), weights + weight
    return total / weights
