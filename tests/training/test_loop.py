"""The training loop: what moves and what does not, the loss, resuming, choosing the best."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from compiled_once import compiled_once
from forward import target_logits

from promot_jax import methods, trees
from promot_jax.checkpoints.orbax import Checkpoints, Saved
from promot_jax.distributed import partitioning
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import TrainingError, UserError
from promot_jax.methods.finetune import FINETUNE
from promot_jax.methods.promot import STAGE1, STAGE2
from promot_jax.models import DecoderConfig, build
from promot_jax.models.batch_layout import Tokens, decoder_rows
from promot_jax.params import soft_prompts
from promot_jax.training.loop import Trained, train
from promot_jax.training.losses import cross_entropy
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training
from promot_jax.training.state import TrainState, shardings
from promot_jax.training.step import make_step

VOCAB, EMBED, PROMPT, STEPS = 61, 16, 4, 8
CONFIG = DecoderConfig(VOCAB, EMBED, 2, 1, 2, 8, 24, dropout_rate=0.1, tied_embeddings=False, remat="none")
ADAMW = Training(STEPS, 4, 2, Optimizer("adamw", 0.01, "cosine", warmup_steps=2, weight_decay=0.1), dropout_rate=0.1)
ADAFACTOR = Training(STEPS, 4, 2, Optimizer("adafactor", 0.1, "linear", decay_offset=100), dropout_rate=0.1)
# What the tests share: one interrupted and one uninterrupted run each.
RUNS = {
    "stage1": (STAGE1, ADAFACTOR),
    "stage2": (STAGE2, ADAMW),
    "stage2 in bfloat16": (STAGE2, dataclasses.replace(ADAMW, weight_dtype="bfloat16")),
}


def make_params(tasks=("task",)):
    noise = np.random.default_rng(0)
    shapes = {"model": jax.eval_shape(build(CONFIG).init, jax.random.key(0))}
    shapes["prompt"] = {task: jax.ShapeDtypeStruct((PROMPT, EMBED), np.float32) for task in tasks}
    return Partitioner().place(jax.tree.map(lambda x: noise.normal(0, 0.3, x.shape).astype(np.float32), shapes))


PARAMS = make_params()
PATHS = tuple(trees.flatten(PARAMS))


def examples(seed, count, attached=True):
    """Sequences with 1 to 3 target tokens, the prompt prepended."""
    noise = np.random.default_rng(seed)
    virtual = list(range(VOCAB, VOCAB + PROMPT)) if attached else []
    return [
        Tokens(
            [*virtual, *noise.integers(0, VOCAB, noise.integers(2, 8)).tolist()],
            noise.integers(0, VOCAB, noise.integers(1, 4)).tolist(),
        )
        for _ in range(count)
    ]


def stream(attached=True, stop=None, poison=None):
    """Batches as a function of the step; stops as a killed process does, or turns to NaN."""
    for step in itertools.count():
        if step == stop:
            raise KeyboardInterrupt
        batch = decoder_rows([[one] for one in examples(step, 4, attached)], 16, 3)
        yield batch | {"weights": batch["weights"] * np.float32("nan")} if step == poison else batch


def host(tree):
    """Copies: the device's buffers are donated to the next update."""
    return {path: np.array(leaf) for path, leaf in trees.flatten(tree).items()}


def same(first, second):
    return {path for path in first if np.array_equal(first[path], second[path])}


@dataclasses.dataclass
class Record:
    """What a run showed to its caller."""

    seen: dict
    written: list
    result: Trained | None = None


