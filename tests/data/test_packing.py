"""Batches in fewer rows: the same examples, in which shape. tests/models/test_packed_batches.py compares losses."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promot_jax.data.batches import TrainBatches
from promot_jax.data.encoding import Encoder
from promot_jax.data.examples import Example
from promot_jax.data.packing import PackedBatches, Packer, Shape
from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.models.batch_layout import Tokens, decoder_rows

VOCAB, PROMPT = 97, 5
DECODER = build(DecoderConfig(VOCAB, 16, 2, 1, 1, 8, 24))
DROPPING = build(DecoderConfig(VOCAB, 16, 2, 1, 1, 8, 24, dropout_rate=0.1))
T5 = build(T5Config(VOCAB, 16, 2, 1, 1, 8, 24))
MODELS = {"decoder": DECODER, "dropout": DROPPING, "t5": T5}
INPUTS, TARGETS = 30, 6
PROMPTS = ([], list(range(VOCAB, VOCAB + PROMPT)), list(range(VOCAB + PROMPT, VOCAB + PROMPT + 3)))
IDS = st.integers(2, 9)
EXAMPLES = st.builds(
    lambda prompt, inputs, targets: Tokens([*prompt, *inputs], targets),
    st.sampled_from(PROMPTS),
    st.lists(IDS, min_size=1, max_size=INPUTS - PROMPT),
    st.lists(IDS, min_size=1, max_size=TARGETS),
)


def numbered(rows: list[list[Tokens]]) -> list[tuple[list[int], list[int]]]:
    return [(tokens.inputs, tokens.targets) for row in rows for tokens in row]


def of_decoder(batch: dict[str, np.ndarray], rows: slice = slice(None)) -> list[tuple[list[int], list[int]]]:
    """The examples in a decoder's arrays, from what each target's state can see."""
    found = []
    arrays = {name: array[rows] for name, array in batch.items()}
    for row in range(len(arrays["tokens"])):
        tokens, segments, prefixes, positions, aims, targets, weights = (
            arrays[name][row]
            for name in (
                "tokens", "segment_ids", "prefix_ids", "positions", "target_positions", "targets", "weights"
            )
        )  # fmt: skip
        for segment in sorted({int(segments[aim]) for aim, weight in zip(aims, weights, strict=True) if weight}):
            own = np.flatnonzero(segments == segment)
            seen = np.flatnonzero((segments == segment) | (segments == prefixes[own[0]]))
            assert seen.tolist() == sorted(seen) and (prefixes[own] == prefixes[own[0]]).all()
            assert positions[seen].tolist() == list(range(len(seen)))
            mine = np.flatnonzero((segments[aims] == segment) & (weights > 0))
            ids, answer = tokens[seen].tolist(), targets[mine].tolist()
            assert aims[mine].tolist() == [*range(own[-1] - len(answer) + 1, own[-1] + 1)]
            assert ids[len(ids) - len(answer) + 1 :] == answer[:-1]
            found.append((ids[: len(ids) - len(answer) + 1], answer))
    return found


def of_t5(batch: dict[str, np.ndarray], rows: slice = slice(None)) -> list[tuple[list[int], list[int]]]:
    found = []
    arrays = {name: array[rows] for name, array in batch.items()}
    for row in range(len(arrays["tokens"])):
        for segment in range(1, arrays["segment_ids"][row].max() + 1):
            inputs = arrays["tokens"][row][arrays["segment_ids"][row] == segment].tolist()
            found.append((inputs, arrays["targets"][row][arrays["decoder_segment_ids"][row] == segment].tolist()))
    return found


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=40)
@given(st.lists(EXAMPLES, min_size=8, max_size=8), st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]), st.data())
def test_a_batch_keeps_its_examples(name, examples, parts, data):
    """Each once, within its microbatch, in a shape that the mesh divides; or as it was."""
    microbatches, devices = parts
    read = of_t5 if name == "t5" else of_decoder
    packer = Packer(MODELS[name], 8, INPUTS, TARGETS, microbatches=microbatches, devices=devices)
    rows = [[example] for example in examples]
    shapes = packer.choose([data.draw(st.permutations(rows)), rows[:4] + rows[:4]], steps=1000)
    batch = packer.layout(rows, shapes)

    sizes = (*batch["tokens"].shape, batch["targets"].shape[1])
    assert Shape(*sizes) in shapes and shapes[-1] == packer.plain and len(shapes) <= 3
    assert sizes[0] % (microbatches * devices) == 0 and sizes[0] <= 8
    for part in range(microbatches):
        wanted = sorted(numbered(rows[part::microbatches]))
        assert sorted(read(batch, slice(part, None, microbatches))) == wanted
    if name == "dropout":
        assert read(batch) == numbered(rows) and sizes[0] == 8


def test_a_shared_prompt_by_hand():
    examples = [Tokens([200, 201, 5, 6], [7, 0], 2), Tokens([9], [0]), Tokens([200, 201, 8], [1, 2], 2)]
    batch = decoder_rows([examples], 10, 5)
    expected = {
        "tokens": [200, 201, 5, 6, 7, 9, 8, 1, 0, 0],
        "positions": [0, 1, 2, 3, 4, 0, 2, 3, 0, 0],
        "segment_ids": [1, 1, 2, 2, 2, 3, 4, 4, 0, 0],
        "prefix_ids": [1, 1, 1, 1, 1, 3, 1, 1, 0, 0],
        "target_positions": [3, 4, 5, 6, 7],
        "targets": [7, 0, 0, 1, 2],
        "weights": [1, 1, 1, 1, 1],
    }
    assert {name: array[0].tolist() for name, array in batch.items()} == expected


def of_lengths(lengths, prompt=PROMPTS[1], targets=2):
    """Examples whose texts have nothing in common."""
    return [[Tokens([*prompt, *[2 + i] * length], [2] * targets)] for i, length in enumerate(lengths)]


def test_a_row_holds_its_prompt_once():
    """Eight examples of 4 + 1 positions and one prompt of 5 in each of the rows."""
    packer, rows = Packer(DECODER, 8, INPUTS, TARGETS), of_lengths([4] * 8)
    shapes = packer.choose([rows])
    batch, count = packer.layout(rows, shapes), shapes[0].rows
    assert count < 8 and (batch["segment_ids"] > 0).sum() == 8 * 5 + count * 5
    assert (batch["tokens"] == VOCAB).sum() == count
    encoded = Packer(T5, 8, INPUTS, TARGETS)
    batch = encoded.layout(rows, encoded.choose([rows]))
    assert len(batch["tokens"]) < 8 and (batch["tokens"] == VOCAB).sum() == 8  # bidirectional: each has its own


def test_short_examples_run_in_less_than_half_the_work():
    packer = Packer(DECODER, 8, 64, 2)
    batches = [of_lengths(lengths) for lengths in np.random.default_rng(0).integers(4, 25, (20, 8)).tolist()]
    shapes = packer.choose(batches)
    assert len(shapes) == 2 and shapes[0].work() < 0.5 * packer.plain.work()
    assert packer.padding(batches, shapes) < 0.3 < 0.5 < packer.padding(batches, [packer.plain])


def test_a_second_shape_is_for_long_runs():
    """It is compiled, too, and has to be worth it."""
    packer = Packer(DECODER, 8, 64, 2)
    batches = [of_lengths([length] * 8) for length in (4, 4, 4, 14, 14)]
    short, long = (packer.choose(batches, steps=steps) for steps in (100, 1000))
    assert len(short) == 2 and len(long) == 3 and short[0] == long[1]
    assert packer.padding(batches, long) < packer.padding(batches, short)
    assert packer.layout(batches[0], long)["tokens"].shape == long[0][:2]
    assert packer.layout(batches[-1], long)["tokens"].shape == long[1][:2]


def test_what_is_full_stays_as_it_is():
    packer = Packer(DECODER, 4, INPUTS, TARGETS)
    full = [of_lengths([INPUTS - PROMPT - 1] * 4, targets=TARGETS)]
    assert packer.choose(full) == packer.choose([]) == (packer.plain,) == (Shape(4, INPUTS + TARGETS, TARGETS),)


def test_a_batch_that_does_not_fit_keeps_its_rows():
    packer = Packer(DECODER, 4, INPUTS, TARGETS)
    shapes = packer.choose([of_lengths([2, 3, 2, 3])])
    long = of_lengths([INPUTS - PROMPT] * 4)
    batch, plain = packer.layout(long, shapes), DECODER.layout(long, INPUTS, TARGETS)
    assert len(shapes) == 2 and all(np.array_equal(batch[name], plain[name]) for name in plain)


def test_rare_long_batches_do_not_choose_the_shape():
    packer = Packer(DECODER, 4, INPUTS, TARGETS)
    short, long = of_lengths([2, 3, 2, 3]), of_lengths([INPUTS - PROMPT] * 4)
    assert packer.choose([short] * 30 + [long]) == packer.choose([short])


def test_with_dropout_the_mesh_chooses_nothing():
    """What is dropped depends on an example's place in the arrays."""
    batches = [of_lengths([4] * 8)]
    shapes = {
        (model.config.dropout_rate, devices): Packer(model, 8, INPUTS, TARGETS, devices=devices).choose(batches)[0]
        for model in (DECODER, DROPPING)
        for devices in (1, 4)
    }
    assert shapes[0.1, 1] == shapes[0.1, 4] and shapes[0.1, 1].rows == 8
    assert shapes[0.1, 1].length < INPUTS + TARGETS
    assert shapes[0.0, 1].rows < shapes[0.0, 4].rows == 4


