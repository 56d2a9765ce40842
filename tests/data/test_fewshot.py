import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promot_jax.data import fewshot
from promot_jax.data.text import Example
from promot_jax.errors import UserError


def example(name: str, inputs: str | None = None, targets: str = "yes") -> Example:
    return Example("task", name, inputs or f"Q: {name}\nA:", targets, (), "Q:", 4)


def words(text: str) -> int:
    return len(text.split())


POOL = [example(f"train-{i}") for i in range(30)]
QUERY = example("test-1")


def test_exemplars_do_not_depend_on_the_order_of_the_pool() -> None:
    shuffled = random.Random(1).sample(POOL, len(POOL))

    assert fewshot.choose("task", 0, "test-1", shuffled, 4) == fewshot.choose("task", 0, "test-1", POOL, 4)


@pytest.mark.parametrize("other", [("other", 0, "test-1"), ("task", 1, "test-1"), ("task", 0, "test-2")])
def test_exemplars_depend_on_task_seed_and_example(other: tuple[str, int, str]) -> None:
    assert fewshot.choose(*other, POOL, 4) != fewshot.choose("task", 0, "test-1", POOL, 4)


def test_every_pool_member_is_drawn_about_equally_often() -> None:
    drawn = [e.id for i in range(600) for e in fewshot.choose("task", 0, f"test-{i}", POOL, 2)]

    assert all(20 <= drawn.count(e.id) <= 65 for e in POOL)  # 40 on average, 6 standard deviation


def test_exemplars_are_known_for_good() -> None:
    chosen = fewshot.choose("task", 0, "test-1", POOL, 4)

    assert [e.id for e in chosen] == ["train-25", "train-15", "train-3", "train-17"]


def test_too_small_a_pool() -> None:
    with pytest.raises(UserError, match="task 'task' has 2 training examples to draw from, too few for 4 shots"):
        fewshot.choose("task", 0, "train-0", POOL[:3], 4)


def test_no_shots_need_no_pool() -> None:
    assert fewshot.choose("task", 0, "test-1", [], 0) == []


def test_prompts_to_the_letter() -> None:
    shots = [example("a", targets="1"), example("b", targets="2")]

    assert fewshot.compose(QUERY, shots, words, 100) == ("Q: a\nA: 1\n\nQ: b\nA: 2\n\nQ: test-1\nA:", 0)
    assert fewshot.compose(QUERY, shots, words, 10) == ("Q: b\nA: 2\n\nQ: test-1\nA:", 1)
    assert fewshot.compose(QUERY, shots, words, 3) == ("Q: test-1\nA:", 2)
    assert fewshot.compose(QUERY, [], words, 3) == ("Q: test-1\nA:", 0)


def test_a_query_that_does_not_fit() -> None:
    message = "example 'test-1' of task 'task' is 3 tokens long without any exemplar, over the limit of 2"
    with pytest.raises(UserError, match=message):
        fewshot.compose(QUERY, POOL[:1], words, 2)


IDS = st.integers(0, 12).map(str)
POOLS = st.lists(st.tuples(IDS, st.integers(0, 8)), max_size=14, unique_by=lambda pair: pair[0]).map(
    lambda pairs: [example(name, f"Q: {content}\nA:") for name, content in pairs]
)


@given(POOLS, st.integers(0, 3), IDS, st.integers(0, 5), st.randoms(use_true_random=False))
def test_choose(pool: list[Example], seed: int, own: str, k: int, order: random.Random) -> None:
    available = {e.inputs for e in pool if e.id != own}
    if k > len(available):
        with pytest.raises(UserError):
            fewshot.choose("task", seed, own, pool, k)
        return
    chosen = fewshot.choose("task", seed, own, pool, k)

    assert len({e.inputs for e in chosen}) == len(chosen) == k
    assert own not in {e.id for e in chosen}
    assert set(chosen) <= set(pool)
    assert fewshot.choose("task", seed, own, order.sample(pool, len(pool)), k) == chosen
    if k:
        assert fewshot.choose("task", seed, own, pool, k - 1) == chosen[1:]


@given(st.lists(st.text("ab \n", max_size=8), max_size=5), st.text("ab ", min_size=1, max_size=8), st.integers(0, 60))
def test_compose(shots: list[str], query: str, room: int) -> None:
    exemplars = [example(str(i), shot or "-") for i, shot in enumerate(shots)]
    asked = example("query", query)
    if len(query) > room:
        with pytest.raises(UserError):
            fewshot.compose(asked, exemplars, len, room)
        return
    prompt, dropped = fewshot.compose(asked, exemplars, len, room)

    kept = [f"{e.inputs} {e.targets}" for e in exemplars[dropped:]]
    assert prompt == "\n\n".join([*kept, query])
    assert len(prompt) <= room
    if dropped:
        before = exemplars[dropped - 1]
        assert len(prompt) + len(f"{before.inputs} {before.targets}") + 2 > room