@pytest.fixture(name="run", scope="module")
def _run():
    """Trains in a folder. The step of equal settings is compiled once: a process that goes on compiles the same."""
    opened = []

    def run(folder, stage, training, *, params=PARAMS, scores=None, config=CONFIG, seed=0, **source):
        model = build(dataclasses.replace(config, dropout_rate=training.dropout_rate))
        record = Record({}, [])

        def evaluate(current, step):
            record.seen[step] = host(current)
            return {"target": float((scores or {}).get(step, step)), "tasks": {"a": 1.0}}

        try:
            record.result = train(
                folder,
                model,
                params,
                stage,
                training,
                stream(stage.prompt, **source),
                evaluate,
                partitioner=Partitioner(),
                seed=seed,
                write=lambda step, scalars: record.written.append((step, scalars)),
            )
        except KeyboardInterrupt:
            opened[-1].close()  # a save that was under way: a process that is killed later
        return record

    with compiled_once(opened):
        yield run


@pytest.fixture(name="whole", scope="module")
def _whole(run, tmp_path_factory):
    """The uninterrupted run of each stage, and its folder."""
    done = {}

    def whole(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            done[name] = (run(folder, *RUNS[name]), folder)
        return done[name]

    return whole


# ---- what moves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "moving"), [("stage1", "prompt/"), ("stage2", "model/")])
def test_only_the_stages_subtree_moves(whole, name, moving):
    before = host(PARAMS)
    record, _ = whole(name)

    assert same(before, host(PARAMS)) == set(PATHS)  # the caller's own are not donated
    for after in (*record.seen.values(), host(record.result.params)):
        assert set(after) == set(PATHS)
        assert {path for path in PATHS if not path.startswith(moving)} <= same(before, after)
    assert same(before, record.seen[0]) == set(PATHS)
    assert same(before, host(record.result.params)) == {path for path in PATHS if not path.startswith(moving)}


def test_frozen_patterns_stay_bitwise_and_no_prompt_is_needed(run, tmp_path):
    training = dataclasses.replace(ADAMW, steps=2, freeze=("model/token_embedder/.*", "model/.*/scale"))
    params = {"model": PARAMS["model"]}
    record = run(tmp_path, FINETUNE, training, params=params)
    still = {path for path in trees.flatten(params) if path.endswith(("embedding", "scale"))}

    assert len(still) == 4
    assert same(host(params), host(record.result.params)) == still
    assert set(Checkpoints(tmp_path / "checkpoints").shapes(2)) == set(trees.flatten(params)) - still


def test_a_profile_changes_nothing(run, whole, tmp_path):
    stage, training = RUNS["stage1"]
    record = run(tmp_path, stage, dataclasses.replace(training, profile=(2, 3)))
    assert (tmp_path / "profile" / "summary.txt").read_text("utf-8").startswith("Updates 2 to 3 of stage stage1.\n")
    assert same(host(record.result.params), host(whole("stage1")[0].result.params)) == set(PATHS)


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_checkpoints_hold_trained_leaves_and_their_state_only(whole, name):
    stage, training = RUNS[name]
    _, folder = whole(name)
    trained = {path: leaf for path, leaf in trees.flatten(PARAMS).items() if path.startswith(stage.trains)}

    assert Checkpoints(folder / "checkpoints").shapes(STEPS) == {path: leaf.shape for path, leaf in trained.items()}
    with ocp.PyTreeCheckpointer() as reader:
        metadata = reader.metadata(folder / "checkpoints" / str(STEPS) / "state").item_metadata.tree
    sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(metadata["optimizer"])]
    moments = 2 if training.optimizer.name == "adamw" else 1
    total = trees.count(trees.unflatten(trained))
    assert moments * total <= sum(sizes) < moments * total + 40  # counters and stubs


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_frozen_leaves_may_be_held_in_bfloat16(run, tmp_path, platform, monkeypatch):
    """Not on a CPU, where XLA would make float32 of them at every step."""
    monkeypatch.setattr(partitioning, "device_of", lambda _: SimpleNamespace(platform=platform, device_kind=""))
    training = dataclasses.replace(ADAFACTOR, steps=1, dropout_rate=0.0)
    config = dataclasses.replace(CONFIG, dtype="bfloat16", attention="xla")
    record = run(tmp_path, STAGE1, training, config=config)
    held = {path: leaf.dtype for path, leaf in record.seen[1].items()}

    rounded = {path for path in PATHS if path.endswith(("kernel", "embedding"))} if platform == "tpu" else set()
    assert {path for path, dtype in held.items() if dtype == jnp.bfloat16} == rounded
    after = host(record.result.params)
    assert {leaf.dtype for leaf in after.values()} == {np.dtype(np.float32)}
    assert same(host(PARAMS), after) == {path for path in PATHS if path.startswith("model/")}


