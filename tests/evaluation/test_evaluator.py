"""Evaluation: prompts, scores, counts, invariances. Mostly with a rule instead of the model."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio
import tiny_tasks

import promot_jax.data  # noqa: F401, silences TensorFlow
from promot_jax.checkpoints import pretrained
from promot_jax.checkpoints.pretrained import Pretrained
from promot_jax.data import batches, examples
from promot_jax.decoding.continuous_batching import Output
from promot_jax.decoding.inputs import Engine, Input
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.errors import UserError
from promot_jax.evaluation import evaluator as evaluator_module
from promot_jax.evaluation import sampler as sampler_module
from promot_jax.evaluation.evaluator import Evaluator
from promot_jax.evaluation.sampler import Request, Sampler
from promot_jax.evaluation.settings import Evaluation
from promot_jax.models import DecoderModel
from promot_jax.params.soft_prompts import layout
from promot_jax.results import bootstrap
from promot_jax.tasks import metrics, register

SETTINGS = Evaluation(tokens_per_batch=512, max_input_length=256, decoding=Decoding(max_tokens=8))


@pytest.fixture(name="base", scope="module")
def _base(tiny_folder: Path) -> Pretrained:
    return pretrained.load(str(tiny_folder / "tiny.gguf"), Partitioner())


def evaluator(base: Pretrained, task: str = "tiny_review", icl: str = "tiny_icl", **changes: Any) -> Evaluator:
    return Evaluator(sampler(base, **changes), task=task, icl=icl)


def sampler(base: Pretrained, **changes: Any) -> Sampler:
    return Sampler(base, dataclasses.replace(SETTINGS, **changes), Partitioner())


class Oracle:
    """Stands in for the model: answers what `answer` says of a prompt; keeps all prompts."""

    def __init__(self, base: Pretrained, answer: Callable[[str], str]) -> None:
        self.vocabulary, self.answer = base.vocabulary, answer
        self.asked: list[str] = []

    def __call__(self, engine: Engine, inputs: Sequence[Input]) -> Iterator[Output]:
        for index, each in reversed([*enumerate(inputs)]):  # outputs come in any order
            self.asked.append(self.vocabulary.decode(each.ids))
            said = self.vocabulary.encode(self.answer(self.asked[-1]))[: engine.settings.max_tokens]
            yield Output(index, np.array([*said, *[-1] * (engine.settings.max_tokens - len(said))]), None)


@pytest.fixture(name="oracle")
def _oracle(base: Pretrained, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], str]], Oracle]:
    def make(answer: Callable[[str], str]) -> Oracle:
        made = Oracle(base, answer)
        monkeypatch.setattr(sampler_module, "generate_all", made)
        return made

    return make


def plain(base: Pretrained) -> dict[str, Any]:
    """Parameters that are the base model's, but another object: nothing may be taken from memory."""
    return {"model": {**base.params, "decoder": {**base.params["decoder"], "decoder_norm": {"scale": _copied(base)}}}}


def _copied(base: Pretrained) -> Any:
    return base.params["decoder"]["decoder_norm"]["scale"] * 1


def right(prompt: str) -> str:
    """The right answer to the query of a prompt."""
    question = prompt.rpartition("\n\n")[2]
    if question.startswith("Review:"):
        return " good" if " was good" in question else " bad"
    table = tiny_tasks.THINGS | tiny_tasks.ANIMALS
    return " " + table[question.split()[1]]


@pytest.fixture(name="counted")
def _counted() -> Iterator[list[tuple[list[str], list[str]]]]:
    """The task "tiny_counted", whose metric keeps what it gets."""
    calls: list[tuple[list[str], list[str]]] = []

    def keep(targets: list[str], predictions: list[str]) -> dict[str, float]:
        calls.append((list(targets), list(predictions)))
        return {"kept": 50.0}

    before = set(seqio.TaskRegistry.names())
    register.register(
        "tiny_counted", tiny_tasks.reviews, tiny_tasks.REVIEW, [metrics.accuracy, keep], labels=["good", "bad"]
    )
    yield calls
    for name in set(seqio.TaskRegistry.names()) - before:
        seqio.TaskRegistry.remove(name)


