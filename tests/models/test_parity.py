"""Every family and variant against transformers and peft (PyTorch, float32) holding the same random weights.

The models are those of `hf_models.VARIANTS`, read by our own reader. Half of all sequences have a soft prompt
prepended, which peft calls prompt tuning.
"""

import collections
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import peft
import plain_beam
import pytest
import torch
from forward import target_logits

from promot_jax.checkpoints import export
from promot_jax.checkpoints.huggingface import config, load
from promot_jax.decoding.generate import generate
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.models import CONFIGS, build
from promot_jax.models.batch_layout import Tokens
from promot_jax.training import losses

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),  # `generate` gives peft some
]
PROMPT, STEPS = 4, 8
LENGTHS = (1, 4, 9, 13, 20)  # of the 100 inputs: PyTorch gets those of a length together, so that it need not pad
BEAMS = Decoding(max_tokens=STEPS, beams=4, length_penalty=0.6)
# Decoding compiles longest. One of each kind of model: T5 1.0, windows, biases.
QUICK = ("T5 1.0", "Gemma 3", "Qwen 2.5")
DECODED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in hf_models.VARIANTS]


@dataclasses.dataclass
class Pair:
    """A model as we have it and as PyTorch does.

    Attributes:
        model: ours.
        params: of it.
        prompt: `[PROMPT, embed]`.
        plain: the model of transformers.
        prompted: the same in peft's prompt tuning, with the prompt.
    """

    model: Any
    params: Any
    prompt: np.ndarray
    plain: Any
    prompted: Any

    @property
    def vocab(self) -> int:
        return self.model.config.vocab_size

    def inputs(self, ids: list[int], prompted: bool) -> list[int]:
        """Ids with or without the virtual ids of the prompt prepended."""
        return [*range(self.vocab, self.vocab + PROMPT), *ids] if prompted else ids

    def torch_logits(self, prompted: bool, inputs: list[list[int]], targets: list[list[int]]) -> torch.Tensor:
        """Logits `[batch, targets, vocab]` that predict targets after inputs, each of one length."""
        module, ids, aims = (self.prompted if prompted else self.plain), torch.tensor(inputs), torch.tensor(targets)
        if self.model.continues:
            joined = torch.cat([ids, aims[:, :-1]], 1)
            logits = module(input_ids=joined, attention_mask=torch.ones_like(joined)).logits
            return logits[:, -aims.shape[1] :]
        start = torch.zeros_like(aims[:, :1])
        return module(
            input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.cat([start, aims[:, :-1]], 1)
        ).logits


@functools.cache
def pair(name: str) -> Pair:
    plain = hf_models.variant(name)
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        loaded = load.read(Path(folder), Partitioner())
    model = build(CONFIGS[loaded.family](**loaded.config))
    prompt = np.float32(np.random.default_rng(2).normal(size=(PROMPT, model.config.emb_dim)))
    kind = "CAUSAL_LM" if model.continues else "SEQ_2_SEQ_LM"
    settings = peft.PromptTuningConfig(task_type=kind, num_virtual_tokens=PROMPT, num_transformer_submodules=1)
    prompted = peft.get_peft_model(plain, settings).eval()
    prompted.prompt_encoder["default"].embedding.weight.data = torch.tensor(prompt)
    plain.requires_grad_(True)
    return Pair(model, loaded.placed.params, prompt, plain, prompted)


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-4, name: str = "") -> None:
    np.testing.assert_allclose(ours, theirs, tolerance, tolerance * np.abs(theirs).max(), err_msg=name)


# ---- logits, losses, gradients ---------------------------------------------------------------------------------------


def sequences(vocab: int) -> list[Tokens]:
    noise = np.random.default_rng(1)
    return [
        Tokens(noise.integers(0, vocab, noise.integers(1, 21)).tolist(), noise.integers(0, vocab, count).tolist())
        for count in (7, 1, 4, 6, 7, 3)
    ]


