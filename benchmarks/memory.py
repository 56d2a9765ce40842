"""Memory of this process, from Linux's /proc: the peak since its start, and its growth over the loaded model."""

from pathlib import Path

_PROCESS = Path("/proc/self")


class Peak:
    """Counts from where it is made: after the model is loaded, before the work that is measured."""

    def __init__(self) -> None:
        """Starts a new peak."""
        self._before = _field("VmHWM")
        (_PROCESS / "clear_refs").write_text("5")  # resets VmHWM to what is in use
        self._loaded = _field("VmRSS")

    def measures(self) -> dict[str, float]:
        """`peak_bytes` since the start of the process, `growth_bytes` of the peak since then over what was in use."""
        peak = _field("VmHWM")
        return {"peak_bytes": max(peak, self._before), "growth_bytes": peak - self._loaded}


def _field(name: str) -> float:
    """A size in /proc/self/status, in bytes."""
    line = next(line for line in (_PROCESS / "status").read_text("utf-8").splitlines() if line.startswith(name + ":"))
    return float(line.split()[1]) * 1024