def test_trained_weights_may_be_held_in_bfloat16(whole):
    record, folder = whole("stage2 in bfloat16")
    rounded = {path for path in PATHS if path.startswith("model/") and path.endswith(("kernel", "embedding"))}
    held, after = record.seen[STEPS], host(record.result.params)

    assert {path for path, leaf in held.items() if leaf.dtype == jnp.bfloat16} == rounded
    assert {leaf.dtype for leaf in after.values()} == {np.dtype(np.float32)} == {record.seen[0][PATHS[0]].dtype}
    assert same(held, after) == set(PATHS)
    read = Saved(folder / "checkpoints").parameters(STEPS, {"model": PARAMS["model"]})
    assert same(host(read), after) == set(trees.flatten(read))
    with ocp.PyTreeCheckpointer() as reader:
        moments = reader.metadata(folder / "checkpoints" / str(STEPS) / "state").item_metadata.tree["optimizer"]
    assert "bfloat16" not in {str(leaf.dtype) for leaf in jax.tree.leaves(moments)}
    losses, exact = (
        [scalars["train/loss"] for _, scalars in one.written if "train/loss" in scalars]
        for one in (record, whole("stage2")[0])
    )
    assert losses == pytest.approx(exact, rel=0.02) and losses != exact


def test_layers_frozen_in_part_stay_bitwise_beside_weights_in_bfloat16(run, tmp_path):
    training = dataclasses.replace(ADAMW, steps=2, weight_dtype="bfloat16", freeze=("model/decoder/layers_0/.*",))
    before, record = host(PARAMS), run(tmp_path, FINETUNE, training, params={"model": PARAMS["model"]})
    after = host(record.result.params)
    stacks = [path for path in after if "/layers/" in path]

    assert stacks and all(np.array_equal(after[path][0], before[path][0]) for path in stacks)
    assert not any(np.array_equal(after[path][1], before[path][1]) for path in stacks)
    assert record.seen[2]["model/token_embedder/embedding"].dtype == jnp.bfloat16


def test_a_stage_that_trains_nothing_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="Stage stage1 trains nothing: every leaf of 'prompt' is frozen"):
        run(tmp_path, STAGE1, dataclasses.replace(ADAFACTOR, freeze=("prompt/.*",)))
    with pytest.raises(UserError, match="Stage stage1 trains nothing"):
        run(tmp_path, STAGE1, ADAFACTOR, params={"model": PARAMS["model"]})
    with pytest.raises(UserError, match=r"The pattern 'model/token_embeder/.*' matches no parameter \(did you mean"):
        run(tmp_path, STAGE2, dataclasses.replace(ADAMW, freeze=("model/token_embeder/.*",)))
    assert not (tmp_path / "checkpoints").exists()


# ---- one update ------------------------------------------------------------------------------------------------------


class Update:
    """One update by plain gradient descent at rate 1, from step 0 of seed 0 unless said otherwise."""

    def __init__(self, stage, training, transform=None):
        self.transform = optax.sgd(1.0) if transform is None else transform
        self.trained, self.frozen = trees.partition(PARAMS, lambda path: path.startswith(stage.trains))
        self.step_fn = make_step(build(CONFIG), self.transform, stage, training, shardings(self.state(0)))

    def state(self, step):
        trained = jax.tree.map(jnp.copy, self.trained)
        return TrainState(trained, self.transform.init(trained), jnp.int32(step))

    def __call__(self, batch, step=0, seed=0):
        """Returns `(gradients, metrics)`."""
        state, metrics = self.step_fn(self.state(step), self.frozen, batch, jax.random.key(seed))
        before, after = host(self.trained), host(state.params)
        return {path: before[path] - after[path] for path in before}, {name: float(x) for name, x in metrics.items()}

    def lowered(self, batch):
        return self.step_fn.lower(self.state(0), self.frozen, batch, jax.random.key(0)).as_text()


