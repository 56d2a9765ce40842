"""Workers that stand in for the programs of a benchmark."""

import time


def work(seconds: float = 0.0, fail: bool = False, same: float = 1.0) -> dict[str, float]:
    if fail:
        raise ValueError("no compiler here")
    time.sleep(seconds)
    return {"seconds": seconds, "same": same}
