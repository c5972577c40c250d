"""Vision transformers: taps, positions, names elsewhere; see also proofs/fidelity/vision_transformers.py."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx

from proofs.others import timm
from tat_jax import convert, fields, networks
from tat_jax.networks import vit_positions
from tat_jax.networks.view import MEAN, View, watch
from tat_jax.networks.vit import ARCHITECTURES, DESIGNS
from tat_jax.weights import store
from tat_jax.weights.names import convert_entries, export_entries, to_torch, torch_names
from tat_jax.weights.store import StoredNetwork

DINO, REGISTERS, TURNED, WITH_HEAD = (
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_tiny_patch16_224",
)
NARROW = {"depth": 2, "embed_dim": 8}
IMAGES = np.random.default_rng(0).normal(size=(2, 28, 42, 3)).astype(np.float32)


def narrow(name=REGISTERS, classes=0, dtype="float32", **options):
    grid = {"position_grid": 3} if DESIGNS[name].grid else {}
    arguments = {"architecture": name, "num_classes": classes, **NARROW, **grid, **options}
    return networks.construct(arguments, dtype=dtype, rngs=nnx.Rngs(0))


def outputs(network, images):
    graph, state = nnx.split(View(network))
    return jax.jit(lambda state, images: nnx.merge(graph, state)(images))(state, images)


def entries_of(name, classes=0, **options):
    """Return random entries of a narrow network as timm names them."""
    grid = {"position_grid": 3} if DESIGNS[name].grid else {}
    arguments = {"architecture": name, "num_classes": classes, **NARROW, **grid, **options}
    shapes = nnx.eval_shape(lambda: networks.construct(arguments, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    weights = {
        path: rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in store.network_weights(shapes).items()
    }
    return export_entries(StoredNetwork(weights, arguments, {"head": "none", "source": "a test"}))


def converted(entries, name, **choice):
    return convert_entries(entries, name, source="a.safetensors", **choice)


def assert_come_back(entries, name, expected=None):
    """Check that entries convert to a network that is exported as those expected, bit by bit."""
    found = export_entries(converted(entries, name))
    expected = entries if expected is None else expected
    assert found.keys() == expected.keys()
    for entry, array in found.items():
        np.testing.assert_array_equal(array, expected[entry])


@pytest.mark.parametrize(
    ("name", "count"),  # timm's
    [
        ("vit_tiny_patch16_224", 5_717_416),
        ("vit_small_patch14_reg4_dinov2", 22_442_344),
        ("vit_small_patch16_dinov3", 21_971_944),
    ],
)
def test_a_full_network_has_timm_s_number_of_parameters(name, count):
    model = nnx.eval_shape(lambda: ARCHITECTURES[name].build(num_classes=1000, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


@pytest.fixture(scope="module")
def whole():
    """Return a narrow network with registers and a head, and its outputs for `IMAGES`."""
    network = narrow(classes=3)
    return network, outputs(network, IMAGES)


def test_every_block_without_its_prefix_is_a_tap_and_what_the_head_reads_is_another(whole):
    network, (logits, taps) = whole
    of_patches = dict.fromkeys(("block0", "block1", "norm"), (2, 2, 3, 8))
    assert {name: tap.shape for name, tap in taps.items()} == {**of_patches, "pooled": (2, 8)}
    np.testing.assert_allclose(taps["norm"], network.norm(taps["block1"]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, network.head(taps["pooled"]), rtol=1e-5, atol=1e-7)


def test_without_classes_there_is_no_head_and_the_taps_are_the_same(whole):
    network, (_, expected) = whole
    headless, weights = narrow(), store.network_weights(network)
    names = weights.keys() - store.network_weights(headless).keys()
    assert names == {"head.kernel", "head.bias"}
    store.set_weights(headless, {n: a for n, a in weights.items() if n not in names}, source="a test")
    logits, taps = outputs(headless, IMAGES)
    assert logits is None
    for name, tap in taps.items():
        np.testing.assert_allclose(tap, expected[name], rtol=1e-6, atol=1e-7)


def test_the_mean_of_the_patches_may_be_pooled_instead_of_the_class_token(whole):
    _, (_, taps) = whole
    mean = outputs(narrow(classes=3, pooling="mean"), IMAGES).taps["pooled"]
    np.testing.assert_allclose(mean, taps["norm"].mean((1, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [REGISTERS, TURNED])
def test_bfloat16_activations_keep_float32_parameters_softmax_and_norms(name):
    network = narrow(name, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(network))} == {jnp.dtype("float32")}
    _, taps = watch(View(network), (), DESIGNS[name].patch * 2)
    assert {tap.dtype for tap in taps.values()} == {jnp.dtype("bfloat16")}
    graph, state = nnx.split(network)
    images = np.zeros((1, *2 * (2 * DESIGNS[name].patch,), 3), np.float32)
    steps = str(jax.make_jaxpr(lambda state, images: nnx.merge(graph, state)(images))(state, images))
    of_softmax_and_norms = re.findall(r":(\w+)\[[\d,]*\] = (?:exp|rsqrt|reduce_sum|reduce_max)\b", steps)
    assert len(of_softmax_and_norms) > 10
    assert set(of_softmax_and_norms) == {"f32"}


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(5, 5), (2, 9), (1, 1), (3, 11)])
def test_positions_are_resampled_as_pytorch_does(size, antialias, x64):
    positions = np.random.default_rng(0).normal(size=(5, 5, 4))
    found = vit_positions.resample(jnp.asarray(positions), *size, antialias=antialias)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(positions).permute(2, 0, 1)[None], size=size, mode="bicubic", antialias=antialias
    )
    np.testing.assert_allclose(found, expected[0].permute(1, 2, 0), rtol=1e-12, atol=1e-13)


def test_rotations_keep_what_a_pair_of_patches_one_row_apart_says_to_each_other_and_the_prefix(x64):
    cosines, sines = vit_positions.rotations(4, 2, 8, prefix=3, dtype="float64")
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8))
    turned = [
        vit_positions.rotate(jnp.broadcast_to(x, (1, 1, 11, 8)), cosines, sines)[0, 0] for x in (query, key)
    ]
    np.testing.assert_array_equal(turned[0][:3], np.broadcast_to(query[0, 0], (3, 8)))
    said = np.einsum("qd,kd->qk", *(np.asarray(x)[3:] for x in turned))
    for first, second in [((0, 2), (4, 6)), ((0, 1), (6, 7)), ((2, 5), (4, 7))]:
        assert said[first] == pytest.approx(said[second], rel=1e-6)
    assert said[0, 2] != pytest.approx(said[0, 4], rel=1e-3)


def test_images_that_patches_do_not_divide_are_refused_when_it_is_built():
    said = r"patches of 14×14 pixels do not divide images of 32×32: .* as image_size=28"
    with pytest.raises(ValueError, match=said):
        watch(View(narrow()), (), 32)


@pytest.mark.parametrize("width", [100, 6, 0])
def test_a_width_that_heads_do_not_divide_is_no_field_s(width):
    config = fields.defaults(networks.FIELDS).to_dict() | {"architecture": DINO, "embed_dim": width}
    (said,) = fields.wrong(networks.FIELDS, config)
    assert said.startswith(f"embed_dim={width}: allowed is a multiple of 64")


def test_augreg_s_images_have_a_mean_of_a_half_and_dinov2_s_that_of_imagenet():
    for name, mean in ((WITH_HEAD, (0.5, 0.5, 0.5)), ("deit_tiny_patch16_224", MEAN), (DINO, MEAN)):
        config = fields.defaults(networks.FIELDS)
        with config.ignore_type():
            config.update({"architecture": name, **NARROW, "position_grid": 1})
        made = networks.build(config, num_classes=3, dtype="float32", seed=0, fit_head=True)
        assert made.view.mean == mean


def test_a_file_of_timm_s_comes_and_goes_bit_by_bit_by_the_command(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=56, patch_size=14, embed_dim=128, depth=3, num_heads=2, init_values=1e-5, num_classes=0
    )
    state = {name: array.numpy() for name, array in model.state_dict().items()}
    safetensors.numpy.save_file(state, tmp_path / "timm.safetensors")
    convert.main([DINO, "--from", str(tmp_path / "timm.safetensors"), "--to", str(tmp_path / "w")])
    assert "it has no head: terms on logits refuse it as a teacher" in capsys.readouterr().out
    stored = store.load_network(tmp_path / "w")
    assert stored.origin["head"] == "none"
    assert stored.arguments == {
        "architecture": DINO,
        "num_classes": 0,
        "depth": 3,
        "embed_dim": 128,
        "position_grid": 4,
    }
    convert.main(["--export", str(tmp_path / "back.safetensors"), str(tmp_path / "w")])
    assert "it has no head, and gives no logits" in capsys.readouterr().out
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name])


def test_a_student_that_starts_from_a_network_without_a_head_gets_one(tmp_path):
    stored = converted(entries_of(REGISTERS), REGISTERS)
    store.save_network(tmp_path / "w", stored)
    config = fields.defaults(networks.FIELDS)
    with config.ignore_type():
        config.update(
            {"architecture": REGISTERS, **NARROW, "position_grid": 3, "weights": str(tmp_path / "w")}
        )
    student = networks.build(config, num_classes=5, dtype="float32", seed=0, fit_head=True)
    assert (student.arguments["num_classes"], student.origin["head"]) == (5, "fresh")
    teacher = networks.build(config, num_classes=5, dtype="float32", seed=0, fit_head=False)
    assert (teacher.arguments["num_classes"], teacher.origin["head"]) == (0, "none")
    assert teacher.view.network.head is None


@pytest.mark.parametrize("head", [None, "none", "fresh"])
def test_a_classifier_s_head_is_taken_left_out_or_started_afresh(head):
    found = converted(entries_of(WITH_HEAD, classes=3), WITH_HEAD, head=head)
    assert found.arguments["num_classes"] == {None: 3, "none": 0, "fresh": 1000}[head]
    assert found.origin["head"] == (head or "trained")


def test_a_classifier_without_its_head_is_refused_with_both_ways_out():
    with pytest.raises(ValueError, match=r"no head \(head.weight, head.bias\); --head fresh .*, --head none"):
        converted(entries_of(WITH_HEAD), WITH_HEAD)


SAVED = (
    ("head.", "classifier."),
    ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("cls_token", "vit.embeddings.cls_token"),
    ("pos_embed", "vit.embeddings.position_embeddings"),
    ("norm.", "vit.layernorm."),
    ("blocks.", "vit.encoder.layer."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".attn.", ".attention.attention."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def of_hugging_face(entries, rules):
    """Return entries of timm's as Hugging Face's library saves them."""
    found = {}
    for name, array in entries.items():
        for ours, theirs in rules:
            at_start = ours in ("head.", "norm.")
            name = (
                theirs + name.removeprefix(ours)
                if at_start and name.startswith(ours)
                else (name if at_start else name.replace(ours, theirs))
            )
        if ".qkv." in name:
            parts = zip(("query", "key", "value"), np.split(array, 3), strict=True)
            found |= {name.replace("qkv", part): piece for part, piece in parts}
        else:
            found[name] = array
    return found


def test_hugging_face_s_classifier_is_read_under_its_names_and_without_its_pooler():
    entries = entries_of(WITH_HEAD, classes=3)
    theirs = of_hugging_face(entries, SAVED)
    assert_come_back(theirs | {"vit.pooler.dense.weight": np.ones((8, 8), np.float32)}, WITH_HEAD, entries)


def test_what_is_known_of_neither_library_is_named():
    theirs = of_hugging_face(entries_of(WITH_HEAD, classes=3), SAVED)
    with pytest.raises(ValueError, match=r"extra: adapter.weight \(2,\)"):
        converted(theirs | {"vit.embeddings.adapter.weight": np.ones(2, np.float32)}, WITH_HEAD)


def test_with_registers_the_class_token_takes_up_its_position():
    entries = entries_of(REGISTERS)
    position = np.random.default_rng(1).normal(size=(1, 1, 8)).astype(np.float32)
    theirs = {
        **{name: array for name, array in entries.items() if name != "reg_token"},
        "register_tokens": entries["reg_token"],
        "pos_embed": np.concatenate([position, entries["pos_embed"]], axis=1),
        "mask_token": np.zeros((1, 8), np.float32),
    }
    assert_come_back(theirs, REGISTERS, entries | {"cls_token": entries["cls_token"] + position})


def test_facebook_s_dinov3_is_read_under_its_names_and_biases_of_zero_are_none():
    entries = entries_of(TURNED)
    theirs = {"rope_embed.periods": np.ones(2, np.float32), "mask_token": np.zeros((1, 8), np.float32)}
    for name, array in entries.items():
        name = re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", name).replace("reg_token", "storage_tokens")
        theirs[name] = array
        if name.endswith("qkv.weight"):
            theirs[name.replace("weight", "bias")] = np.zeros(24, np.float32)
            theirs[name.replace("weight", "bias_mask")] = np.ones(24, np.float32)
    assert_come_back(theirs, TURNED, entries)
    theirs["blocks.1.attn.qkv.bias"] = np.ones(24, np.float32)
    with pytest.raises(ValueError, match=r"extra: blocks\.1\.attn\.q_bias \(8,\)"):
        converted(theirs, TURNED)


def test_chunks_of_blocks_are_numbered_through_and_networks_found_under_any_prefix():
    entries = entries_of(DINO)
    theirs = {
        f"teacher.backbone.{name.replace('blocks.1.', 'blocks.1.1.')}": a for name, a in entries.items()
    }
    theirs = {name.replace("blocks.0.", "blocks.0.0."): array for name, array in theirs.items()}
    assert_come_back(theirs | {"teacher.dino_head.weight": np.ones(3, np.float32)}, DINO, entries)


@pytest.mark.parametrize(
    ("of", "name", "said"),
    [
        (REGISTERS, DINO, "a.safetensors: it has 4 register tokens, and vit_small_patch14_dinov2 has 0"),
        (DINO, REGISTERS, "it has 0 register tokens, and vit_small_patch14_reg4_dinov2 has 4"),
    ],
)
def test_registers_that_do_not_fit_are_counted(of, name, said):
    with pytest.raises(ValueError, match=said):
        converted(entries_of(of), name)


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (REGISTERS, DINO),
        ("vit_base_patch14_dinov2", DINO),
        ("vit_small_patch16_dinov3_qkvb", TURNED),
    ],
)
def test_a_file_of_another_architecture_is_named(of, name):
    with pytest.raises(ValueError, match=f"it is {of}, and no {name}"):
        ARCHITECTURES[name].read_arguments(of_full_size(of))


def of_full_size(name):
    """Return zeros under timm's names, which take no memory."""
    shapes = nnx.eval_shape(lambda: ARCHITECTURES[name].build(num_classes=0, rngs=nnx.Rngs(0)))
    return {
        torch_names(path, name)[0]: to_torch(path, np.broadcast_to(np.float32(0), leaf.shape))
        for path, leaf in store.network_weights(shapes).items()
    }


