"""The loop with the baselines' additions: which leaves move, which stay bitwise, the penalties, resuming."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled_once import compiled_once
from forward import target_logits

from promot_jax import methods, trees
from promot_jax.checkpoints.orbax import Checkpoints
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.methods.base import Stage
from promot_jax.methods.dft import TargetProbability
from promot_jax.methods.finetune import FINETUNE
from promot_jax.methods.kl import Divergence
from promot_jax.methods.l2sp import SquaredDistance
from promot_jax.methods.promot import STAGE2
from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.models.batch_layout import Tokens, decoder_rows
from promot_jax.params import freezing
from promot_jax.params.lora import Lora
from promot_jax.training import losses, optimizer
from promot_jax.training.loop import train
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training
from promot_jax.training.state import TrainState, shardings
from promot_jax.training.step import make_step

VOCAB, EMBED, PROMPT = 61, 16, 4
CONFIG = DecoderConfig(VOCAB, EMBED, 2, 1, 3, 8, 24)
MODEL = build(CONFIG)
SHAPE = Lora(rank=2)
ADAMW = Training(4, 4, 2, Optimizer("adamw", 0.01, weight_decay=0.1), dropout_rate=0.1)
ADAFACTOR = dataclasses.replace(ADAMW, optimizer=Optimizer("adafactor", 0.01, weight_decay=1e-3))


def make_params():
    noise = np.random.default_rng(0)
    shapes = {"model": jax.eval_shape(MODEL.init, jax.random.key(0))}
    shapes["prompt"] = {"task": jax.ShapeDtypeStruct((PROMPT, EMBED), np.float32)}
    shapes["lora"] = SHAPE.init(jax.random.key(0), shapes["model"])
    return Partitioner().place(jax.tree.map(lambda x: noise.normal(0, 0.3, x.shape).astype(np.float32), shapes))


PARAMS = make_params()


def subtrees(*names):
    return {name: PARAMS[name] for name in names}


def batch_of(step, attached=False):
    noise = np.random.default_rng(step)
    virtual = list(range(VOCAB, VOCAB + PROMPT)) if attached else []
    rows = [
        [Tokens([*virtual, *noise.integers(0, VOCAB, 5).tolist()], noise.integers(0, VOCAB, n).tolist())]
        for n in (1, 2, 3, 3)
    ]
    return decoder_rows(rows, 16, 3)


def host(tree):
    return {path: np.array(leaf) for path, leaf in trees.flatten(tree).items()}


OPENED = []


@pytest.fixture(autouse=True, scope="module")
def _compiled_once():
    with compiled_once(OPENED):
        yield


def run(folder, stage, training, params, stop=None):
    """Trains on batches that depend on the step alone; `stop` ends it as a killed process does."""

    def stream():
        for step in itertools.count():
            if step == stop:
                raise KeyboardInterrupt
            yield batch_of(step, stage.prompt)

    model = build(dataclasses.replace(CONFIG, dropout_rate=training.dropout_rate))
    options = {"partitioner": Partitioner(), "seed": 0, "write": lambda *_: None}
    done = train(folder, model, params, stage, training, stream(), lambda _, step: {"target": step}, **options)
    return host(done.params)


JOINT = dataclasses.replace(ADAMW, prompt_optimizer=Optimizer("adafactor", 0.1))
PENALTIES = Stage("kl", trains=("model",), objective=Divergence(0.5), penalty=SquaredDistance(0.1))
FREEZE = Stage("freeze", trains=("model",))
CASES = {
    "joint": (methods.METHODS["joint"]().stages[0], JOINT, "model prompt"),
    "lora": (methods.METHODS["lora"](lora=SHAPE).stages[0], ADAFACTOR, "lora"),
    "stage2_lora": (methods.METHODS["promot_lora"](lora=SHAPE).stages[1], ADAMW, "model"),
    "penalties": (PENALTIES, dataclasses.replace(ADAMW, microbatches=2), "model"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_moves_and_a_killed_run_goes_on_to_the_same_bits(name, tmp_path):
    stage, training, moving = CASES[name]
    attached = ["model", *["prompt"] * stage.prompt, *["lora"] * bool(stage.lora)]
    params, before = subtrees(*attached), host(subtrees(*attached))
    after = run(tmp_path / "whole", stage, training, params)

    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {path for path in before if path.split("/")[0] in moving.split()}
    assert all(np.array_equal(leaf, before[path]) for path, leaf in host(params).items())
    assert set(Checkpoints(tmp_path / "whole" / "checkpoints").shapes(4)) == moved

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stage, training, params, stop=3)
    OPENED[-1].close()  # the save that was under way: a process that is killed later
    again = run(tmp_path / "killed", stage, training, params)
    assert all(np.array_equal(leaf, after[path]) for path, leaf in again.items())


# ---- freezing by layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [ADAMW, ADAFACTOR], ids=["adamw", "adafactor"])
def test_frozen_layers_of_a_stack_stay_bitwise(training, tmp_path, capsys):
    """Weight decay, Adafactor's scale and dropout included; a negative zero, which adding zero would turn, too."""
    training = dataclasses.replace(
        training, steps=2, freeze=("model/token_embedder/.*", "model/decoder/layers_[02]/.*")
    )
    params = subtrees("model")
    flat = trees.flatten(params)
    path = "model/decoder/layers/mlp/wo/kernel"
    params = trees.unflatten(flat | {path: flat[path].at[0, 0, 0].set(-0.0)})
    before, after = host(params), run(tmp_path, FREEZE, training, params)

    for path, leaf in before.items():
        if path.startswith("model/decoder/layers/"):
            assert leaf[[0, 2]].tobytes() == after[path][[0, 2]].tobytes(), path
            assert not np.array_equal(leaf[1], after[path][1]), path
    assert before["model/token_embedder/embedding"].tobytes() == after["model/token_embedder/embedding"].tobytes()
    assert not np.array_equal(before["model/decoder/decoder_norm/scale"], after["model/decoder/decoder_norm/scale"])
    one = sum(leaf[1].size for path, leaf in before.items() if "/layers/" in path)
    assert f"[freeze] trains {one + EMBED:,} of " in capsys.readouterr().out


