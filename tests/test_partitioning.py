"""Tables of shardings, and eight devices that compute what one does; the eight live in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from promot_jax import decoding, losses, prompts, train, trees
from promot_jax.checkpoints import Checkpoints
from promot_jax.data import batches
from promot_jax.errors import UserError
from promot_jax.models import DecoderConfig, T5Config, build, layouts
from promot_jax.optim import Optimizer
from promot_jax.partitioning import Partitioner
from promot_jax.stages import STAGE1, STAGE2

VOCAB, PROMPT, STEPS = 64, 4, 10
CONFIG = DecoderConfig(VOCAB, 16, 4, 2, 2, 8, 24, dropout_rate=0.1, tied_embeddings=False)
TRAINING = {
    "stage1": train.Training(STEPS, 8, STEPS, Optimizer("adafactor", 0.1, clip_norm=1.0), dropout_rate=0.1),
    "stage2": train.Training(STEPS, 8, STEPS, Optimizer("adamw", 1e-3, eps=1e-4), dropout_rate=0.1),
}
MESHES = {"data": Partitioner(), "all": Partitioner(data=2, fsdp=2, model=2)}
MODEL = {
    "token_embedder/embedding": ("model", "fsdp"),
    "decoder/layers/self_attention/query/kernel": (None, "fsdp", "model"),
    "decoder/layers/self_attention/key/kernel": (None, "fsdp", "model"),
    "decoder/layers/self_attention/value/kernel": (None, "fsdp", "model"),
    "decoder/layers/self_attention/out/kernel": (None, "model", "fsdp"),
    "decoder/layers/mlp/wi_0/kernel": (None, "fsdp", "model"),
    "decoder/layers/mlp/wi_1/kernel": (None, "fsdp", "model"),
    "decoder/layers/mlp/wo/kernel": (None, "model", "fsdp"),
    "decoder/layers/pre_self_attention_layer_norm/scale": (None, None),
    "decoder/layers/pre_mlp_layer_norm/scale": (None, None),
    "decoder/decoder_norm/scale": (None,),
    "decoder/logits_dense/kernel": ("fsdp", "model"),
}
SPECS = {f"model/{path}": PartitionSpec(*axes) for path, axes in MODEL.items()} | {
    "prompt/task": PartitionSpec(None, None)
}


def make_params():
    noise = np.random.default_rng(0)
    shapes = {
        "model": jax.eval_shape(build(CONFIG).init, jax.random.key(0)),
        "prompt": {"task": jax.ShapeDtypeStruct((PROMPT, CONFIG.emb_dim), np.float32)},
    }
    return jax.tree.map(lambda x: noise.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def examples(seed, count):
    noise = np.random.default_rng(seed)
    virtual = list(range(VOCAB, VOCAB + PROMPT))
    for _ in range(count):
        ids = noise.integers(0, VOCAB, noise.integers(4, 11)).tolist()
        yield layouts.Tokens([*virtual, *ids[:-2]], ids[-2:])


def both_stages(folder, partitioner):
    """Trains stage 1, then stage 2, and asks the result: arrays by name, and where the optimizer state lay."""
    params, arrays, places, make_step = partitioner.place(make_params()), {}, {}, train.make_step
    stream = [layouts.decoder_rows([[one] for one in examples(step, 8)], 16, 2) for step in range(STEPS)]
    for stage in (STAGE1, STAGE2):
        written = []

        def spy(model, transform, training, shardings, name=stage.name):
            leaves = jax.tree_util.tree_leaves_with_path(shardings)
            places[name] = {jax.tree_util.keystr(path): str(leaf.spec) for path, leaf in leaves}
            return make_step(model, transform, training, shardings)

        train.make_step = spy
        params = train.train(
            folder / stage.name,
            build(CONFIG),
            params,
            stage,
            TRAINING[stage.name],
            stream,
            lambda current, step: {"target": 0.0},
            partitioner=partitioner,
            seed=0,
            write=lambda step, scalars, written=written: written.append(scalars),
        ).params
        train.make_step = make_step
        for name in ("train/loss", "train/grad_norm"):
            arrays[f"{stage.name}/{name}"] = np.array([scalars[name] for scalars in written if name in scalars])
    arrays |= {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    # Five behind the prompt, five stripped, in one batch.
    asked = [one.inputs for one in examples(99, 5)] + [one.inputs[PROMPT:] for one in examples(98, 5)]
    ((_, batch),) = batches.buckets(asked, 32 * 16, partitioner.rows())
    settings, stops, key = decoding.Decoding(max_tokens=6), np.zeros(VOCAB, bool), jax.random.key(0)
    table, placed = prompts.table(params["prompt"]), partitioner.batch(batch)
    limits = np.full(len(batch["lengths"]), 6, np.int32)
    out = decoding.generate(build(CONFIG), settings, params["model"], table, placed, stops, limits, key)
    arrays["outputs"] = np.asarray(out)[: len(asked)]
    settings = decoding.Decoding(max_tokens=6, beams=3)
    out = decoding.generate(build(CONFIG), settings, params["model"], table, placed, stops, limits, key)
    arrays["beam outputs"] = np.asarray(out)[: len(asked)]
    arrays |= chunked_loss(partitioner.place(make_params()), partitioner)
    arrays_on = {path: str(leaf.sharding.spec) for path, leaf in trees.flatten(params).items()}
    return arrays, {**places, "params": arrays_on}


def chunked_loss(params, partitioner):
    """A loss whose logits are cut into 4 chunks, and its gradients."""
    model, rows = build(CONFIG), [[one] for one in examples(7, 8)]
    batch = partitioner.batch(layouts.decoder_rows(rows, 16, 4))

    @jax.jit
    def loss(weights, table):
        hidden = model.hidden(weights, table, batch)
        return losses.chunked_cross_entropy(model, weights, hidden, batch["targets"], batch["weights"], 0.1, 8 * VOCAB)

    total, grads = jax.value_and_grad(loss)(params["model"], prompts.table(params["prompt"]))
    return {"chunked": np.asarray(total)} | {f"chunked/{name}": leaf for name, leaf in trees.flatten(grads).items()}


def refusals():
    """What is refused on eight devices, as messages."""
    odd = {"model": {"token_embedder": {"embedding": np.zeros((61, 16))}}}
    row = layouts.decoder_rows([[one] for one in examples(0, 4)], 16, 2)
    attempts = {
        "mesh": Partitioner(data=3).mesh,
        "two left": Partitioner(data=-1, fsdp=-1).mesh,
        "none": Partitioner(data=-1, fsdp=16).mesh,
        "zero": Partitioner(data=0, fsdp=-1).mesh,
        "divide": lambda: Partitioner(model=2).specs(odd),
        "batch": lambda: Partitioner(fsdp=4).batch(row),
    }
    messages = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except UserError as error:
            messages[name] = str(error)
    return messages


def main(folder):
    """What the process with eight devices runs."""
    report = {"devices": jax.device_count(), "refused": refusals()}
    report["rows"] = {name: partitioner.rows() for name, partitioner in MESHES.items()}
    for name, partitioner in MESHES.items():
        arrays, report[name] = both_stages(folder / name, partitioner)
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "report.json").write_text(json.dumps(report))


@pytest.fixture(name="eight", scope="module")
def _eight(tmp_path_factory):
    """The folder that eight devices filled, and their report."""
    folder = tmp_path_factory.mktemp("eight")
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling takes longer than running
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "report.json").read_text())


@pytest.fixture(name="one", scope="module")
def _one(tmp_path_factory, fast_compilation):
    return both_stages(tmp_path_factory.mktemp("one"), Partitioner())[0]


# ---- eight devices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_equal_one(one, eight, mesh):
    with np.load(eight[0] / f"{mesh}.npz") as arrays:
        assert set(arrays) == set(one)
        for name, expected in one.items():
            if name in ("outputs", "beam outputs"):
                assert np.array_equal(arrays[name], expected)
            else:
                bound = 1e-5 * np.abs(expected).max()
                np.testing.assert_allclose(arrays[name], expected, rtol=1e-5, atol=bound, err_msg=name)
    assert len(one["stage1/train/loss"]) == len(one["stage2/train/loss"]) == STEPS
    assert (one["outputs"] >= 0).all() and len(np.unique(one["outputs"])) > 6


def test_parameters_and_optimizer_state_lie_as_the_tables_say(eight):
    _, report = eight

    assert report["devices"] == 8 and report["rows"] == {"data": 8, "all": 4}
    for mesh in MESHES:
        assert report[mesh]["params"] == {path: str(spec) for path, spec in SPECS.items()}
        state = report[mesh]["stage2"]
        for path, spec in SPECS.items():
            keys = "".join(f"['{key}']" for key in path.split("/"))
            lies = {name: place for name, place in state.items() if name.endswith(keys)}
            if path.startswith("prompt/"):
                assert not lies
            else:
                assert len(lies) == 3 and set(lies.values()) == {str(spec)}, lies  # the parameter, mu and nu
        rest = {name: place for name, place in state.items() if "['model']" not in name}
        assert rest and set(rest.values()) == {str(PartitionSpec())}
        assert not any("['model']" in name for name in report[mesh]["stage1"])


def test_one_device_reads_a_checkpoint_of_eight(eight):
    folder, _ = eight
    like = {"model": Partitioner().place(make_params())["model"]}
    checkpoints = Checkpoints(folder / "all" / "stage2" / "checkpoints")
    restored = trees.flatten(checkpoints.parameters(STEPS, like))
    checkpoints.close()

    with np.load(folder / "all.npz") as arrays:
        for path, leaf in restored.items():
            assert leaf.sharding.num_devices == 1 and np.array_equal(leaf, arrays[path])


def test_what_does_not_divide_is_refused(eight):
    refused = eight[1]["refused"]

    assert "A mesh of data=3, fsdp=1, model=1 does not fit the 8 devices" in refused["mesh"]
    assert {"two left", "none", "zero"} <= set(refused)
    assert "embedding: vocab of size 61 does not divide over mesh axis 'model' of 2" in refused["divide"]
    assert "A batch of 4 rows does not divide over 8 data shards; change BATCH_SIZE" in refused["batch"]


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_every_leaf_has_its_row():
    assert Partitioner().specs(make_params()) == SPECS


@pytest.mark.parametrize("tied", [True, False])
def test_an_encoder_decoder_has_the_same_rows(tied):
    activations = ("relu",) if tied else ("gelu", "linear")
    config = T5Config(VOCAB, 16, 4, 2, 2, 8, 24, activations, tied_embeddings=tied)
    shapes = {"model": jax.eval_shape(build(config).init, jax.random.key(0))}
    specs = Partitioner().specs(shapes)

    assert set(specs) == set(trees.flatten(shapes))
    for stack in ("encoder", "decoder"):
        assert specs[f"model/{stack}/relpos_bias/rel_embedding"] == PartitionSpec(None, None)  # on every device
        assert specs[f"model/{stack}/{stack}_norm/scale"] == PartitionSpec(None)
        assert specs[f"model/{stack}/layers/mlp/{'wi' if tied else 'wi_1'}/kernel"] == PartitionSpec(
            None, "fsdp", "model"
        )
    assert specs["model/decoder/layers/encoder_decoder_attention/out/kernel"] == PartitionSpec(None, "model", "fsdp")
    assert specs["model/encoder/layers/attention/query/kernel"] == PartitionSpec(None, "fsdp", "model")


def test_own_rows_come_first():
    partitioner = Partitioner(
        path_rules=((r"model/.*/mlp/wo/kernel", ("layers", "embed", "mlp")), (r"lora/.*", ("embed", "rank"))),
        axis_rules=(("mlp", "data"), ("rank", "model")),
    )
    specs = partitioner.specs({**make_params(), "lora": {"a": np.zeros((4, 2))}})

    assert specs["model/decoder/layers/mlp/wo/kernel"] == PartitionSpec(None, "fsdp", "data")
    assert specs["model/decoder/layers/mlp/wi_0/kernel"] == PartitionSpec(None, "fsdp", "data")
    assert specs["lora/a"] == PartitionSpec("fsdp", "model")
    assert specs["model/token_embedder/embedding"] == PartitionSpec("model", "fsdp")


@pytest.mark.parametrize(
    ("partitioner", "tree", "message"),
    [
        (Partitioner(), {"head": {"kernel": np.zeros((2, 2))}}, "No pattern covers the parameter 'head/kernel'"),
        (Partitioner(), {"prompt": {"task": np.zeros(3)}}, r"prompt/task has shape \(3,\), but its row names the axes"),
        (Partitioner(axis_rules=(("prompt", "modle"),)), {"prompt": {"a": np.zeros((2, 2))}}, "on mesh axis 'modle'"),
        (
            Partitioner(axis_rules=(("prompt", "data"), ("prompt_embed", "data"))),
            {"prompt": {"a": np.zeros((2, 2))}},
            r"prompt cannot lie on mesh axis 'data'; use each of \('data', 'fsdp', 'model'\) once",
        ),
        (
            Partitioner(data=2),
            {"prompt": {"a": np.zeros((2, 2))}},
            "data=2, fsdp=1, model=1 does not fit the 1 devices",
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(partitioner, tree, message):
    with pytest.raises(UserError, match=message):
        partitioner.place(tree)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_optimizer_state_is_sharded_like_its_parameters(name):
    """Leaves of a parameter's path and shape; counters and factored moments are on every device."""
    partitioner = Partitioner()
    shapes = {
        "model": {
            "token_embedder": {"embedding": jax.ShapeDtypeStruct((256, 128), jnp.float32)},
            "decoder": {"layers": {"mlp": {"wo": {"kernel": jax.ShapeDtypeStruct((3, 8, 128), jnp.float32)}}}},
        },
        "prompt": {"task": jax.ShapeDtypeStruct((200, 128), jnp.float32)},
    }
    state = jax.eval_shape(Optimizer(name, clip_norm=1.0).build(10).init, shapes)
    placed = jax.tree_util.tree_leaves_with_path(partitioner.like(state, shapes))
    leaves = dict(jax.tree_util.tree_leaves_with_path(state))
    specs = {(3, 8, 128): (None, "model", "fsdp"), (200, 128): (None, None)}
    specs |= {(256, 128): ("model", "fsdp")} if name == "adamw" else {}
    for path, sharding in placed:
        assert sharding.spec == PartitionSpec(*specs.get(leaves[path].shape, ())), jax.tree_util.keystr(path)
    full = [leaf.shape for leaf in leaves.values() if leaf.shape in specs]
    assert sorted(full) == sorted([*specs] * (2 if name == "adamw" else 1))
    if name == "adafactor":
        assert {(256,), (128,)} <= {leaf.shape for leaf in leaves.values()}  # the embedding's, factored


if __name__ == "__main__":
    main(Path(sys.argv[1]))
