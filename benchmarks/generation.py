"""Greedy and beam decoding against transformers.generate: the demo's 4-shot prompts, 48 new tokens, stop at a newline.

Both have the model loaded and have generated before. The other program's batches are sorted by length, at its fastest
batch size and way to stop. The same tokens are asked for; beams differ slightly in how length is penalized.
Time: 40 minutes on two cores; --quick --pairs 1: 6 minutes.
"""

from collections.abc import Sequence

from benchmarks import machine, models, prompts
from benchmarks.harness import Case, Ratio, Side
from benchmarks.question import PEAK, SECONDS, Column, Question, main

BEAMS = 4


def cases(quick: bool) -> Sequence[Case]:
    """Greedy and beam search."""
    folder = models.decoder(quick)
    file = prompts.ensure(folder, 1 if quick else 10)
    sizes = (8,) if quick else (8, 16, 32)
    return [_case("greedy", str(folder), str(file), 1, sizes), _case("beam", str(folder), str(file), BEAMS, sizes)]


def _case(name: str, folder: str, file: str, beams: int, sizes: Sequence[int]) -> Case:
    settings = {"folder": folder, "prompts": file, "max_tokens": 48, "beams": beams}
    stops = ("ids", "strings") if beams > 1 else ("ids",)  # each id that ends a beam costs a candidate
    variants = {
        f"batches of {size // (2 if beams > 1 else 1)}, stop {stop}": {
            "batch_size": size // (2 if beams > 1 else 1),
            "stop": stop,
        }
        for size in sizes
        for stop in stops
    }
    theirs, race = "benchmarks.baselines:generate", {"every": 2}
    sides = [
        Side("ours_f32", "benchmarks.ours:generate", settings),
        Side("generate_f32", theirs, settings, variants, race=race),
    ]
    ratios = [Ratio(f"{name}_vs_generate", "seconds", "ours_f32", "generate_f32")]
    if machine.fast_bfloat16():
        sides += [
            Side("ours_bf16", "benchmarks.ours:generate", settings | {"dtype": "bfloat16"}),
            Side("generate_bf16", theirs, settings | {"bfloat16": True}, variants, race=race),
        ]
        ratios += [Ratio(f"{name}_vs_generate_bf16", "seconds", "ours_bf16", "generate_bf16")]
    return Case(name, tuple(sides), tuple(ratios), agree="tokens" if beams == 1 else "", tolerance=0.05)


COLUMNS = {"seconds": SECONDS, "tokens_per_s": Column("tokens per second"), "peak_bytes": PEAK}
QUESTION = Question("generation", cases, COLUMNS)

if __name__ == "__main__":
    main(QUESTION)
