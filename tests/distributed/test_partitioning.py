"""Tables of shardings, and eight devices that compute what one does; the eight are in another process."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import compilation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import target_logits
from jax.sharding import PartitionSpec
from test_gin_files import bound

from promot_jax import trees
from promot_jax.checkpoints.orbax import Checkpoints
from promot_jax.data import batches
from promot_jax.decoding.continuous_batching import generate_all
from promot_jax.decoding.generate import generate
from promot_jax.decoding.inputs import Engine, Input
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner, activations, constrain
from promot_jax.errors import UserError
from promot_jax.methods.promot import STAGE1, STAGE2
from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.models.batch_layout import Tokens, decoder_rows
from promot_jax.params import soft_prompts
from promot_jax.training import loop as loop_module
from promot_jax.training import losses
from promot_jax.training.loop import train
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training

VOCAB, PROMPT, STEPS = 64, 4, 6
CONFIG = DecoderConfig(VOCAB, 16, 4, 2, 2, 8, 24, dropout_rate=0.1, tied_embeddings=False)
CONFIGS = {"decoder": CONFIG, "t5": T5Config(VOCAB, 16, 4, 2, 2, 8, 24, dropout_rate=0.1, remat="full")}
TRAINING = {
    "stage1": Training(STEPS, 8, STEPS, Optimizer("adafactor", 0.1, clip_norm=1.0), dropout_rate=0.1),
    "stage2": Training(STEPS, 8, STEPS, Optimizer("adamw", 1e-3, eps=1e-4), dropout_rate=0.1),
}
PRESETS = ("data", "fsdp", "tensor", "2d")
# On eight devices: "all" splits every axis, and the presets of gin/meshes/ are what a user takes.
CASES = [(family, mesh) for family in CONFIGS for mesh in ("all", *PRESETS)]
FAST = [("decoder", "all"), ("t5", "2d")]
# Compiling takes longest: in the fast tests, T5 trains the model alone, and each kind of decoding is run once,
# continuous batching in both families.
LEFT_OUT = {"decoder": ("beam outputs",), "t5": ("stage1", "outputs")}
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
ROOT = Path(__file__).parents[2]


def partitioner_of(mesh):
    if mesh == "all":
        return Partitioner(data=2, fsdp=2, model=2)
    return bound("promot.gin", f"meshes/{mesh}.gin")["experiment"].partitioner


def make_params(config=CONFIG):
    noise = np.random.default_rng(0)
    shapes = {
        "model": jax.eval_shape(build(config).init, jax.random.key(0)),
        "prompt": {"task": jax.ShapeDtypeStruct((PROMPT, config.emb_dim), np.float32)},
    }
    return jax.tree.map(lambda x: noise.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def examples(seed, count):
    noise = np.random.default_rng(seed)
    virtual = list(range(VOCAB, VOCAB + PROMPT))
    for _ in range(count):
        ids = noise.integers(0, VOCAB, noise.integers(4, 11)).tolist()
        yield Tokens([*virtual, *ids[:-2]], ids[-2:])


def both_stages(folder, partitioner, family, left_out=()):
    """Trains stage 1, then stage 2, and generates with the result: arrays by name, and where the optimizer state lay.

    `left_out` names a stage and outputs that are not made.
    """
    config = CONFIGS[family]
    model = build(config, partitioner)
    params, arrays, places, make_step = partitioner.place(make_params(config)), {}, {}, loop_module.make_step
    stream = [model.layout([[example] for example in examples(step, 8)], 14, 2) for step in range(STEPS)]
    for stage in (stage for stage in (STAGE1, STAGE2) if stage.name not in left_out):
        written = []

        def spy(model, transform, stage, training, shardings, name=stage.name):
            leaves = jax.tree_util.tree_leaves_with_path(shardings)
            places[name] = {jax.tree_util.keystr(path): str(leaf.spec) for path, leaf in leaves}
            return make_step(model, transform, stage, training, shardings)

        loop_module.make_step = spy
        params = train(
            folder / stage.name,
            model,
            params,
            stage,
            TRAINING[stage.name],
            stream,
            lambda current, step: {"target": 0.0},
            partitioner=partitioner,
            seed=0,
            write=lambda step, scalars, written=written: written.append(scalars),
        ).params
        loop_module.make_step = make_step
        for name in ("train/loss", "train/grad_norm"):
            arrays[f"{stage.name}/{name}"] = np.array([scalars[name] for scalars in written if name in scalars])
    arrays |= {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    # Five with the soft prompt prepended, five stripped, in one batch.
    inputs = [example.inputs for example in examples(99, 5)]
    inputs += [example.inputs[PROMPT:] for example in examples(98, 5)]
    ((_, batch),) = batches.buckets(inputs, 32 * 16, partitioner.rows())
    settings, stops, key = Decoding(max_tokens=6), np.zeros(VOCAB, bool), jax.random.key(0)
    table, placed = soft_prompts.table(params["prompt"]), partitioner.batch(batch)
    limits = np.full(len(batch["lengths"]), 6, np.int32)
    for name, decoding in (("outputs", settings), ("beam outputs", Decoding(max_tokens=6, beams=3))):
        if name not in left_out:
            out = generate(model, decoding, params["model"], table, placed, stops, limits, key)
            arrays[name] = np.asarray(out)[: len(inputs)]
    rows = [Input([*ids, *range(30 * (i % 2))], 2 + i % 5, i, "all") for i, ids in enumerate(inputs)]
    rows[::3] = [dataclasses.replace(each, continuations=((3, 4), (5,))) for each in rows[::3]]
    engine = Engine(model, settings, params["model"], table, stops, key, partitioner, 256, 512)
    found = sorted(generate_all(engine, rows), key=lambda output: output.member)
    arrays["continuous outputs"] = np.stack([output.ids for output in found])
    arrays["likelihoods"] = np.stack([output.likelihoods for output in found if output.likelihoods is not None])
    if family == "decoder":  # chunks know no family
        arrays |= chunked_loss(partitioner.place(make_params(config)), model)
    arrays_on = {path: str(leaf.sharding.spec) for path, leaf in trees.flatten(params).items()}
    return arrays, {**places, "params": arrays_on}


def chunked_loss(params, model):
    """A loss whose logits are cut into 4 chunks, and its gradients."""
    batch = model.partitioner.batch(model.layout([[example] for example in examples(7, 8)], 12, 4))

    @jax.jit
    def loss(weights, table):
        hidden = model.hidden(weights, table, batch)
        return losses.chunked_cross_entropy(model, weights, hidden, batch["targets"], batch["weights"], 0.1)

    with mock.patch.object(losses, "CHUNK", 1):  # less than a position has: a chunk per position
        total, grads = jax.value_and_grad(loss)(params["model"], soft_prompts.table(params["prompt"]))
    return {"chunked": np.asarray(total)} | {f"chunked/{name}": leaf for name, leaf in trees.flatten(grads).items()}


def refusals():
    """What is refused on eight devices, as messages."""
    odd = {"model": {"token_embedder": {"embedding": np.zeros((61, 16))}}}
    row = decoder_rows([[example] for example in examples(0, 4)], 16, 2)
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


def logits_and_constraints():
    """Where logits lie, and how many activations the model places when it knows of a mesh and when it does not."""
    partitioner = partitioner_of("all")
    batch = build(CONFIG).layout([[example] for example in examples(0, 8)], 14, 2)
    params = partitioner.place(make_params())
    specs = {}
    for name, given in (("placed", partitioner), ("free", None)):
        traced = jax.jit(functools.partial(target_logits, build(CONFIG, given))).trace(params["model"], None, batch)
        specs[name] = str(traced.jaxpr).count("sharding_constraint")
    logits = jax.jit(functools.partial(target_logits, build(CONFIG, partitioner)))(params["model"], None, batch)
    return {**specs, "logits": str(logits.sharding.spec)}


def main(folder, cases):
    """What the process with eight devices runs."""
    report = {"devices": jax.device_count(), "refused": refusals(), "activations": logits_and_constraints()}
    report["rows"] = {mesh: partitioner_of(mesh).rows() for mesh in ("all", *PRESETS)}
    for family, mesh in cases:
        name = f"{family} {mesh}"
        left_out = LEFT_OUT[family] if cases == FAST else ()
        arrays, report[name] = both_stages(folder / name, partitioner_of(mesh), family, left_out)
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "report.json").write_text(json.dumps(report))


def on_eight_devices(folder, cases):
    """The folder that eight devices filled, and their report."""
    environment = {
        **os.environ,
        "XLA_FLAGS": compilation.flags("--xla_force_host_platform_device_count=8"),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__, str(folder), *map("/".join, cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "report.json").read_text())


@pytest.fixture(name="eight", scope="module")
def _eight(tmp_path_factory):
    return on_eight_devices(tmp_path_factory.mktemp("eight"), FAST)


@pytest.fixture(name="single", scope="module")
def _single(tmp_path_factory):
    """The results of one device, of a family and what is left out."""

    @functools.cache
    def single(family, left_out=()):
        return both_stages(tmp_path_factory.mktemp(family), Partitioner(), family, left_out)[0]

    return single


# ---- eight devices ---------------------------------------------------------------------------------------------------


def assert_same(folder, name, single):
    """Losses, gradients and parameters within 1e-5, and the same outputs."""
    with np.load(folder / f"{name}.npz") as arrays:
        assert set(arrays) == set(single)
        for key, expected in single.items():
            if key.endswith("outputs"):
                assert np.array_equal(arrays[key], expected)
            else:
                bound = 1e-5 * np.abs(expected).max()
                np.testing.assert_allclose(arrays[key], expected, rtol=1e-5, atol=bound, err_msg=key)


@pytest.mark.parametrize(("family", "mesh"), FAST)
def test_eight_devices_equal_one(single, eight, family, mesh):
    one = single(family, LEFT_OUT[family])
    assert_same(eight[0], f"{family} {mesh}", one)
    losses = [one[name] for name in one if name.endswith("/train/loss")]
    assert losses and all(len(curve) == STEPS and len(set(curve.tolist())) == STEPS for curve in losses)
    outputs = one["continuous outputs"]
    assert ((outputs >= 0).sum(axis=1) == 2 + np.arange(len(outputs)) % 5).all() and len(np.unique(outputs)) > 6


@pytest.mark.slow
def test_every_mesh_and_family_equals_one_device(single, tmp_path):
    folder, _ = on_eight_devices(tmp_path, CASES)
    for family, mesh in CASES:
        assert_same(folder, f"{family} {mesh}", single(family))


def test_activations_lie_as_the_table_says(eight):
    places = eight[1]["activations"]

    assert places["logits"] == str(PartitionSpec(("data", "fsdp"), None, "model"))
    assert places["placed"] >= 8 and places["free"] == 0


def test_parameters_and_optimizer_state_lie_as_the_tables_say(eight):
    _, report = eight

    assert report["devices"] == 8 and report["rows"] == {"all": 4, "data": 8, "fsdp": 8, "tensor": 1, "2d": 2}
    assert report["decoder all"]["params"] == {path: str(spec) for path, spec in SPECS.items()}
    state = report["decoder all"]["stage2"]
    for path, spec in SPECS.items():
        keys = "".join(f"['{key}']" for key in path.split("/"))
        lies = {name: place for name, place in state.items() if name.endswith(keys)}
        if path.startswith("prompt/"):
            assert not lies
        else:
            assert len(lies) == 3 and set(lies.values()) == {str(spec)}, lies  # the parameter, mu and nu
    rest = {name: place for name, place in state.items() if "['model']" not in name}
    assert rest and set(rest.values()) == {str(PartitionSpec())}
    assert not any("['model']" in name for name in report["decoder all"]["stage1"])


def test_one_device_reads_a_checkpoint_of_eight(eight):
    folder, _ = eight
    like = {"model": Partitioner().place(make_params())["model"]}
    checkpoints = Checkpoints(folder / "decoder all" / "stage2" / "checkpoints")
    restored = trees.flatten(checkpoints.parameters(STEPS, like))
    checkpoints.close()

    with np.load(folder / "decoder all.npz") as arrays:
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
        (Partitioner(axis_rules=(("promt", "data"),)), {}, "nothing has the axis 'promt' (did you mean 'prompt'?)"),
        (
            Partitioner(path_rules=((r"model/.*/wo/kernle", ("mlp", "embed")),)),
            {"model": {"wo": {"kernel": np.zeros((2, 2))}}},
            "the pattern 'model/.*/wo/kernle' matches no parameter",
        ),
        (
            Partitioner(path_rules=((r"modle/.*", ("mlp", "embed")),)),
            {"model": {"wo": {"kernel": np.zeros((2, 2))}}},
            "the pattern 'modle/.*' matches no parameter",
        ),
        (
            Partitioner(axis_rules=(("prompt", ("data", "fsdp")), ("prompt_embed", "data"))),
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
    with pytest.raises(UserError, match=message.replace("(did", r"\(did").replace("?)", r"\?\)")):
        partitioner.place(tree)


def test_a_row_for_a_room_that_is_not_there_waits_for_it():
    """Prompts are placed after the model: a row about them is no mistake while there are none."""
    partitioner = Partitioner(path_rules=((r"prompt/.*", ("prompt", "embed")),))
    assert partitioner.specs({"model": make_params()["model"]}).keys() == SPECS.keys() - {"prompt/task"}
    assert partitioner.specs(make_params())["prompt/task"] == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_optimizer_state_is_sharded_like_its_parameters(name):
    """By shape: a factored moment lies like the axes that it has of its parameter; counters are on every device."""
    partitioner = Partitioner(axis_rules=(("prompt_embed", "data"),))
    shapes = {
        "model": {
            "token_embedder": {"embedding": jax.ShapeDtypeStruct((256, 128), jnp.float32)},
            "decoder": {
                "logits_dense": {"kernel": jax.ShapeDtypeStruct((128, 128), jnp.float32)},  # square
                "layers": {
                    "mlp": {
                        "wo": {"kernel": jax.ShapeDtypeStruct((3, 8, 128), jnp.float32)},  # too narrow to factor
                        "wi": {"kernel": jax.ShapeDtypeStruct((3, 128, 160), jnp.float32)},
                    }
                },
            },
        },
        "prompt": {"task": jax.ShapeDtypeStruct((200, 128), jnp.float32)},
    }
    state = jax.eval_shape(Optimizer(name, clip_norm=1.0).build(10).init, shapes)
    leaves = dict(jax.tree_util.tree_leaves_with_path(state))
    entries = set()
    for path, sharding in jax.tree_util.tree_leaves_with_path(partitioner.like(state, shapes)):
        if jnp.issubdtype(leaves[path].dtype, jnp.floating):
            keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
            entries.add((keys[-2] if keys[-1] == "kernel" else keys[-1], leaves[path].shape, sharding.spec))
        else:
            assert sharding.spec == PartitionSpec()
    full = {
        ("embedding", (256, 128), PartitionSpec("model", "fsdp")),
        ("logits_dense", (128, 128), PartitionSpec("fsdp", "model")),
        ("wo", (3, 8, 128), PartitionSpec(None, "model", "fsdp")),
        ("wi", (3, 128, 160), PartitionSpec(None, "fsdp", "model")),
        ("task", (200, 128), PartitionSpec(None, "data")),
    }
    if name == "adamw":
        assert entries == full
        return
    factored = {
        ("embedding", (128,), PartitionSpec("fsdp")),
        ("embedding", (256,), PartitionSpec("model")),
        ("logits_dense", (128,), PartitionSpec("fsdp")),
        ("logits_dense", (128,), PartitionSpec("model")),
        ("wi", (3, 128), PartitionSpec(None, "fsdp")),
        ("wi", (3, 160), PartitionSpec(None, "model")),
    }
    unused = {entry for entry in entries if 1 in entry[1]}  # optax's placeholders for what a leaf has not
    assert entries - unused == factored | {entry for entry in full if entry[0] in ("wo", "task")}
    assert {spec for _, _, spec in unused} == {PartitionSpec()}


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    id: int
    slice_index: int
    process_index: int
    core_on_chip: int = 0
    coords: tuple[int, ...] = (0, 0, 0)
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_slices_lie_along_one_axis_and_share_no_other():
    devices = tuple(Device(i, i // 4, i // 2) for i in (3, 4, 0, 7, 1, 6, 2, 5))
    for partitioner, inside in (
        (Partitioner(data=2, fsdp=2, model=2, devices=devices), (1, 2, 2)),
        (Partitioner(data=4, fsdp=1, model=2, slices=2, devices=devices), (2, 1, 2)),
    ):
        grid = partitioner.mesh().devices
        for number, block in enumerate(np.split(grid, 2)):
            assert block.shape == inside and {device.slice_index for device in block.flat} == {number}
    grid = Partitioner(fsdp=8, slice_axis="fsdp", devices=devices).mesh().devices
    assert [device.slice_index for device in grid.flat] == [0] * 4 + [1] * 4
    whole = tuple(dataclasses.replace(device, slice_index=0) for device in devices)
    grid = Partitioner(data=4, fsdp=2, slices=4, devices=whole).mesh().devices  # slices of no name are processes
    assert all(len({device.process_index for device in row.flat}) == 1 for row in grid)
    for wrong in ({"fsdp": 8, "data": 1}, {"data": 8, "slices": 4}, {"model": 8, "data": 1}):
        with pytest.raises(UserError, match="does not lie over 2 slices by its axis 'data'"):
            Partitioner(devices=devices, **wrong).mesh()


def test_cores_of_a_chip_are_neighbours():
    """A topology of TPU v4 lists them one by one."""
    devices = tuple(Device(2 * i + core, 0, 0, core, (i, 0, 0)) for i in range(4) for core in range(2))
    for sizes in ({"fsdp": 2, "model": 4}, {"fsdp": 8}, {"data": 2, "fsdp": 4}):
        grid = Partitioner(data=sizes.pop("data", 1), devices=devices, **sizes).mesh().devices
        assert sorted(device.id for device in grid.flat) == [*range(8)]
        assert all(first.coords == second.coords for first, second in grid.reshape(-1, 2))


def test_activations_are_left_alone_on_one_device():
    x = jnp.ones((2, 3))
    with activations(Partitioner()):
        assert constrain(x, "batch", "length") is x
    assert constrain(x, "batch", "length") is x


@pytest.mark.parametrize("wrong", [{"slice_axis": "model"}, {"slices": -1}, {"axis_rules": (("mlp",),)}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(UserError, match=r"Partitioner\."):
        Partitioner(**wrong)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [tuple(case.split("/")) for case in sys.argv[2:]])
