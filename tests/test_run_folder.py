"""A run's folder: which config may continue there, and what one of before says now."""

import errno
import json
import threading
from pathlib import Path

import pytest

from tat_jax import costs, run_folder
from tat_jax.configs import base, r18_r34, r18_r34_kd
from tat_jax.experiment import FIELDS
from tat_jax.run_folder import BusyError, only_run
from tat_jax.schedules import linear


def written(config, folder):
    run_folder.write_config(config, folder, 0, changed=False)
    return config.copy_and_resolve_references()


def test_what_is_written_is_read_again(tmp_path):
    assert run_folder.read_config(tmp_path, FIELDS) is None
    config = written(r18_r34.get_config(), tmp_path)
    assert json.loads(run_folder.read_config(tmp_path, FIELDS).to_json()) == json.loads(config.to_json())
    assert run_folder.changes(config, tmp_path, FIELDS) == []


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("epochs", 7, "epochs: 100 there, 7 now"),
        ("losses.kd.weight", 0.5, "losses.kd.weight: 0.0 there, 0.5 now"),
        ("losses.tat.layer4.weight", 0.3, "losses.tat.layer4.weight: 0.2 there, 0.3 now"),
        ("optimizer.milestones", (1, 2), r"optimizer.milestones: [30, 60, 90] there, [1, 2] now"),
    ],
)
def test_what_may_change_is_told(tmp_path, name, value, line):
    config = written(r18_r34.get_config(), tmp_path)
    config.update_from_flattened_dict({name: value})
    assert run_folder.changes(config, tmp_path, FIELDS) == [line]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1),
        ("student.width", 8),
        ("losses.tat.layer4.weight", 0.0),
        ("losses.tat.layer3.weight", 0.1),
        ("losses.tat.layer4.heads", 2),
    ],
)
def test_what_may_not_change_is_refused_by_name(tmp_path, name, value):
    config = written(r18_r34.get_config(), tmp_path)
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=rf"another config; choose another --workdir:\n  {name}: "):
        run_folder.changes(config, tmp_path, FIELDS)


def test_a_schedule_may_take_the_place_of_a_weight_that_is_not_0(tmp_path):
    config = written(r18_r34.get_config(), tmp_path)
    config.losses.tat.layer4 = base.loss("tat", weight=linear(0.0, 0.2, end=5))
    (line,) = run_folder.changes(config, tmp_path, FIELDS)
    assert line.startswith("losses.tat.layer4.weight: 0.2 there, {")
    config.losses.tat.layer3 = base.loss("tat", weight=linear(0.0, 0.2, end=5))
    with pytest.raises(ValueError, match=r"losses\.tat\.layer3\.weight"):
        run_folder.changes(config, tmp_path, FIELDS)


def test_a_field_that_one_of_two_configs_lacks_is_at_its_default(tmp_path):
    config = written(r18_r34.get_config(), tmp_path)
    path = tmp_path / "config.json"
    said = json.loads(path.read_text())
    del said["losses"]["kd"], said["losses"]["tat"]["layer1"], said["optimizer"]["nesterov"]
    path.write_text(json.dumps(said))
    assert run_folder.read_config(tmp_path, FIELDS).optimizer.nesterov is False
    assert run_folder.changes(config, tmp_path, FIELDS) == []
    with config.unlocked():
        config.losses.tat.layer9 = base.loss("tat", weight=0.1, heads=1)
    with pytest.raises(ValueError, match=r"workdir:\n  losses.tat.layer9.weight: 0.0 there, 0.1 now$"):
        run_folder.changes(config, tmp_path, FIELDS)


def test_what_none_stands_for_is_no_change_and_another_is_refused_with_the_way_to_keep_it(tmp_path):
    config = r18_r34.get_config()
    config.data.eval_resize = 256  # as every config of before said it
    config = written(config, tmp_path)
    config.data.eval_resize = None
    assert run_folder.changes(config, tmp_path, FIELDS) == []
    config.data.image_size = 96
    keep = r"data.eval_resize: 256 there, 110 now; --config.data.eval_resize=256 keeps it\n"
    with pytest.raises(ValueError, match=keep):
        run_folder.changes(config, tmp_path, FIELDS)


