"""The real pretrained model against PyTorch, its weights read by other code than ours."""

import jax
import numpy as np
import pytest
from forward import target_logits

from promot_jax import assets
from promot_jax.checkpoints import pretrained
from promot_jax.decoding.generate import generate
from promot_jax.decoding.settings import Decoding
from promot_jax.distributed.partitioning import Partitioner
from promot_jax.models.batch_layout import Tokens, decoder_rows

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("compiled_for_speed")]

TEXTS = (
    "Country: Italy\nCapital: Rome\n\nCountry: France\nCapital:",
    "The quick brown fox jumps over the lazy dog, and then",
    "Verb: go\nPast: went\n\nVerb: take\nPast:",
    "A film of 1997 in 12 parts. question: Is this review positive? Is it true or false? answer:",
)


@pytest.fixture(scope="module")
def twin():
    """The same GGUF file, read by the gguf package, in transformers' Llama."""
    gguf = pytest.importorskip("gguf")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reader = gguf.GGUFReader(assets.resolve("asset:smollm2-135m-instruct"))
    arrays = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            tie_word_embeddings=True,
        )
    ).eval()

    def halves(w, heads):
        """From interleaved rotary pairs, as the file has them, to the two halves of transformers."""
        return w.reshape(heads, w.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)

    state = {
        "model.embed_tokens.weight": arrays["token_embd.weight"],
        "model.norm.weight": arrays["output_norm.weight"],
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for i in range(30):
        theirs, ours = f"blk.{i}.", f"model.layers.{i}."
        state[ours + "self_attn.q_proj.weight"] = halves(arrays[theirs + "attn_q.weight"], 9)
        state[ours + "self_attn.k_proj.weight"] = halves(arrays[theirs + "attn_k.weight"], 3)
        state[ours + "self_attn.v_proj.weight"] = arrays[theirs + "attn_v.weight"]
        state[ours + "self_attn.o_proj.weight"] = arrays[theirs + "attn_output.weight"]
        state[ours + "mlp.gate_proj.weight"] = arrays[theirs + "ffn_gate.weight"]
        state[ours + "mlp.up_proj.weight"] = arrays[theirs + "ffn_up.weight"]
        state[ours + "mlp.down_proj.weight"] = arrays[theirs + "ffn_down.weight"]
        state[ours + "input_layernorm.weight"] = arrays[theirs + "attn_norm.weight"]
        state[ours + "post_attention_layernorm.weight"] = arrays[theirs + "ffn_norm.weight"]
    model.load_state_dict({name: torch.tensor(np.array(w)) for name, w in state.items()})
    return model


@pytest.fixture(scope="module")
def base():
    return pretrained.load("asset:smollm2-135m-instruct", Partitioner())


def test_logits_agree_with_pytorch(base, twin):
    import torch

    rows = [list(base.vocabulary.encode(text)) for text in TEXTS]
    batch = decoder_rows([[Tokens(row[:-8], row[-8:])] for row in rows], 32, 8)
    for row, ours in zip(rows, target_logits(base.model, base.params, None, batch), strict=True):
        with torch.no_grad():
            theirs = twin(torch.tensor([row])).logits[0, -9:-1].numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_greedy_generation_agrees_with_pytorch(base, twin):
    import torch

    rows = [list(base.vocabulary.encode(text)) for text in TEXTS]
    tokens = np.zeros((len(rows), 32), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    inputs = {"tokens": tokens, "lengths": np.array([len(row) for row in rows], np.int32)}
    stops, settings = np.zeros(49152, bool), Decoding(max_tokens=12)
    out = generate(base.model, settings, base.params, None, inputs, stops, np.int32(12), jax.random.key(0))
    for row, ours in zip(rows, np.asarray(out), strict=True):
        ids = torch.tensor([row])
        theirs = twin.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert ours.tolist() == theirs[0, len(row) :].tolist()


def test_every_parameter_is_counted(base):
    assert sum(leaf.size for leaf in jax.tree.leaves(base.params)) == 134_515_008
    assert base.leaves == {"loaded": 11, "new": 0, "unused": 0}
