"""Without labels: networks without a head, the losses that refuse them, and images that have no classes."""

import io
import pickle
import tarfile

import jax
import numpy as np
import pytest
from flax import nnx

from tat_jax import evaluate, fields, networks, sharding
from tat_jax.build import build
from tat_jax.configs import base
from tat_jax.data.pipeline import open_pipeline
from tat_jax.data.sources import open_source
from tat_jax.networks.view import View
from tat_jax.weights import store
from tat_jax.weights.names import export_entries
from tat_jax.weights.store import StoredNetwork
from tests.images import encode, photograph
from tests.tiny import Tiny

NARROW = {"architecture": "resnet18", "small_images": True, "width": 2}


def built_network(*, classes, fit_head=True, **changes):
    entry = fields.defaults(networks.FIELDS)
    with entry.ignore_type():
        entry.update(NARROW | changes)
    return networks.build(entry, num_classes=classes, dtype="float32", seed=7, fit_head=fit_head)


def keep(network, folder):
    weights = store.network_weights(network.view.network)
    store.save_network(folder, StoredNetwork(weights, network.arguments, network.origin))
    return str(folder)


@pytest.fixture
def headless(tmp_path):
    return keep(built_network(classes=0), tmp_path / "headless")


@pytest.mark.parametrize(("architecture", "head"), [("resnet18", "fc"), ("mobilenet_v2", "classifier")])
def test_a_network_without_a_head_gives_the_features_that_its_head_would_read_and_no_logits(
    architecture, head
):
    narrow = {"width": 2} if architecture != "mobilenet_v2" else {}

    def parts(classes):
        return networks.construct(
            {"architecture": architecture, "num_classes": classes, **narrow}, rngs=nnx.Rngs(0)
        )

    whole, without = parts(5), parts(0)
    weights = store.network_weights(whole)
    of_head = {path for path in weights if path.startswith(f"{head}.")}
    assert store.network_weights(without).keys() == weights.keys() - of_head != weights.keys()
    store.set_weights(
        without, {path: a for path, a in weights.items() if path not in of_head}, source="a test"
    )
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    given, bare = View(whole)(images), View(without)(images)
    assert bare.logits is None
    np.testing.assert_array_equal(bare.taps["pooled"], given.taps["pooled"])
    layer = whole.fc if head == "fc" else whole.classifier[1]
    np.testing.assert_allclose(layer(given.taps["pooled"]), given.logits, rtol=1e-5, atol=1e-6)


def test_features_of_a_network_in_bfloat16_are_means_in_float32():
    network = networks.construct({**NARROW, "num_classes": 0}, dtype="bfloat16", rngs=nnx.Rngs(0))
    assert View(network)(np.zeros((1, 16, 16, 3), np.uint8)).taps["pooled"].dtype == np.float32


def test_a_network_without_a_head_is_kept_as_one_and_restored_and_exported(headless):
    restored = networks.restore(headless)
    assert restored.arguments["num_classes"] == 0
    assert restored.origin["head"] == "none"
    assert restored.view(np.zeros((1, 16, 16, 3), np.uint8)).logits is None
    entries = export_entries(store.load_network(headless))
    assert "layer4.1.conv2.weight" in entries
    assert not any(name.startswith("fc.") for name in entries)


def test_a_network_without_a_head_is_not_evaluated_by_its_logits(headless):
    with pytest.raises(ValueError, match="has no head: train one, as --config finetune"):
        evaluate.load(base.base(), "nowhere", headless)


def test_a_student_from_weights_without_a_head_gets_a_fresh_one_for_the_data_s_classes(headless):
    student = built_network(classes=3, weights=headless)
    kept = store.load_network(headless).weights
    assert student.origin["head"] == "fresh"
    assert student.view(np.zeros((1, 16, 16, 3), np.uint8)).logits.shape == (1, 3)
    own = store.network_weights(student.view.network)
    assert own.keys() - kept.keys() == {"fc.kernel", "fc.bias"}
    np.testing.assert_array_equal(own["layer4.1.conv2.kernel"], kept["layer4.1.conv2.kernel"])


