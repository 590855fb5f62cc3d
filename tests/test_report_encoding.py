"""What a report packs: read back within the error that it states, thinned without losing what alerts need."""

from __future__ import annotations

import base64
import gzip
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from incoherence_monitor.report.encoding import FINEST, LARGEST_CODE, UNDEFINED, ZERO, pack, thin
from incoherence_monitor.report.markup import clean, html, script_json, tag

NUMBERS = st.one_of(
    st.just(float("nan")), st.just(0.0), st.floats(2.0**-40, 2.0**40, width=32), st.floats(0.875, 1.125, width=32)
)


def unpack(packed, heads):
    """As data.js does."""
    raw = gzip.decompress(base64.b64decode(packed.text))
    low, step = np.frombuffer(raw, "<f4", heads), np.frombuffer(raw, "<f4", heads, 4 * heads)
    grown = np.frombuffer(raw, np.uint8, -1, 8 * heads).reshape(heads, -1)
    codes = np.cumsum(grown, axis=1, dtype=np.uint8)
    with np.errstate(over="ignore"):
        values = np.exp(low[:, None].astype(np.float64) + step[:, None].astype(np.float64) * codes)
    values[codes == ZERO] = 0
    values[codes == UNDEFINED] = np.nan
    return values.T


@settings(max_examples=200, deadline=None)
@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=NUMBERS))
def test_values_are_read_back_within_the_error_that_is_stated(values):
    packed = pack(values)
    found = unpack(packed, values.shape[1])
    assert found.shape == values.shape
    np.testing.assert_array_equal(np.isnan(found), np.isnan(values))
    np.testing.assert_array_equal(found == 0, values == 0)
    known = np.isfinite(values) & (values > 0)
    error = np.abs(np.log(found[known]) - np.log(values[known].astype(np.float64)))
    # Single precision of logarithms up to 28 adds what a code's rounding does not.
    assert error.max(initial=0) <= np.log1p(packed.error) + 1e-5


def test_a_step_is_half_of_the_noise_and_no_more_than_the_range_asks_for():
    generator = np.random.default_rng(0)
    noisy = np.exp(0.05 * generator.standard_normal((2000, 3))).astype(np.float32)
    assert pack(noisy).error == pytest.approx(0.05 / 4, rel=0.15)
    assert pack(noisy, noise_steps=8).error == pytest.approx(0.05 / 16, rel=0.15)
    smooth = np.exp(np.linspace(0, 5, 2000))[:, None].astype(np.float32)
    assert pack(smooth).error == pytest.approx(np.expm1(5 / LARGEST_CODE / 2), rel=0.01)
    assert pack(np.ones((50, 2), np.float32)).error == pytest.approx(FINEST / 2, rel=0.01)
    assert pack(np.ones((50, 2), np.float32), finest=0.1).error == pytest.approx(np.expm1(0.05), rel=0.01)


def test_noise_costs_less_than_five_bits_a_value():
    generator = np.random.default_rng(0)
    values = np.exp(0.03 * generator.standard_normal((2000, 64))).astype(np.float32)
    # Base64 takes 8 bits for 6.
    assert len(pack(values).text) * 6 / values.size < 4.5


def test_nothing_at_all_is_packed_too():
    packed = pack(np.zeros((5, 0), np.float32))
    assert gzip.decompress(base64.b64decode(packed.text)) == b""
    assert packed.error == 0


@given(st.integers(1, 500), st.integers(2, 100), st.sets(st.integers(0, 499), max_size=10))
def test_thinning_keeps_what_it_must_and_is_even(count, most, keep):
    kept = np.array(sorted(at for at in keep if at < count), dtype=np.int64)
    rows = thin(count, most, kept)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert rows[0] == 0
    assert rows[-1] == count - 1
    assert set(kept.tolist()) <= set(rows.tolist())
    assert len(rows) <= min(count, most + len(kept) + 1)
    if count <= most:
        assert len(rows) == count
    else:
        assert np.diff(rows).max() <= -(-count // most)


HOSTILE = ["</script><script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "\u2028\u2029", "<!--", "]]>&amp;"]


@pytest.mark.parametrize("text", HOSTILE)
def test_json_in_a_script_can_not_end_it_and_reads_back(text):
    written = script_json({text: [text]})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {text: [text]}


@pytest.mark.parametrize("text", HOSTILE)
def test_text_and_attributes_are_read_back_as_they_were(text):
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, name, attributes):
            found.append((name, dict(attributes)))

        def handle_data(self, data):
            found.append(data)

    reader = Reader()
    reader.feed(html(tag("p", text, title=text)))
    reader.close()
    assert found[0] == ("p", {"title": text})
    assert "".join(found[1:]) == text


def test_what_html_cannot_hold_is_replaced():
    assert clean("a\x00b\ud800c\n") == "a\ufffdb\ufffdc\n"
    assert html(tag("p", "\x1b[31m")) == "<p>\ufffd[31m</p>"
