"""One Compose stack for all tests of this folder: it takes half a minute to start."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributor_node.services.demo.manifest import manifest_text
from distributor_node.services.demo.objects import GeneratedContent, demo_objects
from tests.docker.compose import ROOT, ComposeStack
from tests.docker.harness import (
    ENDLESS,
    GROWING,
    KILLED,
    LARGE_OBJECTS,
    LARGE_SIZE,
    NOTES,
    OBJECT_SIZE,
    RELOADED,
    Harness,
)

PREFIX = "/distributor"
CONNECTIONS_PER_ADDRESS = 24


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """The whole stack: up, with three fetchers and every profile. What it logged is shown if a test failed."""
    folder = tmp_path_factory.mktemp("stack")
    demo = _demo_directory(folder / "demo")
    manifest = folder / "manifest.yaml"
    manifest.write_text(manifest_text(demo_objects(demo / "media"), "http://demo:3390/api/v1/files/"))
    settings = folder / "settings.env"
    # On a busy machine a fetch may begin late. These tests look at the answers that follow it. The short `min_idle`
    # saves a wait until objects can be evicted.
    secret = secrets.token_hex(16)
    settings.write_text(
        "DISTRIBUTOR_PUBLIC_API__FIRST_BYTE_WAIT=10\nDISTRIBUTOR_EVICTOR__MIN_IDLE=2\n"
        f"DISTRIBUTOR_OPERATOR_API__SECRET={secret}\n"
    )
    stack = ComposeStack(
        folder,
        {
            "STORAGE_LIMIT": "200M",
            "FETCH_CONCURRENCY": "2",
            "SETTINGS_FILE": str(settings),
            "MANIFEST_FILE": str(manifest),
            "DEMO_DIRECTORY": str(demo),
            "EDGE_PREFIX": PREFIX,
            "EDGE_CONNECTIONS_PER_ADDRESS": str(CONNECTIONS_PER_ADDRESS),
            "EDGE_TLS_DIRECTORY": str(_certificate(folder / "tls")),
            "EDGE_HSTS": "31536000",
            "EDGE_HTTP3": "on",
        },
    )
    harness = Harness(stack, {item.object_id: item for item in demo_objects(demo / "media")}, secret)
    finished = False
    try:
        stack.build()
        stack.up("--build")
        yield harness
        finished = True
    finally:
        try:
            if harness.failed or not finished:
                sys.stderr.write(stack.logs())
        finally:
            stack.remove()


@pytest.fixture(autouse=True)
def _good_sources(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test begins and ends with storage nodes that behave; the stack remembers failures for its logs."""
    failed_before = request.session.testsfailed
    yield
    if "harness" in request.fixturenames:
        harness: Harness = request.getfixturevalue("harness")
        harness.failed |= request.session.testsfailed > failed_before
        harness.behave([])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what was measured."""
    if NOTES:
        terminalreporter.section("measured on the stack")
        for note in NOTES:
            terminalreporter.write_line(note)


def _demo_directory(target: Path) -> Path:
    """The demo's own media, sixty small objects and three large ones more; readable by the containers' user."""
    shutil.copytree(ROOT / "deploy" / "demo", target)
    sizes = {str(number): OBJECT_SIZE for number in range(100, 160)} | dict.fromkeys(
        (*LARGE_OBJECTS, KILLED, GROWING, ENDLESS, RELOADED), LARGE_SIZE
    )
    for object_id, size in sizes.items():
        content = GeneratedContent(int(object_id), size).read(0, size)
        (target / "media" / f"{object_id}-generated.ogg").write_bytes(content)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


def _certificate(target: Path) -> Path:
    """A directory as the edge wants it, with a certificate signed by itself."""
    target.mkdir()
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
            "-keyout", "key.pem", "-out", "certificate.pem",
        ],
        cwd=target, check=True, capture_output=True,
    )  # fmt: skip
    for path in (target, *target.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target
