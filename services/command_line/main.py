"""`distributor`: run a service, look at the settings.

Each command imports its service itself, so that --help is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distributor_node.services.command_line.operator import app as operator_app
from distributor_node.services.command_line.replay import replay
from distributor_node.shared.domain.errors import ConfigurationError

if TYPE_CHECKING:
    from distributor_node.shared.settings import Settings

app = typer.Typer(
    name="distributor",
    help="A distributor node: serves media objects from a bounded cache, filled on demand from storage nodes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at the settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(operator_app, name="operator")
app.command()(replay)

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML file with settings; the environment overrides what it says."
    ),
]


@app.command()
def standalone(config: ConfigFile = None) -> None:
    """Run the whole node in one process, without Redis and RabbitMQ."""
    settings = _load(config)
    from distributor_node.services.standalone.main import run

    sys.exit(run(settings))


@app.command()
def api(config: ConfigFile = None) -> None:
    """Run the HTTP server that clients talk to."""
    settings = _load(config)
    from distributor_node.services.api.main import run

    sys.exit(run(settings))


@app.command()
def fetcher(config: ConfigFile = None) -> None:
    """Run a worker that downloads objects."""
    settings = _load(config)
    from distributor_node.services.fetcher.main import run

    sys.exit(run(settings))


@app.command()
def evictor(config: ConfigFile = None) -> None:
    """Run the evictor, which keeps the volume below its limit; a second one stands by."""
    settings = _load(config)
    from distributor_node.services.evictor.main import run

    sys.exit(run(settings))


@app.command("import-config")
def import_config(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Configuration of the network's existing node, YAML or JSON."),
    ],
) -> None:
    """Print an existing node's configuration as ours; what has no equal is named on standard error.

    Its environment variables (JOYSTREAM_DISTRIBUTOR__…) count as they do there. See docs/migration.md.
    """
    import os

    from distributor_node.services.migration.import_config import import_configuration

    text, remarks = import_configuration(file, os.environ)
    print(text, end="")
    for remark in remarks:
        print(remark, file=sys.stderr)


@config_app.command("check")
def check(config: ConfigFile = None) -> None:
    """Say whether the settings can work; exit code 2 and a reason if they cannot."""
    _load(config)
    print("The settings are in order.")


@config_app.command("show")
def show(config: ConfigFile = None) -> None:
    """Print the settings in force as YAML, secrets redacted."""
    from distributor_node.services.command_line.config import show_settings

    print(show_settings(_load(config)), end="")


@config_app.command("reference")
def reference() -> None:
    """Print all settings, their environment variables, defaults and meanings as Markdown."""
    from distributor_node.services.command_line.config import render_reference

    print(render_reference(), end="")


def _load(config: Path | None) -> Settings:
    from distributor_node.shared.settings import load_settings

    return load_settings(config)


def main() -> None:
    """Entry point of the console command."""
    try:
        app()
    except ConfigurationError as error:
        from distributor_node.shared.runtime.run_service import MISCONFIGURED

        print(f"distributor: these settings cannot work:\n{error}", file=sys.stderr)
        sys.exit(MISCONFIGURED)


if __name__ == "__main__":
    main()
