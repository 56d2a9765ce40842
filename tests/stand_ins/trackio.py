"""Stands in for the package trackio (0.43): what we call of it, with its names and defaults; keeps what it is given."""

from typing import Any

runs: list["Run"] = []


class Table:
    def __init__(self, columns: list[str] | None = None, data: list[list[Any]] | None = None) -> None:
        self.columns, self.data = columns, data


class Run:
    def __init__(self, **options: Any) -> None:
        self.options = options
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        assert not self.finished
        self.logged.append(metrics)

    def finish(self) -> None:
        self.finished = True


def init(
    project: str,
    name: str | None = None,
    config: dict[str, Any] | None = None,
    resume: str = "never",
    embed: bool = True,
) -> Run:
    assert resume == "allow" and not embed
    runs.append(Run(project=project, name=name, config=config))
    return runs[-1]
