"""lm-eval's tasks on any checkpoint, with or without its soft prompt.

    python -m promot_jax.lm_eval --model promot_jax --model_args checkpoint=runs/promot,prompt=runs/promot \
        --tasks hellaswag,gsm8k

lm-eval (0.4) finds models in its own registry and imports no other package. This module registers `promot_jax` there
and runs lm-eval's command with the arguments that it was given; from Python, import it and call
`lm_eval.simple_evaluate(model="promot_jax", model_args=...)`.

Texts become tokens as in lm-eval's `hf` model, so that scores agree with those of an exported folder. lm-eval's
`batch_size` and `device` have no effect: `tokens_per_batch` is the size of batches, and JAX chooses the devices.
"""

import logging
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import promot_jax as pj
from promot_jax.data.vocabularies.controls import unmarked
from promot_jax.decoding.settings import Decoding
from promot_jax.errors import UserError
from promot_jax.evaluation.settings import Evaluation
from promot_jax.experiments.log_likelihood import log_likelihoods
from promot_jax.models.batch_layout import Tokens
from promot_jax.params import soft_prompts

MAX_GEN_TOKS = 256  # longest output where a task names none, as in lm-eval's other models
_DEFAULT_LENGTH = 2048  # of models whose context has no bound, as there
_log = logging.getLogger(__name__)
_Scored = list[tuple[float, bool]]


@register_model("promot_jax")
class PromotLM(TemplateLM):
    """A model of this package for lm-eval."""

    def __init__(
        self,
        checkpoint: str,
        prompt: str = "",
        dtype: str = "float32",
        vocabulary: str = "",
        max_length: int | None = None,
        tokens_per_batch: int = 4096,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Loads the model.

        Args:
            checkpoint: as `promot_jax.load` takes it.
            prompt: a trained soft prompt, which is then prepended to every input; "" for the plain model.
            dtype: of activations, "float32" or "bfloat16".
            vocabulary: path of the tokenizer, for a checkpoint that carries none.
            max_length: of input and output in tokens, without the soft prompt; None for the model's context.
            tokens_per_batch: tokens that are computed together.
            batch_size: lm-eval's, which is not used; likewise `max_batch_size` and `device`.
            max_batch_size: see there.
            device: see there.

        Raises:
            UserError: nothing at a path, or a prompt of another model.
        """
        super().__init__()
        del batch_size, max_batch_size, device
        self.model = pj.load(checkpoint, prompt=prompt, dtype=dtype, vocabulary=vocabulary)
        self.backend = "causal" if self._family.continues else "seq2seq"
        self._tokens_per_batch, self._checkpoint = tokens_per_batch, checkpoint
        self._prompt = self.model.only_prompt()
        ids = soft_prompts.layout(self.model.prompts, self._family.config.vocab_size)
        self._virtual = ids[self._prompt].tolist() if self._prompt else []
        context = self._family.config.max_length
        self.max_length = max_length or (context - len(self._virtual) if context else _DEFAULT_LENGTH)

    @property
    def _family(self) -> Any:
        return self.model.base.model

    @property
    def eot_token_id(self) -> int:
        """End of sequence."""
        return self.model.base.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Precedes a text that is scored from its first token on: beginning of sequence where there is one."""
        bos_id = self.model.base.vocabulary.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches."""
        return self._checkpoint.replace("/", "__")

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """Raises UserError: control tokens in a text are text here."""
        raise UserError(
            "--apply_chat_template needs control tokens in texts, which this model reads as text: export the model and "
            "use lm-eval's hf model."
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """None, where no chat template is asked for; raises UserError as `apply_chat_template` otherwise."""
        return self.apply_chat_template([]) if chat_template else None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, framed as the model reads an input, without its soft prompt."""
        del kwargs
        vocabulary = self.model.base.vocabulary
        ids = vocabulary.encode(unmarked(string))
        if add_special_tokens is False:
            return list(ids)
        start = [vocabulary.bos_id] if vocabulary.add_bos and vocabulary.bos_id is not None else []
        end = [] if self._family.continues else [vocabulary.eos_id]
        return [*start, *ids, *end]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any) -> _Scored:
        """Log-likelihood of each continuation, and whether greedy decoding would give it."""
        del kwargs
        pairs = []
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation) if self._family.continues else self.max_length
            if room < 1:
                raise UserError(f"A continuation of {len(continuation)} tokens does not fit max_length.")
            pairs.append(Tokens([*self._virtual, *context[-room:]], continuation))
        table, params = soft_prompts.table(self.model.prompts), self.model.base.params
        scored = log_likelihoods(self._family, params, table, pairs, self.model.partitioner, self._tokens_per_batch)
        for (texts, *_), answer in zip(requests, scored, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return scored

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context; each has the soft prompt prepended."""
        pairs: list[tuple[Any, list[int], list[int]]] = []
        owners = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            made = [(None, *make_disjoint_window(window)) for window in windows]
            pairs += made
            owners += [index] * len(made)
        totals = [0.0] * len(requests)
        for index, (score, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            totals[index] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Outputs, each cut at the first of its stop texts; requests of equal settings are decoded together."""
        groups: dict[tuple[Decoding, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(index)
        outputs = [""] * len(requests)
        for (decoding, until), members in groups.items():
            texts = [self._shortened(requests[index].args[0], decoding.max_tokens) for index in members]
            for index, output in zip(members, self._generate(texts, decoding), strict=True):
                outputs[index] = postprocess_generated_text(output, list(until), None)
                self.cache_hook.add_partial("generate_until", requests[index].args, outputs[index])
        return outputs

    def _generate(self, texts: list[str], decoding: Decoding) -> list[str]:
        """Raw outputs."""
        from promot_jax.evaluation.sampler import Request, Sampler

        settings = Evaluation(decoding=decoding, tokens_per_batch=self._tokens_per_batch)
        sampler = Sampler(self.model.base, settings, self.model.partitioner)
        return sampler.ask(self.model.params, [Request(text, self._prompt) for text in texts])

    def _shortened(self, text: str, output: int) -> str:
        """A context without its beginning where it would leave the output no room, as in lm-eval's other models."""
        room = self.max_length - (output if self._family.continues else 0)
        framing = len(self.tok_encode(""))
        ids = self.tok_encode(text, add_special_tokens=False)
        if room <= framing:
            raise UserError(f"An output of {output} tokens (max_gen_toks) leaves no room in {self.max_length} tokens.")
        if len(ids) + framing <= room:
            return text
        _log.warning("A context of %d tokens is cut to its last %d.", len(ids), room - framing)
        return self.model.base.vocabulary.decode(ids[framing - room :])


def _settings(options: dict[str, Any]) -> tuple[Decoding, tuple[str, ...]]:
    """How a request is decoded, and the texts that end its output."""
    given = normalize_gen_kwargs(options, MAX_GEN_TOKS)
    until = tuple(given.pop("until", ()))
    known = {"max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "num_beams"}
    if unknown := given.keys() - known:
        raise UserError(
            f"The generation setting {min(unknown)!r} is not known here; known are {', '.join(sorted(known))}."
        )
    sampled = bool(given.get("do_sample"))
    decoding = Decoding(
        max_tokens=given["max_gen_toks"],
        temperature=float(given.get("temperature", 0.0)) if sampled else 0.0,
        top_k=int(given.get("top_k", 0)) if sampled else 0,
        top_p=float(given.get("top_p", 1.0)) if sampled else 1.0,
        stop=until[0] if until else "",
        beams=int(given.get("num_beams", 1)),
    )
    return decoding, until


def main() -> None:
    """Runs lm-eval's command."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
