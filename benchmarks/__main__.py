"""`make bench`: the node beside nginx (and varnish, if installed), on the same objects and machine."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from benchmarks import load, nginx
from benchmarks.machine import describe
from benchmarks.report import Report, write_results
from benchmarks.run import CASE_NAMES, HARNESS_CASES, Options, Run
from tests.servers.rabbitmq_server import MISSING as RABBITMQ_MISSING
from tests.servers.rabbitmq_server import RabbitServer

RESULTS = Path(__file__).parent / "results"
_NEEDED_GIB = 15
_MISSING = 3
_FAILED = 1


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench ARGS=…", description=__doc__)
    parser.add_argument(
        "--case", action="append", choices=CASE_NAMES, metavar="NAME",
        help=f"measure this case (may be given again); default: all of {', '.join(CASE_NAMES)}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=None, help="rounds of each case (default 7)")
    parser.add_argument(
        "--seconds", type=float, default=None, help="seconds of load on each contender (default 3)"
    )
    parser.add_argument("--samples", type=int, default=None, help="samples of each miss (default 41)")
    parser.add_argument("--quick", action="store_true", help="a look in a minute or two: few, small, short")
    parser.add_argument("--no-pin", action="store_true", help="let the kernel place servers and load")
    parser.add_argument(
        "--check-harness", action="store_true", help="nginx static plays our part: its ratio must be 1"
    )
    parser.add_argument("--folder", type=Path, help="where the run's files lie (default: a temporary one)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    given = parser.parse_args(arguments)
    if given.check_harness and not set(given.case or ()).issubset(HARNESS_CASES):
        parser.error(f"--check-harness: nginx cannot play our part but in {', '.join(HARNESS_CASES)}")
    return given


def options_of(given: argparse.Namespace) -> Options:
    quick = given.quick
    return Options(
        cases=given.case or (HARNESS_CASES if given.check_harness else CASE_NAMES),
        rounds=given.rounds or (2 if quick else 7),
        seconds=given.seconds or (1 if quick else 3),
        samples=given.samples or (5 if quick else 41),
        quick=quick,
        pinned=not given.no_pin,
        check_harness=given.check_harness,
    )


def missing_programs() -> list[str]:
    """What to install, a line each."""
    found = []
    for program in (nginx.program, load.program):
        try:
            program()
        except RuntimeError as error:
            found.append(str(error))
    needed = {"redis-server": "redis-server", "curl": "curl", "setpriv": "util-linux"}
    found += [
        f"{name} not found: apt-get install {package}"
        for name, package in needed.items()
        if not shutil.which(name)
    ]
    return found if RabbitServer.is_installed() else [*found, RABBITMQ_MISSING]


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}" if "\n" not in text else f"\n{text}\n", flush=True)


def exit_on_signal(number: int, _: FrameType | None) -> None:
    """For SIGTERM: through all `finally`s, so that nothing stays behind."""
    sys.exit(128 + number)


def main() -> None:
    given = parse()
    missing = missing_programs()
    if missing:
        print("\n".join(missing), file=sys.stderr)
        sys.exit(_MISSING)
    signal.signal(signal.SIGTERM, exit_on_signal)
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=given.folder) as place:
        folder = Path(place)
        free = shutil.disk_usage(folder).free / 2**30
        if free < _NEEDED_GIB and not given.quick:
            log(
                f"only {free:.0f} GiB free in {folder}: a whole run needs {_NEEDED_GIB} (--folder, or --quick)"
            )
        report = Report(describe(folder), goals_apply=not given.check_harness)
        try:
            Run(options_of(given), report, log).run(folder)
        finally:
            if report.cases:
                if goals := report.goal_table():
                    log(goals)
                for path in write_results(report, given.results, "bench"):
                    log(f"written: {path}")
        for case, failure in report.failures.items():
            log(f"FAILED: {case}: {failure}")
        if report.failures:
            sys.exit(_FAILED)


if __name__ == "__main__":
    main()