def test_a_config_that_changes_is_kept_with_the_step_to_which_it_was_used(tmp_path):
    config = written(r18_r34.get_config(), tmp_path)
    config.epochs = 7
    run_folder.write_config(config, tmp_path, 300, changed=True)
    kept = {path.name: json.loads(path.read_text())["epochs"] for path in tmp_path.iterdir()}
    assert kept == {"config.json": 7, "config_until_step300.json": 100}


def of_before(config, *, alpha, beta, temperature):
    """Return a config as it was written before losses were a list."""
    said = json.loads(config.to_json())
    said.pop("task")
    taps = said.pop("losses")["tat"]
    for options in taps.values():
        del options["student_tap"], options["teacher_tap"]
    later = ("nesterov", "schedule", "power", "minimum_rate", "warmup_epochs", "rates")
    said["optimizer"] = {name: v for name, v in said["optimizer"].items() if name not in later}
    for network in ("student", "teacher"):
        for name in ("mean", "std", "image_size"):
            del said[network][name]
    return said | {"loss": {"alpha": alpha, "beta": beta, "temperature": temperature}, "tat": taps}


@pytest.mark.parametrize(
    ("module", "loss"),
    [
        (r18_r34, {"alpha": 0.1, "beta": 0.0, "temperature": 1.0}),
        (r18_r34_kd, {"alpha": 0.5, "beta": 0.5, "temperature": 1.0}),
        (r18_r34_kd, {"alpha": 0.5, "beta": None, "temperature": 1.0}),
    ],
)
def test_a_config_of_before_losses_were_a_list_says_the_same(tmp_path, module, loss):
    config = module.get_config()
    (tmp_path / "config.json").write_text(json.dumps(of_before(config, **loss)))
    assert run_folder.changes(config, tmp_path, FIELDS) == []


def test_alpha_0_was_the_bare_divergence(tmp_path):
    loss = {"alpha": 0.0, "beta": 0.3, "temperature": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(of_before(r18_r34.get_config(), **loss)))
    losses = run_folder.read_config(tmp_path, FIELDS).losses
    assert losses.cross_entropy.weight == 0
    assert losses.kd.weight * losses.kd.temperature**2 == 1


def test_hintons_weight_stays_what_it_was_to_the_bit(tmp_path):
    loss = {"alpha": 0.1, "beta": 0.9, "temperature": 3.0}
    assert 0.9 * 3.0**2 / 3.0**2 != 0.9
    (tmp_path / "config.json").write_text(json.dumps(of_before(r18_r34.get_config(), **loss)))
    losses = run_folder.read_config(tmp_path, FIELDS).losses
    assert (losses.cross_entropy.weight, losses.kd.weight, losses.kd.temperature) == (0.1, 0.9, 3.0)


def test_a_run_that_said_a_replaced_field_continues_with_the_one_now_and_no_other(tmp_path):
    config = written(r18_r34.get_config(), tmp_path)
    path = tmp_path / "config.json"
    said = json.loads(path.read_text())
    for tap, options in said["losses"]["tat"].items():
        del options["asks"]
        options["per_teacher_position"] = tap == "layer4"
    path.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"losses.tat.layer4.asks: teacher there, student now$"):
        run_folder.changes(config, tmp_path, FIELDS)
    config.losses.tat.layer4.asks = "teacher"
    assert run_folder.changes(config, tmp_path, FIELDS) == []


@pytest.mark.parametrize("text", ["{", "[]", '"text"', '{"losses": 3, "tat": 1'])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json is damaged; remove it"):
        run_folder.read_config(tmp_path, FIELDS)


