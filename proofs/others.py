"""timm, torchvision and transformers, importable beside any PyTorch.

On import torchvision says which shapes its compiled operators return, and fails where they cannot be loaded:
as where pip found PyTorch built for CPUs, and torchvision for CUDA. Networks that classify need none of them,
so that it is enough to declare them.
"""

import torch

try:
    import torchvision
except RuntimeError:
    for _operator in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    import torchvision

import timm
import transformers

__all__ = ["timm", "torchvision", "transformers"]
