"""When Intel's own binding is taken."""

from __future__ import annotations

import pytest

from falcon_dist import ccl_intel as intel
from falcon_dist.contract import UserError


@pytest.mark.parametrize(
    ("binding", "torch"), [("2.8.0+cpu", "2.8.0+cpu"), ("2.8.0", "2.8.1+cu128"), ("2.13.0+cpu", "2.13.0")]
)
def test_one_built_for_this_torch_is_taken(binding: str, torch: str) -> None:
    assert intel.fault({"oneccl-bind-pt": binding, "torch": torch}) is None


@pytest.mark.parametrize(("binding", "torch"), [("2.8.0+cpu", "2.13.0+cpu"), ("2.1.0", "2.13.0"), ("odd", "odd")])
def test_one_built_for_another_torch_is_refused(binding: str, torch: str) -> None:
    reason = intel.fault({"oneccl-bind-pt": binding, "torch": torch})
    assert reason is not None
    assert f'{binding} is not for torch {torch}: "ccl-intel"; use --backend ccl' in reason
    assert "\n" not in reason


def test_none_is_one_line_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intel, "_installed", lambda: {"torch": "2.13.0"})
    with pytest.raises(UserError, match='is not installed: "ccl-intel"; use --backend ccl'):
        intel.register()
