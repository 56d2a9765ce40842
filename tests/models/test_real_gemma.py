"""The real Gemma 3 270M against transformers, which reads the same file with its own code."""

import random

import jax
import numpy as np
import pytest
from forward import target_logits

from promot_jax import assets, main
from promot_jax.checkpoints import pretrained
from promot_jax.decoding.generate import generate
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.models.batch_layout import Tokens, decoder_rows
from promot_jax.results import schema

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.usefixtures("compiled_for_speed")]

TEXTS = (
    "Country: Italy\nCapital: Rome\n\nCountry: France\nCapital:",
    "Mot: Hund -> chien\n\tMot:   Katze ->",
    "def f(x):\n    return x + 1\n\n\n# ни кошки, ни 猫 <b>👩‍🔬</b> naïve ½ 12345",
)
WORDS = (
    "the", " cat", "  ", "   ", "\n", "\n\n", "\t", "\t\t", " ", "é", "e\u0301", "猫", "ни", " 1234", "½", "👩\u200d🔬",
    "<b>", "</b>", "<table>", "[multimodal]", "ß", "…", "don't", "Capital:", "\r\n", "\u3000", "\x00", "snake_case", "http://a.b/?q=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def path():
    return assets.resolve("asset:gemma3-270m")


@pytest.fixture(scope="module")
def base(path):
    return pretrained.load(str(path), Partitioner())


def test_ids_equal_transformers(base, path):
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert base.vocabulary.add_bos and base.vocabulary.bos_id == oracle.bos_token_id == 2
    assert base.vocabulary.vocab_size == 262144
    rng = random.Random(0)
    texts = [*TEXTS, *("".join(rng.choice(WORDS) for _ in range(rng.randint(1, 30))) for _ in range(1000))]
    texts += ["".join(chr(rng.randint(32, 0x2FFF)) for _ in range(40)) for _ in range(200)]
    for text in texts:
        ids = base.vocabulary.encode(text)
        assert ids == oracle(text, add_special_tokens=False).input_ids, repr(text)
        assert "▁" in text or base.vocabulary.decode(ids) == text


def test_logits_equal_transformers(base, path):
    """Longer than the window of 512, too."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    settings = transformers.AutoConfig.for_model(**loader.load_gguf_checkpoint(path)["config"])
    twin = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    state = loader.load_gguf_checkpoint(path, return_tensors=True, model_to_load=twin)["tensors"]
    assert set(twin.load_state_dict(state, strict=False).missing_keys) <= {"lm_head.weight"}  # tied
    assert base.model.config.window == 512
    rows = [[2, *base.vocabulary.encode(text)] for text in (*TEXTS, " ".join(TEXTS) * 10)]
    assert len(rows[-1]) > 600
    for row in rows:
        batch = decoder_rows([[Tokens(row[:-8], row[-8:])]], len(row), 8)
        ours = np.asarray(target_logits(base.model, base.params, None, batch)[0])
        with torch.no_grad():
            theirs = twin(torch.tensor([row]), logits_to_keep=9).logits[0, :-1].numpy()
        difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
        print(f"{len(row)} tokens: difference {difference:.1e} of the largest logit")
        assert difference < 1e-3
        assert ours.argmax(-1).tolist() == theirs.argmax(-1).tolist()


def test_it_knows_capitals(base):
    assert sum(leaf.size for leaf in jax.tree.leaves(base.params)) == 268_098_176
    row = [2, *base.vocabulary.encode(TEXTS[0])]
    inputs = {"tokens": np.array([row], np.int32), "lengths": np.array([len(row)], np.int32)}
    stops, settings = np.zeros(262144, bool), Decoding(max_tokens=4)
    out = generate(base.model, settings, base.params, None, inputs, stops, np.int32(4), jax.random.key(0))
    assert base.vocabulary.decode(out[0].tolist()).split()[0] == "Paris"


FEW = {
    "Evaluation.examples": 6, "Evaluation.target_examples": 8, "Evaluation.curve_examples": 2,
    "Evaluation.curve_target_examples": 4, "Evaluation.shots": (4,),
}  # fmt: skip


def demonstration(job, workdir, **more):
    """A run of the demonstration on this model, with few examples; its results."""
    given = {"INITIAL_CHECKPOINT_PATH": "asset:gemma3-270m"} | FEW | more
    options = [f"--gin.{name}={value}" for name, value in given.items()]
    assert main.main([f"--gin_file={job}.gin", f"--workdir={workdir}", *options]) == 0
    return schema.read_run(workdir)


def test_the_demonstration_evaluates_it(tmp_path):
    """Of 6 examples a task; of 20 it was 76."""
    run = demonstration("icl_eval", tmp_path)
    assert run.model == "asset:gemma3-270m" and run.leaves["loaded"] == 15
    assert run.icl["4"].norm_avg > 60 and run.target.n == 8


@pytest.mark.parametrize(("job", "trained"), [("promot_stage1", 10_240), ("finetune", 268_098_176)])
def test_the_demonstration_trains_it(job, trained, tmp_path, capsys):
    run = demonstration(job, tmp_path, TRAIN_STEPS=12, EVAL_PERIOD=6, WARMUP_STEPS=2, LEARNING_RATE=LEARN[job])
    assert f"trains {trained:,} of" in capsys.readouterr().out
    losses = [point.loss for point in run.curve if point.loss is not None]
    assert len(losses) == 2 and losses[1] < losses[0]


LEARN = {"promot_stage1": 0.02, "finetune": 3e-5}
