"""What a claim asks about admission, by the settings. The answer: tests/contract/test_state_store_claims.py."""

from __future__ import annotations

from typing import Any

import pytest

from distributor_node.services.api.assets.handler import admission_question
from distributor_node.shared.domain.space import AdmissionQuestion
from distributor_node.shared.settings.model import Settings

LIMIT = 1_000_000
MIB = 1024**2


def settings(**admission: Any) -> Settings:
    return Settings.model_validate(
        {
            "storage": {"limit": LIMIT, "low_watermark": 0.5},
            "catalog": {"kind": "manifest", "manifest": "none.yaml"},
            "admission": admission,
        }
    )


@pytest.mark.parametrize(
    ("above", "admitted", "asked"), [("auto", MIB, MIB + 1), ("64K", 65_536, 65_537), ("0", 0, 1)]
)
def test_only_for_large_objects_the_store_is_asked(above: str, admitted: int, asked: int) -> None:
    chosen = settings(above_size=above, window=60)
    assert admission_question(chosen, None) is None
    assert admission_question(chosen, admitted) is None
    size = None if above == "auto" else admitted
    assert admission_question(chosen, asked) == AdmissionQuestion(asked, size, LIMIT // 2, 60)


@pytest.mark.parametrize("off", ["off", "OFF", None, False])
def test_off_admits_everything(off: object) -> None:
    assert admission_question(settings(above_size=off), 10**12) is None


def test_by_default_the_threshold_follows_the_traffic() -> None:
    assert settings().admission.above_size == "auto"


@pytest.mark.parametrize("wrong", ["none", True, "1x", [1]])
def test_other_values_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"admission\.above_size\n.*expected auto, off or a size"):
        settings(above_size=wrong)
