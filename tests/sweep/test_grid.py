"""The cells of a comparison: which there are, where each lies, what it runs with, and what is no grid."""

from pathlib import Path
from typing import Any

import pytest

from promot_jax.errors import UserError
from promot_jax.evaluation.settings import Evaluation
from promot_jax.experiments.settings import Experiment
from promot_jax.sweep.grid import Grid
from promot_jax.training.optimizer import Optimizer
from promot_jax.training.settings import Training, Tuning

LENGTHS = {"inputs": 32, "targets": 3}
EXPERIMENT = Experiment("model", "review", "module", LENGTHS, "icl", evaluation=Evaluation(shots=(1,)))
TUNING = Tuning(Training(4, 2, 2, Optimizer(learning_rate=0.02)), Training(4, 2, 2, Optimizer(learning_rate=1e-4)))
RATES = {"prompt_learning_rate": (0.1, 0.2), "learning_rate": (1e-3, 1e-2)}


def grid(workdir: Path, methods: tuple[str, ...], **changes: Any) -> Grid:
    settings: dict[str, Any] = {"seeds": (0,), "varied": {}, "tasks": {}} | changes
    return Grid(workdir, EXPERIMENT, TUNING, methods, **settings)


def folders(one: Grid) -> list[str]:
    return [cell.folder.relative_to(one.workdir).as_posix() for cell in one.cells()]


def test_cells_lie_where_the_demonstration_has_them() -> None:
    assert folders(grid(Path("w"), ("pretrained", "promot"), seeds=(0, 3))) == [
        "pretrained/seed_0", "promot/seed_0", "pretrained/seed_3", "promot/seed_3",
    ]  # fmt: skip


def test_a_method_has_the_rates_of_its_stages() -> None:
    tasks = {"rte": {}, "snli": {}}
    found = folders(grid(Path("w"), ("pretrained", "prompt_tuning", "finetune", "promot"), varied=RATES, tasks=tasks))
    assert found[:9] == [
        "rte/pretrained/seed_0",
        "rte/prompt_tuning/prompt_learning_rate_0.1/seed_0",
        "rte/prompt_tuning/prompt_learning_rate_0.2/seed_0",
        "rte/finetune/learning_rate_0.001/seed_0",
        "rte/finetune/learning_rate_0.01/seed_0",
        "rte/promot/prompt_learning_rate_0.1_learning_rate_0.001/seed_0",
        "rte/promot/prompt_learning_rate_0.1_learning_rate_0.01/seed_0",
        "rte/promot/prompt_learning_rate_0.2_learning_rate_0.001/seed_0",
        "rte/promot/prompt_learning_rate_0.2_learning_rate_0.01/seed_0",
    ]
    assert found[9:] == [folder.replace("rte", "snli", 1) for folder in found[:9]]
    only_model = folders(grid(Path("w"), ("prompt_tuning", "promot"), varied={"learning_rate": (1e-3,)}))
    assert only_model == ["prompt_tuning/seed_0", "promot/learning_rate_0.001/seed_0"]


def test_a_baseline_has_the_hyperparameters_that_are_its_own() -> None:
    varied = {"l2sp_weight": (1, 0.1), "freeze": (1, 2), "learning_rate": (1e-3,)}
    one = grid(Path("w"), ("finetune", "l2sp", "freeze", "prompt_tuning"), varied=varied)
    assert folders(one) == [
        "finetune/learning_rate_0.001/seed_0",
        "l2sp/l2sp_weight_1.0_learning_rate_0.001/seed_0",
        "l2sp/l2sp_weight_0.1_learning_rate_0.001/seed_0",
        "freeze/freeze_1_learning_rate_0.001/seed_0",
        "freeze/freeze_2_learning_rate_0.001/seed_0",
        "prompt_tuning/seed_0",
    ]
    _, strong, weak, low, high, _ = one.cells()
    assert [one.tuning_of(cell).method("l2sp").l2sp_weight for cell in (strong, weak)] == [1.0, 0.1]
    assert str(weak) == "l2sp, review, l2sp_weight 0.1, learning_rate 0.001, seed 0"
    patterns = [one.tuning_of(cell).method("freeze").stages[0].freeze for cell in (low, high)]
    assert patterns[1] == (*patterns[0], "model/(encoder|decoder)/layers_1/.*")
    assert len(patterns[0]) == 2 and patterns[0][1] == "model/(encoder|decoder)/layers_0/.*"