class TestOnlyRun:
    def test_a_second_run_is_refused_until_the_first_has_ended(self, tmp_path):
        with (
            only_run(tmp_path / "run"),
            pytest.raises(BusyError, match=r"another run is at work in .*run; choose another --workdir"),
            only_run(tmp_path / "run"),
        ):
            pass
        with only_run(tmp_path / "run") as check_is_there:
            check_is_there()

    def test_whether_one_is_at_work_is_asked_without_keeping_others_out(self, tmp_path):
        assert not run_folder.is_busy(tmp_path / "run")
        assert not (tmp_path / "run").exists()
        with only_run(tmp_path / "run"):
            assert run_folder.is_busy(tmp_path / "run")
        assert not run_folder.is_busy(tmp_path / "run")
        with only_run(tmp_path / "run"):
            pass

    def test_what_takes_a_moment_is_done_in_turn(self, tmp_path):
        order = []

        def second():
            with run_folder.in_turn(tmp_path / "study"):
                order.append("second")

        thread = threading.Thread(target=second)
        with run_folder.in_turn(tmp_path / "study"):
            thread.start()
            thread.join(0.2)
            order.append("first")
        thread.join()
        assert order == ["first", "second"]

    def test_a_folder_that_was_moved_is_told_of_and_what_was_made_anew_there_is_removed(self, tmp_path):
        def move(folder, check_is_there):
            folder.rename(tmp_path / "moved")
            (folder / "checkpoints" / "7.tmp").mkdir(parents=True)
            check_is_there()

        with pytest.raises(OSError, match="run was moved or deleted while its run was at work: nothing more"):
            self.work(tmp_path / "run", move)
        assert [path.name for path in tmp_path.iterdir()] == ["moved"]

    def test_what_fails_because_the_folder_went_is_told_as_that(self, tmp_path):
        def write_after_moving(folder, _):
            folder.rename(tmp_path / "moved")
            (folder / "row").write_text("")

        with pytest.raises(OSError, match="was moved or deleted"):
            self.work(tmp_path / "run", write_after_moving)

    def test_a_full_disk_is_named_with_the_way_out(self, tmp_path):
        def write(*_):
            with open("/dev/full", "wb", buffering=0) as file:
                file.write(b"row")

        with pytest.raises(
            OSError, match=r"cannot write in .*: No space left on device; make room there, and"
        ):
            self.work(tmp_path, write)

    def test_a_full_disk_that_the_costs_of_a_run_meet_is_named_likewise(self, tmp_path, monkeypatch):
        def fail(path, *_):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match=r"cannot write in .*: No space left on device; make room there"):
            self.work(tmp_path, lambda *_: costs.note(tmp_path, step_memory=1))

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        message = r"cannot write in .*file/run: Not a directory; .*another --workdir"
        with pytest.raises(OSError, match=message):
            self.work(tmp_path / "file" / "run", lambda *_: None)

    @pytest.mark.parametrize(
        "error", [OSError(errno.ENOSPC, "full", "/elsewhere/file"), OSError(errno.EIO, "broken")]
    )
    def test_an_error_of_another_place_or_kind_stays_as_it_is(self, tmp_path, error):
        def fail(*_):
            raise error

        with pytest.raises(OSError, match=error.strerror) as raised:
            self.work(tmp_path, fail)
        assert raised.value is error

    @pytest.mark.parametrize(
        ("path", "is_blamed"),
        [
            ("run_data/train/a.jpg", False),
            ("run/../run_data/a.jpg", False),
            ("run/row", True),
            (b"run/row", True),
            ("run", True),
            (".", True),
            (7, False),
        ],
    )
    def test_a_folder_whose_name_begins_alike_is_another(self, tmp_path, monkeypatch, path, is_blamed):
        def fail(*_):
            raise OSError(errno.EACCES, "Permission denied", path)

        monkeypatch.chdir(tmp_path)
        with pytest.raises(OSError, match="Permission denied") as raised:
            self.work(Path("run"), fail)
        assert str(raised.value).startswith("cannot write in run: ") == is_blamed

    def work(self, folder, work):
        with only_run(folder) as check_is_there:
            work(folder, check_is_there)
