"""Checkpoints: what is written, what is kept, what is taken for a checkpoint and what is refused."""

import asyncio
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from promot_jax import trees
from promot_jax.checkpoints import pretrained, stage_folder
from promot_jax.checkpoints.orbax import Checkpoints, Saved
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import StorageError, UserError
from promot_jax.results.schema import StageRecord
from promot_jax.results.scores import StepEvaluation
from promot_jax.training.optimizer import Optimizer

PROGRESS = {"curve": [{"step": 0, "target": 12.5, "loss": None}], "seconds": 3.25}


def make_state(value=0.0, rows=4, optimizer="adafactor"):
    """The state of a stage that trains a prompt, placed as a run places it."""
    params = Partitioner().place({"prompt": {"task": jnp.arange(rows * 8, dtype=jnp.float32).reshape(rows, 8) + value}})
    slots = Optimizer(optimizer).build(10).init(params)
    step = jax.device_put(jnp.int32(value), Partitioner().replicated())
    return {"params": params, "optimizer": jax.device_put(slots, Partitioner().replicated()), "step": step}


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.dtype == other.dtype and one.sharding == other.sharding and np.array_equal(one, other)


@pytest.fixture(name="opened")
def _opened(tmp_path):
    """Opens the same folder any number of times; closes all."""
    all_opened = []

    def opened(**options):
        all_opened.append(Checkpoints(tmp_path / "checkpoints", **options))
        return all_opened[-1]

    yield opened
    for checkpoints in all_opened:
        checkpoints.close()


def save(checkpoints, scores, **kwargs):
    for step, score in scores.items():
        checkpoints.save(step, make_state(step, **kwargs), PROGRESS, score)
    checkpoints.wait()


def steps_on_disk(checkpoints):
    return sorted(int(path.name) for path in checkpoints.folder.iterdir() if path.name.isdigit())


def test_a_new_folder_has_no_checkpoint(opened, tmp_path):
    assert opened().latest() is None
    assert (tmp_path / "checkpoints").is_dir()


def test_checkpoints_of_an_analysis_stay(opened):
    scores = {10: 5.0, 20: 4.0, 30: 9.0, 40: 3.0, 50: 2.0}
    writer = opened(keep_period=20)
    save(writer, scores)
    assert steps_on_disk(writer) == writer.steps() == [20, 30, 40, 50]  # every 20, the best, the newest
    writer.close()
    save(opened(), {60: 1.0})
    assert opened().steps() == [30, 60]


def test_reading_beside_a_writer_leaves_what_is_half_deleted(opened, tmp_path):
    save(opened(), {10: 5.0})
    half = tmp_path / "checkpoints" / "5" / "state"
    half.mkdir(parents=True)
    assert Saved(tmp_path / "checkpoints").steps() == [10] and half.is_dir()
    assert opened().steps() == [10] and not half.exists()


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_what_was_saved_comes_back_bitwise(opened, optimizer):
    state = make_state(7, optimizer=optimizer)
    state["params"]["prompt"]["task"] *= jnp.float32(1 / 3)
    writer = opened()
    writer.save(7, state, PROGRESS, 50.0)
    writer.wait()
    for reader in (writer, opened()):
        assert reader.latest() == 7
        restored, progress = reader.restore(7, make_state(optimizer=optimizer))
        assert_same(restored, state)
        assert progress == PROGRESS
        assert_same(reader.parameters(7, make_state()["params"]), state["params"])
        assert reader.shapes(7) == {"prompt/task": (4, 8)}


