"""Whether these tests run against compiled modules is as the environment says: `make test-compiled`."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy/release/compile_fast_path.py"


def modules() -> tuple[str, ...]:
    """As the script names them; read, since it imports what only a build needs."""
    text = SCRIPT.read_text().partition("MODULES = (")[2].partition("\n)")[0]
    return tuple(line.strip().strip('",') for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("module", modules())
def test_a_module_is_the_one_of_this_tree(module: str) -> None:
    """Compiled where its extension module lies beside it, which is nowhere but in a copy made by `make compile`."""
    found = importlib.import_module("distributor_node." + module.removesuffix(".py").replace("/", "."))
    assert found.__file__ is not None
    file = Path(found.__file__)
    assert file.resolve().is_relative_to(ROOT)
    compiled = list((ROOT / "distributor_node" / module).parent.glob(f"{Path(module).stem}.*.so"))
    assert (file.suffix == ".so") is bool(compiled)
    assert bool(compiled) is (ROOT.parent.name == "build" and ROOT.name == "compiled")
