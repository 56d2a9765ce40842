"""Settings of generation."""

import dataclasses

from promot_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How outputs are chosen.

    Attributes:
        max_tokens: longest output, the stop token included.
        temperature: 0 is greedy.
        top_k: sample among the so many likeliest tokens; 0 is all.
        top_p: sample among the likeliest tokens that hold this much probability.
        stop: text at which an output ends; it is cut off. An answer of our tasks is one line, so that this default
            saves time and changes no score.
        beams: 1 is greedy or sampled; more are the width of a beam search.
        length_penalty: of beam search: exponent of T5X's brevity penalty `((5 + length) / 6) ** length_penalty`, which
            log-probabilities are divided by.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: str = "\n"
    beams: int = 1
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        if self.max_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                "Decoding needs max_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, "
                f"not {self.max_tokens}, {self.temperature}, {self.top_k}, {self.top_p}."
            )
        if self.beams < 1 or not 0 <= self.length_penalty < float("inf"):
            raise UserError(
                f"Decoding needs beams >= 1 and a finite length_penalty >= 0, not {self.beams}, {self.length_penalty}."
            )
        if self.beams > 1 and self.temperature > 0:
            raise UserError(
                f"A beam search does not sample: set Decoding.beams = 1 or Decoding.temperature = 0, not {self.beams} "
                f"and {self.temperature}."
            )
