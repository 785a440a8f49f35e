"""The command line: `rawattn` with its commands, each in a module of its own name."""

from __future__ import annotations

from typing import Any

import click

import rawattn
from rawattn import compiler

from . import bench, cache, check, explain, info, warmup


class _Group(click.Group):
    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except compiler.UnsupportedEnvironment as error:  # one sentence with the remedy; a traceback would hide it
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rawattn.__version__, prog_name="rawattn")
def main() -> None:
    """Attention kernels for NVIDIA Hopper, compiled when they are first needed.

    Exit status of each command: 0 if done, 1 if something failed, and the
    output says what, 2 for a usage error.

    \b
    Examples:
        rawattn check
        rawattn bench prefill --help
    """


main.add_command(bench.bench)
main.add_command(cache.cache)
main.add_command(check.check)
main.add_command(explain.explain)
main.add_command(info.info)
main.add_command(warmup.warmup)
