"""Runs questions and rewrites docs/performance.md: `python -m benchmarks [NAME ...] [--pairs N] [--quick]`."""

import argparse
import importlib

from benchmarks import QUESTIONS, performance, question


def main() -> None:
    """Runs the questions that the arguments name, all where there is none; a quick run leaves the page as it is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(QUESTIONS)}; all where none is named")
    parser.add_argument("--pairs", type=int, default=question.PAIRS, help="how often each side runs")
    parser.add_argument("--quick", action="store_true", help="small work, to try the scripts out")
    options = parser.parse_args()
    for name in options.names:
        if name not in QUESTIONS:
            parser.error(f"no question is called {name!r}; there are {', '.join(QUESTIONS)}")
    for name in options.names or QUESTIONS:
        answer = question.answer(importlib.import_module(f"benchmarks.{name}").QUESTION, options.pairs, options.quick)
        if not options.quick:
            performance.keep(answer)
            performance.rewrite()


if __name__ == "__main__":
    main()
