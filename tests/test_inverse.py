"""gencli evaluate inverse: errors of a flow's way there and back, of which the tests know the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gencli import data
from gencli.metrics.inverse import inverse
from gencli.models.flows.nice import NICE
from tests.flows import build
from tests.test_cli import Call, gencli, refused
from tests.tiny import words

__all__ = ["gencli"]  # the fixture


class Shifted(NICE):
    """Its inverse is off by a known amount, in data and so in latents."""

    off = 0.0

    def f_inverse(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return super().f_inverse(z, labels) + self.off


def measured(off: float, name: str = "digits", **options: Any) -> dict[str, Any]:
    source = data.load(name, "test")
    flow = build(Shifted, source.spec, hidden=(16,), couplings=2, **options)
    flow.off = off
    return inverse(flow, source, limit=70)


def test_an_exact_inverse_is_exact_to_rounding() -> None:
    row = measured(0.0)
    assert row["examples"] == 70 and row["data"] == "digits@test" and row["off"] == 0
    assert 0 < row["value"] < 1e-5 and 0 < row["latents"] < 1e-5
    assert row["value_float64"] < 1e-12 and row["latents_float64"] < 1e-12


@pytest.mark.parametrize("logit", [None, 0.05])
def test_a_known_error_is_found(logit: float | None) -> None:
    """0.03 in units of 1/17 of the range moves half of the pixels, with uniform noise, to another level."""
    row = measured(0.03, logit=logit)
    assert row["value"] == pytest.approx(0.03, rel=1e-3) and row["value_float64"] == pytest.approx(0.03, rel=1e-9)
    assert row["latents_float64"] > 0.01
    if logit is None:  # the lowest and highest level are clamped: none leaves the highest
        x = data.load("digits", "test").rows(torch.arange(70))["x"]
        inner = (x < 16).double().mean().item()
        assert row["off"] == pytest.approx(0.03 * 17 * inner, rel=0.05)


def test_of_a_run(gencli: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("realnvp", "vae"):
        assert gencli("train", name, *words(name), "--steps", 2, "--no-preview").code == 0
    row = gencli("eval", "inverse", 1, "-n", 20).row
    assert row["metric"] == "inverse" and row["examples"] == 20 and row["value"] < 1e-4 and row["model"] == "realnvp"
    assert "inverse" in {found["metric"] for found in gencli("eval", "all", 1, "-n", 90).rows}
    refused(gencli("eval", "inverse", 2), 2, "vae has no inverse")
    assert gencli("sample", 1, "-n", 3, "-o", "s.npz").code == 0
    refused(gencli("eval", "inverse", "s.npz"), 2, "inverse is of a run, not of samples")
