import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import tiny_tasks
from hypothesis import given
from hypothesis import strategies as st

from promot_jax.data import examples as text
from promot_jax.data.encoding import joined
from promot_jax.data.examples import Example
from promot_jax.data.exemplars import WithExemplars, choose, compose, distinct, draw
from promot_jax.errors import UserError


def example(name: str, inputs: str | None = None, targets: str = "yes") -> Example:
    return Example("task", name, inputs or f"Q: {name}\nA:", targets, (), "Q:", 4)


def words(text: str) -> int:
    return len(text.split())


POOL = [example(f"train-{i}") for i in range(30)]
QUERY = example("test-1")


def test_exemplars_do_not_depend_on_the_order_of_the_pool() -> None:
    shuffled = random.Random(1).sample(POOL, len(POOL))

    assert choose("task", 0, "test-1", shuffled, 4) == choose("task", 0, "test-1", POOL, 4)


@pytest.mark.parametrize("other", [("other", 0, "test-1"), ("task", 1, "test-1"), ("task", 0, "test-2")])
def test_exemplars_depend_on_task_seed_and_example(other: tuple[str, int, str]) -> None:
    assert choose(*other, POOL, 4) != choose("task", 0, "test-1", POOL, 4)


def test_every_pool_member_is_drawn_about_equally_often() -> None:
    drawn = [e.id for i in range(600) for e in choose("task", 0, f"test-{i}", POOL, 2)]

    assert all(20 <= drawn.count(e.id) <= 65 for e in POOL)  # 40 on average, 6 standard deviation


def test_exemplars_are_known_for_good() -> None:
    chosen = choose("task", 0, "test-1", POOL, 4)

    assert [e.id for e in chosen] == ["train-25", "train-15", "train-3", "train-17"]


def test_too_small_a_pool() -> None:
    with pytest.raises(UserError, match="task 'task' has 2 training examples to draw from, too few for 4 shots"):
        choose("task", 0, "train-0", POOL[:3], 4)


def test_no_exemplar_asks_the_same_question() -> None:
    twin = example("train-99", inputs=POOL[25].inputs)
    chosen = choose("task", 0, "test-1", [*POOL, twin], 4, POOL[25].inputs)

    # Without train-25 and its twin, the others stay, and the next in rank comes in front.
    assert [e.id for e in chosen[1:]] == ["train-15", "train-3", "train-17"]
    assert POOL[25].inputs not in {e.inputs for e in chosen}
    assert choose("task", 0, "test-1", POOL, 4, "Q: another\nA:") == choose("task", 0, "test-1", POOL, 4)
    with pytest.raises(UserError, match="has 2 training examples to draw from, too few for 3 shots"):
        choose("task", 0, "test-1", POOL[:3], 3, POOL[0].inputs)


def test_no_shots_need_no_pool() -> None:
    assert choose("task", 0, "test-1", [], 0) == []


def test_prompts_to_the_letter() -> None:
    shots = [example("a", targets="1"), example("b", targets="2")]

    assert compose(QUERY, shots, words, 100) == ("Q: a\nA: 1\n\nQ: b\nA: 2\n\nQ: test-1\nA:", 0)
    assert compose(QUERY, shots, words, 10) == ("Q: b\nA: 2\n\nQ: test-1\nA:", 1)
    assert compose(QUERY, shots, words, 3) == ("Q: test-1\nA:", 2)
    assert compose(QUERY, [], words, 3) == ("Q: test-1\nA:", 0)


def test_a_query_that_does_not_fit() -> None:
    message = "example 'test-1' of task 'task' is 3 tokens long without any exemplar, over the limit of 2"
    with pytest.raises(UserError, match=message):
        compose(QUERY, POOL[:1], words, 2)


IDS = st.integers(0, 12).map(str)
POOLS = st.lists(st.tuples(IDS, st.integers(0, 8)), max_size=14, unique_by=lambda pair: pair[0]).map(
    lambda pairs: [example(name, f"Q: {content}\nA:") for name, content in pairs]
)


