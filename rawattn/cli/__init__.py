"""The command line: `rawattn info` and `rawattn check`."""

from __future__ import annotations

import click

import rawattn

from . import check, info


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rawattn.__version__, prog_name="rawattn")
def main() -> None:
    """Attention kernels for NVIDIA Hopper, compiled when they are first needed."""


main.add_command(check.check)
main.add_command(info.info)
