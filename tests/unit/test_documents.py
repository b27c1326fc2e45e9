"""The documents and the repository agree: paths, links, names, the tables of the README, the generated documents."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from distributor_node.services.api import headers
from distributor_node.shared.domain.space import RECORD_BYTES

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
TOP_LEVEL = (
    "services",
    "shared",
    "tests",
    "deploy",
    "docs",
    "benchmarks",
    "requirements",
    "distributor_node",
)
WRITTEN_BY_RUNS = {"benchmarks/results/"}
TEST_FOLDERS = ("unit", "contract", "integration", "end_to_end", "chaos", "docker", "deploy")

document = pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)


@document
def test_every_path_exists(file: Path) -> None:
    for path in code_words(file):
        if path.split("/")[0] in TOP_LEVEL and "/" in path and path not in WRITTEN_BY_RUNS:
            assert list(ROOT.glob(path.partition("::")[0])), f"{file.name} names {path}"


@document
def test_every_link_leads_somewhere(file: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", file.read_text()):
        linked = (file.parent / target) if target else file
        assert linked.exists(), f"{file.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{file.name} links to {target}#{anchor}"


@document
def test_every_test_exists(file: Path) -> None:
    for word in code_words(file):
        path, _, name = word.removeprefix("tests/").partition("::")
        if path.split("/")[0] in TEST_FOLDERS and Path(path).name.startswith("test_"):
            assert (ROOT / "tests" / path).exists(), f"{file.name} names {word}"
            if name:
                text = (ROOT / "tests" / path).read_text()
                assert f"def {name}(" in text, f"{file.name} names {word}"


@document
def test_every_name_is_in_the_file_it_is_said_to_be_in(file: Path) -> None:
    for name, path in re.findall(r"`(\w+)` in `([^`\s]+\.py)`", file.read_text()):
        assert name in (ROOT / path).read_text(), f"{file.name} says {name} is in {path}"


@pytest.mark.parametrize(
    "term",
    [
        "circuit breaker",
        "leader election",
        "singleflight",
        "dead letter",
        "backoff",
        "graceful shutdown",
        "retry schedule",
        "X-Cache",
        "JWT",
        "ENOSPC",
    ],
)
def test_the_architecture_tells_where_a_standard_term_is(term: str) -> None:
    lines = [line for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines() if term in line]
    assert any(re.search(r"`(services|shared)/[^`]+`", line) for line in lines)


@document
def test_plain_words(file: Path) -> None:
    words = r"\b(whoever|nobody|anybody|somebody|anew|meanwhile|nought)\b"
    assert not re.findall(words, file.read_text(), re.IGNORECASE)


def test_the_readme_fits_on_two_screens() -> None:
    """Of 50 lines; a window of 180 columns shows each without a break."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 180


def cells(document: str, first: str) -> list[str]:
    """The cells of the table's row that begins so."""
    (row,) = [
        line for line in (ROOT / "docs" / document).read_text().splitlines() if line.startswith(f"| {first}")
    ]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_capacity_agrees_with_what_was_measured() -> None:
    """docs/capacity.md rounds the figures for a million objects; tables of the measurements have them."""
    store, evictor, api = [
        line.strip("|").split("|")[1:]
        for line in (ROOT / "docs" / "performance.md").read_text().splitlines()
        if line.startswith("| 1,000,000 objects")
    ]
    _, _, commits, _, _, redis_bytes = (float(cell.replace(",", "")) for cell in store)
    adopting, known, evictions, peak = (float(evictor[place].replace(",", "")) for place in (0, 5, 10, 12))
    low, high = re.findall(r"\d+", cells("capacity.md", "Redis, index")[1])
    assert int(low) <= redis_bytes <= int(high)
    memory = re.findall(r"\d+", cells("capacity.md", "evictor, memory")[1])
    assert [int(memory[0]), int(memory[1])] == [pytest.approx(float(evictor[3]), rel=0.01), peak]
    start = re.findall(r"\d+", cells("capacity.md", "start of the evictor")[1])
    assert [int(one) for one in start] == [round(adopting), pytest.approx(known, abs=0.5)]
    rates = re.findall(r"[\d,]+\d", cells("capacity.md", "evictions a second")[1])
    assert [int(one.replace(",", "")) for one in rates] == [evictions, pytest.approx(commits, rel=0.01)]
    assert f"{api[-1].strip()} MB" in cells("capacity.md", "API, memory")[2]
    by_policy = [
        int(cells("eviction.md", policy)[place])
        for policy in ("gdsf |", "lru-sp |", "lru |")
        for place in (1, 3)
    ]
    assert f"{min(by_policy)} to {max(by_policy)} bytes" in cells("capacity.md", "evictor, memory")[2]
    counted = float(re.findall(r"([\d.]+) GB", cells("capacity.md", "counted against")[1])[0])
    assert counted * 1e9 == pytest.approx(1e6 * RECORD_BYTES, rel=0.01)


def test_the_table_of_responses_has_the_headers_that_are_sent() -> None:
    rows = [
        line.split("|")[2:6]
        for line in (ROOT / "README.md").read_text().splitlines()
        if "| `max-age" in line or "| `public" in line or "| `no-store" in line
    ]
    seen = {(cache.strip(" `"), control.strip(" `")) for _, cache, _, control in rows}
    assert seen == {
        ("hit", headers.cache_control("hit")),
        ("pending", headers.cache_control("pending")),
        ("miss", headers.cache_control("miss")),
        ("", headers.CACHE_ERROR),
        ("as above", headers.CACHE_ERROR),
    }


@pytest.mark.parametrize("module", ["services.api.openapi", "services.api.operator.openapi"])
def test_openapi_documents_are_up_to_date(module: str) -> None:
    generator = import_module(f"distributor_node.{module}")
    file = ROOT / (module.replace(".", "/") + ".json")
    assert file.read_text() == generator.render(generator.document()), "run `make reference`"


def code_words(file: Path) -> Iterator[str]:
    """The words between backticks, without those of code blocks."""
    prose = re.sub(r"^```.*?^```|^    .*?$", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", prose):
        yield from (word.rstrip(".,:;") for word in span.split())


def anchors(file: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