@given(POOLS, st.integers(0, 3), IDS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_choose(pool: list[Example], seed: int, own: str, k: int, order: random.Random) -> None:
    available = {e.inputs for e in pool if e.id != own}
    if k > len(available):
        with pytest.raises(UserError):
            choose("task", seed, own, pool, k)
        return
    chosen = choose("task", seed, own, pool, k)

    assert len({e.inputs for e in chosen}) == len(chosen) == k
    assert own not in {e.id for e in chosen}
    assert set(chosen) <= set(pool)
    assert choose("task", seed, own, order.sample(pool, len(pool)), k) == chosen
    if k:
        assert choose("task", seed, own, pool, k - 1) == chosen[1:]


@given(st.lists(st.text("ab \n", max_size=8), max_size=5), st.text("ab ", min_size=1, max_size=8), st.integers(0, 60))
def test_compose(shots: list[str], query: str, room: int) -> None:
    exemplars = [example(str(i), shot or "-") for i, shot in enumerate(shots)]
    asked = example("query", query)
    if len(query) > room:
        with pytest.raises(UserError):
            compose(asked, exemplars, len, room)
        return
    prompt, dropped = compose(asked, exemplars, len, room)

    kept = [joined(e.inputs, e.targets) for e in exemplars[dropped:]]
    assert prompt == "\n\n".join([*kept, query])
    assert len(prompt) <= room
    if dropped:
        before = exemplars[dropped - 1]
        assert len(prompt) + len(joined(before.inputs, before.targets)) + 2 > room


ARTICLE = Example("task", "a", "Article: one two three four\nSummary:", "short", (), "", 1, suffix="\nSummary:")


@pytest.mark.parametrize(
    ("room", "prompt"),
    [
        (10, "Article: x\nSummary: y\n\nArticle: one two three four\nSummary:"),
        (6, "Article: one two three four\nSummary:"),
        (5, "Article: one two three\nSummary:"),
        (2, "Article:\nSummary:"),
    ],
)
def test_a_query_that_may_be_shortened_loses_its_end_but_not_its_suffix(room: int, prompt: str) -> None:
    exemplar = Example("task", "b", "Article: x\nSummary:", "y", (), "", 1, suffix="\nSummary:")

    assert compose(ARTICLE, [exemplar], words, room) == (prompt, room < 10)


def test_a_query_without_room_for_its_suffix() -> None:
    with pytest.raises(UserError, match="over the limit of 1"):
        compose(ARTICLE, [], words, 1)


@given(POOLS, st.integers(0, 3), IDS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_draw(pool: list[Example], seed: int, own: str, k: int, order: random.Random) -> None:
    query = example(own, "Q: 3\nA:")
    candidates = distinct(pool)
    available = {e.inputs for e in candidates if e.id != own and e.inputs != query.inputs}
    if k > len(available):
        with pytest.raises(UserError, match="too few training examples"):
            draw("task", seed, query, candidates, k)
        return
    drawn = draw("task", seed, query, candidates, k)

    assert len({e.inputs for e in drawn}) == len(drawn) == k
    assert own not in {e.id for e in drawn} and query.inputs not in {e.inputs for e in drawn}
    shuffled = distinct(order.sample(pool, len(pool)))
    assert shuffled == candidates and draw("task", seed, query, shuffled, k) == drawn
    if k:
        assert draw("task", seed, query, candidates, k - 1) == drawn[1:]


def test_every_pool_member_is_drawn_about_as_often_by_place() -> None:
    pool = distinct(POOL)
    drawn = [e.id for i in range(600) for e in draw("task", 0, example(f"test-{i}"), pool, 2)]

    assert all(15 <= drawn.count(e.id) <= 75 for e in POOL)
    assert draw("task", 1, QUERY, pool, 4) != draw("task", 0, QUERY, pool, 4)


def composed(name: str, seed: int, room: int, count: Callable[[str], int] = len) -> WithExemplars:
    return WithExemplars(text.stream(name, "train", seed=0), seed, count, room)


def take(stream: Iterator[Example], n: int = 72) -> list[Example]:
    return list(itertools.islice(stream, n))


def test_a_training_stream_with_one_exemplar() -> None:
    plain = {e.id: e for e in text.read("tiny_review", "train")}
    stream = composed("tiny_review_1shot", 0, 1000)
    examples = take(stream)

    prompts = {(e.id, e.inputs) for e in examples}
    assert len(prompts) == len({name for name, _ in prompts})  # the same one whenever an example comes by
    assert len(prompts) > tiny_tasks.SIZES["train"] // 2
    for name, prompt in prompts:
        exemplar, query = prompt.split("\n\n")
        assert query == plain[name].inputs
        assert exemplar in {f"{e.inputs} {e.targets}" for e in plain.values() if e.id != name}
    assert [e.targets for e in examples] == [plain[e.id].targets for e in examples]
    assert stream.dropped == 0
    assert take(composed("tiny_review_1shot", 0, 1000)) == examples
    assert take(composed("tiny_review_1shot", 1, 1000)) != examples


def test_what_asks_for_no_exemplar_passes() -> None:
    assert take(composed("tiny_review", 0, 1000)) == take(text.stream("tiny_review", "train", seed=0))


def test_exemplars_without_room_are_dropped_and_counted() -> None:
    plain = {e.id: e.inputs for e in text.read("tiny_review", "train")}
    room = 2 * max(map(len, plain.values())) + 5  # two of the longest do not fit
    stream = composed("tiny_review_1shot", 0, room)
    examples = take(stream)

    alone = [e for e in examples if e.inputs == plain[e.id]]
    assert 0 < stream.dropped == len(alone) < len(examples)
    assert max(len(e.inputs) for e in examples) <= room


def test_what_does_not_fit_alone_is_left_to_the_batches() -> None:
    stream = composed("tiny_review_1shot", 0, 3)

    assert take(stream) == take(text.stream("tiny_review_1shot", "train", seed=0))
    assert stream.dropped == 0


def test_a_mixture_draws_each_tasks_own_exemplars() -> None:
    for e in take(composed("tiny_pair_1shot", 0, 1000)):
        captions = [part.split(":")[0] for part in e.inputs.split("\n\n")]
        assert captions == [{"tiny_review_1shot": "Review", "tiny_size_1shot": "Animal"}[e.task]] * 2