@functools.cache
def measured(name: str) -> tuple[list[np.ndarray], list[float], dict[str, np.ndarray], np.ndarray]:
    """Ours: logits and loss of each sequence, alone and in one packed row; gradients of the sum of these losses."""
    both = pair(name)
    rows = [Tokens(both.inputs(row.inputs, i % 2 == 1), row.targets) for i, row in enumerate(sequences(both.vocab))]
    packed = rows[:4]
    batch = both.model.layout([[row] for row in rows] + [packed], 128, 32)
    alone = np.arange(len(rows) + 1) < len(rows)

    def loss(params: Any, prompt: Any) -> Any:
        logits = target_logits(both.model, params, prompt, batch)
        each = jax.vmap(functools.partial(losses.cross_entropy, label_smoothing=0.0))
        row_losses = each(logits, batch["targets"], batch["weights"])
        return (row_losses * alone).sum(), (logits, row_losses)

    gradients, (logits, row_losses) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
        both.params, jnp.asarray(both.prompt)
    )
    ends = np.cumsum([len(row.targets) for row in packed])
    parts = [np.asarray(part)[: len(row.targets)] for row, part in zip(rows, logits, strict=False)]
    parts += [np.asarray(logits)[-1, end - len(row.targets) : end] for row, end in zip(packed, ends, strict=True)]
    family = "decoder" if both.model.continues else "t5"
    by_name = export._sources(family, config.full(family, both.model.config), gradients[0])
    return (
        parts,
        row_losses.tolist()[:-1],
        {key: source.values() for key, source in by_name.items()},
        np.asarray(gradients[1]),
    )


@pytest.mark.parametrize("name", hf_models.VARIANTS)
def test_logits_and_losses(name: str) -> None:
    both = pair(name)
    rows = sequences(both.vocab)
    logits, row_losses, _, _ = measured(name)
    for i, ours in enumerate(logits):
        row = rows[i % len(rows)]
        with torch.no_grad():
            theirs = both.torch_logits(i % 2 == 1, [row.inputs], [row.targets])[0]
            loss = torch.nn.functional.cross_entropy(theirs, torch.tensor(row.targets), reduction="sum")
        assert_close(ours, theirs.numpy())
        if i < len(rows):
            np.testing.assert_allclose(row_losses[i], loss.item(), rtol=1e-4)
    ids = torch.tensor(rows[0].inputs)
    embedded = both.plain.get_input_embeddings()(ids).detach()
    np.testing.assert_array_equal(both.model.input_rows(both.params, jnp.asarray(ids.numpy())), embedded)


@pytest.mark.parametrize("name", hf_models.VARIANTS)
def test_every_gradient(name: str) -> None:
    both = pair(name)
    _, _, gradients, of_prompt = measured(name)
    both.prompted.zero_grad()
    for i, row in enumerate(sequences(both.vocab)):
        logits = both.torch_logits(i % 2 == 1, [row.inputs], [row.targets])[0]
        torch.nn.functional.cross_entropy(logits, torch.tensor(row.targets), reduction="sum").backward()
    assert_close(of_prompt, both.prompted.prompt_encoder["default"].embedding.weight.grad.numpy(), 1e-3)
    theirs = {key: parameter.grad.numpy() for key, parameter in both.plain.named_parameters()}
    assert gradients.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert np.abs(gradient).max() > 0
        assert_close(gradients[key], gradient, 1e-3, key)


# ---- greedy decoding and beams, on 100 inputs ------------------------------------------------------------------------


