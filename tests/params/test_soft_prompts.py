"""Soft prompts: virtual ids, initialisers, files, and stripping."""

import contextlib
import functools
import json
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forward import target_logits
from hypothesis import given
from hypothesis import strategies as st

from promot_jax.errors import UserError
from promot_jax.models import DecoderConfig, build
from promot_jax.models.batch_layout import Tokens, decoder_rows
from promot_jax.models.layers import Embed
from promot_jax.params import soft_prompts
from promot_jax.params.soft_prompts import PromptInfo, PromptInit

VOCAB, EMBED = 50, 8
# Every row says which token it is: [i, i / 100, ...].
EMBEDDING = jnp.arange(VOCAB, dtype=jnp.float32)[:, None] * jnp.array([1.0, *[0.01] * (EMBED - 1)])
KEY = jax.random.key(3)
INFO = PromptInfo(task="sentiment", length=5, step=40, score=91.5, initialiser="uniform", base="0123456789abcdef")
ACCEPTED = ("another", INFO.base)


def encode(text):
    """One token per letter; "a" is token 1."""
    return [ord(letter) - ord("a") + 1 for letter in text]


def rows(init, length, key=KEY, **kwargs):
    array = init.rows(key, length, EMBEDDING.shape, EMBEDDING.__getitem__, encode, **kwargs)
    assert array.shape == (length, EMBED) and array.dtype == jnp.float32
    return np.asarray(array)


def tokens_of(array):
    return array[:, 0].astype(int).tolist()


# ---- virtual ids -----------------------------------------------------------------------------------------------------


def test_virtual_ids_point_at_the_rows_of_their_task():
    noise = np.random.default_rng(0)
    prompt = {task: jnp.asarray(noise.normal(size=(n, EMBED))) for task, n in {"b": 2, "c": 4, "a": 3}.items()}
    ids, table = soft_prompts.layout(prompt, VOCAB), soft_prompts.table(prompt)

    assert {task: [rows_of_task[0], rows_of_task[-1]] for task, rows_of_task in ids.items()} == {
        "a": [50, 52],
        "b": [53, 54],
        "c": [55, 58],
    }
    assert all(rows_of_task.dtype == np.int32 for rows_of_task in ids.values())
    for task, rows_of_task in ids.items():
        assert np.array_equal(table[rows_of_task - VOCAB], prompt[task])


def test_no_prompt_has_no_ids_and_no_table():
    assert soft_prompts.layout(None, VOCAB) == soft_prompts.layout({}, VOCAB) == {}
    assert soft_prompts.table(None) is None and soft_prompts.table({}) is None


def test_embedding_reads_real_and_virtual_ids():
    prompt = -jnp.arange(1, 4, dtype=jnp.float32)[:, None] * jnp.ones(EMBED)
    embed = partial(Embed(VOCAB, EMBED).apply, {"params": {"embedding": EMBEDDING}})
    ids = jnp.array([[VOCAB, VOCAB + 2, 0, VOCAB - 1, VOCAB + 1]])

    assert embed(ids, prompt, jnp.float32)[0, :, 0].tolist() == [-1, -3, 0, VOCAB - 1, -2]
    plain = jnp.arange(VOCAB)[None]
    assert np.array_equal(embed(plain, prompt, jnp.float32), embed(plain, None, jnp.float32))


# ---- initialisers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "low", "high"), [("uniform", -0.3, 0.3), ("uniform_positive", 0.0, 0.3)])
def test_uniform_ranges(method, low, high):
    array = rows(PromptInit(method, scale=0.3), 500)

    assert low <= array.min() < low + 0.01 and high - 0.01 < array.max() <= high
    assert abs(array.mean() - (low + high) / 2) < 0.01  # 4000 draws, 6 standard errors or so


def test_the_default_is_the_papers():
    array = rows(PromptInit(), 500)

    assert -0.5 <= array.min() < -0.49 and 0.49 < array.max() <= 0.5


def test_vocabulary_draws_rows_without_replacement():
    everything = rows(PromptInit("vocabulary"), VOCAB)
    some = tokens_of(rows(PromptInit("vocabulary"), 20))

    assert sorted(tokens_of(everything)) == list(range(VOCAB)) != tokens_of(everything)
    assert np.array_equal(everything, EMBEDDING[np.array(tokens_of(everything))])
    assert len(set(some)) == 20 and max(some) >= 20


