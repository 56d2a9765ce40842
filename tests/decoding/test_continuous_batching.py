"""Continuous batching against generation of each input alone; the shape of its programs."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import pytest

from promot_jax.data import batches
from promot_jax.decoding import continuous_batching as batching
from promot_jax.decoding.continuous_batching import Output, generate_all
from promot_jax.decoding.generate import generate
from promot_jax.decoding.inputs import Engine, Input, shared_prefix, waiting_batches
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.models import DecoderConfig, T5Config, build
from promot_jax.models.stack import apart

VOCAB, PROMPT, MOST = 40, 3, 12
MODELS = {
    "windows": DecoderConfig(VOCAB, 16, 2, 1, 2, 8, 24, window=6, global_every=2),
    "T5": T5Config(VOCAB, 16, 2, 2, 2, 8, 24, relative_buckets=8, relative_max_distance=12),
}
STOPS = np.isin(np.arange(VOCAB), [3, 17, 29])


@pytest.fixture(autouse=True)
def _few_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WIDTHS", (32, 64, 128))  # each is compiled


@pytest.fixture(params=MODELS, name="engine", scope="module")
def _engine(request: pytest.FixtureRequest) -> Engine:
    model, noise = build(MODELS[request.param]), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = Partitioner().place({"model": jax.tree.map(lambda leaf: noise.normal(0, 0.5, leaf.shape), shapes)})
    params = jax.tree.map(lambda leaf: leaf.astype("float32"), params)
    table = np.float32(noise.normal(size=(PROMPT, 16)))
    settings, key = Decoding(max_tokens=MOST), jax.random.key(0)
    return Engine(model, settings, params["model"], table, STOPS, key, Partitioner(), 256, 1024)


def inputs(count: int = 40) -> list[Input]:
    """Of two size classes, with limits of their own; every other one with the prompt."""
    noise = np.random.default_rng(1)
    rows = []
    for i in range(count):
        ids = noise.integers(0, VOCAB, noise.integers(1, 60)).tolist()
        virtual = range(VOCAB, VOCAB + PROMPT) if i % 2 else ()
        rows.append(Input([*virtual, *ids], int(noise.integers(1, MOST + 1)), i))
    return rows


def outputs(generated: Iterable[Output]) -> dict[int, np.ndarray]:
    return {output.member: output.ids for output in generated}


def alone(engine: Engine, each: Input) -> list[int]:
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(each.ids)] = each.ids
    batch = {"tokens": tokens, "lengths": np.array([len(each.ids)], np.int32)}
    limits = np.array([each.limit], np.int32)
    out = generate(engine.model, engine.settings, engine.params, engine.table, batch, STOPS, limits, engine.key)
    return np.asarray(out)[0].tolist()


def test_each_output_is_that_of_its_input_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    admitted: list[int] = []
    start: Callable[..., Any] = batching._start
    monkeypatch.setattr(batching, "_start", lambda *given: (admitted.append(len(given[7])), start(*given))[1])
    rows = inputs()
    found = outputs(generate_all(engine, rows))
    assert sorted(found) == list(range(len(rows)))
    assert [found[index].tolist() for index in range(len(rows))] == [alone(engine, each) for each in rows]
    assert len({tuple(ids) for ids in map(tuple, found.values())}) > 20 and len(admitted) > 4  # places were refilled
    assert len({int((ids >= 0).sum()) for ids in found.values()}) > 4  # and rows ended at different steps


def test_rows_that_are_left_move_to_smaller_batches_and_on_to_the_next_class(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step pays for few free places, and the outputs stay those of the inputs alone."""
    moves: list[tuple[int, int, int]] = []  # places before and after, and the new width
    moved: Callable[..., Any] = batching._moved

    def record(model: Any, chosen: Any, rows: Any, state: Any, **size: int) -> Any:
        moves.append((len(rows.done), len(chosen), size["width"]))
        return moved(model, chosen, rows, state, **size)

    monkeypatch.setattr(batching, "_moved", record)
    monkeypatch.setattr(batching, "LEAST_PLACES", 2)
    noise = np.random.default_rng(3)
    lengths = [*noise.integers(1, 30, 16), *noise.integers(34, 60, 16)]
    rows = [Input(noise.integers(0, VOCAB, n).tolist(), 1 + i % MOST, i) for i, n in enumerate(lengths)]
    roomy = dataclasses.replace(engine, prefill_tokens=2048, cache_tokens=4096)
    found = outputs(generate_all(roomy, rows))
    assert [found[index].tolist() for index in range(len(rows))] == [alone(engine, each) for each in rows]
    assert {(16, 4, 32), (4, 32, 64), (32, 8, 64), (8, 2, 64)} >= {*moves} and len({*moves}) > 2


