"""T5X checkpoints: every leaf in its place, and what is written is read back bit for bit."""

import dataclasses
import itertools
import math
import os
import shutil
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import tensorstore
import tiny
from t5x_fixtures import drawn, in_scratch, read  # noqa: F401, used by name
from t5x_writer import EMBED, HEADS, QUERY, SHAPES, SIZE, Arrays, draw, nested, save, stacked, t5_shapes, zarr

from promot_jax import trees
from promot_jax.checkpoints import pretrained
from promot_jax.checkpoints.t5x import load as t5x
from promot_jax.checkpoints.t5x import write
from promot_jax.data.vocabularies.tokenizer import TokenizerVocabulary
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import StorageError, UserError
from promot_jax.experiments.initial_params import load_prompts
from promot_jax.experiments.settings import Experiment
from promot_jax.models import DecoderConfig, build
from promot_jax.params import soft_prompts


@pytest.mark.parametrize("form", ["file", "gcs", "old", "placeholder", "bare", "bounds", "inline"])
def test_every_leaf_lands_in_its_place(tmp_path: Path, arrays: Arrays, form: str) -> None:
    folder = save(tmp_path / "checkpoint_7", arrays, form)
    before = sorted(tmp_path.rglob("*"))
    assert t5x.is_checkpoint(folder)
    params, leaves = read(folder, SHAPES)
    flat = trees.flatten(params)
    np.testing.assert_equal(flat, stacked(arrays))
    assert all(leaf.dtype == np.float32 and leaf.ctypes.data % 64 == 0 for leaf in flat.values())
    assert leaves == {"loaded": len(SHAPES), "new": 0, "unused": 2}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", ["file", "bare", "inline"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_float_types(tmp_path: Path, form: str, dtype: Any) -> None:
    arrays = draw(dtype=dtype)
    np.testing.assert_equal(trees.flatten(read(save(tmp_path / "c", arrays, form), SHAPES)[0]), stacked(arrays))