def test_vocabulary_may_draw_from_the_first_rows_only():
    drawn = tokens_of(rows(PromptInit("vocabulary", first=12), 12))

    assert sorted(drawn) == list(range(12)) != drawn


@pytest.mark.parametrize(("first", "length"), [(5, 6), (0, VOCAB + 1), (VOCAB + 1, 3)])
def test_too_few_rows_to_draw_from(first, length):
    with pytest.raises(UserError, match=f"Cannot draw {length} prompt rows from the first {first or VOCAB} of 50"):
        rows(PromptInit("vocabulary", first=first), length)


def test_labels_start_as_the_means_of_their_pieces():
    drawn = tokens_of(rows(PromptInit("vocabulary", first=30), 6))
    array = rows(PromptInit("labels", first=30), 6, labels=["b", "ad", "xyz"])

    np.testing.assert_allclose(array[0], EMBEDDING[2])
    np.testing.assert_allclose(array[1], EMBEDDING[jnp.array([1, 4])].mean(axis=0))
    np.testing.assert_allclose(array[2], EMBEDDING[jnp.array([24, 25, 26])].mean(axis=0))
    assert tokens_of(array[3:]) == drawn[3:]


def test_labels_beyond_the_prompt_are_left_out():
    assert tokens_of(rows(PromptInit("labels"), 2, labels=["c", "b", "a"])) == [3, 2]
    with pytest.raises(UserError, match="'labels' needs a task with a label set"):
        rows(PromptInit("labels"), 2)


def test_text_is_repeated_or_cut_to_length():
    init = PromptInit("text", text="cab")

    assert tokens_of(rows(init, 2)) == [3, 1]
    assert tokens_of(rows(init, 3)) == [3, 1, 2]
    assert tokens_of(rows(init, 8)) == [3, 1, 2, 3, 1, 2, 3, 1]
    with pytest.raises(UserError, match=r"empty text; set PromptInit\.text"):
        rows(PromptInit("text"), 2)


def test_file_takes_a_saved_prompt_or_a_bare_array(tmp_path):
    array = np.random.default_rng(0).normal(size=(5, EMBED)).astype(np.float32)
    soft_prompts.save(tmp_path / "run" / "prompt", array, INFO)
    np.save(tmp_path / "bare.npy", array.astype(np.float64))

    for path in ("run", "run/prompt", "run/prompt/prompt.npy", "bare.npy"):
        assert np.array_equal(rows(PromptInit("file", path=str(tmp_path / path)), 5), array)
    with pytest.raises(UserError, match=r"has shape \(5, 8\); PROMPT_LENGTH and the model ask for \(4, 8\)"):
        rows(PromptInit("file", path=str(tmp_path / "bare.npy")), 4)


@pytest.mark.parametrize("method", ["uniform", "uniform_positive", "vocabulary", "labels"])
def test_the_key_alone_decides(method):
    init = PromptInit(method)
    first, again, other = (rows(init, 4, key=jax.random.key(seed), labels=["a"]) for seed in (0, 0, 1))

    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_wrong_initialisers():
    with pytest.raises(UserError, match="did you mean 'vocabulary'"):
        PromptInit("vocabluary")
    for setting in ({"scale": 0.0}, {"first": -1}):
        with pytest.raises(UserError, match="scale is positive and first is not negative"):
            PromptInit(**setting)
    with pytest.raises(UserError, match="PROMPT_LENGTH is 0"):
        rows(PromptInit(), 0)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(name="saved")
def _saved(tmp_path):
    """A prompt in the working folder of a run, and its array."""
    array = np.random.default_rng(0).normal(size=(5, EMBED)).astype(np.float32)
    path = soft_prompts.save(tmp_path / "prompt", jnp.asarray(array), INFO)
    assert sorted(file.name for file in path.parent.iterdir()) == ["prompt.json", "prompt.npy"]
    return path, array


def test_a_saved_prompt_comes_back_as_it_was(saved):
    path, array = saved

    run = path.parents[1]
    (run / "whole").mkdir()
    (run / "whole" / "stage1").symlink_to(run)  # where the whole method leaves it
    for given_path in (path, path.parent, run, run / "whole", str(path)):
        loaded, info = soft_prompts.load(given_path, ACCEPTED)
        assert loaded.dtype == np.float32 and np.array_equal(loaded, array) and info == INFO


