"""The kernels against the reference, `layers.attend`; which kernel runs where, and what is said if none does."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from promot_jax import trees
from promot_jax.distributed import partitioning
from promot_jax.errors import UserError
from promot_jax.models import DecoderConfig, attention, build, layers
from promot_jax.models.batch_layout import Tokens, decoder_rows

ROWS, HEADS, HEAD_DIM, SCALE = 2, 4, 16, 0.25


def arrays(length, kv_heads, dtype=jnp.float32):
    noise = np.random.default_rng(0)
    shapes = [(ROWS, length, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
    sizes = length // 3, length // 2, length - length // 3 - length // 2
    segments = np.repeat([[1, 2, 0]], ROWS, axis=0).repeat(sizes, axis=1)
    segments[1] = 1  # one row is not packed
    return *(jnp.asarray(noise.normal(size=shape) * 2, dtype) for shape in shapes), jnp.asarray(segments, jnp.int32)


def reference(query, key, value, segments, cap=0.0, window=0):
    slots = np.arange(query.shape[1])
    distance = slots[:, None] - slots
    mask = (segments[:, :, None] == segments[:, None, :]) & (distance >= 0) & (distance < (window or len(slots)))
    return layers.attend(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask, SCALE, cap=cap)


@pytest.mark.parametrize(
    ("length", "kv_heads", "cap", "window"),
    [
        (200, 2, 0.0, 0),
        pytest.param(128, 4, 0.0, 0, marks=pytest.mark.slow),
        pytest.param(128, 1, 5.0, 0, marks=pytest.mark.slow),
        pytest.param(384, 2, 0.0, 100, marks=pytest.mark.slow),
        pytest.param(300, 2, 5.0, 130, marks=pytest.mark.slow),
    ],
)
def test_splash_computes_what_the_reference_does(length, kv_heads, cap, window):
    """Forward and gradients, with packed and padded rows; a length that is no multiple of the block is padded."""
    *given, segments = arrays(length, kv_heads)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, length, HEADS * HEAD_DIM)), jnp.float32)

    def kernel(*given):
        mixed = attention.splash(*given, segments, scale=SCALE, cap=cap, window=window, interpret=True)
        return (mixed.reshape(ROWS, length, -1) * weights).sum(), mixed.reshape(ROWS, length, -1)

    def plain(*given):
        mixed = reference(*given, segments, cap, window)
        return (mixed * weights).sum(), mixed

    found, expected = (
        jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True))(*given) for function in (kernel, plain)
    )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


# Gemma's: windows in two of three layers, a soft cap, one key/value head for two queries.
CONFIG = DecoderConfig(64, 32, 4, 2, 3, 8, 48, window=20, global_every=3, attention_softcap=5.0, remat="dots")


def parameters(config):
    """Random parameters, norms included, and a soft prompt of four rows."""
    noise = np.random.default_rng(0)
    shapes = trees.flatten(jax.eval_shape(build(config).init, jax.random.key(0)))
    params = {path: jnp.asarray(noise.normal(size=leaf.shape) * 0.3, jnp.float32) for path, leaf in shapes.items()}
    return trees.unflatten(params), jnp.asarray(noise.normal(size=(4, 32)), jnp.float32)


@pytest.fixture(name="models", scope="module")
def _models():
    """The model that runs by XLA, that which runs by splash, their parameters, and a soft prompt."""
    models = [build(dataclasses.replace(CONFIG, attention=name)) for name in ("xla", "splash")]
    return models, *parameters(CONFIG)


@pytest.mark.slow
def test_a_model_trains_alike_by_either(models):
    """Loss and gradients by model and prompt; the rows are packed and their lengths no multiple of anything."""
    models, params, prompt = models
    noise = np.random.default_rng(1)
    rows = [[[64, 65, 66, 67, *noise.integers(0, 64, size)] for size in sizes] for sizes in ((30, 21), (50,))]
    batch = decoder_rows([[Tokens(row[:-5], row[-5:]) for row in segments] for segments in rows], 70, 10)

    def loss(model):
        return lambda params, prompt: jnp.square(model.hidden(params, prompt, batch)).mean()

    expected, found = (jax.jit(jax.value_and_grad(loss(model), (0, 1)))(params, prompt) for model in models)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.slow
def test_prefill_fills_the_same_cache_by_either(models):
    models, params, prompt = models
    tokens = np.random.default_rng(2).integers(0, 64, (3, 30))
    inputs = {"tokens": jnp.asarray(tokens), "lengths": jnp.asarray([30, 7, 0])}
    expected, found = (
        jax.jit(lambda params, model=model: model.prefill(params, prompt, inputs, 4))(params) for model in models
    )
    np.testing.assert_allclose(found[0][:2], expected[0][:2], atol=1e-5 * float(jnp.abs(expected[0]).max()))
    (logits, state), (_, theirs) = found, expected
    for row, length in enumerate([30, 7]):
        for name in ("key", "value"):
            ours = state["cache"][name][:, row, :length]
            np.testing.assert_allclose(ours, theirs["cache"][name][:, row, :length], atol=1e-5)
    after, _ = models[1].step(params, state, jnp.argmax(logits, -1))
    assert after.shape == (3, 64)


def on(platform, monkeypatch, **more):
    client = SimpleNamespace(platform_version=more.pop("version", "PJRT C API cuda 12090"))
    device = SimpleNamespace(platform=platform, client=client, **more)
    monkeypatch.setattr(partitioning, "device_of", lambda partitioner: device)
    attention._print_once.cache_clear()


def chosen(asked, length=256, dtype=jnp.bfloat16, head_dim=64, cap=0.0):
    shapes = [jax.ShapeDtypeStruct((2, length, heads, head_dim), dtype) for heads in (4, 2)]
    return attention.choose(asked, *shapes, cap)


def test_auto_is_the_kernel_of_the_platform(monkeypatch, capsys):
    assert chosen("auto") == "xla" and chosen("splash") == "splash"
    on("tpu", monkeypatch)
    assert chosen("auto") == "splash" and chosen("auto", dtype=jnp.float32, cap=5.0) == "splash"
    assert chosen("xla") == "xla"
    on("gpu", monkeypatch)
    assert chosen("auto") == "cudnn"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("platform", "arguments", "reason"),
    [
        ("tpu", {"length": 66}, "not by splash: rows of 66 tokens are shorter than a block of 128"),
        ("gpu", {"dtype": jnp.float32}, "not by cudnn: cuDNN takes bfloat16, not float32"),
        ("gpu", {"cap": 50.0}, "cuDNN has no soft cap"),
        ("gpu", {"head_dim": 256}, "heads of a multiple of 8 up to 128, not 256"),
    ],
)
def test_what_a_kernel_cannot_do_runs_by_xla_and_is_said_once(platform, arguments, reason, monkeypatch, capsys):
    on(platform, monkeypatch, compute_capability="8.0")
    assert chosen("auto", **arguments) == chosen("auto", **arguments) == "xla"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Attention runs by XLA") and reason in line


def test_hopper_takes_wide_heads_and_other_gpus_have_no_cudnn(monkeypatch):
    on("gpu", monkeypatch, compute_capability="9.0")
    assert chosen("auto", head_dim=256) == "cudnn"
    on("gpu", monkeypatch, version="rocm 60300", compute_capability="gfx90a")
    assert chosen("auto") == "xla"


def test_a_kernel_of_another_platform_is_refused(monkeypatch):
    with pytest.raises(UserError, match="attention is 'cudnn', which runs on GPUs alone, and the devices here are cpu"):
        chosen("cudnn")
    on("gpu", monkeypatch)
    with pytest.raises(UserError, match="runs on TPUs alone"):
        chosen("splash")
    with pytest.raises(UserError, match="attention is 'flash'; use one of 'auto', 'xla', 'cudnn', 'splash'"):
        DecoderConfig(64, 32, 4, 2, 3, 8, 48, attention="flash")


@pytest.mark.parametrize(("window", "length"), [(0, 64), (20, 65)])
def test_cudnn_is_lowered_for_gpus(window, length, monkeypatch):
    """To cuDNN's own call, forward and backward: that it runs needs a GPU."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    *given, segments = arrays(length, 2, jnp.bfloat16)

    def loss(*given):
        return attention.cudnn(*given, segments, scale=SCALE, window=window).astype(jnp.float32).sum()

    exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=("cuda",), disabled_checks=[
        jax.export.DisabledSafetyCheck.custom_call("__cudnn$fmhaScaleBiasSoftmax"),
        jax.export.DisabledSafetyCheck.custom_call("__cudnn$fmhaScaleBiasSoftmaxBackward"),
    ])(*given)  # fmt: skip
    text = exported.mlir_module()
    assert "__cudnn$fmhaScaleBiasSoftmax" in text and "fmhaScaleBiasSoftmaxBackward" in text


