"""Wrong settings are refused by name, with what was expected and what came, and never with a secret."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.settings import Settings, load_settings
from distributor_node.shared.settings.load import all_settings, read_environment, variable_of
from distributor_node.shared.settings.model import METRICS_PORTS
from tests.preloaded import run_preloaded

ROOT = Path(__file__).parents[2]
AS_PERCENT = "state_store.url: expected redis://user:password@host:port/…, with / ? # @"
SECRET = "hunter2-hunter2-hunter2"
VALID = {"DISTRIBUTOR_CATALOG__MANIFEST": "/of-another-machine/manifest.yaml"}


def load(text: str | None = None, folder: Path | None = None, /, **environment: str) -> Settings:
    """Settings from the text of a file, and from variables without their prefix."""
    file = None
    if text is not None:
        assert folder is not None
        file = folder / "settings.yaml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
    variables = {f"DISTRIBUTOR_{name}": value for name, value in environment.items()}
    return load_settings(file, VALID | variables)


def refusal(text: str | None = None, folder: Path | None = None, /, **environment: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(text, folder, **environment)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("STORAGE_LIMIT", "STORAGE__LIMIT"),
        ("STORGE__LIMIT", "STORAGE__LIMIT"),
        ("STORAGE__LIMT", "STORAGE__LIMIT"),
        ("STORAGELIMIT", "STORAGE__LIMIT"),
        ("STORAGE___LIMIT", "STORAGE__LIMIT"),
        ("_STORAGE__LIMIT", "STORAGE__LIMIT"),
        ("storage__limits", "STORAGE__LIMIT"),
        ("WORKERID", "WORKER_ID"),
        ("BUCKET", "BUCKETS"),
        ("STATE_STORE_URL", "STATE_STORE__URL"),
        ("STATESTORE__URL", "STATE_STORE__URL"),
        ("JOB_QUEUE__URI", "JOB_QUEUE__URL"),
        ("STATE_STORE__URL__FILE", "STATE_STORE__URL_FILE"),
        ("OPERATOR_API__SECRET_FILES", "OPERATOR_API__SECRET_FILE"),
        ("PUBLIC_API__PORTS", "PUBLIC_API__PORT"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_nearest_name(name: str, meant: str) -> None:
    told = refusal(**{name: SECRET})
    assert told == f"DISTRIBUTOR_{name}: unknown setting; did you mean DISTRIBUTOR_{meant}?"


def test_a_variable_like_no_setting_is_refused_too() -> None:
    assert refusal(XYZZY="1") == "DISTRIBUTOR_XYZZY: unknown setting"
    load_settings(None, VALID | {"DISTRIBUTED_XYZZY": "1", "JOYSTREAM_DISTRIBUTOR__ID": "1"})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("storage: {limt: 5G}", "storage.limt: unknown setting; did you mean storage.limit?"),
        ("storge: {limit: 5G}", "storge: unknown setting"),
        ("worker: 7", "worker: unknown setting; did you mean worker_id?"),
        ("limit: 5G", "limit: unknown setting"),
        ("storage:\n  limit: 5G\n  limit: 6G", "line 3: limit is given twice"),
        ("log: {hits: true}\nstorage: {limit: 5G}\nlog: {level: debug}", "line 3: log is given twice"),
        ("1: 2", "line 1: expected a name that is text"),
        ("[1]: 2", "line 1: expected a name that is text"),
        ("storage: 5G", "storage: expected a group of settings, got text"),
        ("storage: [5G]", "storage: expected a group of settings, got a list"),
        ("storage:", "storage: expected a group of settings, got nothing"),
        ("storage: {limit: 20}", "storage.limit: expected at least 64K, got 20 bytes; is the unit missing, as in 20G?"),
        ("storage: {max_cached_item: 5}", "storage.max_cached_item: expected at least 64K, got 5 bytes"),
        ("public_api: {memory_cache: 64}", "public_api.memory_cache: expected 0 or at least 64K, got 64 bytes"),
        ("storage: {limit: much}", "storage.limit: expected a number and a unit, such as 500G, 64M or"),
        (f"storage: {{limit: {'9' * 400}P}}", "storage.limit: expected a size from 0 to 4096P, got '999"),
        ("storage: {limit: -5}", "storage.limit: expected a size from 0 to 4096P, got -5"),
        ("storage: {path: 5}", "storage.path: expected a path, got 5"),
        ("public_api: {port: http}", "public_api.port: expected a whole number, got 'http'"),
        ("public_api: {port: 65536}", "public_api.port: expected at most 65535, got 65536"),
        ("public_api: {workers: 1.5}", "public_api.workers: expected a whole number, got 1.5"),
        ("fetch: {lease: .nan}", "fetch.lease: expected at most 604800, got nan"),
        ("log: {level: loud}", "log.level: expected 'debug', 'info', 'warning' or 'error', got 'loud'"),
        ("log: {hits: perhaps}", "log.hits: expected true or false, got 'perhaps'"),
        ("buckets: 5", "buckets: expected a list, got 5"),
        ("buckets: [1:30]", "buckets[0]: expected text (in YAML, put it in quotes), got 90"),
        ("buckets: ['0-1']", "malformed bucket id: expected family:index, such as 0:1, got '0-1'"),
        ("id: ''", "id: expected at least 1 characters, got ''"),
        ("catalog: {origin: 'https://me:hunter2-hunter2-hunter2@x/'}\nlog: 1", "log: expected a group"),
        (f"operator_api: {{secret: {SECRET[:7]}}}", "operator_api.secret: expected at least 16 characters"),
        ("operator_api: {secret: 12345678901234567}", "operator_api.secret: expected text (in YAML, put"),
        (f"operator_api: {SECRET}", "operator_api: expected a group of settings, got text"),
        (f"operator_api: {{sceret: {SECRET}}}", "unknown setting; did you mean operator_api.secret?"),
        (f"operator_api: {{secret: '{SECRET}", "not valid YAML (line 1"),
        (f"operator_api: {{secret: *{SECRET}}}", "not valid YAML (line 1"),
        (f"operator_api: {{secret: !{SECRET} x}}", "not valid YAML (line 1"),
        ("- storage", "expected names and values at the top level, got list"),
        ("\x00", "not valid YAML"),
        ("\ud800", "expected UTF-8"),
        ("{" * 5000, "not valid YAML"),
        (f"shutdown_deadline: {'9' * 5000}", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_a_sentence_that_names_the_setting(text: str, told: str, tmp_path: Path) -> None:
    message = refusal(text, tmp_path)
    assert told in message
    assert SECRET[:7] not in message


@pytest.mark.parametrize(
    "name", [path for path, field in all_settings().items() if field.annotation in (Path, Path | None)]
)
def test_a_path_with_nul_is_refused_by_name(name: str, tmp_path: Path) -> None:
    group, _, field = name.partition(".")
    file = tmp_path / "settings.yaml"
    file.write_text(f'{group}: {{{field}: "/tmp/a\\0b"}}\n')
    with pytest.raises(ConfigurationError) as caught:
        load_settings(file, {key: value for key, value in VALID.items() if key != variable_of(name)})
    assert rf"{name}: expected a path without NUL characters, got '/tmp/a\x00b'" in str(caught.value)


def test_two_weights_for_one_node_are_refused() -> None:
    given = {"DISTRIBUTOR_PEERS__WEIGHTS": '{"http://a": 1, "http://a/": 2}'}
    with pytest.raises(ConfigurationError, match="for the same: 'http://a', 'http://a/'"):
        load_settings(None, VALID | given)


def test_weights_of_peers_can_be_given_by_a_variable() -> None:
    given = {"DISTRIBUTOR_PEERS__WEIGHTS": '{"http://cell-a:3334/": 2, "http://cell-b:3334": 0.5}'}
    assert load_settings(None, VALID | given).peers.weights == {
        "http://cell-a:3334": 2.0,
        "http://cell-b:3334": 0.5,
    }


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"STORAGE": ""}, "STORAGE: expected a variable for each setting of the group, such as"),
        ({"BUCKETS": ""}, "BUCKETS: expected a JSON list, or values separated by commas, got ''"),
        ({"BUCKETS": "[0:1]"}, "BUCKETS: expected a JSON list, or values separated by commas, got '[0:1]'"),
        ({"BUCKETS": "[" * 100_000}, "BUCKETS: expected a JSON list"),
        ({"PEERS__WEIGHTS": "http://a=2"}, "PEERS__WEIGHTS: expected a JSON object, got 'http://a=2'"),
        ({"PEERS__WEIGHTS": '{"http://a": 1, "http://a": 2}'}, "PEERS__WEIGHTS: 'http://a' is given twice"),
        ({"PEERS__WEIGHTS": "[2]"}, "PEERS__WEIGHTS: expected a JSON object, got '[2]'"),
        ({"PEERS__WEIGHTS": '{"http://a": "x"}'}, "peers.weights.http://a (DISTRIBUTOR_PEERS__WEIGHTS): expected a "),
        ({"JOB_QUEUE__RETRY_DELAYS": "5,soon"}, "job_queue.retry_delays[1] (DISTRIBUTOR_JOB_QUEUE__RETRY"),
        ({"WORKER_ID": ""}, "worker_id (DISTRIBUTOR_WORKER_ID): expected a whole number, got ''"),
        ({"ID": "a\udcff"}, "ID: expected UTF-8"),
        ({"ID": "a", "id": "b"}, "id: id is given by DISTRIBUTOR_ID too"),
        ({"STATE_STORE__URL_FILE": "/nowhere/at/all"}, "STATE_STORE__URL_FILE: expected a readable file, got '/no"),
        ({"STORAGE__PATH_FILE": "/etc/hostname"}, "STORAGE__PATH_FILE: unknown setting; did you mean"),
        ({"STATE_STORE__URL": f"redis://:{SECRET}/#x@localhost:6379/0"}, AS_PERCENT),
        ({"STATE_STORE__URL": f"redis://:{SECRET}#x@localhost:6379/0"}, AS_PERCENT),
        ({"STATE_STORE__URL": f"redis://:12#{SECRET}@localhost:6379/0"}, AS_PERCENT),
        ({"STATE_STORE__URL": f"redis://:12/{SECRET}@localhost:6379/0"}, AS_PERCENT),
        ({"STATE_STORE__URL": f"redis://:12?{SECRET}@localhost:6379/0"}, AS_PERCENT),
        ({"STATE_STORE__URL": f"redis://:{SECRET}[@localhost:6379/0"}, AS_PERCENT),
        ({"STATE_STORE__URL": f"redis:{SECRET}"}, "state_store.url: expected a URL that begins with redis://"),
        ({"JOB_QUEUE__URL": f"amqp://me:{SECRET}/#x@localhost/"}, "job_queue.url: expected amqp://user:password@"),
        ({"JOB_QUEUE__URL": SECRET}, "job_queue.url: expected a URL that begins with amqp://"),
        ({"OPERATOR_API__SECRET": SECRET[:7]}, "SECRET): expected at least 16 characters (its value is not shown)"),
        ({"CATALOG__KIND": "origin", "CATALOG__ORIGIN": f"https://me:{SECRET}@x/"}, "catalog.origin: expected an"),
        ({"STORAGE__LIMIT": f"redis://:{SECRET}@localhost"}, "64M or 1024, got 'redis://***@localhost'"),
        ({"FETCH__WINDOW": "65535"}, "WINDOW): expected off or a size from 64K to 4096P, such as 8M, got '65535'"),
        ({"FETCH__WINDOW": "0"}, "WINDOW): expected off or a size from 64K to 4096P, such as 8M, got '0'"),
        ({"FETCH__WINDOW": "wide"}, "WINDOW): expected off or a size from 64K to 4096P, such as 8M, got 'wide'"),
        ({"FETCH__WINDOW": "5000P"}, "WINDOW): expected off or a size from 64K to 4096P, such as 8M, got '5000P'"),
        ({"ADMISSION__ABOVE_SIZE": "much"}, "SIZE): expected auto, off or a size of at most 4096P, such as 500G, 64M"),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_a_sentence_that_names_it(variables: dict[str, str], told: str) -> None:
    message = refusal(**variables)
    assert told in message
    assert SECRET[:7] not in message


@pytest.mark.parametrize(
    ("text", "window"), [("64K", 64 * 1024), ("1M", 1024**2), ("off", None), ("OFF", None)]
)
def test_windows(text: str, window: int | None) -> None:
    assert load(FETCH__WINDOW=text).fetch.window == window


def test_a_message_says_once_what_was_expected() -> None:
    message = refusal(FETCH__WINDOW="wide", ADMISSION__ABOVE_SIZE="much")
    assert [line.count("expected") for line in message.splitlines() if "got" in line] == [1, 1]


@pytest.mark.parametrize("service", ["api", "fetcher", "evictor"])
def test_stores_in_memory_are_for_standalone_alone(service: str) -> None:
    done = distributor(service)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"expected those of Redis and RabbitMQ for `distributor {service}`, got memory://" in done.stderr
    assert distributor("config", "check", "--for", service).returncode == 2


def test_check_says_which_services_can_run() -> None:
    servers = {
        "DISTRIBUTOR_STATE_STORE__URL": "redis://localhost/0",
        "DISTRIBUTOR_JOB_QUEUE__URL": "amqp://localhost/",
    }
    assert distributor("config", "check").stdout.startswith("The settings are valid for standalone. ")
    assert distributor("config", "check", **servers).stdout == (
        "The settings are valid for api, fetcher and evictor.\n"
    )
    done = distributor("config", "check", "--for", "standalone", **servers)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "state_store.url, job_queue.url: expected memory:// in standalone mode",
    )


METRICS = METRICS_PORTS["standalone"]


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"DASHBOARD__PORT": "3334"}, "public_api.port, dashboard.port: expected two ports, got 3334 for both"),
        ({"METRICS__PORT": "3334"}, "public_api.port, metrics.port: expected two ports, got 3334 for both"),
        (
            {"OPERATOR_API__PORT": "3334", "OPERATOR_API__SECRET": SECRET},
            "public_api.port, operator_api.port: expected two ports, got 3334 for both",
        ),
        (
            {"PEERS__PORT": "3334", "PEERS__DNS": "c:1", "PEERS__OWN_URL": "http://a:3334", "PEERS__SECRET_FILE": "/s"},
            "public_api.port, peers.port: expected two ports, got 3334 for both",
        ),
        (
            {"PUBLIC_API__PORT": f"{METRICS}", "PUBLIC_API__HOST": "::"},
            f"public_api.port, metrics.port: expected two ports, got {METRICS} for both",
        ),
        ({"PUBLIC_API__HOST": "10.0.0.1", "DASHBOARD__HOST": "10.0.0.1", "DASHBOARD__PORT": "3334"}, "3334 for both"),
    ],
)  # fmt: skip
def test_two_servers_of_one_process_cannot_have_one_port(variables: dict[str, str], told: str) -> None:
    found = load(**variables)
    with pytest.raises(ConfigurationError, match=re.escape(told)):
        found.check_for("standalone")


@pytest.mark.parametrize(
    "variables",
    [
        {"DASHBOARD__PORT": "3334", "DASHBOARD__ENABLED": "false"},
        {"OPERATOR_API__PORT": "3334"},  # off without a secret
        {"PEERS__PORT": "3334"},  # off without peers
        {"DASHBOARD__PORT": "0", "PUBLIC_API__PORT": "0", "METRICS__PORT": "0"},
        {"DASHBOARD__PORT": "3334", "PUBLIC_API__HOST": "10.0.0.1"},  # the page's host is 127.0.0.1
    ],
)
def test_ports_that_do_not_clash(variables: dict[str, str]) -> None:
    load(**variables).check_for("standalone")


def test_a_fetcher_alone_may_have_the_port_of_an_api_elsewhere() -> None:
    servers = {
        "DISTRIBUTOR_STATE_STORE__URL": "redis://localhost/0",
        "DISTRIBUTOR_JOB_QUEUE__URL": "amqp://localhost/",
        "DISTRIBUTOR_METRICS__PORT": "3334",
    }
    assert distributor("config", "check", "--for", "fetcher", **servers).returncode == 0
    for options in ([], ["--for", "api"]):
        done = distributor("config", "check", *options, **servers)
        assert (done.returncode, done.stdout) == (2, "")
        assert "public_api.port, metrics.port: expected two ports, got 3334 for both" in done.stderr


@pytest.mark.parametrize(
    ("length", "remarks"),
    [(16, "operator_api.secret: expected at least 32 bytes (RFC 7518, section 3.2), got 16\n"), (32, "")],
)
def test_check_remarks_on_a_secret_that_the_node_warns_of(length: int, remarks: str) -> None:
    done = distributor("config", "check", DISTRIBUTOR_OPERATOR_API__SECRET="s" * length)
    assert done.returncode == 0
    assert "".join(line for line in done.stderr.splitlines(True) if "secret" in line) == remarks


def distributor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_preloaded(arguments, {"PATH": "/usr/bin:/bin", **VALID, **environment}, ROOT)


def test_lists_in_the_environment() -> None:
    assert (
        load(BUCKETS="0:1, 2:3").buckets
        == load(BUCKETS='["0:1", "2:3"]').buckets
        == frozenset({"0:1", "2:3"})
    )
    assert load(JOB_QUEUE__RETRY_DELAYS="5,30").job_queue.retry_delays == (5.0, 30.0)


def test_a_former_name_is_no_unknown_one(tmp_path: Path) -> None:
    assert load(EVICTOR__DUTY_INTERVAL="60").evictor.assignment_interval == 60
    both = "evictor: expected one of them, got both"
    assert (
        re.sub(
            "duty.*: ", "", refusal("evictor: {assignment_interval: 5}", tmp_path, EVICTOR__DUTY_INTERVAL="6")
        )
        == both
    )


def test_the_environment_overrides_single_settings_of_the_file(tmp_path: Path) -> None:
    given = load("storage: {limit: 5G, path: here}", tmp_path, STORAGE__LIMIT="6G")
    assert (given.storage.limit, given.storage.path) == (6 * 1024**3, Path("here"))


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_secret_may_be_in_a_file(tmp_path: Path, ending: str) -> None:
    (tmp_path / "secret").write_bytes(f"{SECRET}{ending}".encode())
    given = load(OPERATOR_API__SECRET_FILE=str(tmp_path / "secret"))
    assert given.operator_api.secret is not None
    assert given.operator_api.secret.get_secret_value() == SECRET


def test_secret_files_that_cannot_be_used(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    for content, told in (
        (b"\xff" + SECRET.encode(), "UTF-8"),
        (SECRET.encode() * 9999, "at most 65536 bytes"),
    ):
        secret.write_bytes(content)
        message = refusal(OPERATOR_API__SECRET_FILE=str(secret))
        assert told in message
        assert SECRET not in message
    secret.write_text(SECRET)
    both = refusal(OPERATOR_API__SECRET_FILE=str(secret), OPERATOR_API__SECRET=SECRET)
    assert re.search(r"operator_api.secret is given by DISTRIBUTOR_OPERATOR_API__SECRET\w* too", both)
    assert SECRET not in both


# Fuzz: whatever is given, there are settings or a refusal in words, without a secret.

NAMES = (
    st.sampled_from(sorted(all_settings()))
    | st.sampled_from(sorted(Settings.model_fields))
    | st.text(max_size=9)
)
SECRETS = st.sampled_from(
    [
        SECRET,
        f"redis://:{SECRET}/#@h:1/0",
        f"amqp://u:{SECRET}@h/",
        f"redis://{SECRET}",
        f"https://u:{SECRET}@h/{{id}}",
    ]
)
PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["20G", "9" * 500, "1e999", "0:1", "manifest", "origin", "memory://", "::", "\x00"])
)  # fmt: skip
VALUES = st.recursive(
    PLAIN | SECRETS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
SECRET_SETTINGS = [variable_of(name) for name in ("operator_api.secret", "state_store.url", "job_queue.url")]
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def told_about(load_them: Any) -> str:
    """The refusal, or nothing; any other exception is the failure of the test."""
    try:
        load_them()
    except ConfigurationError as error:
        told = str(error)
    else:
        return ""
    assert told.strip()
    return told


@QUIET
@given(fields=st.dictionaries(NAMES, VALUES, max_size=5))
@example(fields={"operator_api": {"secret": [SECRET]}})
@example(fields={"operator_api": [SECRET]})
@example(fields={"admission.above_size": [f"redis://:{SECRET}/#@h:1/0"]})
def test_no_file_leads_to_a_traceback_or_shows_a_secret(fields: dict[str, Any], tmp_path: Path) -> None:
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        group, _, rest = name.partition(".")
        if rest and isinstance(nested.setdefault(group, {}), dict):
            nested[group][rest] = value
        else:
            nested[group] = value
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(nested, allow_unicode=False))
    told = told_about(lambda: load_settings(file, VALID))
    assert not leaks(told, nested)


def leaks(told: str, fields: dict[str, Any]) -> bool:
    """Whether a secret is shown that was given where secrets belong, or as credentials in a URL."""
    hidden = re.sub(
        rf"'{SECRET}'|'redis://{SECRET}'", "", told
    )  # as the value of a setting that is no secret
    return SECRET in hidden and SECRET not in str(list(_names(fields)))


def _names(fields: Any) -> Any:
    if isinstance(fields, dict):
        for name, inner in fields.items():
            yield name
            yield from _names(inner)


@QUIET
@given(text=st.text(max_size=60) | st.text(alphabet="{}[]:-*&!|>'\"% \n#?ab", max_size=40))
def test_no_text_of_a_file_leads_to_a_traceback(text: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    told_about(lambda: load_settings(file, VALID))


@QUIET
@given(
    variables=st.dictionaries(
        st.sampled_from(sorted(map(variable_of, all_settings())))
        | st.text(max_size=9).map("DISTRIBUTOR_".__add__),
        st.text(max_size=20)
        | st.sampled_from(["[", "[1]", "[[]]", "5G", "0:1", "null", "9" * 500, "\udcff"]),
        max_size=4,
    ),
    name=st.sampled_from(
        [*SECRET_SETTINGS, *(f"{name}_FILE" for name in SECRET_SETTINGS), "DISTRIBUTOR_SECRET"]
    ),
    secret=SECRETS,
)
def test_no_environment_leads_to_a_traceback_or_shows_a_secret(
    variables: dict[str, str], name: str, secret: str
) -> None:
    told = told_about(lambda: load_settings(None, VALID | variables | {name: secret}))
    if not name.endswith("_FILE"):  # the name of a file is shown
        assert SECRET not in told


def test_every_setting_can_be_given_by_its_variable() -> None:
    for path in all_settings():
        environment = read_environment({variable_of(path): "{}" if path == "peers.weights" else "1"})
        assert (environment.problems, environment.variables) == ([], {path: variable_of(path)})