def test_a_save_holds_what_was_there_when_it_was_called(opened, monkeypatch):
    """The state is donated to the next update and the curve grows while the save goes on in the background."""

    async def late(self, *args):
        await asyncio.sleep(0.2)
        await write(self, *args)

    write = ocp.JsonCheckpointHandler._save_fn
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", late)
    bump = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state, curve = {"params": {"prompt": {"task": jnp.zeros((500, 500))}}, "optimizer": (), "step": jnp.int32(0)}, []
    checkpoints = opened()
    for step in range(1, 4):
        state = bump(state)
        curve.append({"step": step})
        checkpoints.save(step, state, {"curve": curve}, 1.0)
        state = bump(state)
        curve[-1]["late"] = True
        curve.append({"step": "late"})
        checkpoints.wait()
        restored, progress = checkpoints.restore(step, state)
        assert np.unique(restored["params"]["prompt"]["task"]).tolist() == [int(state["step"]) - 1]
        assert "late" not in progress["curve"][-1] and progress["curve"][-1]["step"] == step
        assert len(progress["curve"]) == 2 * step - 1


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ({1: 10, 2: 30, 3: 20, 4: 25}, [2, 4]),
        ({1: 10, 2: 20, 3: 30}, [3]),
        ({1: 30, 2: 20, 3: 10}, [1, 3]),
        ({1: 30, 2: 30, 3: 10}, [2, 3]),  # of equals the later
        ({1: 30, 2: 30, 3: 30}, [3]),
        ({1: -1, 2: -1, 3: 0, 4: -1}, [3, 4]),
    ],
)
@pytest.mark.parametrize("interrupted", [False, True])
def test_the_newest_and_the_best_are_kept(opened, scores, kept, interrupted):
    checkpoints = opened()
    for step, score in scores.items():
        checkpoints = opened() if interrupted else checkpoints
        save(checkpoints, {step: score})
        assert checkpoints.latest() == step
    assert steps_on_disk(checkpoints) == kept


def test_what_is_no_finished_checkpoint_is_ignored(opened, tmp_path):
    writer = opened()
    save(writer, {3: 50, 5: 20})
    folder = tmp_path / "checkpoints"
    (folder / "9").mkdir()
    (folder / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / "8.orbax-checkpoint-tmp").mkdir()
    (folder / "notes").mkdir()
    (folder / "11").write_text("a file")
    shutil.copytree(folder / "5", folder / "12")  # half deleted when the process was killed
    (folder / "12" / "_CHECKPOINT_METADATA").unlink()
    assert writer.latest() == 5

    reopened = opened()
    assert steps_on_disk(reopened) == [3, 5, 11]  # 11 is the file: none of ours
    assert reopened.latest() == 5
    restored, _ = reopened.restore(5, make_state())
    assert_same(restored, make_state(5))


def test_training_goes_on_over_what_an_interruption_left(opened, tmp_path):
    save(opened(), {3: 50, 5: 20})
    (tmp_path / "checkpoints" / "9").mkdir()
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)

    checkpoints = opened()
    for step in (6, 7, 9, 10):
        save(checkpoints, {step: 10})
        assert checkpoints.latest() == step and steps_on_disk(checkpoints) == [3, step]
        assert_same(checkpoints.restore(step, make_state())[0], make_state(step))


def test_a_checkpoint_of_another_shape_is_refused(opened):
    checkpoints = opened()
    save(checkpoints, {2: 50})
    for read in (checkpoints.restore, lambda step, like: checkpoints.parameters(step, like["params"])):
        with pytest.raises(
            UserError, match=r"holds prompt/task as \(4, 8\), this run has \(6, 8\); give another --work"
        ):
            read(2, make_state(rows=6))
        other = make_state()
        other["params"]["prompt"]["other"] = other["params"]["prompt"].pop("task")
        with pytest.raises(UserError, match=r"holds prompt/other as nothing, this run has \(4, 8\)"):
            read(2, other)
        empty = make_state()
        empty["params"] = {"prompt": {}}
        with pytest.raises(UserError, match="also trains prompt/task, which this run does not"):
            read(2, empty)
        with pytest.raises(UserError, match="checkpoints/3 is gone; put it back"):
            read(3, make_state())


def test_a_checkpoint_of_another_optimizer_is_refused(opened):
    checkpoints = opened()
    save(checkpoints, {2: 50}, optimizer="adamw")
    with pytest.raises(UserError, match=r"checkpoints/2 does not fit this run \("):
        checkpoints.restore(2, make_state(optimizer="adafactor"))