SHARDED = """
import sys
sys.path[:0] = {path!r}
import dataclasses, jax, jax.numpy as jnp, numpy as np
import test_attention as case
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.models import build
from promot_jax.models.batch_layout import Tokens, decoder_rows

plain = decoder_rows([[Tokens([64, 65, *range(size)], [1, 2])] for size in range(20, 28)], 40, 2)
mesh = Partitioner(data=2, fsdp=2, model=2)
for kv_heads in (2, 1):
    config = dataclasses.replace(case.CONFIG, num_kv_heads=kv_heads)
    params, prompt = case.parameters(config)

    def gradient(attention, partitioner, params, batch):
        model = build(dataclasses.replace(config, attention=attention), partitioner)
        loss = lambda params, prompt: (model.hidden(params, prompt, batch) * jnp.sin(jnp.arange(32.0))).sum()
        assert ("shard_map" in str(jax.make_jaxpr(loss)(params, prompt))) == (attention == "splash")
        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, prompt))

    found = gradient("splash", mesh, mesh.place({{"model": params}})["model"], mesh.batch(plain))
    for ours, theirs in zip(map(np.asarray, found), map(np.asarray, gradient("xla", None, params, plain))):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * abs(theirs).max())
print("equal")
"""


@pytest.mark.slow
def test_on_a_mesh_each_device_runs_the_kernel_on_its_rows_and_heads():
    """Eight devices against one, also where all queries share one key/value head, which each device then holds."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    code = SHARDED.format(path=[p for p in sys.path if p])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.stdout.endswith("equal\n"), done.stderr
