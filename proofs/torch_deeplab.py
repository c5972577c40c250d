"""MobileNetV2 and DeepLabV3+ in PyTorch, from the papers, under the names of public weights."""

from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate, pad

from proofs.torch_resnet import TorchResNet

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def layer(fan_in, fan_out, size=1, stride=1, dilation=1, groups=1, padded=True):
    """Return a convolution and its normalisation."""
    padding = dilation * (size // 2) if padded else 0
    convolution = nn.Conv2d(fan_in, fan_out, size, stride, padding, dilation, groups, bias=False)
    return [convolution, nn.BatchNorm2d(fan_out)]


class InvertedResidual(nn.Module):
    """The layers lie in pairs, as torchvision has them, or in one `row`; `pads_input` surrounds the input."""

    def __init__(self, fan_in, fan_out, stride, expansion, dilation, *, row, pads_input):
        super().__init__()
        hidden = expansion * fan_in
        pairs = [layer(fan_in, hidden)] if expansion > 1 else []
        pairs.append(layer(hidden, hidden, 3, stride, dilation, hidden, padded=not pads_input))
        groups = [[*pair, nn.ReLU6()] for pair in pairs]
        parts = [*chain(*groups)] if row else [nn.Sequential(*group) for group in groups]
        self.conv = nn.Sequential(*parts, *layer(hidden, fan_out))
        self.around = 4 * (dilation if pads_input else 0,)
        self.is_added = stride == 1 and fan_in == fan_out

    def forward(self, x):
        y = self.conv(pad(x, self.around))
        return x + y if self.is_added else y


class TorchMobileNetV2(nn.Module):
    """Return logits, as torchvision's; without classes it is a backbone, of which `maps` is called."""

    def __init__(self, num_classes=1000, *, output_stride=32, padding="ordinary"):
        super().__init__()
        options = {"row": num_classes is None, "pads_input": padding == "input"}
        features: list[nn.Module] = [nn.Sequential(*layer(3, 32, 3, 2), nn.ReLU6())]
        fan_in, reached, rate = 32, 2, 1
        for expansion, fan_out, depth, stride in STAGES:
            dilation = 1
            if reached == output_stride:
                dilation, rate, stride = rate, rate * stride, 1
            reached *= stride
            for i in range(depth):
                block = InvertedResidual(fan_in, fan_out, 1 if i else stride, expansion, dilation, **options)
                features.append(block)
                fan_in = fan_out
        if num_classes is None:
            self.features = nn.Sequential(*features)
            self.low_level_features, self.high_level_features = self.features[:4], self.features[4:]
        else:
            self.features = nn.Sequential(*features, nn.Sequential(*layer(320, 1280), nn.ReLU6()))
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))

    def maps(self, x):
        """Return the last map and the low-level one."""
        low_level = self.low_level_features(x)
        return self.high_level_features(low_level), low_level


class TorchBackbone(TorchResNet):
    """A ResNet without a head, its last stages dilated; the last one is a multi-grid unit of bottlenecks."""

    layer1: Any
    layer2: Any
    layer3: Any
    layer4: Any

    def __init__(self, architecture, *, output_stride, width=64):
        super().__init__(architecture, num_classes=1, width=width)
        del self.fc
        rate = 1
        for stage in (self.layer3, self.layer4)[0 if output_stride == 8 else 1 :]:
            rate *= 2
            for i, block in enumerate(stage):
                is_bottleneck = block.conv3 is not None
                grid = (1, 2, 4)[i] if is_bottleneck and stage is self.layer4 else 1
                for convolution in (block.conv2,) if is_bottleneck else (block.conv1, block.conv2):
                    convolution.dilation = convolution.padding = 2 * (rate * grid,)
            for module in stage.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)

    def maps(self, x):
        """Return the last map and the low-level one."""
        low_level = self.layer1(self.maxpool(self.bn1(self.conv1(x)).relu()))
        return self.layer4(self.layer3(self.layer2(low_level))), low_level


class Branch(nn.Module):
    def __init__(self, fan_in, size, dilation):
        super().__init__()
        self.atrous_conv, self.bn = layer(fan_in, 256, size, dilation=dilation)

    def forward(self, x):
        return self.bn(self.atrous_conv(x)).relu()


class Pyramid(nn.Module):
    def __init__(self, fan_in, rates, dropout):
        super().__init__()
        self.aspp1 = Branch(fan_in, 1, 1)
        self.aspp2, self.aspp3, self.aspp4 = (Branch(fan_in, 3, rate) for rate in rates)
        self.global_avg_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *layer(fan_in, 256), nn.ReLU())
        self.conv1, self.bn1 = layer(1280, 256)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        branches = [branch(x) for branch in (self.aspp1, self.aspp2, self.aspp3, self.aspp4)]
        branches.append(self.global_avg_pool(x).expand_as(branches[0]))
        return self.bn1(self.conv1(torch.cat(branches, 1)))


class Decoder(nn.Module):
    def __init__(self, low_level, num_classes, dropouts):
        super().__init__()
        self.conv1, self.bn1 = layer(low_level, 48)
        first, second = ([*layer(fan_in, 256, 3), nn.ReLU()] for fan_in in (304, 256))
        head = nn.Conv2d(256, num_classes, 1)
        self.last_conv = nn.Sequential(
            *first, nn.Dropout(dropouts[0]), *second, nn.Dropout(dropouts[1]), head
        )

    def forward(self, x, low_level):
        """Return the map before the last ReLU, and the logits."""
        low_level = self.bn1(self.conv1(low_level)).relu()
        x = interpolate(x, low_level.shape[2:], mode="bilinear", align_corners=True)
        x = self.last_conv[:6](torch.cat([x, low_level], 1))
        return x, self.last_conv[6:](x)


class TorchDeepLab(nn.Module):
    """Return logits; with `taps=True` the pyramid's and the decoder's maps before their ReLUs, too.

    Args:
        architecture: of the backbone, a ResNet's or `mobilenet_v2`.
        num_classes: of a pixel.
        output_stride: 16 or 8.
        dropouts: the rates behind the pyramid and within the decoder.
        of_backbone: its further options.
    """

    def __init__(
        self, architecture, *, num_classes=21, output_stride=16, dropouts=(0.5, 0.5, 0.1), **of_backbone
    ):
        super().__init__()
        self.backbone: Any
        if architecture == "mobilenet_v2":
            self.backbone = TorchMobileNetV2(None, output_stride=output_stride, **of_backbone)
            channels = 320, 24
        else:
            self.backbone = TorchBackbone(architecture, output_stride=output_stride, **of_backbone)
            first = of_backbone.get("width", 64) * (4 if architecture in ("resnet50", "resnet101") else 1)
            channels = 8 * first, first
        rates = [rate * 16 // output_stride for rate in (6, 12, 18)]
        self.aspp = Pyramid(channels[0], rates, dropouts[0])
        self.decoder = Decoder(channels[1], num_classes, dropouts[1:])

    def forward(self, x, taps=False):
        last, low_level = self.backbone.maps(x)
        aspp = self.aspp(last)
        decoder, logits = self.decoder(self.aspp.dropout(aspp.relu()), low_level)
        logits = interpolate(logits, x.shape[2:], mode="bilinear", align_corners=True)
        return (logits, {"aspp": aspp, "decoder": decoder}) if taps else logits