def test_only_trained_leaves_are_handed_over(opened, tmp_path, caplog):
    save(opened(), {4: 10})
    frozen = {"model": {"kernel": jnp.ones(3)}, "prompt": {"other": jnp.ones((2, 8))}}
    params = trees.merge(frozen, Partitioner().place({"prompt": {"task": jnp.zeros((4, 8))}}))

    caplog.clear()
    merged = stage_folder.overlay(tmp_path, 4, params)
    assert not [record for record in caplog.records if record.levelname not in ("DEBUG", "INFO")]
    assert np.array_equal(merged["prompt"]["task"], make_state(4)["params"]["prompt"]["task"])
    assert merged["model"]["kernel"] is frozen["model"]["kernel"]
    assert merged["prompt"]["other"] is frozen["prompt"]["other"]


def test_a_stage_is_finished_once_it_is_recorded(tmp_path):
    curve = [StepEvaluation(step=4, stage="stage2", target=50.0)]
    stage = StageRecord(stage="stage2", trains="model", checkpoint="a.gguf", base="b", best_step=4, curve=curve)
    assert stage_folder.describe(tmp_path) is None
    stage_folder.record(tmp_path, stage)
    assert stage_folder.describe(tmp_path) == stage
    for text, message in (("{", "cannot be read"), ("[]", "Expected `object`"), ("{}", "missing required field")):
        (tmp_path / stage_folder.STAGE_FILE).write_text(text)
        with pytest.raises(UserError, match=f"{message}.*; delete it to run the stage again"):
            stage_folder.describe(tmp_path)
    stage_folder.record(tmp_path, stage)
    with pytest.raises(UserError, match=r"No checkpoint at '.*nowhere'"):
        pretrained.load(str(tmp_path / "nowhere"), Partitioner())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no finished run that trained a model"):
        pretrained.load(str(tmp_path / "empty"), Partitioner())


def changed(opened, folder, change):
    """A checkpoint of step 4 as a disk that lies gives it back: Orbax's files are whole, one leaf is another."""
    state, elsewhere = make_state(4), Checkpoints(folder / "elsewhere")
    elsewhere.save(4, change(state), PROGRESS, 10.0)
    elsewhere.close()
    save(opened(), {4: 10})
    shutil.rmtree(folder / "checkpoints/4/state")
    shutil.copytree(folder / "elsewhere/4/state", folder / "checkpoints/4/state")
    return opened()


def flipped(array):
    """One bit of one element."""
    words = np.asarray(array).copy().view(np.uint32)
    words.reshape(-1)[3] ^= np.uint32(1)
    return jax.device_put(words.view(np.float32), array.sharding)


def test_one_flipped_bit_of_a_parameter_is_refused(opened, tmp_path):
    """The right values are those that were saved, bit for bit; Orbax itself reads the file without a word."""
    checkpoints = changed(opened, tmp_path, lambda state: state | {"params": jax.tree.map(flipped, state["params"])})
    for read in (checkpoints.restore, lambda step, like: checkpoints.parameters(step, like["params"])):
        with pytest.raises(UserError, match=r"4 is damaged \(the values of prompt/task are not those .*put a copy"):
            read(4, make_state())


def test_one_flipped_bit_of_the_optimizer_is_refused(opened, tmp_path):
    def change(state):
        leaves, structure = jax.tree.flatten(state["optimizer"])
        leaves = [flipped(leaf) if leaf.size > 8 and leaf.dtype == np.float32 else leaf for leaf in leaves]
        return state | {"optimizer": jax.tree.unflatten(structure, leaves)}

    checkpoints = changed(opened, tmp_path, change)
    with pytest.raises(UserError, match=r"4 is damaged \(the optimizer's values are not those that were saved"):
        checkpoints.restore(4, make_state())
    assert_same(checkpoints.parameters(4, make_state()["params"]), make_state(4)["params"])  # of them nothing is wrong


def test_a_step_in_the_folder_of_another_is_refused(opened, tmp_path):
    save(opened(), {4: 10})
    (tmp_path / "checkpoints/4").rename(tmp_path / "checkpoints/3")
    checkpoints = opened()
    for read in (checkpoints.restore, lambda step, like: checkpoints.parameters(step, like["params"])):
        with pytest.raises(UserError, match=r"checkpoints/3 is damaged \(it is that of step 4, under another name"):
            read(3, make_state())