def test_the_metric_gets_each_example_once(
    base: Pretrained, oracle: Any, counted: list[tuple[list[str], list[str]]]
) -> None:
    model = oracle(lambda prompt: " good")
    scored = evaluator(base, task="tiny_counted").target(plain(base), "test", 7)
    ((targets, predictions),) = counted
    assert len(model.asked) == len(targets) == 7 and predictions == ["good"] * 7
    assert scored.entry.n == len(scored.rows) == 7
    assert scored.entry.score == pytest.approx(100 * targets.count("good") / 7)
    assert scored.entry.metrics == {"accuracy": scored.entry.score, "kept": 50.0}


def test_right_answers_score_100_and_each_finds_its_row(base: Pretrained, oracle: Any) -> None:
    oracle(right)
    found, rows = evaluator(base).icl(plain(base), 2, "test", 10)
    assert {name: task.score for name, task in found.tasks.items()} == {"tiny_colour": 100, "tiny_size": 100}
    assert found.norm_avg == 100 and found.ci95 == (100, 100) and len(rows) == 20
    for row in rows:
        name = row.input.rpartition("\n\n")[2].split()[1]
        assert row.output == row.target == (tiny_tasks.THINGS | tiny_tasks.ANIMALS)[name]
    assert evaluator(base).target(plain(base), "validation", 6).entry.score == 100


@pytest.mark.parametrize("shots", [0, 1, 2, 5])
def test_any_number_of_shots_from_the_train_split(base: Pretrained, oracle: Any, shots: int) -> None:
    model = oracle(right)
    found, rows = evaluator(base).icl(plain(base), shots, "test", 6)
    train = {
        f"{example.inputs} {example.targets}"
        for task in ("tiny_colour", "tiny_size")
        for example in examples.read(task, "train")
    }
    queries = {
        example.inputs for task in ("tiny_colour", "tiny_size") for example in examples.read(task, "test", limit=6)
    }
    assert sorted(model.asked) == sorted(row.input for row in rows) and len(rows) == 12
    for row in rows:
        *exemplars, query = row.input.split("\n\n")
        assert len(exemplars) == len(set(exemplars)) == shots and set(exemplars) <= train and query in queries
    assert found.dropped_shots == 0 and {row.shots for row in rows} == {shots}


def test_exemplars_depend_on_the_seed(base: Pretrained, oracle: Any) -> None:
    oracle(right)
    first, again, other = (
        [row.input for row in evaluator(base, exemplar_seed=seed).icl(plain(base), 2, "test", 6)[1]]
        for seed in (0, 0, 1)
    )
    assert first == again and all(one != two for one, two in zip(first, other, strict=True))
    assert [one.rpartition("\n\n")[2] for one in first] == [two.rpartition("\n\n")[2] for two in other]


def test_dropped_shots_are_counted(base: Pretrained, oracle: Any) -> None:
    oracle(right)
    encode = base.vocabulary.encode
    found, rows = evaluator(base, max_input_length=80).icl(plain(base), 4, "test", 6)
    assert found.dropped_shots == sum(row.dropped_shots for row in rows) > 0
    full = evaluator(base).icl(plain(base), 4, "test", 6)[1]
    for row, whole in zip(rows, full, strict=True):
        assert len(encode(row.input)) <= 80
        assert row.input.split("\n\n") == whole.input.split("\n\n")[row.dropped_shots :]
        assert row.input[row.query :] == whole.input[whole.query :] == row.input.split("\n\n")[-1]
    with pytest.raises(UserError, match="without any exemplar"):
        evaluator(base, max_input_length=8).icl(plain(base), 4, "test", 6)


def test_each_row_says_what_its_output_scores(base: Pretrained, oracle: Any) -> None:
    oracle(lambda prompt: right(prompt) + "!" if "Colour:" in prompt else " big")  # exact match forgives the mark
    _, rows = evaluator(base).icl(plain(base), 0, "test", 6)
    scores = {task: [row.score for row in rows if row.task == task] for task in ("tiny_colour", "tiny_size")}
    assert scores["tiny_colour"] == [100] * 6 and set(scores["tiny_size"]) == {0, 100}
    assert all(row.query == 0 and (row.score == 100) == row.output.startswith(row.target) for row in rows)
    known = set(seqio.TaskRegistry.names())
    register.register("tiny_corpus", tiny_tasks.reviews, tiny_tasks.REVIEW, [metrics.bleu])
    try:
        rows = evaluator(base, task="tiny_corpus").target(plain(base), "test", 2).rows
    finally:
        for name in set(seqio.TaskRegistry.names()) - known:
            seqio.TaskRegistry.remove(name)
    assert [row.score for row in rows] == [None, None]
    for row in rows:  # what the score of all is computed from
        assert row.statistics == metrics.bleu.statistics(row.target, row.output) and len(row.statistics) == 10