def test_sizes_of_batches_do_not_matter(engine: Engine) -> None:
    rows = inputs(12)
    small = dataclasses.replace(engine, prefill_tokens=1, cache_tokens=1)
    found, again = outputs(generate_all(small, rows)), outputs(generate_all(engine, rows))
    assert all(np.array_equal(found[index], again[index]) for index in range(len(rows)))
    assert not outputs(generate_all(engine, []))


def test_inputs_that_start_alike_share_a_prefill(engine: Engine) -> None:
    noise = np.random.default_rng(2)
    start = [*range(VOCAB, VOCAB + PROMPT), *noise.integers(0, VOCAB, 40).tolist()]
    rows = [Input([*start, i, *noise.integers(0, VOCAB, i).tolist()], 6, i) for i in range(9)]
    grouped = [dataclasses.replace(each, group="a") for each in rows] + inputs(3)
    (first, *_) = waiting_batches(grouped, 256, engine)
    assert first.prefix == (tuple(start) if engine.model.continues else ())
    found, again = outputs(generate_all(engine, grouped)), outputs(generate_all(engine, [*rows, *inputs(3)]))
    assert all(np.array_equal(found[index], again[index]) for index in range(len(grouped)))
    assert len({tuple(ids) for ids in found.values()}) > 6


def test_a_prefix_leaves_something_of_every_row() -> None:
    long = [*range(50)]
    assert shared_prefix([long, [*long[:40], 9], [*long, 1]]) == tuple(range(40))
    assert shared_prefix([long, long]) == tuple(range(49))
    assert not shared_prefix([long]) and not shared_prefix([long, long[:20]])


# ---- programs --------------------------------------------------------------------------------------------------------


def large_operations(engine: Engine, params: Any, rows: int, width: int) -> list[str]:
    """Opcodes of the compiled decode loop whose results have the size of a layer's cache or weights, or more."""
    cfg = engine.model.config
    state = batching._empty(engine.model, engine.settings, params, rows, width, 16)
    loop = batching._decode.lower(
        engine.model, engine.settings, params, engine.stops, engine.key, np.int32(rows), *state
    ).compile()
    least = min(rows * cfg.num_kv_heads * (width + 16) * cfg.head_dim, cfg.emb_dim * cfg.mlp_dim)
    pattern = r"^ +(?:ROOT )?%?[\w.\-]+ = \w+\[([\d,]+)\]\S* ([\w\-]+)\("
    results = [(match[1].split(","), match[2]) for match in re.finditer(pattern, loop.as_text(), re.M)]
    return [opcode for sizes, opcode in results if np.prod([*map(int, sizes)]) >= least]


def test_a_step_copies_neither_a_cache_nor_a_weight() -> None:
    """In the optimized program: no copy, transpose, conversion or slice of such a size; updates are in place."""
    model = build(DecoderConfig(VOCAB, 64, 4, 2, 2, 16, 96))
    params = jax.jit(model.init)(jax.random.key(0))
    engine = Engine(model, Decoding(max_tokens=16), params, None, STOPS, jax.random.key(0), Partitioner(), 256, 1024)
    moved = {"copy", "transpose", "convert", "dynamic-slice", "slice", "concatenate", "gather"}
    stacked = large_operations(engine, params, 8, 64)
    found = large_operations(engine, apart(params, Partitioner()), 8, 64)
    assert not moved & {*found} and found.count("dynamic-update-slice") == 4  # keys and values of two layers
    assert "dynamic-slice" in stacked  # the test can tell
