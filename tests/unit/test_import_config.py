"""Configuration of an existing node, translated to ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distributor_node.services.migration import import_configuration, read_yaml
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.objects import Assignment
from distributor_node.shared.settings import load_settings

FULL = """
id: distributor-7
endpoints:
  storageSquid: https://squid.example/graphql
  joystreamNodeWs: wss://rpc.example:9944
directories:
  assets: ./local/data
  cacheState: ./local/cache
logs:
  file:
    level: debug
    path: ./local/logs
    maxFiles: 30
  console:
    level: verbose
  elastic:
    level: info
    endpoint: http://localhost:9200
limits:
  storage: 500G
  maxConcurrentStorageNodeDownloads: 100
  maxConcurrentOutboundConnections: 300
  outboundRequestsTimeoutMs: 5000
  pendingDownloadTimeoutSec: 3600
  maxCachedItemSize: 1G
  queryNodeCacheTTL: 60
  dataObjectSourceByObjectIdTTL: 60
intervals:
  saveCacheState: 60
  checkStorageNodeResponseTimes: 90
  cacheCleanup: 60
publicApi:
  port: 3334
operatorApi:
  port: 3335
  hmacSecret: this-is-not-so-secret
buckets:
  - "0:1"
  - "0:2"
workerId: 3
"""


def converted(folder: Path, text: str, **environment: str) -> tuple[dict[str, Any], list[str]]:
    file = folder / "config.yml"
    file.write_text(text)
    printed, remarks = import_configuration(file, {"HOME": "/", **environment})
    (folder / "ours.yaml").write_text(printed)
    return yaml.safe_load(printed), remarks


def test_every_setting_has_its_place(tmp_path: Path) -> None:
    settings, remarks = converted(tmp_path, FULL)
    assert settings == {
        "id": "distributor-7",
        "buckets": ["0:1", "0:2"],
        "worker_id": 3,
        "public_api": {"port": 3334, "max_proxied": 300},
        "operator_api": {"port": 3335, "secret": "this-is-not-so-secret"},
        "catalog": {
            "kind": "joystream",
            "refuse_private_sources": True,
            "squid": "https://squid.example/graphql",
            "chain": "wss://rpc.example:9944",
            "positive_ttl": 60,
        },
        "sources": {"probe_interval": 90},
        "fetch": {"concurrency": 100, "first_byte_timeout": 5.0},
        "storage": {
            "path": str(tmp_path / "local/data"),
            "import_assets": str(tmp_path / "local/data"),
            "import_cache_state": str(tmp_path / "local/cache/cache.json"),
            "limit": "500G",
            "max_cached_item": "1G",
        },
        "evictor": {"assignment_interval": 3600},
        "log": {"level": "debug"},
    }
    named = {remark.partition(" ")[0] for remark in remarks}
    assert named >= {
        "limits.pendingDownloadTimeoutSec",
        "limits.dataObjectSourceByObjectIdTTL",
        "intervals.saveCacheState",
        "intervals.cacheCleanup",
        "logs.file",
        "logs.elastic",
        "operatorApi.hmacSecret",
    }


def test_printed_settings_are_accepted(tmp_path: Path) -> None:
    converted(tmp_path, FULL)
    settings = load_settings(tmp_path / "ours.yaml")
    assert settings.storage.limit == 500 * 1024**3
    assert settings.catalog.kind == "joystream"
    assert settings.assignment == Assignment(frozenset({"0:1", "0:2"}), 3)


def test_plain_tokens_have_their_nginx_meaning(tmp_path: Path) -> None:
    settings, _ = converted(
        tmp_path, "id: 010\nbuckets:\n  - 1:0\n  - 0:10\nworkerId: 3\nlogs: {console: {level: off}}\n"
    )
    assert settings["buckets"] == ["1:0", "0:10"]
    assert settings["id"] == "10"
    assert "log" not in settings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("-0o17", "-0o17"), ("0o17", 15), ("0x1F", 31), ("1e3", 1000.0), (".5", 0.5), ("1_000", "1_000"),
        ("190:20:30", "190:20:30"), ("no", "no"), ("On", "On"), ("True", True), ("~", None), ("", None),
        ("2026-11-27", "2026-11-27"), ("'5'", "5"), ("0b1", "0b1"), ("<<", "<<"),
    ],
)  # fmt: skip
def test_the_core_schema(text: str, value: object) -> None:
    assert read_yaml(f"a: {text}") == {"a": value}


def test_aliases_and_tags_are_read_and_objects_are_not_made() -> None:
    assert read_yaml("a: &x {b: 1}\nc: *x\nd: !!str 5") == {"a": {"b": 1}, "c": {"b": 1}, "d": "5"}
    with pytest.raises(yaml.YAMLError):
        read_yaml("a: !!python/object/apply:os.system [true]")


def test_json_with_tabs_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{\n\t"id": "a",\n\t"workerId": 3\n}\n')
    printed, _ = import_configuration(file, {})
    assert yaml.safe_load(printed)["worker_id"] == 3
    file.write_text('{"id": "a",}')
    with pytest.raises(ConfigurationError, match="not valid JSON"):
        import_configuration(file, {})


def test_json_is_read_as_well(tmp_path: Path) -> None:
    settings, _ = converted(tmp_path, json.dumps(yaml.safe_load(FULL)))
    assert settings["storage"]["limit"] == "500G"


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    settings, remarks = converted(
        tmp_path,
        FULL,
        JOYSTREAM_DISTRIBUTOR__LIMITS__STORAGE="200G",
        JOYSTREAM_DISTRIBUTOR__LIMITS__MAX_CONCURRENT_STORAGE_NODE_DOWNLOADS="7",
        JOYSTREAM_DISTRIBUTOR__BUCKETS='["3:4"]',
        JOYSTREAM_DISTRIBUTOR__PUBLIC_API__PORT="3399",
        JOYSTREAM_DISTRIBUTOR__ID="named-by-the-environment",
        JOYSTREAM_DISTRIBUTOR__OPERATOR_API="off",
        JOYSTREAM_DISTRIBUTOR__LOGS__FILE="off",
        JOYSTREAM_DISTRIBUTOR__ENDPOINTS__STORAGE_SQUID="http://squid:4352/graphql",
    )
    assert settings["storage"]["limit"] == "200G"
    assert settings["fetch"]["concurrency"] == 7
    assert settings["buckets"] == ["3:4"]
    assert settings["public_api"]["port"] == 3399
    assert settings["id"] == "named-by-the-environment"
    assert settings["catalog"]["squid"] == "http://squid:4352/graphql"
    assert "operator_api" not in settings
    secret = '"12345678901234567"'
    for given in (secret, secret.strip('"')):
        settings, _ = converted(tmp_path, FULL, JOYSTREAM_DISTRIBUTOR__OPERATOR_API__HMAC_SECRET=given)
        assert settings["operator_api"]["secret"] == given, "a text is no JSON"
    assert not any(remark.startswith("logs.file") for remark in remarks)


def test_worker_mode(tmp_path: Path) -> None:
    settings, _ = converted(tmp_path, "id: a\nworkerId: 3\n")
    assert settings == {
        "catalog": {"kind": "joystream", "refuse_private_sources": True}, "id": "a", "worker_id": 3,
    }  # fmt: skip


def test_unknown_names_are_reported(tmp_path: Path) -> None:
    squid = "endpoints: {storageSquid: http://squid:4352/graphql}"
    _, remarks = converted(tmp_path, f"id: a\nworkerId: 3\nlimits: {{newThing: {{deep: 1}}}}\n{squid}\n")
    assert remarks == ["limits.newThing.deep is unknown, and has no equivalent"]


def test_without_an_assignment_that_is_reported(tmp_path: Path) -> None:
    _, remarks = converted(tmp_path, "id: a\n")
    assert any(remark.startswith("workerId is missing") for remark in remarks)


def test_a_short_secret_is_left_out(tmp_path: Path) -> None:
    settings, remarks = converted(
        tmp_path, "id: a\nworkerId: 3\noperatorApi: {port: 3335, hmacSecret: short}\n"
    )
    assert "secret" not in settings["operator_api"]
    assert any("at least 16 characters" in remark for remark in remarks)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("limits: {storage: lots}", "limits.storage: expected a number and a unit"),
        ("limits: {maxConcurrentStorageNodeDownloads: many}", "limits.maxConcurrentStorageNodeDownloads"),
        ("buckets: 5", "buckets: expected a list"),
        ("buckets: ['a:b']", "malformed bucket id"),
        ("logs: {console: {level: loud}}", "logs.console.level: expected one of"),
        ("- a\n- b", "names and values"),
        ("a: [", "neither YAML nor JSON"),
    ],
)
def test_settings_that_cannot_work_are_rejected_by_name(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told.replace("(", r"\(")):
        converted(tmp_path, text)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        import_configuration(tmp_path / "nothing.yml", {})


QUERY_NODE, SQUID = "https://old.example/graphql", "https://squid.example/graphql"


@pytest.mark.parametrize("squid_first", [True, False])
def test_the_squid_wins_over_a_query_node(tmp_path: Path, squid_first: bool) -> None:
    named = [f"  storageSquid: {SQUID}\n", f"  queryNode: {QUERY_NODE}\n"]
    text = "workerId: 3\nendpoints:\n" + "".join(named if squid_first else reversed(named))
    settings, remarks = converted(tmp_path, text)
    assert settings["catalog"]["squid"] == SQUID
    assert [remark for remark in remarks if "another schema" in remark]
    settings, _ = converted(
        tmp_path,
        f"workerId: 3\nendpoints: {{storageSquid: {SQUID}}}\n",
        JOYSTREAM_DISTRIBUTOR__ENDPOINTS__QUERY_NODE=QUERY_NODE,
    )
    assert settings["catalog"]["squid"] == SQUID, "a variable of the query node is no squid either"


def test_a_query_node_is_used_only_if_the_operator_accepts_it(tmp_path: Path) -> None:
    text = f"workerId: 3\nendpoints: {{queryNode: {QUERY_NODE}}}\n"
    settings, remarks = converted(tmp_path, text)
    assert "squid" not in settings["catalog"]
    assert any("name your Storage-Squid" in remark for remark in remarks)
    assert any(remark.startswith("endpoints.storageSquid is missing") for remark in remarks)
    printed, remarks = import_configuration(tmp_path / "config.yml", {}, accept_query_node=True)
    assert yaml.safe_load(printed)["catalog"]["squid"] == QUERY_NODE
    assert not any("another schema" in remark or "missing" in remark for remark in remarks)


def test_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    variables = {"ID": "alone", "WORKER_ID": "3", "DIRECTORIES__ASSETS": "data", "LIMITS__STORAGE": "5G"}
    printed, _ = import_configuration(
        None, {f"JOYSTREAM_DISTRIBUTOR__{name}": value for name, value in variables.items()}
    )
    settings = yaml.safe_load(printed)
    assert (settings["id"], settings["worker_id"]) == ("alone", 3)
    assert settings["storage"]["path"] == str(tmp_path / "data")
    assert "from the environment" in printed


@pytest.mark.parametrize("unset", ["off", "null", "undefined"])
def test_words_that_unset_a_setting(tmp_path: Path, unset: str) -> None:
    settings, _ = converted(
        tmp_path,
        FULL,
        JOYSTREAM_DISTRIBUTOR__BUCKETS=unset,
        JOYSTREAM_DISTRIBUTOR__ID=unset,
        JOYSTREAM_DISTRIBUTOR__DIRECTORIES__CACHE_STATE=unset,
        JOYSTREAM_DISTRIBUTOR__OPERATOR_API=unset,
    )
    assert not {"buckets", "id", "operator_api"} & settings.keys()
    assert "import_cache_state" not in settings["storage"]


def test_null_in_the_file_is_not_set(tmp_path: Path) -> None:
    settings, _ = converted(tmp_path, "workerId: 3\nid: null\ndirectories: {assets: ~, cacheState: null}\n")
    assert not {"id", "storage"} & settings.keys()


@pytest.mark.parametrize("text", ["hello: world\n", "{}", "keys: [{suri: //Alice}]\n", "id: null\n"])
def test_a_file_without_a_known_name_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"expected at least one of id, endpoints\.storageSquid"):
        converted(tmp_path, text)


def test_keys_are_named_for_what_they_do(tmp_path: Path) -> None:
    _, remarks = converted(tmp_path, "workerId: 3\nid: a\nkeys: [{suri: //Alice}]\n")
    (remark,) = [remark for remark in remarks if remark.startswith("keys ")]
    assert "chain transactions" in remark
    assert "`leader:*`" in remark
    assert "Alice" not in remark