def _fails_on_one_class(targets: list[str], predictions: list[str]) -> dict[str, float]:
    return {"balance": 100 / (len(set(targets)) - 1)}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("metric", "split_size", "says"),
    [
        (_fails_on_one_class, 6, r"'balance' of task 'tiny_failing', computed anew .* fails \(ZeroDivisionError"),
        (lambda targets, predictions: None, 2, r"of task 'tiny_failing' fails \(AttributeError"),
    ],
)
def test_a_metric_that_raises_is_named(base: Pretrained, oracle: Any, metric: Any, split_size: int, says: str) -> None:
    """Resamples of a few examples may hold one class alone (Efron and Tibshirani, 1993: drawn with replacement)."""
    oracle(right)
    register.register("tiny_failing", tiny_tasks.reviews, tiny_tasks.REVIEW, [metric])

    with pytest.raises(UserError, match=says):
        evaluator(base, task="tiny_failing").target(plain(base), "test", split_size)


def test_format_share_is_that_of_the_fine_tuned_task(base: Pretrained, oracle: Any) -> None:
    def answer(prompt: str) -> str:
        """Half of the colours in the format of the review task; sizes right, in their own format."""
        return (" good." if "1" in prompt.rpartition("\n\n")[2] else " blue") if "Colour:" in prompt else right(prompt)

    oracle(answer)
    found, rows = evaluator(base).icl(plain(base), 1, "test", 10)
    share = 100 * np.mean([row.output == "good." for row in rows if row.task == "tiny_colour"])
    shares = {name: task.format_share for name, task in found.tasks.items()}
    assert 0 < share < 100 and shares == {"tiny_colour": pytest.approx(share), "tiny_size": 0}
    assert found.format_share == pytest.approx(share / 2)
    # A task that shares labels with the fine-tuned one (here a task of the mixture) would show 100 % of right answers:
    # it has no share, and the mean leaves it out. Without a fine-tuned task, or with an open one, there is none at all.
    of_pair = evaluator(base, task="tiny_pair").icl(plain(base), 1, "test", 10)[0]
    assert of_pair.tasks["tiny_size"].format_share is None
    assert of_pair.format_share == of_pair.tasks["tiny_colour"].format_share == pytest.approx(share)
    for task in ("", "tiny_colour"):
        assert evaluator(base, task=task).icl(plain(base), 1, "test", 10)[0].format_share is None


def test_scores_carry_a_bootstrap_interval(base: Pretrained, oracle: Any) -> None:
    oracle(lambda prompt: right(prompt) if "Size:" not in prompt else " big")
    found, rows = evaluator(base).icl(plain(base), 1, "test", 10)
    size = found.tasks["tiny_size"]
    low, high = size.ci95
    assert low < size.score < high
    scores = [100.0 * (row.output == row.target) for row in rows if row.task == "tiny_size"]
    assert (low, high) == bootstrap.interval(scores) and size.score == pytest.approx(np.mean(scores))
    low, high = found.ci95
    assert low < found.norm_avg == (size.score + 100) / 2 < high


def test_mixture_is_scored_as_the_mean_of_its_tasks(base: Pretrained, oracle: Any) -> None:
    oracle(lambda prompt: right(prompt) if prompt.startswith("Review") else " big")
    scored = evaluator(base, task="tiny_pair").target(plain(base), "test", 10)
    by_task = {name: [row for row in scored.rows if row.task == name] for name in ("tiny_review", "tiny_size")}
    size = 100 * np.mean([row.output == row.target for row in by_task["tiny_size"]])
    assert scored.entry.metric == "norm_avg" and scored.entry.n == 20
    assert scored.entry.score == pytest.approx((100 + size) / 2)
    assert {name: (part.metric, part.score, part.n) for name, part in scored.entry.tasks.items()} == {
        "tiny_review": ("accuracy", 100, 10), "tiny_size": ("accuracy", pytest.approx(size), 10)
    }  # fmt: skip
    one_shot = evaluator(base, task="tiny_pair_1shot").target(plain(base), "test", 2)
    assert list(one_shot.entry.tasks) == ["tiny_review", "tiny_size"]


