"""The picture of one head's energy field, and the field itself against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from incoherence_monitor import painting
from incoherence_monitor.errors import MissingDependencyError, SettingError
from incoherence_monitor.field import field_figure
from incoherence_monitor.ops import energy_field


def head(length=40, dim=8):
    return torch.randn(length, dim), torch.randn(length, dim) + 3


def test_the_causal_field_is_each_row_less_its_mean_over_the_past():
    query, key = head()
    field = energy_field(query, key, 0.5, causal=True)
    logits = 0.5 * query.double() @ key.double().T
    for row in range(40):
        past = logits[row, : row + 1]
        torch.testing.assert_close(field[row, : row + 1], past - past.mean())
        assert not field[row, row + 1 :].any()
    # The full one is bounded in rank by d, this one is not.
    assert torch.linalg.matrix_rank(energy_field(query, key, 0.5)) == 8
    assert torch.linalg.matrix_rank(field) > 8


def test_both_fields_are_drawn_with_titles_units_and_one_scale_of_colours():
    query, key = head()
    figure = field_figure(query, key, scale=0.5, layer="layers.3.$attn$", head=5, step=1200, run="a run")
    assert figure._suptitle.get_text() == "Energy field of layers.3.$attn$, query head 5, 40 tokens, step 1200, a run"
    panels = [axis for axis in figure.axes if axis.images]
    assert [panel.get_xlabel() for panel in panels] == ["key position"] * 2
    assert panels[0].get_ylabel() == "query position"
    full, causal = (np.ma.filled(panel.images[0].get_array(), np.nan) for panel in panels)
    np.testing.assert_allclose(full, energy_field(query, key, 0.5))
    np.testing.assert_array_equal(np.isnan(causal), ~np.tri(40, dtype=bool))
    assert panels[0].images[0].get_clim() == panels[1].images[0].get_clim()
    low, high = panels[0].images[0].get_clim()
    assert low == -high
    bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
    assert [bar.get_ylabel() for bar in bars] == ["logit less its row's mean, nats"]


@pytest.mark.parametrize("query", [torch.zeros(40, 8), torch.full((40, 8), torch.nan)])
def test_a_field_of_zeros_or_without_a_finite_number_is_drawn_too(query):
    painting.to_pixels(field_figure(query, head()[1], scale=0.5, layer="0", head=0))


@pytest.mark.parametrize(
    ("query", "key"),
    [
        (torch.randn(40, 8), torch.randn(41, 8)),
        (torch.randn(1, 8), torch.randn(1, 8)),
        (torch.randn(1, 40, 8), torch.randn(1, 40, 8)),
        (torch.randn(2049, 1), torch.randn(2049, 1)),
    ],
)
def test_shapes_that_make_no_picture_are_refused(query, key):
    with pytest.raises(SettingError, match="2 to 2048 tokens"):
        field_figure(query, key, scale=0.5, layer="0", head=0)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"incoherence-monitor\[plots\]"):
        field_figure(*head(), scale=0.5, layer="0", head=0)