def test_a_checkpoint_of_another_run_is_refused(opened, tmp_path):
    save(opened(run="a"), {4: 10})
    for run in ("a", ""):
        opened(run=run).restore(4, make_state())
        Saved(tmp_path / "checkpoints", run).parameters(4, make_state()["params"])
    other = opened(run="b")
    for read in (other.restore, lambda step, like: other.parameters(step, like["params"])):
        with pytest.raises(UserError, match="checkpoints/4 is of a run with other settings; put the right one back"):
            read(4, make_state())


def test_a_checkpoint_of_an_earlier_version_says_nothing_of_its_origin(opened, tmp_path):
    save(opened(run="a"), {4: 10})
    path = tmp_path / "checkpoints/4/progress/metadata"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "origin"}))
    assert_same(opened(run="b").restore(4, make_state())[0], make_state(4))


@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), float("nan")])
def test_what_a_file_may_leave_out_has_its_checksum(opened, value):
    """Zarr leaves out chunks that are the fill value, and -0.0 equals 0.0."""
    state = {"params": {"prompt": {"task": jnp.full((4, 8), value)}}, "optimizer": (), "step": jnp.int32(4)}
    checkpoints = opened()
    checkpoints.save(4, state, PROGRESS, 10.0)
    checkpoints.wait()
    restored, _ = checkpoints.restore(4, state)
    assert np.asarray(restored["params"]["prompt"]["task"]).tobytes() == np.full((4, 8), value, np.float32).tobytes()


@pytest.mark.parametrize("part", ["progress", "progress/metadata", "state/_METADATA", "state/manifest.ocdbt", "state"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_part_that_is_missing_or_cut_is_one_sentence(opened, tmp_path, part, how):
    save(opened(), {4: 10})
    path = tmp_path / "checkpoints/4" / part
    if how == "missing":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        for file in [file for file in (path, *path.rglob("*")) if file.is_file()]:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"The checkpoint .*/4 (is damaged|is gone|does not fit this run)"):
        opened().restore(4, make_state())


@pytest.mark.parametrize("content", ["", '{"sco', "5", "[]", '{"other": 1}', '{"score": "high"}'])
def test_damaged_scores_are_one_sentence(opened, tmp_path, content):
    """Orbax reads them when it opens the folder."""
    save(opened(), {4: 10})
    (tmp_path / "checkpoints/4/metrics/metrics").write_text(content)
    with pytest.raises(UserError, match=r"The checkpoint .*/4 is damaged"):
        opened()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's other writes
@pytest.mark.parametrize("fault", ["a quota", "a file in the way"])
def test_a_save_that_fails_is_one_sentence_and_the_last_one_stays(opened, tmp_path, fault, caplog, capfd):
    """The reasons are those of the system: errno(3)."""
    state = make_state(1) | {"params": {"prompt": {"task": jax.random.normal(jax.random.key(0), (512, 256))}}}
    checkpoints = opened()
    checkpoints.save(1, state, PROGRESS, 10.0)
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fault == "a quota":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    else:
        (tmp_path / "checkpoints").rename(tmp_path / "moved")
        (tmp_path / "checkpoints").write_text("")
    reason = "File too large" if fault == "a quota" else "Not a directory|File exists"
    try:
        with pytest.raises(StorageError, match=rf"^Cannot save a checkpoint in .* \(({reason})\); make room"):
            save_and_wait(checkpoints, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "Traceback" not in capfd.readouterr().err and not [r for r in caplog.records if r.levelname == "ERROR"]
    if fault == "a file in the way":
        (tmp_path / "checkpoints").unlink()
        (tmp_path / "moved").rename(tmp_path / "checkpoints")
    assert opened().latest() == 1
    opened().restore(1, state)


def save_and_wait(checkpoints, state):
    checkpoints.save(2, state, PROGRESS, 10.0)
    checkpoints.wait()