def test_saving_again_replaces(saved):
    path, array = saved
    other = PromptInfo(task="nli", length=2, step=1, score=None, initialiser="text", base="b")
    soft_prompts.save(path.parent, array[:2], other)

    loaded, info = soft_prompts.load(path, ("a", "b"))
    assert np.array_equal(loaded, array[:2]) and info == other


def test_a_prompt_of_another_base_model_is_refused_unless_forced(saved):
    path, array = saved

    with pytest.raises(UserError, match=r"trained on another base model.*Experiment\.force_prompt"):
        soft_prompts.load(path, ("f" * 64, INFO.base[:4]))
    loaded, info = soft_prompts.load(path, ("f" * 64, INFO.base[:4]), force=True)
    assert np.array_equal(loaded, array) and info.base == INFO.base


def test_a_prompt_needs_its_description(saved):
    path, _ = saved
    description = path.with_suffix(".json")
    for text in ("{", "[1]", "{}", json.dumps({"task": "sentiment"}), json.dumps({**vars(INFO), "extra": 1})):
        description.write_text(text)
        with pytest.raises(UserError, match="is not the description of a prompt"):
            soft_prompts.load(path, ACCEPTED)
    description.write_text(json.dumps({**vars(INFO), "length": 6}))
    with pytest.raises(UserError, match=r"says 6 rows, but .* holds 5"):
        soft_prompts.load(path, ACCEPTED)
    description.unlink()
    with pytest.raises(UserError, match=r"lacks its description prompt\.json; copy both"):
        soft_prompts.load(path, ACCEPTED, force=True)


def test_changed_values_are_refused(saved):
    """Reference: SHA-256, by which any other bit is another prompt; rows times 100 keep every shape."""
    path, array = saved
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for change in (lambda: path.write_bytes(flipped), lambda: np.save(path, array * 100)):
        change()
        with pytest.raises(UserError, match=r"holds other values than .*prompt\.json describes"):
            soft_prompts.load(path, ACCEPTED, force=True)
        with pytest.raises(UserError, match="holds other values"):
            rows(PromptInit("file", path=str(path)), 5)
    path.write_bytes(whole)
    assert np.array_equal(soft_prompts.load(path, ACCEPTED)[0], array)


def test_a_description_of_before_has_no_fingerprint(saved):
    path, array = saved
    described = json.loads(path.with_suffix(".json").read_text())
    assert len(described.pop("values")) == 64
    path.with_suffix(".json").write_text(json.dumps(described))
    np.save(path, array + 1)
    assert np.array_equal(soft_prompts.load(path, ACCEPTED)[0], array + 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_numbers_that_are_not_finite_are_neither_saved_nor_read(saved, bad):
    """Reference: IEEE 754; 1e300 is finite as it is stored and is not in float32."""
    path, array = saved
    wide = array.astype(np.float64)
    wide[2, 3] = bad
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    with pytest.raises(UserError, match="not finite"), np.errstate(over="ignore"):
        soft_prompts.save(path.parent, wide, INFO)
    assert before == (path.read_bytes(), path.with_suffix(".json").read_bytes())
    np.save(path, wide)
    for read in (lambda: soft_prompts.load(path, ACCEPTED), lambda: rows(PromptInit("file", path=str(path)), 5)):
        with pytest.raises(UserError, match="not finite"):
            read()


def test_a_prompt_has_a_task(saved):
    path, array = saved
    with pytest.raises(UserError, match="has no task"):
        soft_prompts.save(path.parent, array, PromptInfo("", 5, 1, None, "uniform", "a"))
    wrongs = ({"task": ""}, {"task": 3}, {"base": None}, {"length": "5"}, {"values": 1})
    for text in (*(json.dumps(vars(INFO) | wrong) for wrong in wrongs), "[" * 100_000, '{"task": ' * 100_000):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(UserError, match="is not the description of a prompt"):
            soft_prompts.load(path, ACCEPTED, force=True)


def test_a_released_prompt_is_named_and_not_verified(tmp_path, capsys):
    """prompt-tuning (google-research/prompt-tuning) saves a bare array, in a file named after the variable."""
    array = np.random.default_rng(0).normal(size=(5, EMBED)).astype(np.float32)
    for name in ("prompt.npy", "encoder.prompt.prompt.prompt"):
        with (tmp_path / name).open("wb") as file:
            np.save(file, array)
        with pytest.raises(UserError, match=r"lacks its description prompt\.json; .*name it by PROMPT_TASK"):
            soft_prompts.load(tmp_path / name, ACCEPTED)
        loaded, info = soft_prompts.load(tmp_path / name, ACCEPTED, task="rte")
        assert np.array_equal(loaded, array) and (info.task, info.length) == ("rte", 5)
        assert "base model is not verified" in capsys.readouterr().out


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="PROMPT_PATH is empty"):
        soft_prompts.load("", ())
    with pytest.raises(UserError, match=r"No prompt at .*; give a prompt\.npy"):
        soft_prompts.load(tmp_path, ())