PLAIN = Training(1, 6, 1, Optimizer())
SIX = examples(100, 6)
BATCH = decoder_rows([[one] for one in SIX], 16, 3)


@pytest.fixture(name="plain", scope="module")
def _plain():
    """Gradients and metrics of the model's parameters."""
    return Update(STAGE2, PLAIN)(BATCH)


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=1e-4, atol=1e-5 * np.abs(leaf).max(), err_msg=path)


def test_the_loss_is_the_mean_over_real_target_tokens(plain):
    """By hand: every example alone, the logits behind each prefix, nothing on inputs or padding."""
    table = soft_prompts.table(PARAMS["prompt"])
    logits = functools.partial(target_logits, build(CONFIG))
    losses = []
    for one in SIX:
        alone = logits(PARAMS["model"], table, decoder_rows([[one]], 16, 3))[0]
        losses += [np.log(np.exp(alone[i]).sum()) - alone[i, token] for i, token in enumerate(one.targets)]
    _, metrics = plain

    assert len({len(one.targets) for one in SIX}) > 1  # so that a mean over rows would be another number
    assert metrics["tokens"] == len(losses)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_gradient_norm_is_of_trained_leaves_only(plain):
    grads, metrics = plain
    clip = metrics["grad_norm"] / 2
    of_prompt, prompt_metrics = Update(STAGE1, PLAIN, optax.chain(optax.clip_by_global_norm(clip), optax.sgd(1.0)))(
        BATCH
    )

    assert set(of_prompt) == {"prompt/task"} and "prompt/task" not in grads
    assert prompt_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert prompt_metrics["grad_norm"] < clip  # so that nothing is clipped, though the model's gradient would be
    for leaves, norm in ((grads, metrics["grad_norm"]), (of_prompt, prompt_metrics["grad_norm"])):
        assert norm == pytest.approx(np.sqrt(sum(np.square(leaf).sum() for leaf in leaves.values())), rel=1e-4)


def test_frozen_leaves_are_not_differentiated():
    dots = [Update(stage, PLAIN).lowered(BATCH).count("stablehlo.dot_general") for stage in (STAGE1, STAGE2)]
    weights = sum(path.endswith("kernel") for path in PATHS)

    assert dots[1] - dots[0] == weights == 8  # one product less for each frozen kernel


def test_accumulated_gradients_are_those_of_the_full_batch(plain):
    grads, metrics = plain
    parts, part_metrics = Update(STAGE2, dataclasses.replace(PLAIN, microbatches=3))(BATCH)

    assert_close(parts, grads)
    assert part_metrics == pytest.approx(metrics, rel=1e-5)


def test_packed_rows_train_as_unpacked_ones(plain):
    grads, metrics = plain
    packed = decoder_rows([SIX[:3], [], SIX[3:]], 48, 9)
    together, packed_metrics = Update(STAGE2, dataclasses.replace(PLAIN, batch_size=3, pack=True))(packed)

    assert_close(together, grads)
    assert packed_metrics == pytest.approx(metrics, rel=1e-5)


def test_dropout_is_a_function_of_seed_and_step(plain):
    update = Update(STAGE1, dataclasses.replace(PLAIN, dropout_rate=0.1))
    losses = [update(BATCH, step, seed)[1]["loss"] for step, seed in ((0, 0), (0, 0), (1, 0), (0, 1))]

    assert losses[0] == losses[1] and len(set(losses)) == 3
    assert plain[1]["loss"] not in losses  # there the model has its rate too, but training did not turn dropout on


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


