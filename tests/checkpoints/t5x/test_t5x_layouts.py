"""Every shape that T5X checkpoints come in: where the file lies, how layers are kept, what packs the chunks."""

import http.server
import json
import math
import threading
import urllib.parse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorstore
from etils import epath
from processes import python
from t5x_fixtures import drawn, in_scratch, read  # noqa: F401, used by name
from t5x_writer import EMBED, HEADS, QUERY, SHAPES, SIZE, VOCAB, Arrays, draw, nested, pack, save, stacked, zarr

from promot_jax import trees
from promot_jax.checkpoints import pretrained
from promot_jax.checkpoints.locate import locate
from promot_jax.checkpoints.t5x import write
from promot_jax.checkpoints.t5x.load import Checkpoint, is_checkpoint
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.models import T5Config, build
from promot_jax.params.fingerprint import fingerprint

TABLES = [f"{stack}/relpos_bias/rel_embedding" for stack in ("encoder", "decoder")]
ZSTD = {"id": "zstd", "level": 3}


def check(path: Path, want: Arrays, unused: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
    assert is_checkpoint(path)
    params, leaves = read(path, shapes)
    np.testing.assert_equal(trees.flatten(params), want)
    assert leaves == {"loaded": len(shapes), "new": 0, "unused": unused}


def test_one_file_holds_everything(tmp_path: Path, arrays: Arrays) -> None:
    """As T5X and Flax wrote it before arrays had files of their own; the path may be that of the file."""
    state = {"step": np.int32(7), "param_states": {"decoder": {"v": np.ones(3, np.float32)}}}
    contents = ({"version": 3, "optimizer": {"target": nested(arrays), "state": state}}, {"target": nested(arrays)})
    for content, unused in zip(contents, (2, 0), strict=True):
        (tmp_path / "checkpoint_9").write_bytes(pack(content))
        check(tmp_path / "checkpoint_9", stacked(arrays), unused)
        (tmp_path / "checkpoint_10").write_bytes(pack(content))
        check(tmp_path, stacked(arrays), unused)
    check(save(tmp_path / "checkpoint_11", arrays) / "checkpoint", stacked(arrays), 2)
    for other in (b"", b"GGUF\3\0\0\0", b"model_checkpoint_path: 1", b'{"a": 1}', b"PK\3\4"):
        (tmp_path / "other").write_bytes(other)
        assert not is_checkpoint(tmp_path / "other")


def test_what_orbax_writes_for_t5x(tmp_path: Path, arrays: Arrays) -> None:
    """A folder per item, names instead of specs, zstd, and the state as a tree of its own."""
    flat: dict[str, Any] = dict(arrays)
    folder = tmp_path / "checkpoint_20" / "state"
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        if array.ndim > 1:
            flat[name] = zarr(folder, name, array, "placeholder", compressor=ZSTD)
    state = {"step": "PLACEHOLDER://_optimizer.state.step", "param_states": {"a": {"m": None, "v": np.ones(3)}}}
    content = {"_optimizer": {"target": nested(flat), "state": state}, "flax_mutables": None, "params_axes": None}
    (folder / "checkpoint").write_bytes(pack(content))
    check(tmp_path, stacked(arrays), 2)
    (folder / "checkpoint").write_bytes(
        pack(content | {"flax_mutables": {"stats": np.float32(1), "step": np.int32([3])}})
    )
    check(tmp_path / "checkpoint_20", stacked(arrays), 4)


def test_state_with_places_of_arrays(tmp_path: Path, arrays: Arrays) -> None:
    """The optimizer's arrays are not looked at: chunks of zeros, of which it has many, are not even written."""
    folder = tmp_path / "c"
    folder.mkdir()
    spec = {"driver": "zarr", "dtype": "float32", "kvstore": {"driver": "gfile", "path": "state.none"}, "metadata": {}}
    target = {name: zarr(folder, name, array) if array.ndim > 1 else array for name, array in arrays.items()}
    state = {"step": np.int32([7]), "param_states": {"encoder": {"v": spec, "v_row": np.zeros(3, np.float32)}}}
    optimizer = {"target": nested(target), "state": state, "flax_mutables": {}}
    (folder / "checkpoint").write_bytes(pack({"version": 3, "optimizer": optimizer}))
    check(folder, stacked(arrays), 3)


def test_chunks_are_what_zarray_says(tmp_path: Path, arrays: Arrays) -> None:
    """T5X does not look at those of its own description, nor at how they are packed there."""

    def edit(flat: dict[str, Any]) -> None:
        flat[QUERY] = json.loads(json.dumps(flat[QUERY]))
        flat[QUERY]["metadata"] |= {"chunks": [8, 6], "compressor": {"id": "blosc"}}

    check(save(tmp_path / "c", arrays, edit=edit), stacked(arrays), 2)


def test_t5_1_0(tmp_path: Path) -> None:
    """ReLU has one kernel, and a tied head none."""
    config = T5Config(VOCAB, EMBED, HEADS, 2, 2, SIZE, 12, mlp_activations=("relu",), tied_embeddings=True)
    like = jax.eval_shape(build(config).init, jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in trees.flatten(like).items()}
    assert "encoder/layers/mlp/wi/kernel" in shapes and "decoder/logits_dense/kernel" not in shapes
    arrays = draw(shapes)
    check(save(tmp_path / "c", arrays), stacked(arrays, shapes), 2, shapes)


def scanned(form: str, axis: int, apart: bool, inner: str = "layers", table: str = "") -> Arrays:
    """A scanned model's arrays: layers on an axis of their own; `table`: position biases repeated under that name."""
    flat = {}
    for path, array in stacked(draw()).items():
        stack, _, rest = path.partition("/layers/")
        if rest and apart and "attention/" in path and path.endswith("kernel"):
            split = (HEADS, SIZE, EMBED) if "/out/" in path else (EMBED, HEADS, SIZE)
            array = array.reshape(-1, *split)
        name = f"{stack}/{inner or stack}/{rest}" if rest else path
        if path in TABLES and table:
            name, array, rest = f"{stack[:7]}/{inner or stack[:7]}/{table}/rel_embedding", np.stack([array] * 3), "x"
        flat[name] = np.ascontiguousarray(np.moveaxis(array, 0, axis)) if rest else array
    return flat


@pytest.mark.parametrize("form", ["file", "inline"])
@pytest.mark.parametrize(
    "layout",
    [
        {"axis": 1, "apart": False},
        {"axis": 1, "apart": True, "inner": "", "table": "relpos_bias"},
        {"axis": 0, "apart": True, "table": "relative_posemb"},
        {"axis": 0, "apart": False, "inner": ""},
    ],
)
def test_scanned_models(tmp_path: Path, arrays: Arrays, form: str, layout: dict[str, Any]) -> None:
    folder = save(tmp_path / "c", scanned(form, **layout), form)
    check(folder, stacked(arrays), 2)
    checkpoint, want = Checkpoint(folder, SHAPES), stacked(arrays)
    for path in ("decoder/layers/self_attention/out/kernel", "encoder/layers/mlp/wi_0/kernel", TABLES[0]):
        box = tuple((size - 2, size) for size in want[path].shape)
        np.testing.assert_array_equal(checkpoint.read(path, box), want[path][tuple(slice(*one) for one in box)])


def test_scanned_models_that_do_not_fit(tmp_path: Path) -> None:
    flat = scanned("inline", 1, False, table="relpos_bias")
    name = "encoder/layers/relpos_bias/rel_embedding"
    own = flat | {name: flat[name] * np.arange(1, 4, dtype=np.float32)[:, None]}
    with pytest.raises(UserError, match="position biases of its own in every layer of encoder"):
        read(save(tmp_path / "a", own, "inline"), SHAPES)
    mixed = flat | {QUERY.replace("_1", ""): np.moveaxis(flat[QUERY.replace("_1", "")], 1, 0)}
    with pytest.raises(UserError, match=r"query/kernel' .* has shape \(2, 8, 6\) and .* wants \(2, 8, 6\)"):
        read(save(tmp_path / "b", mixed, "inline"), SHAPES)
    extra = {"encoder/layers/extra/scale": np.ones((EMBED, 2), np.float32)}
    with pytest.raises(UserError, match=r"'encoder/layers/extra/scale', for which the model has no place"):
        read(save(tmp_path / "d", flat | extra, "inline"), SHAPES)


@pytest.mark.parametrize(("size", "level"), [(3, 3), (300, 1), (1 << 17, 19), ((1 << 19) + 1, 3)])
def test_zstd(tmp_path: Path, size: int, level: int) -> None:
    compressor = {"id": "zstd", "level": level}
    for values in (np.random.default_rng(0).standard_normal(size, np.float32), np.full(size, 2.5, np.float32)):
        folder = save(tmp_path / str(values[0]), {"x/kernel": values}, chunks=[size], compressor=compressor)
        np.testing.assert_equal(read(folder, {"x/kernel": (size,)})[0]["x"]["kernel"], values)


def test_damaged_zstd(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", {"x/kernel": np.ones(64, np.float32)}, chunks=[64], compressor=ZSTD)
    chunk = folder / "target.x.kernel" / "0"
    whole = chunk.read_bytes()
    # A frame that says it holds 256 bytes, and blocks of one repeated byte that hold 128 KiB each.
    bomb = whole[:7] + (b"\2\0\x10\0" * 1000) + b"\3\0\x10\0"
    for damaged in (whole[:-1], whole[:9], whole[:4], b"", b"\0" * 40, whole[:5] + b"\x41" + whole[6:], bomb):
        chunk.write_bytes(damaged)
        with pytest.raises(UserError, match=r"target\.x\.kernel/0\": "):
            read(folder, {"x/kernel": (64,)})


@pytest.fixture(name="bucket")
def _bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that answers to gs://bucket."""
    original = epath.Path
    monkeypatch.setattr(
        epath, "Path", lambda path: original(str(path).replace("gs://bucket", str(tmp_path / "bucket")))
    )
    monkeypatch.setenv("PROMOT_CHECKPOINTS", str(tmp_path / "cache"))
    return tmp_path / "bucket"


@pytest.mark.parametrize("form", ["gcs", "bare", "old"])
@pytest.mark.parametrize("compressor", [{"id": "gzip"}, ZSTD, {"id": "blosc"}])
def test_buckets(tmp_path: Path, arrays: Arrays, bucket: Path, form: str, compressor: dict[str, Any]) -> None:
    """Arrays are read where they lie: only the msgpack file is copied."""
    save(bucket / "t5" / "checkpoint_100", arrays, form, compressor=compressor)
    place = locate("gs://bucket/t5")
    assert not isinstance(place, Path)
    check(place, stacked(arrays), 2)
    copies = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert [file.name for file in copies] == ["checkpoint"]
    chunk = bucket / "t5" / "checkpoint_100" / f"target.{QUERY.replace('/', '.')}" / "1.0"
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"/1\.0\": "):
        read(place, SHAPES)
    chunk.unlink()
    with pytest.raises(UserError, match=r"/1\.0\" is missing"):
        read(place, SHAPES)


SERVED = """
import numpy as np
from promot_jax.checkpoints.t5x import zarr
import tensorstore
spec = {"driver": "zarr", "kvstore": zarr._kvstore("gs://bucket/t5/target.x"), "fill_missing_data_reads": False}
values = np.zeros((8, 6), np.float32)
zarr.fill(values, tensorstore.open(spec, open=True, read=True).result(), (slice(0, 8), slice(0, 6)))
print(values.tolist())
"""


def test_arrays_in_a_bucket_that_is_one(tmp_path: Path) -> None:
    """Over the protocol of Google's storage: what is asked for is `o/NAME?alt=media`, with the name quoted."""
    (tmp_path / "t5").mkdir()
    values = np.arange(48, dtype=np.float32).reshape(8, 6)
    zarr(tmp_path / "t5", "x", values)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            file = tmp_path / urllib.parse.unquote(urllib.parse.urlparse(self.path).path.rpartition("/o/")[2])
            data = file.read_bytes() if file.is_file() else b""
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        found = python(SERVED, TENSORSTORE_GCS_HTTP_URL=address, GCE_METADATA_ROOT="127.0.0.1:1")
        server.shutdown()
    assert json.loads(found) == values.tolist()


def test_a_model_from_a_bucket(tmp_path: Path, bucket: Path) -> None:
    config = T5Config(384, EMBED, HEADS, 2, 2, 4, 12)
    like = jax.eval_shape(build(config).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), like)
    write.write(bucket, 3, params, inline=10)
    loaded = pretrained.load("gs://bucket", Partitioner(), config=config, vocabulary="bytes")
    assert loaded.fingerprint == fingerprint(params) and loaded.path == "gs://bucket"
    (bucket / "empty").mkdir()
    for path in ("gs://bucket/empty", "gs://bucket/none"):
        with pytest.raises(UserError, match="holds neither a Hugging Face folder"):
            pretrained.load(path, Partitioner())


def test_climbing_out_of_a_bucket_s_folder(tmp_path: Path, arrays: Arrays, bucket: Path) -> None:
    save(bucket / "a", arrays)

    def edit(flat: dict[str, Any]) -> None:
        spec = json.loads(json.dumps(flat[QUERY]))
        spec["kvstore"]["path"] = f"../a/target.{QUERY.replace('/', '.')}"
        flat[QUERY] = spec

    save(bucket / "b", arrays, edit=edit)
    with pytest.raises(UserError, match="not one inside"):
        read(locate("gs://bucket/b"), SHAPES)


def test_tensorstore_agrees(tmp_path: Path, arrays: Arrays) -> None:
    """The writer of these tests makes what tensorstore itself reads back."""
    folder = save(tmp_path / "c", arrays, compressor=ZSTD)
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / f"target.{QUERY.replace('/', '.')}")}}
    found = tensorstore.open(spec, open=True).result().read().result()
    np.testing.assert_array_equal(found, arrays[QUERY])
    assert math.prod(found.shape) == EMBED * HEADS * SIZE
