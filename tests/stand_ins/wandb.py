"""Stands in for the package wandb (0.31): what we call of it, with its names and defaults; keeps what it is given."""

from typing import Any

runs: list["Run"] = []


class Settings:
    def __init__(self, console: str = "auto") -> None:
        self.console = console


class Table:
    def __init__(self, columns: list[str], data: list[list[Any]]) -> None:
        self.columns, self.data = columns, data


class Run:
    def __init__(self, **options: Any) -> None:
        self.options = options
        self.step_metrics: dict[str, str] = {}
        self.logged: list[dict[str, Any]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.step_metrics[name] = step_metric or ""

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert self.exit_code is None
        self.logged.append(data)

    def finish(self, exit_code: int | None = None) -> None:
        self.exit_code = exit_code


def init(
    *,
    project: str | None = None,
    name: str | None = None,
    id: str | None = None,
    resume: str | None = None,
    dir: Any = None,
    config: dict[str, Any] | None = None,
    settings: Settings | None = None,
) -> Run:
    assert resume == "allow" and settings and settings.console == "off"
    if project == "refused":
        raise RuntimeError("No API key configured.\nUse `wandb login`.")
    runs.append(Run(project=project, name=name, id=id, dir=dir, config=config))
    return runs[-1]