# ---- the stream ------------------------------------------------------------------------------------------------------


def streams(shards, pack=False, lengths=range(1, 9)):
    encoder = Encoder(lambda text: [ord(letter) for letter in text], 0, None, {"a": np.arange(200, 204)}, "a")

    def part(shard):
        drawn = itertools.cycle(np.random.default_rng(shard).choice(lengths, 1000).tolist())
        examples = (Example("a", "id", chr(40 + shard) + "x" * length, "y", (), "", 0) for length in drawn)
        return TrainBatches(
            examples,
            encoder,
            DECODER.layout,
            batch_size=8 // shards,
            feature_lengths={"inputs": 24, "targets": 4},
            pack=pack,
        )

    return {shard: part(shard) for shard in range(shards)}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
def test_every_batch_has_the_examples_of_the_plain_stream(shards, pack):
    packer = Packer(DECODER, 8, 28, 4)
    packed = PackedBatches(streams(shards, pack), packer, look_ahead=4)
    again = PackedBatches(streams(shards, pack), packer, look_ahead=4)
    plain = zip(*streams(shards, pack).values(), strict=True)
    for batch, same, parts in itertools.islice(zip(packed, again, plain, strict=True), 6):
        assert all(np.array_equal(batch[name], same[name]) for name in batch)
        wanted = [example for part in parts for example in of_decoder(part)]
        assert sorted(of_decoder(batch)) == sorted(wanted)
    if not pack:
        assert packed.shapes[0].work() < 0.6 * packer.plain.work()
        assert {part.skipped for part in packed.parts.values()} == {0}


def test_the_summary_says_what_runs():
    packed = PackedBatches(streams(1), Packer(DECODER, 8, 28, 4), look_ahead=3)
    said = packed.summary()
    assert said.startswith(f"batches run in {packed.shapes[0]} instead of 8 rows of 32 tokens (")
    assert str(Shape(1, 7, 2)) == "1 row of 7 tokens" and said.endswith("% of them padding)")
    full = PackedBatches(streams(1, lengths=[23]), Packer(DROPPING, 8, 28, 4), look_ahead=3)
    assert full.summary() == "batches run in 8 rows of 32 tokens (6 % of them padding); packing would save little"