def test_a_stack_whose_layers_are_all_frozen_is_no_trained_leaf():
    trained, frozen = freezing.split(subtrees("model", "prompt"), ("model",), (r"model/decoder/layers_\d+/mlp/.*",))
    still = {path for path in trees.flatten(frozen) if path.startswith("model/")}

    assert still == {path for path in trees.flatten(subtrees("model")) if "/mlp/" in path} and len(still) == 3
    assert not freezing.layer_masks(trained, (r"model/decoder/layers_\d+/mlp/.*",))
    assert trees.flatten(trained).keys() == trees.flatten(subtrees("model")).keys() - still


def test_a_number_of_the_lowest_layers_of_both_stacks():
    """ByT5 has more encoder than decoder layers; every layer reads T5's position biases."""
    model = jax.eval_shape(build(T5Config(24, 16, 2, 3, 2, 8, 24)).init, jax.random.key(0))
    patterns = freezing.lower_layers(2)
    trained, frozen = freezing.split({"model": model}, ("model",), patterns)
    still = [path for path in trees.flatten(frozen) if "/layers/" not in path]
    assert sorted(path.split("/")[-2] for path in still) == ["relpos_bias", "relpos_bias", "token_embedder"]
    masks = freezing.layer_masks(trained, patterns)
    assert all(list(mask) == [False, False, True] for mask in masks.values())
    assert masks and all(path.startswith("model/encoder/") for path in masks)
    assert not any(path.startswith("model/decoder/layers/") for path in trees.flatten(trained))
    with pytest.raises(UserError, match="at least one layer"):
        freezing.lower_layers(-1)


