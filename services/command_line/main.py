"""The command `distributor`: runs the services and shows the settings.

Each command imports its service when it is called, so that --help is fast.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distributor_node.services.command_line.init import init
from distributor_node.services.command_line.operator import app as operator_app
from distributor_node.services.command_line.replay import replay
from distributor_node.services.command_line.top import status, top
from distributor_node.shared.domain.errors import ConfigurationError

if TYPE_CHECKING:
    from distributor_node.shared.settings import Settings

app = typer.Typer(
    name="distributor",
    help="A distributor node: serves media objects from a bounded cache, filled on demand from storage nodes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Check and show the settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(operator_app, name="operator")
app.command()(replay)
app.command("init")(init)
app.command("top")(top)
app.command("status")(status)


def _print_version(wanted: bool) -> None:
    if wanted:
        from distributor_node.shared.runtime.process import VERSION

        print(f"distributor {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options of the command itself."""


class Service(StrEnum):
    """What `distributor` runs."""

    STANDALONE = "standalone"
    API = "api"
    FETCHER = "fetcher"
    EVICTOR = "evictor"


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file with settings. The environment overrides it."),
]


@app.command()
def standalone(
    config: ConfigFile = None,
    origin: Annotated[
        str | None,
        typer.Option(
            "--origin",
            metavar="URL",
            help="Front this site: http(s) URL with {id} in place of an object's path.",
        ),
    ] = None,
) -> None:
    """Run the whole node in one process, without Redis and RabbitMQ."""
    settings = _load(config, Service.STANDALONE, origin)
    from distributor_node.services.standalone.main import run

    sys.exit(run(settings))


@app.command()
def api(config: ConfigFile = None) -> None:
    """Run the HTTP server for clients."""
    settings = _load(config, Service.API)
    from distributor_node.services.api.main import run

    sys.exit(run(settings))


@app.command()
def fetcher(config: ConfigFile = None) -> None:
    """Run a fetcher, which downloads objects."""
    settings = _load(config, Service.FETCHER)
    from distributor_node.services.fetcher.main import run

    sys.exit(run(settings))


@app.command()
def evictor(config: ConfigFile = None) -> None:
    """Run the evictor, which keeps the volume below its limit. A second evictor is a standby."""
    settings = _load(config, Service.EVICTOR)
    from distributor_node.services.evictor.main import run

    sys.exit(run(settings))


@app.command("import-config")
def import_config(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="Configuration file of the network's existing node, YAML or JSON. Without it: the environment alone.",
        ),
    ] = None,
    accept_query_node: Annotated[
        bool,
        typer.Option("--accept-query-node", help="Use endpoints.queryNode as the squid if none is named."),
    ] = False,
) -> None:
    """Print an existing node's configuration as settings of this node. Remarks go to standard error.

    Its environment variables (JOYSTREAM_DISTRIBUTOR__…) have the same effect as there. See docs/migration.md.
    """
    import os

    from distributor_node.services.migration import import_configuration

    text, remarks = import_configuration(file, os.environ, accept_query_node=accept_query_node)
    print(text, end="")
    for remark in remarks:
        print(remark, file=sys.stderr)


@config_app.command("check")
def check(
    config: ConfigFile = None,
    service: Annotated[
        Service | None,
        typer.Option("--for", help="The service to check them for. Default: standalone, or all the others."),
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Reach the catalog too: the squid, or the origin's server.")
    ] = False,
) -> None:
    """Check the settings, the manifest and other files that they name. If they are invalid, print the reasons and exit
    with code 2."""
    from distributor_node.services.command_line.config import check_catalog, check_files, check_secret

    settings = _load(config, service)
    if service is None:
        settings.check_for(Service.STANDALONE if settings.in_memory else Service.API)
    remarks = check_secret(settings)
    remarks += check_files(settings, online=online)
    for remark in [*remarks, *check_catalog(settings, online=online)]:
        print(remark, file=sys.stderr)
    if service is not None:
        print(f"The settings are valid for {service}.")
    elif settings.in_memory:
        print("The settings are valid for standalone. The separate services need Redis and RabbitMQ.")
    else:
        print("The settings are valid for api, fetcher and evictor.")


@config_app.command("show")
def show(config: ConfigFile = None) -> None:
    """Print the effective settings as YAML, without secrets."""
    from distributor_node.services.command_line.config import show_settings

    print(show_settings(_load(config)), end="")


@config_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of a settings file, for editors."""
    from distributor_node.services.command_line.config import render_schema

    print(render_schema(), end="")


@config_app.command("reference")
def reference() -> None:
    """Print all settings with their environment variables, defaults and meanings, as Markdown."""
    from distributor_node.services.command_line.config import render_reference

    print(render_reference(), end="")


def _load(config: Path | None, service: Service | None = None, origin: str | None = None) -> Settings:
    import os

    from distributor_node.shared.settings import load_settings

    environment = dict(os.environ)
    if origin is not None:
        environment |= {"DISTRIBUTOR_CATALOG__KIND": "origin", "DISTRIBUTOR_CATALOG__ORIGIN": origin}
    try:
        settings = load_settings(config, environment)
    except ConfigurationError as error:
        if config is not None or any(name.startswith("DISTRIBUTOR_") for name in environment):
            raise
        raise ConfigurationError(
            f"{error}\nNo settings were given: name a settings file with --config; `distributor init` writes one"
        ) from error
    if service is not None:
        settings.check_for(service)
    return settings


def main() -> None:
    """Run the console command."""
    try:
        app()
    except ConfigurationError as error:
        from distributor_node.shared.runtime.run_service import MISCONFIGURED

        print(f"distributor: invalid settings or arguments:\n{error}", file=sys.stderr)
        sys.exit(MISCONFIGURED)


if __name__ == "__main__":
    main()