@pytest.mark.parametrize(
    "metadata",
    [
        {"compressor": None},
        {"compressor": {"id": "zlib", "level": 3}},
        {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": -1}},
        {"dimension_separator": "/"},
    ],
)
@pytest.mark.parametrize("form", ["file", "bare"])
def test_other_ways_to_store_chunks(tmp_path: Path, arrays: Arrays, form: str, metadata: dict[str, Any]) -> None:
    folder = save(tmp_path / "c", arrays, form, **metadata)
    np.testing.assert_equal(trees.flatten(read(folder, SHAPES)[0]), stacked(arrays))


def test_arrays_that_flax_cut_into_pieces(tmp_path: Path, arrays: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    content = {"version": 3, "optimizer": {"target": nested(arrays), "state": {}}}
    (tmp_path / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(content))
    assert b"__msgpack_chunked_array__" in (tmp_path / "checkpoint").read_bytes()
    np.testing.assert_equal(trees.flatten(read(tmp_path, SHAPES)[0]), stacked(arrays))


def test_later_files_name_the_optimizer_otherwise(tmp_path: Path, arrays: Arrays) -> None:
    inner = {"_optimizer": {"target": nested(arrays), "state": {}}, "flax_mutables": {"stats": np.float32(2), "z": 1j}}
    for content in (inner, {"version": 3, "optimizer": {**inner["_optimizer"], "flax_mutables": {}}}):
        packed = flax.serialization.msgpack_serialize(content)
        (tmp_path / "checkpoint").write_bytes(packed)
        np.testing.assert_equal(trees.flatten(read(tmp_path, SHAPES)[0]), stacked(arrays))


def test_kernels_with_heads_apart(tmp_path: Path, arrays: Arrays) -> None:
    apart = dict(arrays)
    for name, array in arrays.items():
        if "attention/" in name and name.endswith("kernel"):
            split = (HEADS, SIZE, EMBED) if "/out/" in name else (EMBED, HEADS, SIZE)
            apart[name] = array.reshape(split)
    checkpoint = t5x.Checkpoint(save(tmp_path / "c", apart), SHAPES)
    want = stacked(arrays)
    for path in SHAPES:
        np.testing.assert_array_equal(checkpoint.read(path), want[path])
    path = "decoder/layers/self_attention/query/kernel"
    np.testing.assert_array_equal(checkpoint.read(path, ((1, 2), (0, EMBED), (2, 5))), want[path][1:2, :, 2:5])
    apart[QUERY] = arrays[QUERY].reshape(2, EMBED // 2, HEADS * SIZE)
    with pytest.raises(UserError, match=r"shape \(2, 4, 6\)"):
        t5x.Checkpoint(save(tmp_path / "d", apart), SHAPES)


def test_only_the_chunks_of_a_slice_are_read(tmp_path: Path, arrays: Arrays) -> None:
    want = stacked(arrays)
    folder = save(tmp_path / "c", arrays)
    checkpoint = t5x.Checkpoint(folder, SHAPES)
    others = [folder / f"target.{QUERY.replace('/', '.')}" / f"1.{j}" for j in range(2)]
    whole = [chunk.read_bytes() for chunk in others]
    for chunk in others:  # whoever reads them fails
        chunk.unlink()
    path = "decoder/layers/self_attention/query/kernel"
    box = ((1, 2), (0, 4), (0, HEADS * SIZE))
    np.testing.assert_array_equal(checkpoint.read(path, box), want[path][1:2, :4])
    with pytest.raises(UserError, match=r"1\.[01]\" is missing"):
        checkpoint.read(path)
    for chunk, data in zip(others, whole, strict=True):
        chunk.write_bytes(data)
    for path in ("token_embedder/embedding", "encoder/relpos_bias/rel_embedding", "decoder/layers/mlp/wo/kernel"):
        for box in itertools.product(*([(0, size), (1, 2), (1, size)] for size in SHAPES[path])):
            part = want[path][tuple(itertools.starmap(slice, box))]
            np.testing.assert_array_equal(checkpoint.read(path, box), part)


def test_the_newest_of_several(tmp_path: Path, arrays: Arrays) -> None:
    assert not t5x.is_checkpoint(tmp_path) and not t5x.is_checkpoint(tmp_path / "none")
    for step in (9, 100, 20):
        marked = arrays | {"encoder/encoder_norm/scale": np.full(EMBED, step, np.float32)}
        save(tmp_path / f"checkpoint_{step}", marked, "inline")
    shutil.copytree(tmp_path / "checkpoint_9", tmp_path / "checkpoint_200.tmp-1")
    (tmp_path / "checkpoint_300").mkdir()
    assert t5x.is_checkpoint(tmp_path)
    assert read(tmp_path, SHAPES)[0]["encoder"]["encoder_norm"]["scale"][0] == 100


def test_what_the_model_has_no_place_for(tmp_path: Path, arrays: Arrays) -> None:
    prompt = {"encoder/prompt/prompt/prompt": np.ones((3, EMBED), np.float32)}
    checkpoint = t5x.Checkpoint(save(tmp_path / "c", arrays | prompt), SHAPES)
    assert checkpoint.unused == tuple(prompt) and checkpoint.leaves["unused"] == 3
    with pytest.raises(UserError, match=r"'encoder/layers_1/.*no place"):
        t5x.Checkpoint(tmp_path / "c", t5_shapes(encoder=1))
    tied = {path: shape for path, shape in SHAPES.items() if "logits" not in path}
    with pytest.raises(UserError, match="'decoder/logits_dense/kernel', for which"):
        t5x.Checkpoint(tmp_path / "c", tied)
    with pytest.raises(UserError, match=r"no parameter 'decoder/layers_2/"):
        t5x.Checkpoint(tmp_path / "c", t5_shapes(decoder=3))
    with pytest.raises(UserError, match=r"shape \(20, 8\) and .* wants \(21, 8\)"):
        t5x.Checkpoint(tmp_path / "c", SHAPES | {"token_embedder/embedding": (21, 8)})


@pytest.mark.parametrize("form", ["file", "inline", "placeholder"])
def test_a_prompt_in_a_checkpoint(tmp_path: Path, arrays: Arrays, form: str) -> None:
    """prompt-tuning (google-research/prompt-tuning) trains T5X models with this parameter."""
    rows = np.random.default_rng(1).standard_normal((3, EMBED)).astype(np.float32)
    name = "encoder/prompt/prompt/prompt"

    def edit(flat: dict[str, Any]) -> None:  # T5X partitions some parameters, and others not
        flat[name] = rows if form == "inline" else zarr(tmp_path / "c", name, rows, form)

    save(tmp_path / "c", arrays, form, edit)
    np.testing.assert_array_equal(t5x.read_prompt(tmp_path / "c"), rows)
    for more in ({}, {name: rows[0]}, {name: rows, "decoder/prompt": rows}):
        save(tmp_path / f"{len(more)}{name in more}", arrays | more)
    for folder, message in {"0False": "holds 0 parameters", "1True": r"shape \(8,\)", "2True": "holds 2"}.items():
        with pytest.raises(UserError, match=message):
            t5x.read_prompt(tmp_path / folder)


def test_prompts_of_prompt_tuning_are_attached(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The forms of google-research/prompt-tuning: in a T5X checkpoint, in `numpy_checkpoints/`, a bare array."""
    rows = np.random.default_rng(1).standard_normal((3, tiny.EMBED)).astype(np.float32)
    base = pretrained.load(str(tiny_folder / "tiny.gguf"), Partitioner())
    base.vocabulary.save(tmp_path / "tokenizer")
    write.write(tmp_path / "t5x", 5, base.params | {"encoder": {"prompt": {"prompt": {"prompt": rows}}}})
    given = {"config": base.model.config, "vocabulary": str(tmp_path / "tokenizer")}
    pretrained.load(str(tmp_path / "t5x"), Partitioner(), **given)
    assert "holds a soft prompt, too; PROMPT_PATH may name the same path" in capsys.readouterr().out
    (tmp_path / "numpy").mkdir()
    with (tmp_path / "numpy" / "encoder.prompt.prompt.prompt").open("wb") as file:
        np.save(file, rows)
    np.save(tmp_path / "bare.npy", rows)
    for path in ("t5x", "t5x/checkpoint_5", "numpy", "numpy/encoder.prompt.prompt.prompt", "bare.npy"):
        where = str(tmp_path / path)
        experiment = Experiment("", "sst2", (), {"inputs": 8, "targets": 2}, "", prompt_path=where)
        with pytest.raises(UserError, match="name it by PROMPT_TASK"):
            load_prompts(experiment, base)
        for change, name in (
            ({"prompt_task": "rte"}, "rte"),
            ({"force_prompt": True}, "sst2"),
            ({"prompt_path": {"cb": where}}, "cb"),
        ):
            loaded = load_prompts(dataclasses.replace(experiment, **change), base)
            assert loaded.keys() == {name} and np.array_equal(loaded[name], rows)
            assert "its base model is not verified" in capsys.readouterr().out
    with pytest.raises(UserError, match='the name ""'):
        load_prompts(dataclasses.replace(experiment, prompt_path={"": where}), base)


def test_arrays_of_prompt_tuning_are_found(tmp_path: Path) -> None:
    """google-research/prompt-tuning writes `numpy_checkpoints/checkpoint_N/`, a file named after each parameter."""
    rows = np.random.default_rng(1).standard_normal((3, 4)).astype(ml_dtypes.bfloat16)
    for step in (5, 10, 9):
        folder = tmp_path / "numpy_checkpoints" / f"checkpoint_{step}"
        folder.mkdir(parents=True)
        with (folder / "encoder.prompt.prompt.prompt").open("wb") as file:
            np.save(file, (rows * (step == 10)).astype(np.float32))
    for path in ("", "numpy_checkpoints", "numpy_checkpoints/checkpoint_10"):
        loaded, _ = soft_prompts.load(tmp_path / path, (), task="rte")
        np.testing.assert_array_equal(loaded, rows.astype(np.float32))
    np.save(tmp_path / "bfloat16.npy", rows)
    loaded, _ = soft_prompts.load(tmp_path / "bfloat16.npy", (), task="rte")
    assert loaded.dtype == np.float32 and np.array_equal(loaded, rows.astype(np.float32))
    newest = tmp_path / "numpy_checkpoints" / "checkpoint_10"
    shutil.copy(newest / "encoder.prompt.prompt.prompt", newest / "decoder.prompt.prompt.prompt")
    with pytest.raises(UserError, match=r"checkpoint_10 holds 2 prompts \(decoder\.\S+, encoder\.\S+\); give the file"):
        soft_prompts.load(tmp_path, (), task="rte")
    (newest / "encoder.prompt.prompt.prompt").unlink()
    assert soft_prompts.array_path(tmp_path).name == "decoder.prompt.prompt.prompt"


def test_checkpoints_of_tensorflow_are_named(tmp_path: Path) -> None:
    """Reference: TensorFlow itself, which writes what Mesh TensorFlow's T5 models were released as."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.compat.v1.get_variable("shared/embedding", (4, 2))
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(tmp_path / "model.ckpt"), global_step=1000)
    files = [path.name for path in tmp_path.iterdir()]
    assert {"checkpoint", "model.ckpt-1000.index", "model.ckpt-1000.meta"} < set(files)
    for name in ("", "model.ckpt-1000", *files):
        with pytest.raises(UserError, match=r"is a TensorFlow checkpoint \(Mesh TensorFlow's T5\)"):
            pretrained.load(str(tmp_path / name), Partitioner())
    (tmp_path / "checkpoint").unlink()
    with pytest.raises(UserError, match="is a TensorFlow checkpoint"):
        pretrained.load(str(tmp_path), Partitioner())


def same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    flat = trees.flatten(b)
    assert trees.flatten(a).keys() == flat.keys()
    for path, leaf in trees.flatten(a).items():
        assert leaf.dtype == flat[path].dtype and leaf.shape == flat[path].shape
        assert np.asarray(leaf).tobytes() == np.asarray(flat[path]).tobytes(), path


def decoder_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    like = jax.eval_shape(build(config).init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in trees.flatten(like).items()}


DECODER = DecoderConfig(
    vocab_size=20, emb_dim=8, num_heads=2, num_kv_heads=1, num_layers=3, head_dim=4, mlp_dim=12, tied_embeddings=False
)  # fmt: skip


@pytest.mark.parametrize("shapes", [SHAPES, decoder_shapes(DECODER)], ids=["t5", "decoder"])
@pytest.mark.parametrize("inline", [1 << 14, 20, 0])
def test_write_then_read_is_the_identity(tmp_path: Path, shapes: dict[str, tuple[int, ...]], inline: int) -> None:
    flat = stacked(draw(shapes), shapes)
    flat["token_embedder/embedding"][:5] = [[0.0], [-0.0], [1e-45], [3e38], [1 / 3]]
    flat[next(path for path in flat if path.endswith("wo/kernel"))][:] = 0
    folder = write.write(tmp_path / "a" / "b", 1_100_000, trees.unflatten(flat), inline=inline)
    assert folder == tmp_path / "a" / "b" / "checkpoint_1100000" and os.listdir(folder.parent) == [folder.name]
    same_bits(read(folder.parent, shapes)[0], trees.unflatten(flat))
    with pytest.raises(UserError, match="there already"):
        write.write(folder.parent, 1_100_000, trees.unflatten(flat))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_others_read_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """By flax and tensorstore alone; device arrays and several chunks per array."""
    monkeypatch.setattr(write, "_CHUNK", 100)
    arrays = draw()
    params = trees.unflatten({path: jax.numpy.asarray(leaf, dtype) for path, leaf in stacked(arrays).items()})
    folder = write.write(tmp_path, 3, params, inline=40)
    content = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    assert content["version"] == 3 and content["optimizer"]["state"]["step"] == 3
    for name, array in arrays.items():
        leaf = content["optimizer"]["target"]
        for room in name.split("/"):
            leaf = leaf[room]
        if isinstance(leaf, dict):
            assert leaf["kvstore"] == {"driver": "file", "path": f"target.{name.replace('/', '.')}"}
            leaf["kvstore"]["path"] = str(folder / leaf["kvstore"]["path"])
            leaf = tensorstore.open(leaf, open=True).result().read().result()
        assert leaf.dtype == dtype and (array.size < 40) == (not (folder / f"target.{name.replace('/', '.')}").exists())
        np.testing.assert_array_equal(leaf, array.astype(dtype))
    back = trees.flatten(read(folder, SHAPES)[0])
    np.testing.assert_equal(back, {path: np.asarray(leaf, "float32") for path, leaf in trees.flatten(params).items()})


def test_t5x_s_own_reader_restores_every_leaf(tmp_path: Path) -> None:
    """By the steps of `load_t5x_checkpoint` (t5x/checkpoints.py) and of `InferenceState` (t5x/train_state.py).

    T5X flattens the file with its empty nodes kept, makes a spec of each dict that is left and an array, by `shape` and
    `dtype`, of everything else: an empty dict ends there with "'dict' object has no attribute 'dtype'".
    """
    arrays = draw()
    folder = write.write(tmp_path, 3, trees.unflatten(stacked(arrays)), inline=40)
    content = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    assert content.keys() == {"version", "optimizer"}

    def is_spec(_: Any, value: Any) -> bool:  # state_utils.tensorstore_leaf
        return {"driver", "kvstore", "metadata"} <= value.keys()

    flat = flax.traverse_util.flatten_dict(
        content["optimizer"],
        keep_empty_nodes=True,
        is_leaf=lambda path, value: bool(value) and is_spec(path, value),
        sep="/",
    )
    specs = {path: tensorstore.Spec(leaf) if isinstance(leaf, dict) else leaf for path, leaf in flat.items()}
    # `fake_param_info`: a leaf without parts wherever the checkpoint has one.
    infos = flax.traverse_util.unflatten_dict(dict.fromkeys(specs, 0), sep="/")

    def shape_and_dtype(_: Any, leaf: Any) -> tuple[tuple[int, ...], str]:  # of a LazyAwaitableArray
        if isinstance(leaf, tensorstore.Spec):
            return tuple(leaf.to_json()["metadata"]["shape"]), leaf.dtype.name
        return tuple(leaf.shape), leaf.dtype.name

    leaves = jax.tree.map(shape_and_dtype, infos, flax.traverse_util.unflatten_dict(specs, sep="/"))
    restored = flax.traverse_util.flatten_dict(leaves, sep="/")
    # Those of `InferenceState.state_dict`, and none besides.
    assert restored.keys() == {"state/step", *(f"target/{name}" for name in arrays)}
    assert all(restored[f"target/{name}"] == (array.shape, "float32") for name, array in arrays.items())


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = stacked(draw())
    with pytest.raises(UserError, match="is int32"):
        write.write(tmp_path, 1, trees.unflatten(flat | {"z": np.ones(3, np.int32)}), inline=150)
    assert os.listdir(tmp_path) == []

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"Cannot write .* No space left"):
        write.write(tmp_path, 1, trees.unflatten(flat))
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write"):
        write.write(tmp_path / "file", 1, trees.unflatten(flat))


def test_pretrained_model_from_a_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    source = pretrained.load(str(tiny_folder / "tiny.gguf"), Partitioner())
    folder = write.write(tmp_path, 0, source.params, inline=100)
    source.vocabulary.save(tmp_path / "tokenizer")
    config = source.model.config
    for missing in ({}, {"config": config}, {"vocabulary": str(tmp_path / "tokenizer")}):
        with pytest.raises(UserError, match="neither sizes nor a tokenizer"):
            pretrained.load(str(folder), Partitioner(), **missing)
    loaded = pretrained.load(str(tmp_path), Partitioner(), config=config, vocabulary=str(tmp_path / "tokenizer"))
    assert loaded.fingerprint == source.fingerprint and loaded.model.config.dropout_rate == 0
    assert loaded.vocabulary == TokenizerVocabulary.load(tmp_path / "tokenizer")
    assert loaded.leaves == {"loaded": len(trees.flatten(source.params)), "new": 0, "unused": 1}
    assert math.prod(loaded.params["token_embedder"]["embedding"].shape) == len(tiny.TOKENS) * tiny.EMBED