def test_a_cell_of_before_stays_in_its_folder(tmp_path: Path) -> None:
    """Folders of before: `lr_`, `l2sp_`; a cell that has none gets one with today's name."""
    varied = {"l2sp_weight": (0.1, 1.0), "learning_rate": (1e-3,)}
    (tmp_path / "l2sp/l2sp_0.1_lr_0.001/seed_0").mkdir(parents=True)
    (tmp_path / "promot/prompt_lr_0.1/seed_0").mkdir(parents=True)
    assert folders(grid(tmp_path, ("l2sp",), varied=varied)) == [
        "l2sp/l2sp_0.1_lr_0.001/seed_0",
        "l2sp/l2sp_weight_1.0_learning_rate_0.001/seed_0",
    ]
    assert folders(grid(tmp_path, ("promot",), varied={"prompt_learning_rate": (0.1,)})) == [
        "promot/prompt_lr_0.1/seed_0"
    ]


def test_settings_of_a_cell() -> None:
    one = grid(Path("w"), ("promot_1shot",), seeds=(5,), varied=RATES, tasks={"rte": {"inputs": 10, "targets": 2}})
    cell = list(one.cells())[-1]
    experiment, tuning = one.experiment_of(cell), one.tuning_of(cell)
    assert (experiment.task, experiment.seed, experiment.evaluation.exemplar_seed) == ("rte_1shot", 5, 5)
    assert experiment.feature_lengths == {"inputs": 22, "targets": 2}  # room for the exemplar
    assert (tuning.prompt.optimizer.learning_rate, tuning.model.optimizer.learning_rate) == (0.2, 1e-2)
    assert tuning.varied({"prompt_learning_rate": 0.02, "learning_rate": 1e-4}) == TUNING
    plain = grid(Path("w"), ("finetune",))
    (cell,) = plain.cells()
    assert plain.experiment_of(cell) == EXPERIMENT and plain.tuning_of(cell) == TUNING


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("promott",)}, "did you mean 'promot'"),
        ({"methods": ("promott_1shot",)}, "did you mean 'promot'"),
        ({"methods": ("promot_0shot",)}, "Unknown method 'promot_0shot'"),
        ({"methods": ()}, "at least one method"),
        ({"seeds": (1, 1)}, "each only once"),
        ({"seeds": (-1,)}, "not negative"),
        ({"varied": {"learning_rat": (1e-3,)}}, "did you mean 'learning_rate'"),
        ({"varied": {"learning_rate": ()}}, "at least one value of 'learning_rate'"),
        ({"varied": {"learning_rate": (1e-3, 1e-3)}}, "each only once"),
        ({"varied": {"learning_rate": (0.0,)}}, "positive"),
        ({"varied": {"learning_rate": ("1",)}}, "positive"),
        ({"varied": {"freeze": (1.5,)}}, "whole numbers"),
        ({"varied": {"lora": (4,)}}, "No setting 'lora' can be varied"),
        ({"margin": -1.0}, "MARGIN is not negative"),
        ({"report": "../other"}, "REPORT becomes a folder in the comparison's own, which '../other' cannot be"),
        ({"report": "/other"}, "in the comparison's own"),
        ({"report": "."}, "in the comparison's own"),
        ({"report": "promot_1shot/all"}, "for the cells of 'promot_1shot'"),
        ({"report": "rte", "tasks": {"rte": {}}}, "for the cells of 'rte'"),
        ({"tasks": {"rte": {}, "..": {}}}, "A name in TASKS becomes a folder in the comparison's own, which '..'"),
        ({"tasks": {"finetune": {}}}, "for the cells of 'finetune'"),
    ],
)
def test_a_grid_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid(Path("w"), changes.pop("methods", ("promot",)), **changes)
