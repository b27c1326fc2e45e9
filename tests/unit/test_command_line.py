"""The console command: settings are checked, shown without secrets, and documented."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from distributor_node.services.command_line.config import default_text, render_reference, render_schema
from distributor_node.services.command_line.main import app
from distributor_node.services.demo.squid import SquidFaults, TestSquid
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.runtime.process import VERSION
from distributor_node.shared.settings import Settings, load_settings
from distributor_node.shared.settings.load import all_settings, check_settings, variable_of
from tests.preloaded import run_preloaded

ROOT = Path(__file__).parents[2]


def distributor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_preloaded(arguments, {"PATH": "/usr/bin:/bin", **environment}, ROOT)


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "catalog: {kind: origin, origin: 'https://reader:hunter2@site.example/{id}'}\n"
        "state_store: {url: 'redis://:hunter2@store.example/0'}\n"
        "job_queue: {url: 'amqp://node:hunter2@queue.example/'}\n"
        "storage: {limit: 500G}\n"
    )
    return file


@pytest.mark.parametrize("command", ["standalone", "api", "fetcher", "evictor"])
def test_every_service_takes_a_settings_file(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"NO_COLOR": "1", "COLUMNS": "120"})
    assert result.exit_code == 0
    assert "--config" in result.output


def test_help_imports_no_service() -> None:
    script = (
        "import sys; import distributor_node.services.command_line.main;"
        " print([m for m in ('sanic', 'aio_pika', 'redis', 'httpx')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_check_says_yes(settings_file: Path) -> None:
    done = distributor("config", "check", "--config", str(settings_file))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", [("config", "check"), ("config", "show"), ("api",), ("standalone",)])
def test_wrong_settings_are_a_clear_message_and_exit_code_2(
    command: tuple[str, ...], settings_file: Path
) -> None:
    done = distributor(*command, "--config", str(settings_file), DISTRIBUTOR_FETCH__LEASE="5")
    assert done.returncode == 2
    assert "fetch.lease (5 s) must be at least twice fetch.lease_renewal" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_settings_file_that_is_not_there(tmp_path: Path) -> None:
    done = distributor("config", "check", "--config", str(tmp_path / "none.yaml"))
    assert done.returncode == 2
    assert "none.yaml cannot be read" in done.stderr


def test_show_is_a_settings_file_without_secrets(settings_file: Path) -> None:
    done = distributor(
        "config", "show", "--config", str(settings_file), DISTRIBUTOR_STORAGE__HIGH_WATERMARK="0.97"
    )
    shown = yaml.safe_load(done.stdout)
    assert shown["storage"]["limit"] == "500G"
    assert shown["storage"]["high_watermark"] == 0.97
    assert "hunter2" not in done.stdout


def test_the_configuration_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == render_reference(), "run: make reference"


def test_relative_paths_follow_the_working_directory_as_the_reference_says(
    settings_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings_file.write_text(settings_file.read_text().replace("{limit", "{path: volume, limit"))
    path = load_settings(settings_file).storage.path
    assert path.absolute() == tmp_path / "elsewhere" / "volume"
    assert "A relative path is relative to the working directory" in " ".join(render_reference().split())


def test_the_schema_is_up_to_date() -> None:
    assert (ROOT / "docs" / "settings.schema.json").read_text() == render_schema(), "run: make reference"


@pytest.mark.parametrize(
    ("fields", "valid"),
    [
        ({}, True),
        ({"storage": {"limit": "500G"}, "buckets": ["0:1"], "log": {"level": "debug"}}, True),
        ({"storage": {"limit": 1000000, "max_cached_item": None}}, True),
        ({"storage": {"limit": "much"}}, False),
        ({"storage": {"limt": "5G"}}, False),
        ({"public_api": {"port": 65536}}, False),
        ({"operator_api": {"secret": "short"}}, False),
    ],
)
def test_the_schema_says_what_is_valid(fields: dict[str, object], valid: bool) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(render_schema()))
    validator.check_schema(validator.schema)
    assert validator.is_valid(fields) is valid
    assert "**********" not in render_schema()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], {"catalog": {"kind": "manifest", "manifest": "/etc/distributor/manifest.yaml"}}),
        (
            [
                "--catalog",
                "joystream",
                "--worker-id",
                "7",
                "--limit",
                "5T",
                "--path",
                "/srv/media",
                "--servers",
            ],
            {
                "worker_id": 7,
                "catalog": {"kind": "joystream", "squid": "http://localhost:4352/graphql"},
                "storage": {"path": "/srv/media", "limit": "5T"},
                "state_store": {"url": "redis://localhost:6379/0"},
                "job_queue": {"url": "amqp://localhost:5672/"},
            },
        ),
        (
            ["--catalog", "origin", "--source", "https://site.example/{id}", "--standalone"],
            {"catalog": {"kind": "origin", "origin": "https://site.example/{id}"}},
        ),
    ],
)
def test_init_writes_settings_that_work(
    tmp_path: Path, options: list[str], wanted: dict[str, object]
) -> None:
    file = tmp_path / "settings.yaml"
    done = distributor("init", str(file), *options)
    assert (done.returncode, done.stderr) == (0, "")
    written = yaml.safe_load(file.read_text())
    assert written == {"storage": {"path": "/var/lib/distributor", "limit": "20G"}} | wanted
    assert file.stat().st_mode & 0o777 == 0o600  # passwords may be added
    assert distributor("config", "check", "--config", str(file)).returncode == 0
    assert jsonschema.Draft202012Validator(json.loads(render_schema())).is_valid(written)


def test_init_mentions_every_setting_and_each_can_be_uncommented(tmp_path: Path) -> None:
    distributor("init", str(tmp_path / "settings.yaml"))
    text = (tmp_path / "settings.yaml").read_text()
    without_default = re.sub(r"^ *#\w+:$\n(?! )", "", text, flags=re.MULTILINE)
    uncommented = yaml.safe_load(re.sub(r"^( *)#(?=\w+:( \S|$))", r"\1", without_default, flags=re.MULTILINE))
    given = {
        f"{name}.{inner}" for name, group in uncommented.items() if isinstance(group, dict) for inner in group
    } | {name for name, value in uncommented.items() if not isinstance(value, dict)}
    defaults = {path for path, field in all_settings().items() if default_text(field)}
    assert defaults <= given


def test_init_overwrites_nothing_and_refuses_what_cannot_work(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    done = distributor("init", str(file), "--limit", "much")
    assert (done.returncode, file.exists()) == (2, False)
    assert "storage.limit: expected a number and a unit" in done.stderr
    file.write_text("mine")
    done = distributor("init", str(file))
    assert (done.returncode, file.read_text()) == (2, "mine")
    assert "settings.yaml: expected a file that can be made, got: File exists" in done.stderr


def test_init_asks_at_a_terminal(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "distributor_node.services.command_line",
        "init",
        str(tmp_path / "s.yaml"),
    ]
    controller, terminal = pty.openpty()
    environment = {"PATH": "/usr/bin:/bin", "NO_COLOR": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=terminal, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        for question, reply in (
            ("Kind of catalog", "joystream"),
            ("GraphQL endpoint", ""),
            ("Worker id", "9"),
            ("Directory", "/srv/media"),
            ("Storage limit", "1T"),
            ("Redis and RabbitMQ", "y"),
        ):
            shown = ""
            while question not in shown:
                shown += os.read(controller, 1000).decode()
            os.write(controller, f"{reply}\n".encode())
        assert process.wait(30) == 0
    os.close(controller)
    written = yaml.safe_load((tmp_path / "s.yaml").read_text())
    assert (written["worker_id"], written["storage"]) == (9, {"path": "/srv/media", "limit": "1T"})
    assert written["state_store"]["url"].startswith("redis://")


def test_version() -> None:
    done = distributor("--version")
    assert (done.returncode, done.stdout) == (0, f"distributor {VERSION}\n")


def test_shell_completion_is_offered() -> None:
    done = distributor("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "complete -o default" in done.stdout


def test_every_setting_has_a_meaning() -> None:
    rows = [line for line in render_reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert not [row for row in rows if row.endswith("|  |")]


def test_a_documented_variable_takes_effect(settings_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTRIBUTOR_PUBLIC_API__PORT", "4000")
    settings: Settings = load_settings(settings_file)
    assert settings.public_api.port == 4000


@pytest.mark.parametrize(
    ("section", "name", "value", "told"),
    [
        ("state_store", "operation_timeout", 10, "must be less than evictor.leadership (10 s)"),
        ("state_store", "operation_timeout", 15, "must be less than fetch.lease (15 s)"),
        ("job_queue", "publish_timeout", 10, "job_queue.publish_timeout (10 s) must be less than 10 s"),
        ("evictor", "min_idle", 0.5, "evictor.min_idle: expected at least 1, got 0.5"),
    ],
)
def test_time_limits_that_defeat_each_other_are_refused(
    section: str, name: str, value: float, told: str
) -> None:
    fields = {section: {name: value}, "catalog": {"kind": "manifest", "manifest": "m.yaml"}}
    with pytest.raises(ConfigurationError, match=re.escape(told)):
        check_settings(fields)


def test_import_config_from_variables_alone() -> None:
    done = distributor(
        "import-config", JOYSTREAM_DISTRIBUTOR__WORKER_ID="3", JOYSTREAM_DISTRIBUTOR__ID="undefined"
    )
    assert done.returncode == 0
    imported = yaml.safe_load(done.stdout)
    assert imported["worker_id"] == 3
    assert "id" not in imported
    done = distributor("import-config")
    assert done.returncode == 2
    assert "expected at least one of id, endpoints.storageSquid" in done.stderr
    assert not done.stdout


MANIFEST = 'version: 1\nbase_urls: ["http://a.example/"]\nobjects:\n  - {id: "1", size: 5}\n'


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "manifest.yaml"
    path.write_text(MANIFEST)
    return path


def check(manifest: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    catalog = {"DISTRIBUTOR_CATALOG__KIND": "manifest", "DISTRIBUTOR_CATALOG__MANIFEST": str(manifest)}
    return distributor("config", "check", *options, **{**catalog, **variables})


def test_check_reads_the_manifest_and_names_the_entry_that_is_wrong(manifest: Path) -> None:
    done = check(manifest)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("The settings are valid for standalone.")
    manifest.write_text(MANIFEST + '  - {id: "2", size: -1}\n')
    done = check(manifest)
    assert (done.returncode, done.stdout) == (2, "")
    assert "line 5, object 2: size: expected a number of bytes, got -1" in done.stderr
    manifest.write_text(MANIFEST + "  - {id: [}\n")
    assert "line 5: invalid YAML" in check(manifest).stderr


def test_check_without_the_manifest_says_so(manifest: Path) -> None:
    manifest.unlink()
    done = check(manifest)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"catalog.manifest: expected a file, got {manifest}: {manifest.parent} is here" in done.stderr
    assert check(manifest, "--online").returncode == 2


def test_check_on_another_machine_says_that_the_manifest_was_not_checked(tmp_path: Path) -> None:
    """Neither the file nor its directory is there."""
    elsewhere = tmp_path / "etc" / "manifest.yaml"
    done = check(elsewhere)
    assert done.returncode == 0
    assert f"catalog.manifest: expected a file that can be read, got {elsewhere}" in done.stderr
    assert "is not here, so it was not checked" in done.stderr
    done = check(elsewhere, "--online")
    assert done.returncode == 2
    assert "No such file" in done.stderr


FLEET = {
    "DISTRIBUTOR_PEERS__URLS": "http://a.example,http://b.example",
    "DISTRIBUTOR_PEERS__OWN_URL": "http://a.example",
}
PATHS = [name for name, setting in all_settings().items() if setting.annotation in (Path, Path | None)]
MADE = ("storage.path", "metrics.multiprocess_dir", "log.access_file")  # by the services


@pytest.mark.parametrize("name", PATHS)
def test_check_names_every_setting_whose_file_is_unusable(name: str, manifest: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    wrong = tmp_path if name in ("catalog.manifest", "log.access_file", "peers.secret_file") else file
    done = check(manifest, **{**FLEET, variable_of(name): str(wrong)})
    assert re.search(rf"^{name}:? .*{re.escape(str(wrong))}", done.stderr, re.MULTILINE), done.stderr
    # The node works without another node's statistics.
    assert done.returncode == (0 if name == "storage.import_cache_state" else 2)
    assert "Traceback" not in done.stderr


def test_check_says_which_files_are_not_here(manifest: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "none" / "here")
    done = check(manifest, **FLEET, **{variable_of(name): missing for name in PATHS if "catalog" not in name})
    assert done.returncode == 0
    # The services make the directories of their own.
    made = {"storage.path", "metrics.multiprocess_dir", "catalog.manifest"}
    assert {line.partition(":")[0] for line in done.stderr.splitlines()} == set(PATHS) - made


def test_check_reads_the_secret_of_a_fleet(manifest: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    variables = {**FLEET, "DISTRIBUTOR_PEERS__SECRET_FILE": str(secret)}
    assert "so it was not checked" in check(manifest, **variables).stderr
    assert check(manifest, "--online", **variables).returncode == 2
    secret.write_text("too short\n")
    done = check(manifest, **variables)
    assert done.returncode == 2
    assert f"peers.secret_file: expected at least 16 bytes in {secret}, got 9" in done.stderr
    secret.write_text("sixteen bytes, or more\n")
    done = check(manifest, **variables)
    assert (done.returncode, done.stderr) == (0, "")


def test_check_says_that_a_log_cannot_be_written(manifest: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = check(manifest, DISTRIBUTOR_LOG__ACCESS_FILE=str(file / "access.log"))
    assert done.returncode == 2
    assert f"{file} is no directory" in done.stderr
    long = tmp_path / ("a" * 300)
    done = check(manifest, DISTRIBUTOR_LOG__ACCESS_FILE=str(long))
    assert done.returncode == 2
    assert f"log.access_file: {long} cannot be written: File name too long" in done.stderr


@pytest.fixture
def restricted(tmp_path: Path) -> None:
    """Skip where modes of files bind nothing, as for root."""
    closed = tmp_path / "restricted"
    closed.mkdir(mode=0)
    if os.access(closed, os.R_OK):
        pytest.skip("this user may read and write everything")


@pytest.mark.usefixtures("restricted")
@pytest.mark.parametrize(("name", "mode"), [(name, 0) for name in PATHS] + [(name, 0o500) for name in MADE])
def test_check_remarks_what_another_user_may_be_allowed_to_do(
    name: str, mode: int, manifest: Path, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    file = closed / "file"
    if mode == 0:
        file.touch()
    closed.chmod(mode)
    done = check(manifest, **FLEET, **{variable_of(name): str(file)})
    closed.chmod(0o700)
    assert done.returncode == (2 if name == "peers.secret_file" else 0), done.stderr
    assert re.search(rf"^{name}: {re.escape(str(file))} cannot be .*", done.stderr, re.MULTILINE), done.stderr
    assert ("cannot be read" not in done.stderr) == (name in MADE)


@pytest.mark.usefixtures("restricted")
def test_check_says_what_this_user_may_not_use(manifest: Path, tmp_path: Path) -> None:
    secret, volume = tmp_path / "secret", tmp_path / "volume"
    secret.write_text("sixteen bytes, or more\n")
    secret.chmod(0)
    volume.mkdir(mode=0o500)
    done = check(manifest, **FLEET, DISTRIBUTOR_PEERS__SECRET_FILE=str(secret))
    assert done.returncode == 2
    assert "peers.secret_file: " in done.stderr
    done = check(manifest, DISTRIBUTOR_STORAGE__PATH=str(volume))
    assert done.returncode == 0  # the services may run as another user
    assert "storage.path: " in done.stderr


@pytest.mark.parametrize(
    ("kind", "setting", "url"),
    [
        ("joystream", "squid", "http://127.0.0.1:1/graphql"),
        ("origin", "origin", "http://127.0.0.1:1/{id}"),
    ],
)
def test_check_online_reaches_squid_and_origin(kind: str, setting: str, url: str) -> None:
    variables = {"DISTRIBUTOR_CATALOG__KIND": kind, f"DISTRIBUTOR_CATALOG__{setting.upper()}": url}
    assert distributor("config", "check", **variables).returncode == 0
    done = distributor("config", "check", "--online", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"catalog.{setting}: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("schema", "code"), [("current", 0), ("bigint_worker", 0), ("without_workers", 2)])
async def test_check_online_asks_a_squid_what_the_node_will_ask(schema: str, code: int) -> None:
    async with TestSquid([], workers={7: ["0:1"]}).run() as squid:
        squid.faults = SquidFaults(schema=schema)
        variables = {
            "DISTRIBUTOR_CATALOG__KIND": "joystream",
            "DISTRIBUTOR_CATALOG__SQUID": squid.url,
            "DISTRIBUTOR_WORKER_ID": "7",
        }
        done = await asyncio.to_thread(distributor, "config", "check", "--online", **variables)
    assert done.returncode == code, done.stderr
    assert ("rejected the query" in done.stderr) == (code == 2)


def test_orders_to_a_fleet_of_which_two_nodes_would_have_one_url(manifest: Path, tmp_path: Path) -> None:
    settings = tmp_path / "fleet.yml"
    fields = {
        "catalog": {"kind": "manifest", "manifest": str(manifest)},
        "storage": {"path": str(tmp_path)},
        "peers": {
            "own_url": "http://10.0.0.1:3334",
            "urls": ["http://10.0.0.1:3334", "http://10.0.0.1:3344"],
        },
    }
    settings.write_text(json.dumps(fields), encoding="utf-8")
    result = CliRunner().invoke(app, ["operator", "--config", str(settings), "purge", "--fleet", "1"])
    assert result.exit_code == 2
    assert "set peers.operator_urls" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("command", [("status",), ("top", "--once")])
@pytest.mark.parametrize("url", ["127.0.0.1:3335", "node", "ftp://node/"])
def test_a_url_without_http_is_a_wrong_option(command: tuple[str, ...], url: str) -> None:
    done = distributor(*command, "--url", url)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"--url: expected a URL with http:// or https://, got {url}"


def test_a_url_without_http_for_an_operators_command() -> None:
    done = distributor(
        "operator", "--url", "127.0.0.1:3335", "state", DISTRIBUTOR_OPERATOR_API__SECRET="s" * 32
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.splitlines()[-1] == "--url: expected a URL with http:// or https://, got 127.0.0.1:3335"
    )