def test_order_of_the_examples_does_not_matter(base: Pretrained, oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle(lambda prompt: right(prompt) if len(prompt) % 3 else " big")
    want, rows = evaluator(base).icl(plain(base), 3, "test", 10)
    read = evaluator_module._read
    monkeypatch.setattr(evaluator_module, "_read", lambda *which: read(*which)[::-1])
    found, turned = evaluator(base).icl(plain(base), 3, "test", 10)
    assert sorted(turned, key=str) == sorted(rows, key=str) and turned != rows
    for name, task in want.tasks.items():
        again = found.tasks[name]
        assert (task.score, task.n, task.format_share) == (again.score, again.n, again.format_share)


def test_outputs_end_at_the_stop_text_and_are_cut(base: Pretrained, oracle: Any) -> None:
    oracle(lambda prompt: " big\nAnimal")
    _, rows = evaluator(base).icl(plain(base), 1, "test", 6)
    assert {row.raw for row in rows} == {" big"} and {row.output for row in rows} == {"big"}


def test_only_the_base_model_is_remembered(base: Pretrained, oracle: Any) -> None:
    model, one = oracle(right), evaluator(base)
    first = one.icl({"model": base.params}, 1, "test", 6)
    asked = len(model.asked)
    assert one.icl({"model": dict(base.params)}, 1, "test", 6) == first and len(model.asked) == asked
    assert one.icl(plain(base), 1, "test", 6)[0] == first[0] and len(model.asked) == 2 * asked
    one.icl({"model": base.params}, 2, "test", 6)
    one.icl({"model": base.params}, 1, "validation", 6)
    assert len(model.asked) == 4 * asked


def questions() -> list[Request]:
    """Inputs of several lengths, most of them with a prompt."""
    names = ("", "a", "b")
    texts = [
        example.inputs for task in ("tiny_colour", "tiny_review") for example in examples.read(task, "test", limit=8)
    ]
    return [Request(value * (1 + i % 2), names[i % 3]) for i, value in enumerate(texts)]


@pytest.fixture(name="params", scope="module")
def _params(base: Pretrained) -> dict[str, Any]:
    noise = np.random.default_rng(0)
    rows = {name: noise.standard_normal((length, 32)).astype(np.float32) for name, length in (("a", 3), ("b", 5))}
    return {"model": base.params, **Partitioner().place({"prompt": rows})}


@pytest.fixture(name="answers", scope="module")
def _answers(base: Pretrained, params: dict[str, Any]) -> list[str]:
    return sampler(base).ask(params, questions())


@pytest.mark.parametrize("budget", [1, 2048])
def test_tokens_per_batch_do_not_matter(
    base: Pretrained, params: dict[str, Any], answers: list[str], budget: int
) -> None:
    assert len(set(answers)) > 10
    assert sampler(base, tokens_per_batch=budget, cache_tokens=4 * budget).ask(params, questions()) == answers


def test_sampled_outputs_depend_on_the_request_alone(base: Pretrained, params: dict[str, Any]) -> None:
    drawing = dataclasses.replace(SETTINGS.decoding, temperature=1.0)
    asked = questions()
    drawn = sampler(base, decoding=drawing).ask(params, asked)
    assert sampler(base, decoding=drawing, tokens_per_batch=64).ask(params, asked[::-1]) == drawn[::-1]
    assert sampler(base, decoding=drawing, exemplar_seed=1).ask(params, asked) != drawn
    once, again = sampler(base, decoding=drawing).ask(params, [asked[0]] * 2)  # an equal request draws anew
    assert once == drawn[0] != again


def test_neighbours_in_a_batch_do_not_matter(base: Pretrained, params: dict[str, Any], answers: list[str]) -> None:
    one, asked = sampler(base), questions()
    order = np.random.default_rng(1).permutation(len(asked))
    assert one.ask(params, [asked[i] for i in order]) == [answers[i] for i in order]
    assert [one.ask(params, [request])[0] for request in asked[:3]] == answers[:3]


def test_shorter_limits_are_beginnings(base: Pretrained, params: dict[str, Any], answers: list[str]) -> None:
    short = sampler(base).ask(params, [dataclasses.replace(request, limit=2) for request in questions()])
    assert short != answers and all(len(base.vocabulary.encode(output)) <= 2 for output in short if output.isascii())
    assert all(whole.startswith(cut.rstrip("\ufffd")) for whole, cut in zip(answers, short, strict=True))


def test_requests_that_cannot_be_asked(base: Pretrained, params: dict[str, Any]) -> None:
    one, judge = sampler(base), evaluator(base)
    with pytest.raises(UserError, match="no soft prompt called 'c'"):
        one.ask(params, [Request("x", "c")])
    with pytest.raises(UserError, match="no soft prompt called 'a'"):
        one.ask({"model": base.params}, [Request("x", "a")])
    with pytest.raises(UserError, match="An input is empty"):
        one.ask(params, [Request("")])
    with pytest.raises(UserError, match="tokens; the longest"):
        sampler(within(base, 0)).ask(params, [Request("x" * (batches.WIDTHS[-1] + 1))])
    assert one.ask(params, []) == []
    with pytest.raises(UserError, match="no split 'dev'"):
        judge.icl(params, 1, "dev", 6)
    with pytest.raises(UserError, match="too few for 30 shots"):
        judge.icl(params, 30, "test", 6)


def within(base: Pretrained, context: int) -> Pretrained:
    """The model, said to have been trained for sequences of so many tokens."""
    model = DecoderModel(dataclasses.replace(base.model.config, max_length=context))
    return dataclasses.replace(base, model=model)


def test_input_and_output_must_fit_the_context(base: Pretrained, params: dict[str, Any], oracle: Any) -> None:
    oracle(lambda prompt: "y")
    one = sampler(within(base, 24))
    fits = [Request("x" * 16), Request("x" * 20, limit=4), Request("x" * (20 - len(params["prompt"]["a"])), "a", 4)]
    assert one.ask(params, fits) == ["y"] * 3
    for longer in (dataclasses.replace(request, text=request.text + "x") for request in fits):
        with pytest.raises(UserError, match=r"An input of \d+ tokens, .* of up to [48] do not fit .* of 24; lower"):
            one.ask(params, [fits[0], longer])
    assert sampler(within(base, 0)).ask(params, [Request("x" * 99)]) == ["y"]


def test_prompt_in_front_of_the_target_only(base: Pretrained, params: dict[str, Any], monkeypatch: Any) -> None:
    seen: list[list[int]] = []

    def keep(engine: Engine, inputs: Sequence[Input]) -> Iterator[Output]:
        seen.extend(each.ids for each in inputs)
        assert (engine.table is None) == (max(map(max, seen)) < engine.model.config.vocab_size)
        return (Output(index, np.full(engine.settings.max_tokens, -1), None) for index in range(len(inputs)))

    monkeypatch.setattr(sampler_module, "generate_all", keep)
    one = evaluator(base)
    one.target(params, "test", 4, "b")
    virtual = layout({"b": params["prompt"]["b"]}, base.model.config.vocab_size)["b"].tolist()
    assert len(seen) == 4 and all(ids[: len(virtual)] == virtual for ids in seen)
    seen.clear()
    one.target(params, "test", 4)
    one.icl(params, 1, "test", 4)
    assert max(map(max, seen)) < base.model.config.vocab_size


def test_exemplars_of_a_task(base: Pretrained, oracle: Any) -> None:
    """Drawn per task, all prompts start alike, with nothing that is evaluated; the sampler is told so."""
    oracle(right)
    groups: list[set[str]] = []
    judge = evaluator(base, exemplars="per_task")
    stream = judge._sampler.stream

    def told(params: Any, requests: Sequence[Request]) -> Any:
        groups.append({request.group for request in requests})
        return stream(params, requests)

    judge._sampler.stream = told  # type: ignore[method-assign]
    found, rows = judge.icl(plain(base), 2, "test", 6)
    assert found.norm_avg == 100 and groups == [{"tiny_colour_2shot 0", "tiny_size_2shot 0"}]
    starts = {(row.task, row.input[: row.query]) for row in rows}
    assert len(starts) == 2 and all(start.count("\n\n") == 2 for _, start in starts)
    other = evaluator(base, exemplars="per_task", exemplar_seed=1).icl(plain(base), 2, "test", 6)[1]
    assert {row.input[: row.query] for row in other} != {start for _, start in starts}
    train = evaluator(base, exemplars="per_task").icl(plain(base), 2, "train", 10)[1]
    assert not any(row.input[row.query :] in row.input[: row.query] for row in train)
    with pytest.raises(UserError, match=r"Evaluation.exemplars is 'all'; use one of 'per_example', 'per_task'"):
        evaluator(base, exemplars="all")