def test_label_smoothing_by_hand():
    logits = jnp.log(jnp.array([[[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]]]))
    targets, smoothing = jnp.array([[0, 2, 3]]), 0.3
    # Target 0.7, the others 0.1 each: the divergence from that to the prediction, 0 where the model predicts just that.
    q = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]])
    by_hand = (q * (np.log(q) - np.asarray(logits[0]))).sum(axis=-1)

    assert by_hand[0] == pytest.approx(0, abs=1e-7)
    for weights in ([1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0, 2]):
        total = cross_entropy(logits, targets, jnp.array([weights], jnp.float32), smoothing)
        assert float(total) == pytest.approx(by_hand @ weights, abs=1e-6)


def test_cross_entropy_without_smoothing():
    logits = jnp.array([[[1.0, 2.0, 3.0]]]) + 100
    total = cross_entropy(logits, jnp.array([[1]]), jnp.ones((1, 1)), 0.0)

    assert float(total) == pytest.approx(np.log(np.exp([1, 2, 3]).sum()) - 2, rel=1e-5)


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_the_curve_and_what_is_written(whole):
    record, _ = whole("stage2")
    curve = record.result.curve
    losses = {step: scalars["train/loss"] for step, scalars in record.written if "train/loss" in scalars}
    rate = ADAMW.optimizer.rate(STEPS)

    assert [point["step"] for point in curve] == [0, 2, 4, 6, 8] == list(record.seen)
    assert all(point["stage"] == "stage2" and point["tasks"] == {"a": 1.0} for point in curve)
    assert curve[0]["loss"] is None and list(losses) == [*range(1, STEPS + 1)]
    for point in curve[1:]:
        assert point["loss"] == pytest.approx((losses[point["step"] - 1] + losses[point["step"]]) / 2)
    rates = [scalars["train/rate"] for _, scalars in record.written if "train/rate" in scalars]
    assert rates == [float(rate(step)) for step in range(STEPS)]
    assert losses[STEPS] < losses[1]
    mean_losses = {step: scalars["train/mean_loss"] for step, scalars in record.written if "train/mean_loss" in scalars}
    assert mean_losses == {point["step"]: point["loss"] for point in curve[1:]}  # of training: "eval/" would mislead
    assert not any("eval/loss" in scalars for _, scalars in record.written)
    evaluations = [(step, scalars["eval/target"]) for step, scalars in record.written if "eval/target" in scalars]
    assert evaluations == [(step, float(step)) for step in record.seen]


@pytest.mark.parametrize("name", RUNS)
def test_interrupted_runs_resume_to_the_same_bits(run, whole, tmp_path, name):
    stage, training = RUNS[name]
    reference, _ = whole(name)
    records = [run(tmp_path, stage, training, stop=stop) for stop in (1, 3, 4, 7, None)]

    # From scratch, from scratch, from 2, from 4, from 6: what was not saved is done again.
    assert [min(record.seen, default=None) for record in records] == [0, 0, 4, 6, 8]
    result = records[-1].result
    assert same(host(reference.result.params), host(result.params)) == set(PATHS)
    assert [{**point} for point in result.curve] == reference.result.curve
    assert result.best_step == reference.result.best_step == STEPS
    for record in records:
        for step, after in record.seen.items():
            assert same(reference.seen[step], after) == set(PATHS)
    assert result.seconds > records[-1].result.curve[0]["step"]


def test_a_finished_stage_is_not_trained_again(run, whole):
    reference, folder = whole("stage2")
    again = run(folder, *RUNS["stage2"])

    assert not again.seen and not again.written
    assert same(host(reference.result.params), host(again.result.params)) == set(PATHS)
    assert again.result.curve == reference.result.curve
    # Fewer steps than there are already: nothing to do either.
    assert run(folder, STAGE2, dataclasses.replace(ADAMW, steps=4)).result.best_step == STEPS


def test_other_seeds_and_other_data_give_other_parameters(run, whole, tmp_path):
    reference, _ = whole("stage1")
    other = run(tmp_path, STAGE1, ADAFACTOR, seed=1)

    assert "prompt/task" not in same(host(reference.result.params), host(other.result.params))


