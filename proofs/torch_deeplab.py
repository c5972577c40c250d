"""DeepLabV3+ in PyTorch, from the formulas and the names of the public checkpoints: the reference for ours.

Output stride 16. Nothing here comes from `tat_jax` or from published code.
"""

import torch
from torch import nn
from torch.nn import functional

from proofs.torch_resnet import DEPTHS, Block, conv, randomize

WIDTH, LOW_LEVEL = 256, 48  # channels of ASPP and decoder, and of what joins them
RATES = (1, 6, 12, 18)
# Expansion, channels, blocks, and the stride and the dilation of the first of them.
MOBILENET_V2 = (
    (1, 16, 1, 1, 1),
    (6, 24, 2, 2, 1),
    (6, 32, 3, 2, 1),
    (6, 64, 4, 2, 1),
    (6, 96, 3, 1, 1),
    (6, 160, 3, 1, 1),  # stride 2 and dilation 1 in the classifier
    (6, 320, 1, 1, 2),
)


class Dropout(nn.Dropout):
    """Dropout that takes its mask, scale included, from `mask` if there is one."""

    mask: torch.Tensor | None = None

    def forward(self, x):
        return super().forward(x) if self.mask is None or not self.training else x * self.mask


class TorchResNetBackbone(nn.Module):
    """A ResNet without head whose last stage keeps the resolution: dilated by 2, in bottlenecks 2, 4, 8."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, architecture: str, width: int = 64):
        super().__init__()
        bottleneck = architecture in ("resnet50", "resnet101")
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1, self.maxpool = nn.BatchNorm2d(width), nn.MaxPool2d(3, 2, padding=1)
        fan_in, expansion = width, 4 if bottleneck else 1
        self.low_level_channels = width * expansion
        for stage, depth in enumerate(DEPTHS[architecture]):
            blocks = []
            for i in range(depth):
                stride = 2 if stage in (1, 2) and not i else 1
                dilation = 1 if stage < 3 else 2 << i if bottleneck else 2
                blocks.append(Block(fan_in, width << stage, stride, bottleneck, dilation))
                fan_in = (width << stage) * expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.channels = fan_in

    def forward(self, x):
        low_level = self.layer1(self.maxpool(self.bn1(self.conv1(x)).relu()))
        return low_level, self.layer4(self.layer3(self.layer2(low_level)))


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, project; it is the block's input that is padded, by zeros."""

    def __init__(self, fan_in, fan_out, stride, dilation, expansion):
        super().__init__()
        width = fan_in * expansion
        expand = [nn.Conv2d(fan_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        self.conv = nn.Sequential(
            *(expand if expansion > 1 else ()),
            nn.Conv2d(width, width, 3, stride, dilation=dilation, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
            nn.Conv2d(width, fan_out, 1, bias=False),
            nn.BatchNorm2d(fan_out),
        )
        self.padding = (dilation,) * 4
        self.is_residual = stride == 1 and fan_in == fan_out

    def forward(self, x):
        y = self.conv(functional.pad(x, self.padding))
        return x + y if self.is_residual else y


class TorchMobileNetBackbone(nn.Module):
    """MobileNetV2 without its last convolution and its head."""

    low_level_channels, channels = 24, 320

    def __init__(self):
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        blocks: list[nn.Module] = [stem]
        fan_in = 32
        for expansion, channels, depth, stride, dilation in MOBILENET_V2:
            for i in range(depth):
                blocks.append(InvertedResidual(fan_in, channels, 1 if i else stride, dilation, expansion))
                fan_in = channels
        self.features = nn.Sequential(*blocks)

    def forward(self, x):
        low_level = self.features[:4](x)
        return low_level, self.features[4:](low_level)


class Branch(nn.Module):
    """A convolution of ASPP: 1×1, or 3×3 dilated by a rate."""

    def __init__(self, fan_in, rate):
        super().__init__()
        self.atrous_conv = conv(fan_in, WIDTH, 1 if rate == 1 else 3, dilation=rate)
        self.bn = nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        return self.bn(self.atrous_conv(x)).relu()


class TorchASPP(nn.Module):
    """Atrous spatial pyramid pooling: four convolutions and the mean of the map, side by side."""

    def __init__(self, fan_in, *, dropout: bool):
        super().__init__()
        for i, rate in enumerate(RATES):
            setattr(self, f"aspp{i + 1}", Branch(fan_in, rate))
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), conv(fan_in, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU()
        )
        self.conv1, self.bn1 = conv(5 * WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)
        self.dropout = Dropout(0.5) if dropout else nn.Identity()

    def forward(self, x):
        """Return the map before its ReLU, and after ReLU and dropout."""
        pooled = self.global_avg_pool(x).expand(-1, -1, *x.shape[2:])
        branches = [getattr(self, f"aspp{i + 1}")(x) for i in range(len(RATES))]
        y = self.bn1(self.conv1(torch.cat([*branches, pooled], 1)))
        return y, self.dropout(y.relu())


class TorchDecoder(nn.Module):
    """Two 3×3 convolutions of ASPP's map, enlarged, beside the reduced low-level map; then the classes."""

    def __init__(self, low_level_channels, num_classes):
        super().__init__()
        self.conv1, self.bn1 = conv(low_level_channels, LOW_LEVEL, 1), nn.BatchNorm2d(LOW_LEVEL)
        self.last_conv = nn.Sequential(
            conv(WIDTH + LOW_LEVEL, WIDTH, 3),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            Dropout(0.5),
            conv(WIDTH, WIDTH, 3),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            Dropout(0.1),
            nn.Conv2d(WIDTH, num_classes, 1),
        )

    def forward(self, x, low_level):
        """Return the map before the last ReLU, and the logits."""
        reduced = self.bn1(self.conv1(low_level)).relu()
        tap = self.last_conv[:6](torch.cat([enlarge(x, reduced.shape[2:]), reduced], 1))
        return tap, self.last_conv[6:](tap)


class TorchDeepLab(nn.Module):
    """Return logits of every pixel, and with `taps=True` the maps `low_level`, `layer4`, `aspp`, `decoder`.

    `aspp_dropout=False` leaves ASPP's dropout out, as the published distillation does.
    """

    def __init__(self, backbone, num_classes=21, *, aspp_dropout=True):
        super().__init__()
        self.backbone = backbone
        self.aspp = TorchASPP(backbone.channels, dropout=aspp_dropout)
        self.decoder = TorchDecoder(backbone.low_level_channels, num_classes)

    def forward(self, x, taps=False):
        low_level, features = self.backbone(x)
        aspp, y = self.aspp(features)
        decoder, y = self.decoder(y, low_level)
        logits = enlarge(y, x.shape[2:])
        maps = {"low_level": low_level, "layer4": features, "aspp": aspp, "decoder": decoder}
        return (logits, maps) if taps else logits


def enlarge(x, size):
    """Interpolate between maps whose corners stay where they are."""
    return functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def random_torch_deeplab(backbone, num_classes=21, *, seed=0, **kwargs):
    """Return the network over `backbone()`, as `TorchMobileNetBackbone`, random statistics included."""
    torch.manual_seed(seed)
    return randomize(TorchDeepLab(backbone(), num_classes, **kwargs))