def test_a_student_from_weights_with_a_head_leaves_it_out_where_the_data_has_no_classes(tmp_path):
    with_head = keep(built_network(classes=5), tmp_path / "with_head")
    student = built_network(classes=0, weights=with_head)
    assert student.origin["head"] == "none"
    assert not any(path.startswith("fc.") for path in store.network_weights(student.view.network))


def test_a_teacher_without_a_head_stays_without_one(headless):
    teacher = built_network(classes=3, weights=headless, fit_head=False)
    assert (teacher.arguments["num_classes"], teacher.origin["head"]) == (0, "none")


def test_a_network_of_pixels_cannot_do_without_classes():
    with pytest.raises(ValueError, match=r"DeepLabV3\+ classifies pixels, and there are no classes"):
        networks.construct({"architecture": "deeplab_resnet18", "num_classes": 0}, rngs=nnx.Rngs(0))


def training(classes, *, of_student=None, of_teacher=None, **weights):
    """Build a training of so many classes, with losses of these weights."""
    config = base.base()
    config.data.image_size = 16
    for which in (config.student, config.teacher):
        which.update({"weights": "random", **NARROW})
    config.losses.cross_entropy.weight = 0.0
    for loss, weight in weights.items():
        (config.losses.tat.layer4 if loss == "tat" else config.losses[loss]).weight = weight
    return build(
        config,
        sharding.make_mesh(jax.devices()[:1]),
        num_classes=classes,
        steps_per_epoch=1,
        student=of_student,
        teacher=of_teacher,
    )


@pytest.mark.parametrize("loss", ["cross_entropy", "pixel_cross_entropy"])
def test_a_loss_against_labels_refuses_by_name_images_that_have_none(loss):
    with pytest.raises(ValueError, match=f"^{loss} reads labels, and the images have none: set the weight"):
        training(0, tat=1.0, **{loss: 1.0})


def test_a_loss_between_logits_refuses_by_name_a_student_without_a_head():
    with pytest.raises(ValueError, match=r"^kd reads logits, and the student gives none, as it has no head"):
        training(0, kd=1.0, tat=1.0, of_teacher=built_network(classes=3))


def test_a_loss_between_logits_refuses_by_name_a_teacher_without_a_head():
    headless = networks.Network(
        View(networks.construct({**NARROW, "num_classes": 0}, rngs=nnx.Rngs(0))),
        {**NARROW, "num_classes": 0},
        {"head": "none", "source": "a file"},
    )
    with pytest.raises(ValueError, match="the teacher from a file has no trained head, and kd compares its"):
        training(3, kd=1.0, of_teacher=headless)


def test_a_network_of_one_s_own_without_a_head_refuses_cross_entropy_by_name():
    class Headless(Tiny):
        def __call__(self, images, *, train=False, where=None):
            super().__call__(images, train=train, where=where)

    with pytest.raises(ValueError, match=r"^cross_entropy reads logits, and the student gives none"):
        training(3, cross_entropy=1.0, of_student=Headless(2, rngs=nnx.Rngs(0)))


def test_what_compares_taps_alone_trains_without_labels_and_without_heads():
    built = training(0, tat=1.0)
    assert built.student.origin["head"] == "none"
    assert not built.recipe.teacher_has_head
    assert not any("fc" in map(str, path) for path, _ in nnx.to_flat_state(built.state.params))


def test_kd_needs_no_labels_where_both_networks_have_a_head():
    own = Tiny(2, rngs=nnx.Rngs(0))
    assert training(0, kd=1.0, of_student=own, of_teacher=own).recipe.teacher_has_head


def images_of(root, split, **changes):
    config = base.base().data
    config.update({"source": "images", "root": str(root), **changes})
    return open_source(config, split)


def names_of(source):
    return [source[index].name.rpartition("/")[2] for index in range(len(source))]


def tar_of(path, names):
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(data := encode(photograph(12, 16, seed=i)))
            tar.addfile(member, io.BytesIO(data))


TREE = [f"{folder}/{i}.jpg" for folder in ("a", "b/c") for i in range(5)]


