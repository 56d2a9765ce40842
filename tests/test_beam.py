"""Beam search against all sequences there are, against a plain one in NumPy, and against transformers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from promot_jax import decoding, trees
from promot_jax.decoding import Decoding
from promot_jax.errors import UserError
from promot_jax.models import DecoderConfig, build, layouts

pytestmark = pytest.mark.usefixtures("fast_compilation")
VOCAB, EMBED, PROMPT, STEPS, WIDTH = 13, 16, 3, 8, 16
MODEL = build(DecoderConfig(VOCAB, EMBED, 2, 1, 2, 8, 24))
BEAMS = Decoding(max_tokens=STEPS, beams=4)
STOP = 5


def make_params(model, seed):
    """Weights large enough that some tokens are much likelier than others."""
    noise = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(noise.normal(0, 0.6, x.shape), jnp.float32), shapes)


PARAMS = make_params(MODEL, 0)


def as_batch(rows, width=WIDTH):
    tokens = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return {"tokens": tokens, "lengths": np.array([len(row) for row in rows], np.int32)}


def make_rows(count, seed=1, vocab=VOCAB):
    noise = np.random.default_rng(seed)
    return [noise.integers(0, vocab, noise.integers(1, WIDTH - PROMPT)).tolist() for _ in range(count)]


def generate(rows, settings=BEAMS, *, stops=(STOP,), limits=None, params=PARAMS, prompt=None, model=MODEL):
    """Outputs without what stands behind their ends."""
    mask = np.isin(np.arange(model.config.vocab_size), stops)
    limits = np.broadcast_to(np.int32(settings.max_tokens if limits is None else limits), len(rows))
    out = decoding.generate(model, settings, params, prompt, as_batch(rows), mask, limits, jax.random.key(0))
    assert out.dtype == jnp.int32 and out.shape == (len(rows), settings.max_tokens)
    found = [[token for token in row if token >= 0] for row in out.tolist()]
    assert out.tolist() == [row + [-1] * (settings.max_tokens - len(row)) for row in found]
    return found


def penalty(length, exponent):
    return ((5 + length) / 6) ** exponent


@jax.jit
def next_logits(params, inputs):
    return MODEL.prefill(params, None, inputs, 0)[0]


# ---- against all sequences -------------------------------------------------------------------------------------------

SMALL = build(dataclasses.replace(MODEL.config, vocab_size=7))
ALL = np.array(list(itertools.product(range(7), repeat=4)))


@jax.jit
def sequence_log_probs(params, batch):
    log_probs = jax.nn.log_softmax(SMALL.logits(params, None, batch))
    return jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]


def by_enumeration(params, row, stops):
    """The best sequence of at most 4 tokens; one that does not stop counts only where none does."""
    batch = layouts.decoder_rows([[layouts.Tokens(row, sequence.tolist())] for sequence in ALL], WIDTH, 4)
    totals = np.asarray(sequence_log_probs(params, batch)).cumsum(axis=1)
    stopped = np.isin(ALL, stops)
    if not stops:
        return ALL[totals[:, -1].argmax()].tolist()
    lengths = np.where(stopped.any(axis=1), stopped.argmax(axis=1) + 1, 0)
    scores = np.take_along_axis(totals, lengths[:, None] - 1, axis=1)[:, 0] / penalty(lengths, 0.6)
    best = np.where(lengths > 0, scores, -np.inf).argmax()
    return ALL[best, : lengths[best]].tolist()


@pytest.mark.parametrize("stops", [(0,), (0, 3, 4), ()])
def test_wide_enough_a_search_finds_the_best_of_all(stops):
    rows = make_rows(4, vocab=7)
    settings = Decoding(max_tokens=4, beams=1201)  # 2 * 1201 > 7 ** 4
    lengths = set()
    for seed in range(3):
        params = make_params(SMALL, seed)
        found = generate(rows, settings, stops=stops, params=params, model=SMALL)
        assert found == [by_enumeration(params, row, stops) for row in rows]
        lengths |= {len(row) for row in found}
    assert lengths == {4} if not stops else len(lengths) > 1


# ---- against a plain search ------------------------------------------------------------------------------------------


def plain_search(row, settings=BEAMS, limit=STEPS, params=PARAMS, *, transformers=False):
    """T5X's search of one row, with all its ended hypotheses and its rule when to end; everything computed anew.

    transformers differs in two rules: a hypothesis only ends if it is among the best `beams`, not `2 * beams`; and one
    that is cut off at the limit is as good as one that has ended.
    """
    living, ended = [(0.0, [])], []
    for length in range(1, limit + 1):
        rows = [[*row, *tokens] for _, tokens in living]
        logits = next_logits(params, as_batch(rows + [[0]] * (settings.beams - len(rows)), WIDTH + 2 * STEPS))
        table = np.asarray(jax.nn.log_softmax(logits))
        candidates = [
            (score + table[beam, token], [*tokens, token])
            for beam, (score, tokens) in enumerate(living)
            for token in range(VOCAB)
        ]
        candidates = sorted(candidates, key=lambda one: -one[0])[: 2 * settings.beams]
        over = penalty(length, settings.length_penalty)
        ending = candidates[: settings.beams] if transformers else candidates
        ended += [
            (score / over, tokens)
            for score, tokens in ending
            if tokens[-1] == STOP or (transformers and length == limit)
        ]
        ended = sorted(ended, key=lambda one: -one[0])[: settings.beams]
        living = [one for one in candidates if one[1][-1] != STOP][: settings.beams]
        if len(ended) == settings.beams and ended[-1][0] > living[0][0] / penalty(limit, settings.length_penalty):
            break
    return (ended or living)[0][1]


@pytest.fixture(name="found", scope="module")
def _found(fast_compilation):
    """100 inputs and their outputs at width 4."""
    rows = make_rows(100)
    return rows, generate(rows)


def test_width_4_equals_a_plain_search(found):
    rows, outputs = found
    assert outputs == [plain_search(row) for row in rows]
    lengths = [len(row) for row in outputs]
    assert len(set(lengths)) >= 5 and outputs != generate(rows, Decoding(max_tokens=STEPS))


def test_a_higher_penalty_favours_longer_outputs(found):
    rows, outputs = found
    settings = dataclasses.replace(BEAMS, length_penalty=3.0)
    out = generate(rows, settings)
    assert out[:25] == [plain_search(row, settings) for row in rows[:25]]
    assert sum(map(len, out)) > 1.2 * sum(map(len, outputs))


def score(rows, outputs):
    """Log-probability of each output behind its input."""
    batch = layouts.decoder_rows(
        [[layouts.Tokens(row, out)] for row, out in zip(rows, outputs, strict=True)], WIDTH + STEPS, STEPS
    )
    log_probs = jax.nn.log_softmax(jax.jit(MODEL.logits)(PARAMS, None, batch))
    picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
    return np.asarray((picked * batch["weights"]).sum(axis=1))


def test_a_beam_search_scores_no_less_than_greedy_decoding(found):
    """No law, for the greedy output may fall off the beam: it holds on these 100 inputs."""
    rows, _ = found
    beams, greedy = (generate(rows, dataclasses.replace(BEAMS, beams=beams), stops=()) for beams in (4, 1))
    gain = score(rows, beams) - score(rows, greedy)
    assert (gain > -1e-5).all() and (gain > 0.01).sum() > 20


# ---- rows of a batch -------------------------------------------------------------------------------------------------


def test_rows_do_not_depend_on_their_neighbours(found):
    rows, outputs = found
    noise = np.random.default_rng(2)
    prompt = jnp.asarray(noise.normal(size=(PROMPT, EMBED)), jnp.float32)
    virtual = list(range(VOCAB, VOCAB + PROMPT))
    mixed = [[*virtual, *row] if i % 2 else row for i, row in enumerate(rows[:10])]
    together = generate([*mixed, [], []], prompt=prompt)
    assert together[:10] == [generate([row], prompt=prompt)[0] for row in mixed]
    assert together[:10:2] == outputs[:10:2] and together[1:10:2] != outputs[1:10:2]
    assert together[10:] == [[], []]  # padding


def test_limits_are_those_of_the_row(found):
    rows, outputs = found
    limits = [1 + i % STEPS for i in range(100)]
    own = generate(rows, limits=limits)
    assert all(len(row) <= limit for row, limit in zip(own, limits, strict=True)) and own != outputs
    assert own[2::STEPS] == generate(rows, dataclasses.replace(BEAMS, max_tokens=3))[2::STEPS]
    assert own[7::STEPS] == outputs[7::STEPS]
    assert own[2:10] == [plain_search(rows[i], limit=limits[i]) for i in range(2, 10)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beams": 0}, "Decoding needs beams >= 1"),
        ({"length_penalty": -0.1}, "a finite length_penalty >= 0"),
        ({"length_penalty": float("inf")}, "a finite length_penalty >= 0"),
        ({"length_penalty": float("nan")}, "a finite length_penalty >= 0"),
        ({"temperature": 0.5}, r"set Decoding.beams = 1 or Decoding.temperature = 0, not 4 and 0.5\."),
    ],
)
def test_settings_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BEAMS, **change)


# ---- against transformers --------------------------------------------------------------------------------------------


# Weights with a sharper choice, and a stop token that is chosen often.
SHARP = jax.tree.map(lambda leaf: 2.5 * leaf, PARAMS)
SHARP["token_embedder"]["embedding"] = SHARP["token_embedder"]["embedding"].at[STOP].multiply(2.0)


def twin(params):
    """The model in transformers' Llama."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = MODEL.config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=EMBED, intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    layer = {"input_layernorm": "pre_self_attention_layer_norm", "post_attention_layernorm": "pre_mlp_layer_norm"}
    layer |= {f"self_attn.{name[0]}_proj": f"self_attention/{name}" for name in ("query", "key", "value", "out")}
    layer |= {"mlp.gate_proj": "mlp/wi_0", "mlp.up_proj": "mlp/wi_1", "mlp.down_proj": "mlp/wo"}
    state = {"model.norm.weight": flat["decoder/decoder_norm/scale"]}
    state |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), flat["token_embedder/embedding"])
    for name, path in layer.items():
        kind = "scale" if path.endswith("norm") else "kernel"
        for index, leaf in enumerate(flat[f"decoder/layers/{path}/{kind}"]):
            state[f"model.layers.{index}.{name}.weight"] = leaf.T
    llama.load_state_dict({name: torch.tensor(np.ascontiguousarray(leaf)) for name, leaf in state.items()})
    return llama


