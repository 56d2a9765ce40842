"""What Linux says of the CPU, in /proc/cpuinfo."""

from pathlib import Path


def lines() -> list[str]:
    """The lines of the file, none where there is no such file."""
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def field(name: str) -> str:
    """A field of the first CPU, such as "model name" or "flags" (its instruction sets); "" where there is none."""
    return next((line.partition(":")[2].strip() for line in lines() if line.startswith(name)), "")