def test_of_a_tree_of_folders_an_evenly_spaced_share_is_held_out_and_all_others_are_trained_on(folder):
    root = folder(*TREE)
    train, val = (images_of(root, split, held_out=0.3) for split in ("train", "val"))
    assert (len(train), len(val)) == (7, 3)
    of_both = [source[i].name for source in (train, val) for i in range(len(source))]
    assert sorted(of_both) == sorted(str(root / path) for path in TREE)
    assert train.notes == ["3 of 10 images, evenly spaced, are held out (data.held_out=0.3)"]
    assert (train.num_classes, train[0].label) == (0, None)
    assert pickle.loads(pickle.dumps(train))[6] == train[6]  # as processes that read have it


def test_train_and_val_are_taken_whole_where_both_are_there(folder):
    root = folder("train/x/1.jpg", "train/2.jpg", "val/3.jpg")
    assert names_of(images_of(root, "train")) == ["2.jpg", "1.jpg"]
    assert names_of(images_of(root, "val")) == ["3.jpg"]


def test_a_text_file_lists_paths_relative_to_its_own_folder(folder):
    root = folder(*TREE)
    listed = root / "b" / "list.txt"
    listed.write_text(f"c/3.jpg\n../a/1.jpg\n\n{root}/a/0.jpg\n")
    assert names_of(images_of(listed, "train")) == ["1.jpg", "0.jpg"]
    assert names_of(images_of(listed, "val")) == ["3.jpg"]


def test_tar_files_of_images_need_no_classes_beside_them(tmp_path):
    tar_of(tmp_path / "0.tar", ["x/1.jpg", "2.jpg"])
    tar_of(tmp_path / "1.tar", ["3.jpg", "4.cls.txt", "5.png"])
    whole = [images_of(tmp_path, split) for split in ("val", "train")]
    assert list(map(names_of, whole)) == [["1.jpg"], ["2.jpg", "3.jpg", "5.png"]]
    assert isinstance(whole[1][0].image, bytes)
    assert pickle.loads(pickle.dumps(whole[1]))[2] == whole[1][2]


def test_tar_files_of_images_may_lie_in_a_bucket(bucket, tmp_path):
    tar_of(tmp_path / "0.tar", ["1.jpg", "2.jpg", "3.jpg"])
    (bucket / "shards").write("0.tar", (tmp_path / "0.tar").read_bytes())
    assert names_of(images_of(bucket / "shards", "train")) == ["2.jpg", "3.jpg"]


def test_nothing_to_learn_from_is_said_in_a_line(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^no folder or file .*/nowhere; data.root is a folder of"):
        images_of(tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^no images in .*/empty \("):
        images_of(tmp_path / "empty", "train")
    root = folder("a/1.jpg")
    with pytest.raises(ValueError, match=r"^data.root has one image, and at least two are needed"):
        images_of(root / "a", "train")
    (root / "list.txt").write_text("a/1.jpg\na/2.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"list.txt, line 2: there is no file .*/a/2.jpg$"):
        images_of(root / "list.txt", "train")
    (root / "list.txt").write_text("\n")
    with pytest.raises(FileNotFoundError, match=r"list.txt lists no images; data.root is"):
        images_of(root / "list.txt", "train")


def test_a_tar_file_that_is_cut_short_is_named(tmp_path):
    tar_of(tmp_path / "0.tar", ["1.jpg", "2.jpg"])
    with (tmp_path / "0.tar").open("r+b") as file:
        file.truncate(1300)
    with pytest.raises(ValueError, match=r"^.*/0.tar is damaged \(.*\): pack or copy it anew$"):
        images_of(tmp_path, "train")


def test_classification_takes_no_images_without_classes(folder):
    config = base.base()
    config.data.update({"source": "images", "root": str(folder(*TREE))})
    with pytest.raises(ValueError, match=r"^the images have no classes, .*: take --config.task=features$"):
        open_pipeline(config, "train")
    config.task = "features"
    batch = next(open_pipeline(config, "train", batch_size=2).epoch(0))
    assert batch.label is None
    assert batch.image.shape == (2, 224, 224, 3)


@pytest.mark.parametrize("source", ["digits", "digit_masks"])
def test_features_take_any_source_without_its_labels(source):
    config = base.base()
    config.task = "features"
    config.data.update({"source": source, "image_size": 16, "eval_resize": 16, "threads": 0})
    data = open_pipeline(config, "train", batch_size=2)
    assert data.source.num_classes == 0
    assert next(data.epoch(0)).label is None