def by_transformers(llama, rows, stop):
    """Outputs for inputs of one length at a time, so that nothing is padded."""
    import torch

    found = []
    for length, group in itertools.groupby(rows, key=len):
        ids = torch.tensor(list(group))
        out = llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=2 * STEPS, num_beams=4, do_sample=False,
            length_penalty=0.0, early_stopping="never", eos_token_id=stop, pad_token_id=VOCAB - 1,
        )  # fmt: skip
        new = out[:, length:].tolist()
        found += [row[: row.index(stop) + 1] if stop in row else row for row in new]
    return found


UNPENALISED = dataclasses.replace(BEAMS, length_penalty=0.0, max_tokens=2 * STEPS)  # in both code bases
OF_THREE_LENGTHS = [row for n in (3, 7, 12) for row in np.random.default_rng(n).integers(0, VOCAB, (34, n)).tolist()]


def test_transformers_finds_the_same_where_nothing_stops():
    """Then all hypotheses end at the limit, and the rules are the same."""
    ours = generate(OF_THREE_LENGTHS, UNPENALISED, stops=())
    assert ours == by_transformers(twin(PARAMS), OF_THREE_LENGTHS, None)


def test_transformers_differs_by_its_rules_alone():
    """Which of the candidates end is decided otherwise: in a few of 102 inputs it matters."""
    ours = generate(OF_THREE_LENGTHS, UNPENALISED, params=SHARP)
    theirs = by_transformers(twin(SHARP), OF_THREE_LENGTHS, STOP)
    other = [i for i, row in enumerate(ours) if row != theirs[i]]
    assert len(other) <= 6 and len({len(row) for row in ours}) > 8
    for i in other:
        args = OF_THREE_LENGTHS[i], UNPENALISED, 2 * STEPS, SHARP
        assert ours[i] == plain_search(*args) and theirs[i] == plain_search(*args, transformers=True)
