"""Settings of generation: greedy, sampled, or beam search."""

import dataclasses

from promot_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Settings of generation."""

    max_tokens: int = 16  # longest output, the stop token included
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # sample among so many likeliest tokens; 0 is all
    top_p: float = 1.0  # sample among the likeliest tokens with this total probability
    # Text at which an output ends; it is cut off. Answers of the tasks here are one line, so this saves time only.
    stop: str = "\n"
    beams: int = 1  # width of a beam search; 1 is greedy or sampled
    length_penalty: float = 0.6  # of beam search, T5X's: log-probabilities are divided by `((5 + length) / 6) ** it`

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
