"""From examples to arrays: prompts in front, every example once and in order, nothing cut, positions right."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from promot_jax.data import batches, replay
from promot_jax.data.batches import WIDTHS, ShardedBatches, TrainBatches
from promot_jax.data.encoding import Encoder
from promot_jax.data.examples import Example
from promot_jax.data.replay import Replay
from promot_jax.errors import UserError
from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.models.batch_layout import Tokens, decoder_rows

VOCAB, EOS, BOS = 200, 0, 1
PROMPTS = {"a": np.arange(VOCAB, VOCAB + 3, dtype=np.int32), "b": np.arange(VOCAB + 3, VOCAB + 5, dtype=np.int32)}
IDS = st.integers(2, VOCAB - 1)

LAYOUT = build(DecoderConfig(97, 16, 2, 1, 1, 8, 24)).layout


def encode(text):
    return [ord(letter) for letter in text]


def decode(ids):
    return "".join(chr(i) for i in ids)


def example(inputs, targets="y", task="a"):
    return Example(task, "id", inputs, targets, (), "", 0)


def encoder(prompts=PROMPTS, bos=None, default=""):
    return Encoder(encode, EOS, bos, dict(prompts), default)


def train_batches(examples, *, batch_size=2, inputs=6, targets=4, pack=False, **kwargs):
    lengths = {"inputs": inputs, "targets": targets}
    return TrainBatches(
        iter(examples), encoder(**kwargs), LAYOUT, batch_size=batch_size, feature_lengths=lengths, pack=pack
    )


def sequences(batch):
    """Every sequence of a batch, row by row, from the arrays: `(inputs, targets)`, checking the layout on the way."""
    found = []
    for row in range(len(batch["tokens"])):
        segments, weights = batch["segment_ids"][row], batch["weights"][row]
        real = int(weights.sum())
        assert weights[:real].all() and not weights[real:].any()  # 1 on targets, then padding
        used = int((segments > 0).sum())
        assert not segments[used:].any() and not batch["tokens"][row, used:].any()
        assert np.array_equal(np.unique(segments[:used]), np.arange(1, segments.max() + 1))
        assert (np.diff(segments[:used]) >= 0).all()
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            assert np.array_equal(batch["positions"][row, places], np.arange(len(places)))
            own = np.flatnonzero(np.isin(batch["target_positions"][row, :real], places))
            targets = batch["targets"][row, own].tolist()
            aims = batch["target_positions"][row, own]
            # Each target is predicted where the token before it stands, the last one at the end of the segment.
            assert np.array_equal(aims, np.arange(places[-1] - len(targets) + 1, places[-1] + 1))
            ids = batch["tokens"][row, places].tolist()
            start = len(ids) - len(targets) + 1
            assert ids[start:] == targets[:-1]
            found.append((ids[:start], targets))
        assert real == sum(len(targets) for _, targets in found[len(found) - segments.max() :])
    return found


# ---- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
def test_one_in_a_hundred_is_replayed_exactly(pack):
    """Of the first 1000 sequences 10, and of the first n floor(n / 100), over-long examples not counted."""
    endless = itertools.cycle([example("x", "y" * n) for n in (1, 9, 4, 2)])
    settings = Replay("text", 0.01, targets=4)
    passages = replay.passages(itertools.repeat(example("", "wonderful")), encoder(prompts={}), 6, settings.targets)
    stream = TrainBatches(
        endless,
        encoder(),
        lambda rows, inputs, targets: rows,
        batch_size=4,
        feature_lengths={"inputs": 6, "targets": 6},
        pack=pack,
        replay=settings,
        passages=passages,
    )
    rows = itertools.chain.from_iterable(stream)
    found = list(itertools.islice((one for row in rows for one in row), 1000))
    counts = np.cumsum([one == Tokens(encode("wond"), encode("erfu")) for one in found])
    assert counts[-1] == 10 and stream.skipped > 300
    assert (counts == np.arange(1, 1001) // 100).all()


def test_a_passage_is_given_in_part_and_cut_but_never_asked_behind_a_prompt():
    def of(text, inputs=6, targets=4, **changes):
        (found,) = replay.passages(
            iter([example("", text)]), dataclasses.replace(encoder(), **changes), inputs, targets
        )
        return found

    assert of("abcdef") == Tokens(encode("abc"), encode("def"))  # its end is no end of sequence
    assert of("abcdefghijklmnop") == Tokens(encode("abcdef"), encode("ghij"))
    assert of("abcdefghijklmnop", bos_id=BOS) == Tokens([BOS, *encode("abcde")], encode("fghi"))
    assert of("abcdef", continues=False) == Tokens([*encode("abc"), EOS], encode("def"))
    both = replay.passages(iter([example("a", ""), example("ab", "cd")]), encoder(), 6, 4)
    assert list(both) == [Tokens(encode("ab"), encode(" cd"))]  # what has no second token is left out
    with pytest.raises(UserError, match="The replay task 'a' yields no text"):
        list(replay.passages(iter([example("", "")] * 1000), encoder(), 6, 4))


@pytest.mark.parametrize(
    ("values", "message"), [(("", 0.01), "set REPLAY_TASK"), (("t", 0.0), "rate"), (("t", 1.0), "rate")]
)
def test_replay_settings_that_cannot_be(values, message):
    with pytest.raises(UserError, match=message):
        Replay(*values)


# ---- encoding --------------------------------------------------------------------------------------------------------


def test_inputs_stand_behind_their_own_prompt():
    assert encoder().inputs("xy", "a") == [200, 201, 202, *encode("xy")]
    assert encoder(bos=BOS).inputs("xy", "b") == [203, 204, BOS, *encode("xy")]
    assert encoder(bos=BOS).inputs("xy", "other") == [BOS, *encode("xy")]
    assert encoder(default="b").inputs("xy", "other") == [203, 204, *encode("xy")]
    assert encoder(prompts={}).inputs("xy", "a") == encode("xy") == encoder().inputs("xy")


@pytest.mark.parametrize(
    ("inputs", "targets", "text"),
    [
        ("Label:", "yes", " yes"),
        ("Label: ", "yes", "yes"),
        ("Label:\n", "yes", "yes"),
        ("Label:", "", ""),
        ("Label:", " yes", " yes"),
        ("Label: ", " yes", "yes"),
        ("Label:", "\nyes", "\nyes"),
    ],
)
def test_the_target_continues_the_input(inputs, targets, text):
    tokens = encoder().tokens(example(inputs, targets))

    assert tokens == Tokens([200, 201, 202, *encode(inputs)], [*encode(text), EOS])


def test_inputs_that_are_encoded_end_with_eos_and_targets_stand_alone():
    encoding = dataclasses.replace(encoder(), continues=False)

    assert encoding.tokens(example("xy", "z")) == Tokens([200, 201, 202, *encode("xy"), EOS], [*encode("z"), EOS])
    assert encoding.tokens(example("xy", " z")) == encoding.tokens(example("xy", "z"))
    assert encoding.tokens(example("", "", "none")) == Tokens([EOS], [EOS])  # there is always something to encode
    assert dataclasses.replace(encoding, sentinel_id=77).inputs("xy") == [*encode("xy"), 77, EOS]
    assert dataclasses.replace(encoder(bos=BOS), sentinel_id=77).inputs("xy") == [BOS, *encode("xy"), 77]


@pytest.mark.parametrize("pack", [False, True])
def test_encoded_inputs_in_training_rows(pack):
    bound = dataclasses.replace(encoder(), continues=False)
    model = build(T5Config(97, 16, 2, 1, 1, 8, 24))
    examples = [example("x", "y", "b"), example("xx", "y", "none"), example("x" * 11, "y", "a")]
    stream = TrainBatches(
        itertools.cycle(examples),
        bound,
        model.layout,
        batch_size=1,
        feature_lengths={"inputs": 5, "targets": 4},
        pack=pack,
    )
    batch = next(iter(stream))

    assert {name: array.shape for name, array in batch.items()} == {
        **dict.fromkeys(("tokens", "segment_ids"), (1, 8)),
        **dict.fromkeys(("decoder_tokens", "decoder_segment_ids", "targets", "weights"), (1, 4)),
    }
    both = [203, 204, *encode("x"), EOS, *encode("xx"), EOS]
    assert batch["tokens"][0].tolist() == (both + [0] if pack else both[:4] + [0] * 4)
    assert batch["decoder_tokens"][0].tolist() == ([0, ord("y"), 0, ord("y")] if pack else [0, ord("y"), 0, 0])
    assert batch["weights"].sum() == (4 if pack else 2)


def test_without_any_input_there_is_no_place_to_predict_from():
    with pytest.raises(UserError, match="Example 'id' of task 'none' has an empty input"):
        encoder().tokens(example("", task="none"))
    assert encoder().tokens(example("", "y")).inputs == [200, 201, 202]
    assert encoder(bos=BOS).tokens(example("", "y", "none")).inputs == [BOS]


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_by_hand():
    batch = decoder_rows([[Tokens([200, 5, 6], [7, 8, 0]), Tokens([9], [0])], []], 8, 5)
    expected = {
        "tokens": [200, 5, 6, 7, 8, 9, 0, 0],
        "positions": [0, 1, 2, 3, 4, 0, 0, 0],
        "segment_ids": [1, 1, 1, 1, 1, 2, 0, 0],
        "prefix_ids": [1, 1, 1, 1, 1, 2, 0, 0],
        "target_positions": [2, 3, 4, 5, 0],
        "targets": [7, 8, 0, 0, 0],
        "weights": [1, 1, 1, 1, 0],
    }

    assert {name: array[0].tolist() for name, array in batch.items()} == expected
    assert not any(array[1].any() for array in batch.values())
    assert {name for name, array in batch.items() if array.dtype != np.int32} == {"weights"}
    assert batch["weights"].dtype == np.float32


TOKENS = st.builds(Tokens, st.lists(IDS, min_size=1, max_size=6), st.lists(IDS, min_size=1, max_size=4))


@given(st.lists(st.lists(TOKENS, max_size=4), min_size=1, max_size=4))
def test_rows_hold_their_sequences(rows):
    length = max(sum(len(one.inputs) + len(one.targets) - 1 for one in row) for row in rows) + 1
    targets = max(sum(len(one.targets) for one in row) for row in rows) + 1
    batch = decoder_rows(rows, length, targets)

    assert sequences(batch) == [(one.inputs, one.targets) for row in rows for one in row]
    assert {array.shape for array in batch.values()} == {(len(rows), length), (len(rows), targets)}


# ---- training batches ------------------------------------------------------------------------------------------------


TEXTS = st.lists(
    st.builds(
        example,
        st.text("abc", min_size=1, max_size=9),
        st.text("xyz", max_size=5),
        st.sampled_from(["a", "b", "none"]),
    ),
    min_size=1,
    max_size=30,
)
END = example("end", "")


@given(TEXTS, st.booleans(), st.integers(1, 3))
def test_every_example_that_fits_once_and_in_order(examples, pack, batch_size):
    bound = encoder()
    longest = {"inputs": 6 + len(PROMPTS["a"]), "targets": 4}  # room for the longest prompt
    tokens = [bound.tokens(one) for one in examples]
    fits = [len(t.inputs) <= longest["inputs"] and len(t.targets) <= longest["targets"] for t in tokens]
    kept = [(t.inputs, t.targets) for t, ok in zip(tokens, fits, strict=True) if ok]
    stream = train_batches(itertools.chain(examples, itertools.repeat(END)), batch_size=batch_size, pack=pack)

    found, shapes = [], set()
    for batch in itertools.islice(stream, len(examples) + 1):
        found += sequences(batch)
        shapes |= {batch["tokens"].shape, batch["targets"].shape}
        assert (batch["segment_ids"].max(axis=1) >= 1).all()  # no empty rows
        assert pack or batch["segment_ids"].max() == 1
    assert found[: len(kept)] == kept
    assert set(map(str, found[len(kept) :])) <= {str((bound.tokens(END).inputs, [EOS]))}
    assert stream.skipped == fits.count(False)
    assert shapes == {(batch_size, 3 + 6 + 4), (batch_size, 4)}


@given(TEXTS)
def test_batches_are_a_function_of_the_step(examples):
    first, again = (itertools.islice(train_batches(itertools.cycle([*examples, END]), pack=True), 5) for _ in range(2))

    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_packing_fills_rows():
    examples = [example(text, targets) for text, targets in (("ab", ""), ("c", ""), ("def", "x"), ("g", ""))]
    stream = train_batches(itertools.cycle(examples), batch_size=2, inputs=8, targets=4, pack=True)
    batch = next(iter(stream))

    # Each behind its own prompt ids: 5 + 4 + 8 positions are more than 15, so the third opens a row.
    texts = [decode(inputs[3:]) for inputs, _ in sequences(batch)]
    assert texts == ["ab", "c", "def", "g"] and batch["segment_ids"].max(axis=1).tolist() == [2, 2]
    assert all(inputs[:3] == [200, 201, 202] for inputs, _ in sequences(batch))


def test_the_limit_is_exact():
    for inputs, targets, skipped in (("x" * 6, "y" * 2, 0), ("x" * 7, "y" * 2, 1), ("x" * 6, "y" * 3, 1)):
        stream = train_batches(itertools.chain([example(inputs, targets)], itertools.repeat(END)), batch_size=1)
        next(iter(stream))
        assert stream.skipped == skipped


@pytest.mark.parametrize("pack", [False, True])
def test_nothing_fits(pack):
    stream = train_batches(itertools.repeat(example("x" * 7)), pack=pack)

    with pytest.raises(UserError, match=r"1000 examples .* \(6 inputs, 4 targets\); the last has 10 and 3 tokens"):
        next(iter(stream))


def test_some_long_ones_in_a_row_are_left_out():
    stream = train_batches(itertools.cycle([*[example("x" * 7)] * 999, END]), batch_size=2)

    assert [decode(inputs[3:]) for inputs, _ in sequences(next(iter(stream)))] == ["end", "end"]
    assert stream.skipped == 2 * 999


@pytest.mark.parametrize("lengths", [{"inputs": 4}, {"inputs": 4, "targets": 2, "target": 2}, {}])
def test_feature_lengths_name_inputs_and_targets(lengths):
    with pytest.raises(UserError, match=r"TASK_FEATURE_LENGTHS names .*; give 'inputs' and 'targets'"):
        TrainBatches(iter([]), encoder(), LAYOUT, batch_size=1, feature_lengths=lengths)


# ---- evaluation batches ----------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 140).flatmap(lambda n: st.just([n % VOCAB] * n)), max_size=40),
    st.sampled_from([1, 64, 256, 1000]),
    st.sampled_from([1, 2, 3, 8]),
    st.booleans(),
)
def test_buckets_hold_every_input_once_and_in_order(inputs, budget, multiple, ranked):
    ranks = [len(ids) % 3 * ranked for ids in inputs]
    seen, shapes = [], set()
    for members, batch in batches.buckets(inputs, budget, multiple, ranks if ranked else ()):
        rows, width = batch["tokens"].shape
        assert 1 <= len(members) <= rows and rows % multiple == 0 and width in WIDTHS
        assert rows - multiple < max(budget // width, 1)
        assert rows - len(members) < max(rows / 3, batches.MIN_ROWS) + multiple  # padding rows
        for row, member in enumerate(members):
            length = int(batch["lengths"][row])
            assert batch["tokens"][row, :length].tolist() == inputs[member]
            assert not batch["tokens"][row, length:].any()
            assert length <= width and (width <= WIDTHS[1] or width < 2 * length)
        assert not batch["lengths"][len(members) :].any() and not batch["tokens"][len(members) :].any()
        seen += [(width, ranks[member], len(inputs[member]), int(member)) for member in members]
        shapes.add((rows, width))
    assert seen == sorted(seen)  # narrow to wide, then by rank, then by length, then as given
    assert sorted(member for *_, member in seen) == list(range(len(inputs)))
    for width in {width for _, width in shapes}:  # few shapes, each compiled once: a full one, and that of what is left
        rows = {rows for rows, wide in shapes if wide == width}
        powers = {-(-(parts << power) // multiple) * multiple for power in range(10) for parts in (1, 3)}
        assert rows <= powers and len(rows) <= 2


def test_what_fills_no_batch_goes_to_the_next_width_up_to_a_power_of_two():
    inputs = [[1] * length for length in [40] * 5 + [50] * 3 + [64] + [70] * 10]
    found = [(batch["tokens"].shape, sorted(map(int, members))) for members, batch in batches.buckets(inputs, 160)]
    assert found == [
        ((4, 40), [0, 1, 2, 3]),
        ((2, 56), [4, 5]),
        ((2, 56), [6, 7]),
        ((2, 64), [8]),
        *(((2, 80), [9 + i, 10 + i]) for i in range(0, 10, 2)),
    ]
    ((members, batch),) = batches.buckets(inputs[9:], 4096)
    assert len(members) == 10 and batch["tokens"].shape == (12, 80)


def test_buckets_at_the_edges():
    widths = {
        length: next(iter(batches.buckets([[5] * length], 1)))[1]["tokens"].shape[1] for length in (1, 25, 33, 49, 8192)
    }
    assert widths == {1: 24, 25: 32, 33: 40, 49: 56, 8192: 8192}
    assert list(batches.buckets([], 100)) == []
    with pytest.raises(UserError, match="An input is empty"):
        list(batches.buckets([[1], []], 100))
    with pytest.raises(UserError, match="An input has 8193 tokens; the longest that can be evaluated has 8192"):
        list(batches.buckets([[1] * 8193], 100))


def sharded(held, shards, opened, pack=False):
    """Batches of as many rows as `held`, whose examples say which shard they come from and their place in it."""

    def open_shard(shard):
        opened.append(shard)
        numbered = (example("ab"[: 1 + i % 2], chr(40 + shard) + chr(40 + i), task="") for i in itertools.count())
        return train_batches(numbered, batch_size=len(held) // shards, targets=6, pack=pack)

    return ShardedBatches(open_shard, shards, np.array(held))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_the_number_of_hosts_changes_no_batch(shards, pack):
    opened = []
    alone = list(itertools.islice(sharded([True] * 8, shards, opened, pack), 5))
    assert opened == [*range(shards)]
    for row in range(8):
        for number, batch in enumerate(alone):
            shard, place = batch["targets"][row][1:3] - 40  # after the space
            assert shard == row * shards // 8
            if not pack:
                assert place == number * 8 // shards + row % (8 // shards)
    for hosts in (2, 4, 8):
        for host in range(hosts):
            rows = range(host * 8 // hosts, (host + 1) * 8 // hosts)
            opened = []
            own = itertools.islice(sharded([row in rows for row in range(8)], shards, opened, pack), 5)
            assert opened == sorted({row * shards // 8 for row in rows})
            for batch, whole in zip(own, alone, strict=True):
                for name, array in whole.items():
                    assert np.array_equal(batch[name][rows], array[rows])
                    assert batch[name].dtype == array.dtype and batch[name].shape == array.shape


def test_rows_that_do_not_divide_over_the_shards_are_refused():
    with pytest.raises(UserError, match="A batch of 6 rows does not divide over 4 shards of data; change BATCH_SIZE"):
        sharded([True] * 6, 4, [])
