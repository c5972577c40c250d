"""What `make fidelity` proves at length, in short (`make proofs`); see also `test_devices`."""

import numpy as np
import pytest

from proofs import rounding, torch_transforms
from proofs.fidelity import (
    beside_pytorch,
    convnext,
    devices,
    pixels,
    segmentation_steps,
    trajectories,
    vision_transformers,
    weights,
)
from proofs.fidelity.claim import Claim
from proofs.photographs import photographs
from proofs.program import Layout
from proofs.report import table
from tat_jax import networks
from tat_jax.networks.convnext import architecture
from tests.claims import broken


@pytest.mark.parametrize("run", trajectories.recorded(), ids=lambda run: run["id"])
def test_training_reproduces_the_runs_recorded_from_the_published_code(run):
    claims = trajectories.claims_in_float64(run)
    assert len(claims) == 7
    assert broken(claims) == []


def test_each_step_in_float32_agrees_from_the_state_of_float64():
    run = trajectories.recorded()[0]
    losses = trajectories.float32_losses_from_exact_states(run)
    # Rounding through 34 layers is 1e-6; the bound leaves room for sums in another order.
    assert losses == pytest.approx([step["loss"] for step in run["steps"]], rel=1e-5)


def test_two_steps_on_photographs_lie_on_pytorchs(tmp_path):
    claims = beside_pytorch.claims(photographs(None, 16), None, tmp_path / "curves.png", steps=2)
    assert broken(claims) == []
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_two_steps_of_segmentation_are_pytorchs():
    assert broken(segmentation_steps.claims(steps=2)) == []


def test_two_processes_of_four_devices_segment_as_one_device_does():
    layouts = (Layout(1, 1), Layout(2, 4))
    claims = devices.compare(layouts, case=devices.SEGMENTATION, name="", bound=rounding.SINGLE)
    assert len(claims) == 1
    assert broken(claims) == []


def test_pixels_are_pillows_and_crop_boxes_torchvisions():
    assert broken(pixels.claims(photographs(None, 10), draws=5_000)) == []


@pytest.mark.parametrize("pixels_moved", [0.25, 1])
def test_a_shift_of_a_crop_is_measured_in_pixels(pixels_moved):
    x, y = np.meshgrid(np.arange(100), np.arange(100))

    def waves(dx):
        return np.sin((x - dx) / 9) * np.cos(y / 7) * 100

    assert pixels.shift(waves(pixels_moved), waves(0)) == pytest.approx(pixels_moved, rel=0.05)


def test_boxes_of_another_distribution_are_told_apart(monkeypatch):
    monkeypatch.setattr(torch_transforms, "RATIO", (0.7, 1.4))
    assert min(pixels.box_p_values(375, 500, 5_000).values()) < 1e-6


def test_converted_networks_are_pytorchs():
    assert broken(weights.claims(photographs(None, 4), None)) == []


def test_convnexts_of_other_libraries_are_ours(monkeypatch):
    depths, width = (1, 1, 2, 1), 4
    monkeypatch.setitem(networks.ARCHITECTURES, "convnext_narrow", architecture(depths, width))
    narrow = convnext.Size("convnext_narrow", depths, (4, 8, 16, 32))
    claims = convnext.claims(narrow, [(70, 33)])
    assert len(claims) == 4 * (2 + 2)
    assert broken(claims + convnext.published()) == []


def test_transformers_are_timms_and_hugging_faces():
    claims = vision_transformers.claims(
        vision_transformers.SMALL,
        of_timm=["vit_small_patch14_dinov2", "vit_small_patch16_dinov3"],
        of_hugging_face=["vit_small_patch16_224", "vit_small_patch14_reg4_dinov2"],
        dtypes=["float64"],
    )
    assert len(claims) == 7
    assert broken(claims) == []


def test_a_broken_claim_is_named_and_nan_never_holds():
    claims = [Claim("a", "b", 2e-3, 1e-3), Claim("c", "d", float("nan"), 1.0), Claim("e", "f", 1.0, None)]
    assert [claim.holds for claim in claims] == [False, False, True]
    assert table(claims).count("BROKEN") == 2
    assert "holds" not in table(claims)
