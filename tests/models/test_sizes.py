"""gin/models/: every published size, built abstractly, has exactly the published number of parameters."""

import jax
import pytest

from promot_jax import main, trees
from promot_jax.config import binding, gin_files
from promot_jax.models import build

# Of transformers' models of these sizes, built on the meta device with version 5.23, the table that T5's encoder and
# decoder share counted once. T5X's own mT5 XXL has 12.92 billion.
PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_099_328,
    "llama3_8b": 8_030_261_248,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312,
    "mt5_xl": 3_742_619_648,
    "mt5_xxl": 12_921_057_280,
    "byt5_small": 299_637_760,
    "byt5_base": 581_653_248,
    "byt5_large": 1_228_183_552,
    "byt5_xl": 3_737_801_728,
    "byt5_xxl": 12_906_899_328,
}
PUBLISHED |= {f"flan_t5_{size}": PUBLISHED[f"t5_1_1_{size}"] for size in ("small", "base", "large", "xl", "xxl")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    path = gin_files.folder() / "models" / f"{name}.gin"
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) < 40 and f"models/{name}.gin" in lines[1]
    assert name.startswith("flan") or f"{PUBLISHED[name]:,} parameters" in lines[0]
    job = binding.bind(main.CONFIGURABLES, [gin_files.folder() / "icl_eval.gin", path])
    experiment = job.keywords["experiment"]
    shapes = jax.eval_shape(build(experiment.model).init, jax.random.key(0))
    assert trees.count(shapes) == PUBLISHED[name]
    assert experiment.vocabulary == ("bytes" if name.startswith("byt5") else "")


def test_every_gin_file_of_a_model_is_counted():
    assert {path.stem for path in (gin_files.folder() / "models").glob("*.gin")} == set(PUBLISHED)
