"""Windows over long proteins: coverage, blending weights, and the window around given positions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from bionemo_esm.inference.batching import blending_weights, window_around, windows

SIZES = [(limit, overlap) for limit in (1, 2, 3, 7, 10) for overlap in range(limit)]


@pytest.mark.parametrize(("limit", "overlap"), SIZES)
def test_windows_cover_a_protein_with_as_few_as_possible(limit: int, overlap: int) -> None:
    for residues in range(1, 60):
        cover = windows(residues, limit, overlap)
        assert cover[0][0] == 0
        assert cover[-1][1] == residues
        if residues <= limit:
            assert cover == [(0, residues)]
            continue
        assert all(end - begin == limit for begin, end in cover)
        shared = [end - begin for (_, end), (begin, _) in pairwise(cover)]
        assert min(shared) >= overlap
        assert max(shared) - min(shared) <= 1, "not spaced evenly"
        one_less = limit + (len(cover) - 2) * (limit - overlap)
        assert one_less < residues, "a window fewer would have done"


def test_longest_uniref_protein_has_177_windows_at_half_overlap() -> None:
    cover = windows(45_354, 510, 255)
    assert len(cover) == 177
    assert {end - begin for begin, end in cover} == {510}


@pytest.mark.parametrize(("limit", "overlap"), [(10, 10), (10, -1), (0, 0)])
def test_invalid_overlap_is_rejected(limit: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="does not go with windows"):
        windows(100, limit, overlap)


@pytest.mark.parametrize(("limit", "overlap"), SIZES)
def test_weights_sum_to_one_at_every_residue(limit: int, overlap: int) -> None:
    for residues in range(1, 60):
        cover = windows(residues, limit, overlap)
        total = np.zeros(residues)
        for weights, (begin, end) in zip(blending_weights(cover), cover, strict=True):
            assert weights.dtype == np.float32
            assert weights.shape == (end - begin,)
            assert weights.min() > 0
            total[begin:end] += weights
        np.testing.assert_allclose(total, 1, atol=1e-6)


def test_weights_decrease_linearly_at_cuts_but_not_at_protein_ends() -> None:
    first, second = blending_weights([(0, 10), (6, 16)])
    assert first[:6].tolist() == [1] * 6
    np.testing.assert_allclose(first[6:], [4 / 5, 3 / 5, 2 / 5, 1 / 5], rtol=1e-6)
    np.testing.assert_allclose(second, first[::-1], rtol=1e-6)


def test_middle_window_has_full_weight_between_its_neighbours() -> None:
    _, middle, _ = blending_weights([(0, 6), (4, 10), (8, 14)])
    np.testing.assert_allclose(middle, [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize("cover", [windows(46, 10, 5), windows(14, 6, 2), windows(1000, 510, 255)])
def test_blending_is_symmetric_under_reversal(cover: list[tuple[int, int]]) -> None:
    residues = cover[-1][1]
    assert [(residues - end, residues - begin) for begin, end in reversed(cover)] == cover
    weights = blending_weights(cover)
    for forwards, backwards in zip(weights, reversed(weights), strict=True):
        np.testing.assert_allclose(forwards, backwards[::-1], rtol=1e-6)


def proteingym_window(place: int, residues: int, window: int) -> list[int]:
    """`get_optimal_window` of ProteinGym (Notin et al. 2023), utils/scoring_utils.py, as its ESM scripts call it."""
    half = window // 2
    if residues <= window:
        return [0, residues]
    if place < half:
        return [0, window]
    if place >= residues - half:
        return [residues - window, residues]
    return [max(0, place - half), min(residues, place + half)]


@pytest.mark.parametrize("window", [2, 10, 64])
def test_window_around_a_position_equals_proteingym(window: int) -> None:
    for residues in (1, 5, window - 1, window, window + 1, 2 * window, 150):
        for place in range(residues):
            assert list(window_around(place, place, residues, window)) == proteingym_window(place, residues, window)


@pytest.mark.parametrize("limit", [1, 2, 5, 10])
def test_window_around_positions_contains_them_all_and_is_full(limit: int) -> None:
    residues = 33
    for first in range(residues):
        for last in range(first, min(first + limit, residues)):
            begin, end = window_around(first, last, residues, limit)
            assert 0 <= begin <= first <= last < end <= residues
            assert end - begin == limit
            if begin > 0 and end < residues:
                assert abs((first - begin) - (end - 1 - last)) <= 1, "not in the middle"


def test_positions_too_far_apart_have_no_window() -> None:
    assert window_around(3, 12, 100, 10) == (3, 13)
    with pytest.raises(ValueError, match="places 3 to 13 do not fit into a window of 10 residues"):
        window_around(3, 13, 100, 10)