def test_a_layer_that_is_not_there_is_refused(tmp_path):
    training = dataclasses.replace(ADAMW, freeze=("model/decoder/layers_3/.*",))
    with pytest.raises(UserError, match=r"'model/decoder/layers_3/.*' matches no parameter"):
        run(tmp_path, FREEZE, training, subtrees("model"))


# ---- one update ------------------------------------------------------------------------------------------------------


def update(stage, trained, frozen, batch, training=None):
    """Gradients of one update by plain descent at rate 1, and its metrics."""
    transform = optax.sgd(1.0)
    state = TrainState(jax.tree.map(jnp.copy, trained), transform.init(trained), jnp.int32(0))
    step = make_step(MODEL, transform, stage, training or PLAIN, shardings(state))
    before = host(trained)
    state, metrics = step(state, frozen, batch, jax.random.key(0))
    after = host(state.params)
    return {path: before[path] - after[path] for path in before}, {name: float(x) for name, x in metrics.items()}


PLAIN = Training(1, 4, 1, Optimizer())


@pytest.fixture(name="moved", scope="module")
def _moved():
    """The model after some updates: another one than it started from."""
    noise = np.random.default_rng(1)
    return {"model": jax.tree.map(lambda x: x + noise.normal(0, 0.1, x.shape).astype(np.float32), PARAMS["model"])}


def test_l2sp_is_added_to_the_mean_over_tokens(moved):
    batch, frozen = batch_of(0), {"start": PARAMS["model"]}
    plain, before = update(FINETUNE, moved, {}, batch)
    pulled, after = update(dataclasses.replace(FINETUNE, penalty=SquaredDistance(0.5)), moved, frozen, batch)
    away = {path: leaf - host(PARAMS)[path] for path, leaf in host(moved).items()}

    squares = sum(np.square(leaf).sum() for leaf in away.values())
    assert after["loss"] == pytest.approx(before["loss"] + 0.5 / 2 * squares, rel=1e-4)
    for path, leaf in pulled.items():
        np.testing.assert_allclose(leaf, plain[path] + 0.5 * away[path], rtol=1e-3, atol=1e-4)


def test_kl_is_the_mean_over_real_target_tokens(moved):
    batch, frozen = batch_of(0), {"start": PARAMS["model"]}
    stage, training = Stage("kl", ("model",), objective=Divergence(2.0)), dataclasses.replace(PLAIN, microbatches=2)
    plain, before = update(FINETUNE, moved, {}, batch)
    _, after = update(stage, moved, frozen, batch, training)
    logits = jax.jit(lambda model: target_logits(MODEL, model, None, batch))
    wanted, tuned = (np.asarray(jax.nn.log_softmax(logits(p["model"]))) for p in (PARAMS, moved))
    by_hand = float((np.exp(wanted) * (wanted - tuned)).sum(-1)[batch["weights"] > 0].mean())

    assert by_hand > 0.03
    assert after["loss"] == pytest.approx(before["loss"] + 2.0 * by_hand, rel=1e-4)
    at_start, metrics = update(stage, moved, {"start": moved["model"]}, batch, training)  # no distance, and no pull
    assert metrics["loss"] == pytest.approx(before["loss"], rel=1e-5)
    for path, leaf in at_start.items():
        np.testing.assert_allclose(leaf, plain[path], rtol=1e-3, atol=1e-4)


def test_what_a_stage_does_not_use_is_not_in_its_step():
    def lowered(stage, frozen):
        trained = subtrees("model")
        state = TrainState(trained, optax.sgd(1.0).init(trained), jnp.int32(0))
        step = make_step(MODEL, optax.sgd(1.0), stage, PLAIN, shardings(state))
        return step.lower(state, frozen, batch_of(0), jax.random.key(0)).as_text()

    assert lowered(FINETUNE, {}) == lowered(Stage("other", ("model",), freeze=()), {})
    assert len(lowered(PENALTIES, {"start": PARAMS["model"]})) > len(lowered(FINETUNE, {}))


