"""ResNet in PyTorch, from the paper and torchvision's attribute names: the reference for ours."""

import torch
from torch import nn

DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


def conv(fan_in, fan_out, size, stride=1):
    return nn.Conv2d(fan_in, fan_out, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    def __init__(self, fan_in, width, stride, bottleneck):
        super().__init__()
        fan_out = 4 * width if bottleneck else width
        if bottleneck:
            self.conv1, self.conv2 = conv(fan_in, width, 1), conv(width, width, 3, stride)
            self.conv3, self.bn3 = conv(width, fan_out, 1), nn.BatchNorm2d(fan_out)
        else:
            self.conv1, self.conv2 = conv(fan_in, width, 3, stride), conv(width, width, 3)
            self.conv3 = None
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.downsample = None
        if stride > 1 or fan_in != fan_out:
            self.downsample = nn.Sequential(conv(fan_in, fan_out, 1, stride), nn.BatchNorm2d(fan_out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.conv3 is not None:
            y = self.bn3(self.conv3(y.relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class TorchResNet(nn.Module):
    """Return logits, and with `taps=True` the four stages' outputs, too."""

    def __init__(self, architecture, *, num_classes=1000, width=64):
        super().__init__()
        bottleneck = architecture in ("resnet50", "resnet101", "resnet152")
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1, self.maxpool = nn.BatchNorm2d(width), nn.MaxPool2d(3, 2, padding=1)
        fan_in = width
        for stage, depth in enumerate(DEPTHS[architecture]):
            blocks = []
            for i in range(depth):
                stride = 2 if stage and not i else 1
                blocks.append(Block(fan_in, width << stage, stride, bottleneck))
                fan_in = (width << stage) * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(fan_in, num_classes)

    def forward(self, x, taps=False):
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        outputs = {}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = outputs[name] = getattr(self, name)(x)
        logits = self.fc(x.mean((2, 3)))
        return (logits, outputs) if taps else logits


def random_torch_resnet(architecture, *, seed=0, **kwargs):
    """Return a network with random weights and statistics, signal kept at unit scale through its depth."""
    torch.manual_seed(seed)
    return randomize(TorchResNet(architecture, **kwargs))


def randomize(model):
    """Draw a network's statistics, scales and biases, which PyTorch begins with zeros and ones; return it."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("running_mean", "bias")):
                value.normal_(0, 0.1)
            elif name.endswith("running_var") or value.ndim == 1:
                value.uniform_(0.5, 1.5)
    return model
