"""`rawattn cache`: look at the compiled kernels, remove them, carry them to another machine."""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path
from typing import BinaryIO

import click

from rawattn import compiler


@click.group()
def cache() -> None:
    """List, clear, export and import the compiled kernels.

    A kernel is found only where rawattn's source, its compile options and the
    version of NVRTC are those it was compiled with. Exit status of each: 0 if
    done, 1 if not, 2 for a usage error.

    \b
    Example, warm up in one image and use the kernels in another:
        rawattn warmup --model llama-3.1-8b
        rawattn cache export kernels.tar
        rawattn cache import kernels.tar
    """


@cache.command("list")
def list_() -> None:
    """Show each file of the cache, its size and its age.

    \b
    Example:
        rawattn cache list
    """
    now = time.time()
    cubins = total = 0
    for path in compiler.cache_files():
        size, modified, state = _look(path)
        if state == "":
            cubins, total = cubins + 1, total + size
        click.echo(f"{path.name:<62} {size:>9,}  {_age(now - modified):>6}  {state}".rstrip())
    click.echo(f"{cubins} cubins, {total:,} bytes in {compiler.cache_dir()}")


@cache.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(yes: bool) -> None:
    """Remove the compiled kernels, and no file that is not rawattn's.

    \b
    Example:
        rawattn cache clear --yes
    """
    ours = [path for path in compiler.cache_files() if compiler.is_cache_file(path)]
    total = sum(path.lstat().st_size for path in ours)
    what = f"{len(ours)} files, {total:,} bytes, from {compiler.cache_dir()}"
    if ours and not yes:
        click.confirm(f"Remove {what}?", abort=True)
    for path in ours:
        try:
            path.unlink(missing_ok=True)  # another process may clear, too
        except OSError as error:
            raise click.ClickException(f"{path} cannot be removed ({error.strerror})") from error
    click.echo(f"removed {what}")


@cache.command()
@click.argument("file", type=click.File("wb", lazy=True), metavar="FILE.tar")
def export(file: BinaryIO) -> None:
    """Write the valid compiled kernels to FILE.tar, or - for stdout.

    The same kernels give the same bytes.

    \b
    Example:
        rawattn cache export kernels.tar
    """
    cubins = {path.name: path.read_bytes() for path in compiler.cache_files() if _look(path)[2] == ""}
    if not cubins:
        raise click.ClickException(f"{compiler.cache_dir()} holds no valid cubins to export: run rawattn warmup first")
    try:
        with tarfile.open(fileobj=file, mode="w|") as tar:
            for name, data in cubins.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        file.flush()
    except OSError as error:
        raise click.ClickException(f"{file.name} cannot be written ({error.strerror})") from error
    click.echo(f"exported {len(cubins)} cubins, {sum(map(len, cubins.values())):,} bytes", err=True)


@cache.command("import")
@click.argument("file", type=click.File("rb"), metavar="FILE.tar")
def import_(file: BinaryIO) -> None:
    """Add the kernels of FILE.tar, or - for stdin, to the cache.

    If anything in it is not a valid cubin, nothing is written. That shows damage,
    not intent: import only what comes from someone whose code you would run.

    \b
    Example:
        rawattn cache import kernels.tar
    """
    cubins: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:  # not r|*: a compressed one could hold any number of bytes
            for member in tar:
                cubins[member.name] = _checked(tar, member)
    except (tarfile.TarError, OSError) as error:
        raise click.ClickException(f"{file.name} is not an uncompressed tar archive ({error}); nothing is imported") from error
    for name, data in cubins.items():
        compiler.store(name, data)
    click.echo(f"imported {len(cubins)} cubins, {sum(map(len, cubins.values())):,} bytes, into {compiler.cache_dir()}")


def _checked(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The content of a member that is a valid cubin."""
    stream = tar.extractfile(member) if member.isfile() and not member.issparse() else None
    if stream is None:
        problem = "is not a plain file"
    elif not compiler.is_cubin_name(member.name):
        problem = "does not have the name of a cubin, NAME.KEY.cubin without a folder"
    elif not compiler.is_sealed(member.name, data := stream.read()):
        problem = "is damaged, or no cubin of rawattn"
    else:
        return data
    raise click.ClickException(f"The member {member.name!r} {problem}; nothing is imported")


def _look(path: Path) -> tuple[int, float, str]:
    """Bytes, time of the last change, and "" for a valid cubin, else what it is."""
    try:
        status = path.lstat()
        if not compiler.is_cache_file(path):
            state = "not rawattn's"
        elif not compiler.is_cubin_name(path.name):
            state = "unfinished"
        else:
            state = "" if compiler.is_sealed(path.name, path.read_bytes()) else "damaged"
    except OSError as error:
        raise click.ClickException(f"{path} cannot be read ({error.strerror})") from error
    return status.st_size, status.st_mtime, state


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