def hundred(vocab: int) -> list[list[int]]:
    """Odd rows have the prompt prepended, in the same batch."""
    noise = np.random.default_rng(4)
    return [noise.integers(0, vocab, LENGTHS[i // 2 % len(LENGTHS)]).tolist() for i in range(100)]


def ours(name: str, settings: Decoding, stop: int | None = None) -> list[list[int]]:
    both = pair(name)
    tokens = np.zeros((100, max(LENGTHS) + PROMPT + 2), np.int32)
    rows = [both.inputs(row, i % 2 == 1) for i, row in enumerate(hundred(both.vocab))]
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    inputs = {"tokens": tokens, "lengths": np.array([len(row) for row in rows], np.int32)}
    stops, limits = np.arange(both.vocab) == (-1 if stop is None else stop), np.full(100, settings.max_tokens, np.int32)
    prompt, key = jnp.asarray(both.prompt), jax.random.key(0)
    out = generate(both.model, settings, both.params, prompt, inputs, stops, limits, key)
    return [[token for token in row if token >= 0] for row in out.tolist()]


def alike(name: str) -> dict[tuple[bool, int], list[int]]:
    """Indices of the inputs by whether the prompt is prepended, and by length."""
    indices: dict[tuple[bool, int], list[int]] = collections.defaultdict(list)
    for i, row in enumerate(hundred(pair(name).vocab)):
        indices[i % 2 == 1, len(row)].append(i)
    return indices


def transformers_generate(name: str, stop: int | None = None, **options: Any) -> list[list[int]]:
    """Outputs of transformers' own `generate`, peft's with the prompt prepended.

    Without a cache: with one, these versions generate other tokens after a prompt than their own logits say, and do
    not support a T5 whose decoder is deeper than its encoder.
    """
    both, outputs = pair(name), {}
    rows = hundred(both.vocab)
    for (prompted, length), places in alike(name).items():
        ids = torch.tensor([rows[i] for i in places])
        out = (both.prompted if prompted else both.plain).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False,
            eos_token_id=stop, pad_token_id=0, use_cache=False, **options,
        )  # fmt: skip
        new = out[:, length if both.model.continues else 1 :].tolist()
        outputs |= {i: row[: row.index(stop) + 1] if stop in row else row for i, row in zip(places, new, strict=True)}
    return [outputs[i] for i in range(100)]


def torch_scores(name: str) -> Callable[[list[tuple[int, list[int]]]], np.ndarray]:
    """Log-probabilities of the next token by PyTorch, everything computed anew."""
    both = pair(name)
    rows, groups = hundred(both.vocab), alike(name)

    def score(hypotheses: list[tuple[int, list[int]]]) -> np.ndarray:
        table = np.zeros((len(hypotheses), both.vocab), np.float32)
        for (prompted, _), places in groups.items():
            chosen = [n for n, (i, _) in enumerate(hypotheses) if i in places]
            if chosen:
                inputs = [rows[hypotheses[n][0]] for n in chosen]
                targets = [[*hypotheses[n][1], 0] for n in chosen]
                with torch.no_grad():
                    logits = both.torch_logits(prompted, inputs, targets)[:, -1]
                table[chosen] = torch.log_softmax(logits, -1).numpy()
        return table

    return score


def plain_search(name: str, stop: int, settings: Decoding = BEAMS, **options: Any) -> list[list[int]]:
    searches = [plain_beam.search(settings, STEPS, stop, **options) for _ in range(100)]
    return plain_beam.side_by_side(searches, torch_scores(name))


@functools.cache
def greedy(name: str) -> list[list[int]]:
    return ours(name, Decoding(max_tokens=STEPS))


def a_stop(name: str) -> int:
    """The token that most outputs contain after their first one, so that they end at different lengths."""
    return collections.Counter(token for row in greedy(name) for token in set(row[2:])).most_common(1)[0][0]


@pytest.mark.parametrize("name", DECODED)
def test_greedy_ids(name: str) -> None:
    assert greedy(name) == transformers_generate(name)
    assert len({tuple(row) for row in greedy(name)}) > 50  # the rows do not all say the same


@pytest.mark.parametrize("name", DECODED)
def test_beams_find_what_those_of_transformers_do(name: str) -> None:
    """Where nothing stops: all hypotheses are of one length, so that neither rules of ending nor penalties differ."""
    outputs = ours(name, BEAMS)
    assert outputs == transformers_generate(name, num_beams=4)
    assert outputs != greedy(name)


@pytest.mark.parametrize("name", DECODED)
def test_beams_by_the_rules_of_t5x(name: str) -> None:
    """With a stop token and T5X's length penalty, against a plain search on PyTorch's log-probabilities."""
    stop = a_stop(name)
    outputs = ours(name, BEAMS, stop)
    assert outputs == plain_search(name, stop)
    assert len({len(row) for row in outputs}) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "T5 1.1"])
def test_transformers_differs_by_its_rules_alone(name: str) -> None:
    """With a stop token and no penalty, which of the candidates end is decided otherwise: it matters in some inputs."""
    stop, settings = a_stop(name), dataclasses.replace(BEAMS, length_penalty=0.0)
    theirs = transformers_generate(name, stop, num_beams=4, length_penalty=0.0, early_stopping="never")
    assert theirs == plain_search(name, stop, settings, transformers=True)
    outputs = ours(name, settings, stop)
    assert outputs == plain_search(name, stop, settings)
    assert 0 < sum(a != b for a, b in zip(outputs, theirs, strict=True)) < 50
