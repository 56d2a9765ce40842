"""Each reader, and a finished stage on its base: loading takes less memory than 1.3 times the model.

Of its own (anonymous) memory: the pages of a mapped file are the system's, which takes them back when it needs them.
"""

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from processes import python

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax import trees
from promot_jax.checkpoints.huggingface import config as hf_config
from promot_jax.checkpoints.huggingface import names, safetensors
from promot_jax.checkpoints.t5x import write
from promot_jax.data.vocabularies.tokenizer import TokenizerVocabulary
from promot_jax.models import DecoderConfig

pytestmark = pytest.mark.slow

CONFIG = DecoderConfig(16000, 768, 12, 4, 6, 64, 2048)
Q8_0, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32

PREAMBLE = f"""
import json, sys, threading
from pathlib import Path
import jax
import promot_jax.data
from promot_jax import trees
from promot_jax.checkpoints import pretrained, stage_folder
from promot_jax.checkpoints.orbax import Checkpoints
from promot_jax.data.vocabularies import load as vocabularies
from promot_jax.models import DecoderConfig, build
from promot_jax.distributed.partitioning import Partitioner
folder = Path(FOLDER)
options = {{"config": {CONFIG!r}, "vocabulary": str(folder / "tokenizer")}}
"""
MEASURE = """
# What takes memory once, whatever the size of the model.
import tensorstore
vocabularies.load(folder / "tokenizer")
Partitioner().mesh(), jax.numpy.ones(3).block_until_ready()
jax.eval_shape(build(options["config"]).init, jax.random.key(0))
def memory(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
before, seen, done = memory("RssAnon"), [0], threading.Event()
def watch():
    while not done.wait(0.001):
        seen.append(memory("RssAnon"))
watcher = threading.Thread(target=watch)
watcher.start()
loaded = pretrained.load(str(folder / NAME), Partitioner(), **options)
done.set()
watcher.join()
size = 4 * trees.count(loaded.params)
print(json.dumps({"size": size, "peak": (max(seen) - before) / size, "samples": len(seen)}))
"""
TRAIN = """
loaded = pretrained.load(str(folder / "model.gguf"), Partitioner(), **options)
trained = {path: leaf + 1 for path, leaf in trees.flatten(loaded.params).items() if PART in path}
state = {"params": {"model": trees.unflatten(trained)}, "optimizer": {}, "step": jax.numpy.array(3)}
checkpoints = Checkpoints(folder / "run" / "checkpoints")
checkpoints.save(3, state, {}, 50.0)
checkpoints.close()
description = {"stage": "finetune", "trains": "model", "checkpoint": str(folder / "model.gguf"), "base": loaded.base}
stage_folder.record(folder / "run", {**description, "best_step": 3, "curve": []})
"""


@pytest.fixture(name="values", scope="module")
def _values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(16000 * 768, np.float32)


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    TokenizerVocabulary.from_gguf(
        {key: np.array(value) if key.endswith("token_type") else value for key, value in tiny.METADATA.items()}
    ).save(tmp_path / "tokenizer")
    return tmp_path


def peak(folder: Path, name: str, config: DecoderConfig = CONFIG) -> float:
    code = (PREAMBLE + MEASURE.replace("NAME", repr(name))).replace(repr(CONFIG), repr(config))
    measured = json.loads(python(code.replace("FOLDER", repr(str(folder)))).splitlines()[-1])
    print(name, measured)
    assert measured["size"] > 150e6 and measured["samples"] > 50
    return float(measured["peak"])


def tensors(values: np.ndarray) -> dict[str, safetensors.Source]:
    """A model's under Hugging Face's names, all of the same numbers."""
    sources = {}
    for name in names.table("decoder", hf_config.full("decoder", CONFIG)):
        shape = name.shape[::-1] if name.transposed else name.shape
        for i in range(CONFIG.num_layers if name.stacked else 1):
            made = lambda shape=shape: values[: int(np.prod(shape))].reshape(shape)  # noqa: E731
            sources[name.of(i)] = safetensors.Source(shape, made)
    return sources


def write_gguf(path: Path, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    """The same under GGUF's names."""
    parts = {"self_attn": "attn", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp": "ffn"}
    parts |= {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "output"}
    parts |= {f"{name}_proj": name for name in ("gate", "up", "down")}
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    weights = {}
    for name, source in tensors(values).items():
        _, _, layer, *rest = name.split(".")
        short = "_".join(parts[part] for part in rest[:-1])
        weights[whole.get(name, f"blk.{layer}.{short}.weight")] = source.values()
    sizes = {
        "block_count": CONFIG.num_layers, "embedding_length": 768, "feed_forward_length": 2048, "context_length": 8192,
        "attention.head_count": 12, "attention.head_count_kv": 4, "rope.dimension_count": 64,
    }  # fmt: skip
    metadata = {f"llama.{key}": value for key, value in sizes.items()}
    tiny.write(path, weights, metadata | {"llama.attention.layer_norm_rms_epsilon": 1e-5}, kind=kind)


def test_hugging_face_folder(folder: Path, values: np.ndarray) -> None:
    (folder / "model").mkdir()
    safetensors.write(folder / "model" / "model.safetensors", tensors(values))
    (folder / "model" / "config.json").write_text(json.dumps(hf_config.write("decoder", CONFIG)))
    assert peak(folder, "model") < 1.3


@pytest.mark.parametrize("kind", [F32, Q8_0])
def test_gguf_file(folder: Path, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    write_gguf(folder / "model.gguf", values, kind)
    assert peak(folder, "model.gguf") < 1.3


def test_t5x_checkpoint(folder: Path, values: np.ndarray) -> None:
    """Of more layers: the threads of tensorstore keep some 50 MB for themselves, whatever the size of the model."""
    config = dataclasses.replace(CONFIG, num_layers=16)
    flat = {}
    for name in names.table("decoder", hf_config.full("decoder", config)):
        shape = (config.num_layers, *name.shape) if name.stacked else name.shape
        flat[name.leaf] = np.resize(values, shape)
    write.write(folder / "model", 1, trees.unflatten(flat))
    assert peak(folder, "model", config) < 1.3


@pytest.mark.parametrize("part", ["", "mlp"])
def test_finished_stage(folder: Path, values: np.ndarray, part: str) -> None:
    """One that trained everything, and one that trained the half of it."""
    write_gguf(folder / "model.gguf", values, F32)
    python((PREAMBLE + TRAIN.replace("PART", repr(part))).replace("FOLDER", repr(str(folder))))
    assert peak(folder, "run") < 1.3
