"""An encoder-decoder in the modules that work with any family: data, stages, evaluation; and sentinels."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_tasks  # noqa: F401, registers the tasks

from promot_jax import trees
from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.data import batches, examples
from promot_jax.data.vocabularies.sentencepiece import ByteVocabulary
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.evaluation import sampler as sampler_module
from promot_jax.evaluation.evaluator import Evaluator
from promot_jax.evaluation.sampler import Request, Sampler
from promot_jax.evaluation.settings import Evaluation
from promot_jax.methods.promot import STAGE1, STAGE2
from promot_jax.models import T5Config, build
from promot_jax.params import soft_prompts
from promot_jax.params.dtypes import cast_weights
from promot_jax.params.soft_prompts import PromptInit
from promot_jax.training.loop import train
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training

CONFIG = T5Config(384, 16, 2, 2, 1, 8, 24)
SETTINGS = Evaluation(tokens_per_batch=512, max_input_length=256, decoding=Decoding(max_tokens=6))
LENGTHS = {"inputs": 40, "targets": 6}


@pytest.fixture(name="base", scope="module")
def _base():
    model = build(CONFIG)
    params = Partitioner().place({"model": jax.jit(model.init)(jax.random.key(0))})["model"]
    return Pretrained(model, params, ByteVocabulary(), base="", fingerprint="", path="", leaves={})


def evaluator(base, **changes):
    return Evaluator(sampler(base, **changes), task="tiny_review", icl="tiny_icl")


def sampler(base, **changes):
    return Sampler(base, dataclasses.replace(SETTINGS, **changes), Partitioner())


def encoder(judge, prompt, task):
    return judge.encoder.with_prompts(soft_prompts.layout(prompt, CONFIG.vocab_size), task)


def train_stage(folder, base, stage, params, pack, steps=2):
    judge = evaluator(base)
    stream = batches.TrainBatches(
        examples.stream("tiny_review", "train", seed=0),
        encoder(sampler(base), params["prompt"], "tiny_review"),
        base.model.layout,
        batch_size=2,
        feature_lengths=LENGTHS,
        pack=pack,
    )
    training = Training(steps, 2, steps, Optimizer("adamw", 0.01, "constant", warmup_steps=0), dropout_rate=0.1)
    model = dataclasses.replace(base.model, config=dataclasses.replace(CONFIG, dropout_rate=0.1))

    def evaluate(current, step):
        return {"target": judge.target(current, "validation", 4, "tiny_review").entry.score + step}

    written = []
    trained = train(
        folder,
        model,
        params,
        stage,
        training,
        stream,
        evaluate,
        partitioner=Partitioner(),
        seed=0,
        write=lambda step, scalars: written.append(scalars),
    )
    return trained, [scalars["train/loss"] for scalars in written if "train/loss" in scalars]


@pytest.mark.slow
def test_both_stages_train_their_own_subtree_and_no_other(base, tmp_path):
    rows = PromptInit().rows(
        jax.random.key(1),
        4,
        base.params["token_embedder"]["embedding"].shape,
        functools.partial(base.model.input_rows, base.params),
        base.vocabulary.encode,
    )
    params = Partitioner().place({"model": base.params, "prompt": {"tiny_review": rows}})
    before = {path: np.array(leaf) for path, leaf in trees.flatten(params).items()}

    first, losses = train_stage(tmp_path / "one", base, STAGE1, params, pack=False)
    assert len(losses) == 2 and np.isfinite(losses).all()
    after = {path: np.array(leaf) for path, leaf in trees.flatten(first.params).items()}
    assert {path for path in after if not np.array_equal(after[path], before[path])} == {"prompt/tiny_review"}

    second, losses = train_stage(tmp_path / "two", base, STAGE2, first.params, pack=True)
    assert len(losses) == 2 and np.isfinite(losses).all()
    last = {path: np.array(leaf) for path, leaf in trees.flatten(second.params).items()}
    moved = {path for path in last if not np.array_equal(last[path], after[path])}
    assert moved == {path for path in last if path.startswith("model/")}


def test_inputs_are_encoded_and_targets_stand_by_themselves(base):
    table = {"a": np.zeros((3, 16), np.float32)}
    trained = encoder(sampler(base, sentinel=True), table, "a")  # of training: no sentinel
    example = examples.Example("a", "id", "xy", "z", (), "", 0)
    tokens = trained.tokens(example)
    assert tokens.inputs == [384, 385, 386, *base.vocabulary.encode("xy"), 1]
    assert tokens.targets == [*base.vocabulary.encode("z"), 1]


def test_sentinels_are_asked_for_and_answers_extracted(base, monkeypatch):
    said = "<extra_id_0> good <extra_id_1> film"
    vocabulary, asked = base.vocabulary, []

    def answer(engine, inputs):
        ids = [258, *vocabulary.encode("good"), 257, *vocabulary.encode("film"), -1]
        asked.extend(inputs)
        return ((index, np.array(ids), None) for index in range(len(inputs)))

    monkeypatch.setattr(sampler_module, "generate_all", answer)
    asking = sampler(base, sentinel=True, decoding=Decoding(max_tokens=20))
    judge = Evaluator(asking, task="tiny_review", icl="tiny_icl")
    params = {"model": base.params}
    assert asking.ask(params, [Request("a b")]) == [said]
    assert asked[0].ids == [*vocabulary.encode("a b"), 258, 1]
    asking.ask(params, [Request("a b", labels=("good",))])  # the sentinel in front of a label is not scored
    assert asked[-1].continuations == ((258, *vocabulary.encode("good")),) and asked[-1].unscored == 1
    scored = judge.target(params, "test", 10)
    assert {(row.raw, row.output) for row in scored.rows} == {(said, "good")}
    assert 0 < scored.entry.score < 100
    plain = sampler(base, decoding=Decoding(max_tokens=20))
    assert plain.ask(params, [Request("a b")]) == ["goodfilm"]


def test_a_task_that_was_trained_is_asked_as_it_was_trained(base, monkeypatch):
    ends = []

    def answer(engine, inputs):
        ends.extend(each.ids[-2] for each in inputs)
        return ((index, np.array([-1]), None) for index in range(len(inputs)))

    def asked(ask, *arguments):
        ends.clear()
        ask(*arguments)
        return {end == 258 for end in ends}

    monkeypatch.setattr(sampler_module, "generate_all", answer)
    judge = evaluator(base, sentinel=True)
    prompt = Partitioner().place({"prompt": {"tiny_review": np.zeros((2, 16), np.float32)}})
    untouched = {"model": base.params, **prompt}
    tuned = {"model": jax.tree.map(lambda leaf: leaf + 0, base.params)}
    assert asked(judge.target, untouched, "test", 2) == {True}  # nothing in front of it
    assert asked(judge.target, untouched, "test", 2, "tiny_review") == {False}
    assert asked(judge.target, tuned, "test", 2) == {False}
    loaded = evaluator(dataclasses.replace(base, base="of its run"), sentinel=True)
    assert asked(loaded.target, untouched, "test", 2) == {False}
    for params in (untouched, tuned):
        assert asked(judge.icl, params, 1, "test", 2) == asked(loaded.icl, params, 1, "test", 2) == {True}


def test_a_tokenizer_without_sentinels_is_refused(base, tiny_folder):
    from promot_jax.checkpoints import pretrained

    other = pretrained.load(str(tiny_folder / "tiny.gguf"), Partitioner())
    mixed = dataclasses.replace(base, vocabulary=other.vocabulary)
    with pytest.raises(UserError, match=r"no <extra_id_0>; set Evaluation\.sentinel = False"):
        sampler(mixed, sentinel=True)


def test_in_bfloat16_biases_stay_float32(base):
    cast = trees.flatten(cast_weights(base.params, "bfloat16"))
    kept = {path for path, leaf in cast.items() if leaf.dtype == np.float32}
    assert kept == {path for path in cast if path.endswith(("scale", "rel_embedding"))}