def test_a_truncated_array_is_refused(saved):
    path, _ = saved
    whole = path.read_bytes()
    for size in (0, 3, 8, 60, len(whole) - EMBED * 4, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is not a prompt array"):
            soft_prompts.load(path, ACCEPTED)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


def test_pickles_are_refused_and_never_loaded(saved, tmp_path):
    path, _ = saved
    mark = tmp_path / "unpickled"
    array = np.empty((5, EMBED), object)
    array[:] = [[Bomb(mark)] * EMBED] * 5
    np.save(path, array, allow_pickle=True)
    files = [path.read_bytes(), pickle.dumps(Bomb(mark))]
    np.load(path, allow_pickle=True)  # the file is armed
    assert mark.exists()
    mark.unlink()
    for file in files:
        path.write_bytes(file)
        with pytest.raises(UserError, match="is not a prompt array"):
            soft_prompts.load(path, ACCEPTED)
    assert not mark.exists()


@pytest.mark.parametrize(
    "array", [np.zeros(5), np.zeros((5, 8, 1)), np.zeros((5, 8), int), np.zeros((5, 8), "U3"), np.zeros((0, 8))]
)
def test_other_arrays_are_refused(saved, array):
    path, _ = saved
    np.save(path, array)
    with pytest.raises(UserError, match=r"does not hold a prompt of shape \[length, embed\]"):
        soft_prompts.load(path, ACCEPTED)


def test_archives_are_refused(saved):
    path, array = saved
    with path.open("wb") as file:
        np.savez(file, array)
    whole = path.read_bytes()
    for data in (whole, whole[:40]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="is not a prompt array"):
            soft_prompts.load(path, ACCEPTED)


@given(st.data())
def test_a_damaged_file_is_one_sentence_or_an_array(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    np.save(path, np.ones((2, 3), np.float32))
    damaged = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    with contextlib.suppress(UserError):
        assert soft_prompts._read_array(path).ndim == 2


# ---- strip -----------------------------------------------------------------------------------------------------------


def test_the_stripped_model_is_the_plain_model_bit_for_bit():
    model = build(DecoderConfig(VOCAB, 16, 2, 1, 2, 8, 24))
    noise = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, KEY)
    weights = jax.tree.map(lambda leaf: jnp.asarray(noise.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)
    prompt = {"task": jnp.asarray(noise.normal(size=(4, 16)), jnp.float32)}
    params = {"model": weights, "prompt": prompt}
    texts = [noise.integers(0, VOCAB, noise.integers(4, 12)).tolist() for _ in range(6)]
    batch = decoder_rows([[Tokens(text[:-2], text[-2:])] for text in texts], 16, 2)
    # The only thing stripping does: no request names a prompt, so no table is made.
    stripped = soft_prompts.table({name: params["prompt"][name] for name in ()})

    logits = functools.partial(target_logits, model)
    plain = logits(weights, None, batch)
    assert np.array_equal(logits(params["model"], stripped, batch), plain)
    # With the table at hand and no virtual id, every number is the same, too.
    assert np.array_equal(logits(weights, soft_prompts.table(prompt), batch), plain)
    # The prompt does change what it is attached to.
    attached = [[*soft_prompts.layout(prompt, VOCAB)["task"].tolist(), *text] for text in texts]
    batch = decoder_rows([[Tokens(text[:-2], text[-2:])] for text in attached], 16, 2)
    assert np.abs(logits(weights, soft_prompts.table(prompt), batch) - plain).max() > 0.01
