"""The training step in PyTorch, written from the formulas: an independent reference.

Nothing here comes from `tat_jax` or from the published code.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from proofs.torch_resnet import TorchResNet


class TorchEmbedding(nn.Module):
    """BN(conv(x)), of 3×3 unless another size is given, under the published names."""

    def __init__(self, fan_in, fan_out, size=3):
        super().__init__()
        self.conv2d = nn.Conv2d(fan_in, fan_out, size, padding=size // 2, bias=False)
        self.l2norm = nn.BatchNorm2d(fan_out)

    def forward(self, x):
        return self.l2norm(self.conv2d(x))


class TorchStudent(nn.Module):
    """What is trained: the student, and query and value on its `layer4`."""

    def __init__(self, student: TorchResNet, teacher_features: int):
        super().__init__()
        features = student.fc.in_features
        self.student = student
        self.query = TorchEmbedding(features, teacher_features)
        self.value = TorchEmbedding(features, teacher_features)

    def forward(self, images):
        """Return logits, query and value."""
        logits, taps = self.student(images, taps=True)
        return logits, self.query(taps["layer4"]), self.value(taps["layer4"])


def attend(query, key, value):
    """Return softmax(query · keyᵀ) value, of rows that are positions."""
    return torch.softmax(query @ key.mT, dim=-1) @ value


def tat_loss(query, key, value, target, heads):
    """Return mean (target − softmax(query · keyᵀ) value)², the softmax over the key's positions, per head."""
    batch, channels, height, width = value.shape
    q, k, v = (x.reshape(batch, heads, channels // heads, height * width).mT for x in (query, key, value))
    out = attend(q, k, v)
    return ((out.mT.reshape(target.shape) - target) ** 2).mean()


def kd_loss(student, teacher, labels, alpha, beta, temperature):
    """Return α·CE + β·T²·KL(teacher ‖ student); for α = 0 the KL divergence alone."""
    log_q = functional.log_softmax(student / temperature, dim=1)
    p = functional.softmax(teacher / temperature, dim=1)
    kl = (p * (p.log() - log_q)).sum(1).mean()
    if alpha == 0:
        return kl
    beta = 1 - alpha if beta is None else beta
    return alpha * functional.cross_entropy(student, labels) + beta * temperature**2 * kl


def losses(model, teacher, images, labels, *, alpha, beta, temperature, heads, tat_weight):
    """Return the loss, its KD part and the TaT loss of a batch. `model` may be wrapped."""
    with torch.no_grad():
        teacher_logits, taps = teacher(images, taps=True)
    logits, query, value = model(images)
    kd = kd_loss(logits, teacher_logits, labels, alpha, beta, temperature)
    tat = tat_loss(query, taps["layer4"], value, taps["layer4"], heads)
    return kd + tat_weight * tat, kd, tat


def terms_of(config) -> dict[str, Any]:
    """Return the keyword arguments of `losses` that a config means whose cross-entropy counts."""
    kd, tat = config.losses.kd, config.losses.tat.layer4
    return {
        "alpha": config.losses.cross_entropy.weight,
        "beta": kd.weight,
        "temperature": kd.temperature,
        "heads": tat.heads,
        "tat_weight": tat.weight,
    }


def take_step(optimizer, loss):
    """Take the step that lowers a loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train(model, teacher, batches, *, learning_rate, weight_decay, milestones=(), gamma=0.1, **terms):
    """Take an AdamW step on each batch of images and labels; yield its loss, KD loss and TaT loss.

    Milestones are steps; `terms` are the keyword arguments of `losses`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma)
    model.train()
    teacher.eval()
    for images, labels in batches:
        values = losses(model, teacher, images, labels, **terms)
        take_step(optimizer, values[0])
        schedule.step()
        yield tuple(value.item() for value in values)