def test_a_huge_weight_keeps_the_model(tmp_path):
    """Adam makes steps of the rate whatever the weight is; only their sum stays at zero."""
    training = dataclasses.replace(ADAMW, steps=8, eval_period=8, optimizer=Optimizer("adamw", 0.01, "linear"))
    before = host(subtrees("model"))
    away = []
    for weight in (0.0, 1e6):
        stage = dataclasses.replace(FINETUNE, penalty=SquaredDistance(weight))
        after = run(tmp_path / str(weight), stage, training, subtrees("model"))
        away.append(np.sqrt(sum(np.square(leaf - before[path]).sum() for path, leaf in after.items())))
    assert 0 < away[1] < away[0] / 4


def test_kl_with_a_prompt_is_that_of_the_model_with_the_prompt():
    """The prompt of stage 2 is frozen; one that is trained is another than at the start."""
    frozen = {"prompt": PARAMS["prompt"], "start": PARAMS["model"]}
    batch, apart = batch_of(0, attached=True), dataclasses.replace(STAGE2, objective=Divergence(1.0))
    before = update(STAGE2, subtrees("model"), subtrees("prompt"), batch)[1]["loss"]
    assert update(apart, subtrees("model"), frozen, batch)[1]["loss"] == pytest.approx(before, rel=1e-5)
    with pytest.raises(UserError, match="trains a prompt, which the model at its start does not know"):
        dataclasses.replace(STAGE2, trains=("model", "prompt"), objective=Divergence(1.0))


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("l2sp", {"l2sp_weight": -1.0}),
        ("kl", {"kl_weight": float("inf")}),
        ("wise_ft", {"alphas": (0.5, 1.5)}),
        ("wise_ft", {"alphas": (0.5, 0.501)}),
        ("wise_ft", {"alphas": (0.0,)}),
    ],
)
def test_settings_that_cannot_be(method, setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        methods.METHODS[method](**setting).check()


@pytest.mark.parametrize("chunk", [losses.CHUNK, 4 * VOCAB, 8 * VOCAB])
def test_token_weights_have_no_gradient(moved, chunk, monkeypatch):
    """Of 4 rows of 3 targets: all at once, one position at a time, two and a padded one."""
    monkeypatch.setattr(losses, "CHUNK", chunk)
    batch = batch_of(0)
    got, metrics = update(Stage("dft", ("model",), objective=TargetProbability()), moved, {}, batch)

    def by_hand(model, weights):
        log_probs = jax.nn.log_softmax(target_logits(MODEL, model, None, batch))
        picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
        return -(picked * weights).sum() / batch["weights"].sum(), picked

    _, picked = by_hand(moved["model"], batch["weights"])
    weights = np.exp(picked) * batch["weights"]
    (loss, _), wanted = jax.value_and_grad(by_hand, has_aux=True)(moved["model"], weights)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    for path, leaf in host({"model": wanted}).items():
        np.testing.assert_allclose(got[path], leaf, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("swapped", [False, True])
def test_an_own_optimizer_for_the_prompt(swapped):
    """Each subtree moves as it would alone."""
    pair = [Optimizer("adamw", 0.01), Optimizer("adafactor", 0.3, scale_by_parameter=False)]
    model, prompt = reversed(pair) if swapped else pair
    params = {"model": {"decoder": {"layers": {"wo": jnp.ones((2, 3, 4))}, "norm": jnp.ones(3)}}}
    params["prompt"] = {"task": jnp.ones((4, 3))}
    grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), params)

    def updates(transform, *names):
        held, slope = ({name: tree[name] for name in names} for tree in (params, grads))
        return host(jax.jit(lambda: transform.update(slope, transform.init(held), held)[0])())

    together = updates(optimizer.build(5, model, prompt=prompt), "model", "prompt")
    apart = updates(model.build(5), "model") | updates(prompt.build(5), "prompt")
    assert together.keys() == apart.keys()
    for path, leaf in apart.items():
        np.testing.assert_array_equal(together[path], leaf, err_msg=path)
