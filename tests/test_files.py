"""Writing all or nothing: what killed and concurrent writers leave.

Reference: POSIX, whose kernel drops a dead process's locks.
"""

import json
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import processes
import pytest

from promot_jax import files
from promot_jax.errors import UserError

WRITER = """
    import sys, time
    from promot_jax import files
    with files.replacing(sys.argv[1]) as made:
        made.mkdir()
        (made / "weights").write_bytes(bytes(1000))
        print("writing", flush=True)
        time.sleep(600)
"""


def hidden(folder: Path) -> list[Path]:
    return list(folder.rglob("weights"))


def test_leftovers_of_killed_writers_are_deleted_and_work_in_progress_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path / "run" / "model")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    writer = processes.start(command, env=environment, stdout=-1)
    assert writer.stdout and writer.stdout.readline() == "writing\n"
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    files.delete_leftovers(tmp_path)
    assert len(hidden(tmp_path)) == 1
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(hidden(tmp_path)) == 1
    monkeypatch.setattr(time, "time", lambda: later - 3600)
    files.delete_leftovers(tmp_path)  # as young as one that is about to be locked
    assert len(hidden(tmp_path)) == 1
    monkeypatch.setattr(time, "time", lambda: later)
    files.delete_leftovers(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.name != "run"] == []


def test_of_two_writers_of_a_folder_one_is_told(tmp_path: Path) -> None:
    def write() -> None:
        with files.replacing(tmp_path / "a") as made:
            made.mkdir()
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "first").write_text("")

    with pytest.raises(UserError, match="was made by another process meanwhile"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a" / "first").exists()


def test_leftovers_of_earlier_versions_are_deleted(tmp_path: Path) -> None:
    """Their names are those of `tempfile` in commit 0979974: `mkstemp` and `mkdtemp` beside what was written."""
    left = [".results.json.a1b2c3_4", "outputs/.step_000004.jsonl.abcdefgh", "prompt/prompt.npy.tmp"]
    left += [".with_prompts-a1b2c3_4/model.safetensors", "t5x/checkpoint_0.tmp-a1b2c3_4/checkpoint"]
    kept = ["results.json", ".results.json", "outputs/step_000004.jsonl", ".mine.json.bak", ".notes-a1b2c3_4/x"]
    for name in left + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    files.delete_leftovers(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    assert not (tmp_path / ".with_prompts-a1b2c3_4").exists()


def test_lists_of_numbers_stand_on_one_line_and_text_stays_as_it_is(tmp_path: Path) -> None:
    value = {"a": [1, -2.5, 1e-07], "b": [[1, 2], [3]], "c": "[\n1,\n2\n]", "d": [], "e": [None, 1]}
    text = files.write(value, tmp_path / "a.json").read_text()
    assert '"a": [1, -2.5, 1e-07],' in text and "    [1, 2],\n    [3]\n" in text
    assert json.loads(text) == value