def test_the_best_checkpoint_is_handed_over_of_equals_the_later(run, tmp_path):
    scores = {0: 99, 2: 50, 4: 70, 6: 70, 8: 10}
    record = run(tmp_path, STAGE1, ADAFACTOR, scores=scores)

    assert record.result.best_step == 6  # step 0 has no checkpoint
    assert same(record.seen[6], host(record.result.params)) == set(PATHS)
    assert "prompt/task" not in same(record.seen[8], host(record.result.params))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]


def test_the_best_survives_an_interruption(run, tmp_path):
    scores = {2: 90, 4: 10, 6: 20, 8: 30}
    run(tmp_path, STAGE1, ADAFACTOR, scores=scores, stop=7)
    record = run(tmp_path, STAGE1, ADAFACTOR, scores=scores)

    assert min(record.seen) == 8 and record.result.best_step == 2
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "8"]


def test_nan_stops_the_run_and_names_the_last_good_checkpoint(run, whole, tmp_path):
    reference, _ = whole("stage2")
    with pytest.raises(
        TrainingError, match=r"not finite at step 2 \(loss nan.*no checkpoint yet\. Lower LEARNING_RATE"
    ):
        run(tmp_path, STAGE2, ADAMW, poison=1)
    with pytest.raises(TrainingError, match=r"\[stage2\].* at step 5 .*last good checkpoint is .*/checkpoints/4\."):
        run(tmp_path, STAGE2, ADAMW, poison=4)

    good = Checkpoints(tmp_path / "checkpoints").parameters(4, {"model": PARAMS["model"]})
    assert same(host(good), reference.seen[4]) == set(host(good))
    # With the cause gone, the same command goes on from there.
    assert same(host(run(tmp_path, STAGE2, ADAMW).result.params), host(reference.result.params)) == set(PATHS)


def test_an_update_that_is_not_finite_is_no_checkpoint(run, tmp_path):
    """Without its epsilon, Adam divides 0 by 0 where there is no gradient; loss and gradient are finite."""
    training = dataclasses.replace(ADAMW, eval_period=1, optimizer=Optimizer("adamw", eps=0.0))
    with pytest.raises(TrainingError, match=r"the update is not finite at step 1 .*no checkpoint yet"):
        run(tmp_path, STAGE1, training, params=make_params(("task", "unused")))
    assert Checkpoints(tmp_path / "checkpoints").latest() is None


def test_checkpoints_of_another_run_are_refused(run, whole):
    _, folder = whole("stage1")
    with pytest.raises(UserError, match=r"holds model/.* as nothing, this run has"):
        run(folder, STAGE2, ADAMW)
    with pytest.raises(UserError, match="does not fit this run"):
        run(folder, STAGE1, ADAMW)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "must be at least 1"),
        ({"eval_period": 0}, "must be at least 1"),
        ({"log_period": 0}, "must be at least 1"),
        ({"keep_period": 3, "eval_period": 2}, "give a multiple of that, or 0"),
        ({"keep_period": -2, "eval_period": 2}, "give a multiple of that, or 0"),
        ({"microbatches": 3}, "BATCH_SIZE 4 does not divide into 3 microbatches"),
        ({"weight_dtype": "bfloat"}, r"Unknown weight_dtype 'bfloat' \(did you mean 'bfloat16'"),
        ({"dropout_rate": 1.0}, r"lie in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"lie in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be_trained_with(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ADAMW, **change)


def test_methods_are_stages_in_order():
    plans = {name: method().stages for name, method in methods.METHODS.items()}
    assert plans["promot"] == (STAGE1, STAGE2) and plans["pretrained"] == ()
    assert plans["finetune"] == (FINETUNE,) and not FINETUNE.prompt
    with pytest.raises(UserError, match=r"Unknown method 'promt' \(did you mean 'promot'\?\)"):
        methods.find("promt")