def test_positions_that_are_no_square_are_refused():
    entries = entries_of(DINO)
    entries["pos_embed"] = entries["pos_embed"][:, :9]
    said = "its 9 positions are not those of a square of patches and one of the class token"
    with pytest.raises(ValueError, match=said):
        converted(entries, DINO)


def test_a_head_of_hugging_face_s_dinov2_is_refused_with_the_way_out():
    entries = entries_of(DINO) | {"head.weight": np.ones((3, 16), np.float32)}
    with pytest.raises(ValueError, match=r"reads the class token beside the patches' mean.*: --head none or"):
        converted(entries, DINO)
    assert converted(entries, DINO, head="none").origin["head"] == "none"


def test_a_distillation_token_is_refused_by_name():
    entries = entries_of("deit_tiny_patch16_224", classes=3)
    with pytest.raises(ValueError, match="it has a distillation token; deit_tiny_patch16_224 is"):
        converted(entries | {"dist_token": np.zeros((1, 1, 8), np.float32)}, "deit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (DINO, "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth, and name it"),
        (TURNED, "huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m .* accepted Meta's DINOv3 licence"),
        (WITH_HEAD, "https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k, and name it"),
    ],
)
def test_without_a_file_the_command_says_where_there_is_one(name, said):
    with pytest.raises(SystemExit, match=f"error: {name} is not fetched: get .*{said}.* with --from FILE"):
        convert.main([name])
