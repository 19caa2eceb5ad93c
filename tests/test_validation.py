"""Splits: hand-written cases, properties against the definition row by row, and the splitters of two other projects."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skfolio.model_selection import CombinatorialPurgedCV, WalkForward
from sklearn.dummy import DummyClassifier
from sklearn.model_selection import GridSearchCV, KFold, TimeSeriesSplit, cross_validate

from ml_ensemble.core import ValidationError
from ml_ensemble.labels import triple_barrier_labels
from ml_ensemble.validation import CombinatorialPurgedSplit, PurgedWalkForward, assemble_paths, block_edges


def at(bars) -> pd.DatetimeIndex:
    """Bar numbers as times, one hour apart."""
    return pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(np.asarray(bars), unit="h")


def split(splitter, start, end) -> list[tuple[list[int], list[int]]]:
    return [(train.tolist(), test.tolist()) for train, test in splitter.split(pd.DataFrame(index=at(start)),
                                                                              groups=at(end))]


def fixed(splitter, rows: int, horizon: int) -> list[tuple[list[int], list[int]]]:
    """The splits of evenly spaced bars whose labels all end `horizon` bars later."""
    return split(splitter, np.arange(rows), np.arange(rows) + horizon)


def span(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


# Eighteen bars, the folds are tested on bars 6 to 11 and 12 to 17. Labels end three bars later: bar 2 is settled at
# bar 5 and may train for the first fold, bar 3 is settled at bar 6 and may not. An embargo of 2 moves this to bar 0.
@pytest.mark.parametrize("window, embargo, trains", [
    ("expanding", 0, [span(0, 2), span(0, 8)]),
    ("expanding", 2, [span(0, 0), span(0, 6)]),
    ("rolling", 0, [span(0, 2), span(6, 8)]),
    ("rolling", 2, [span(0, 0), span(6, 6)])])
def test_walk_forward_by_hand(window, embargo, trains):
    found = fixed(PurgedWalkForward(2, window, embargo, min_train=1), rows=18, horizon=3)
    assert found == list(zip(trains, [span(6, 11), span(12, 17)]))


# Forty bars in groups of ten. Behind group 0, whose last label ends at bar 12, bars 10 to 12 are purged, 13 and 14
# embargoed. Before group 2 bars 17 to 19 are purged, because their labels end at bar 20 and later.
def test_combinatorial_by_hand():
    found = fixed(CombinatorialPurgedSplit(4, 2, embargo=2, min_train=1), rows=40, horizon=3)
    assert found == [(span(25, 39), span(0, 19)),
                     (span(15, 16) + span(35, 39), span(0, 9) + span(20, 29)),
                     (span(15, 26), span(0, 9) + span(30, 39)),
                     (span(0, 6) + span(35, 39), span(10, 29)),
                     (span(0, 6) + span(25, 26), span(10, 19) + span(30, 39)),
                     (span(0, 16), span(20, 39))]


def test_labels_of_unequal_length_are_purged_by_their_end_and_not_by_their_number():
    # Bars 0 1 2 | 3 4 5 | 6 7 8. Bar 0 is settled only at bar 4, bar 2 at once; bar 3 has a label until bar 7.
    end = [4, 1, 2, 7, 5, 5, 7, 8, 8]
    middle = split(CombinatorialPurgedSplit(3, 1, min_train=1), range(9), end)[1]
    assert middle == ([1, 2, 8], [3, 4, 5])
    assert split(PurgedWalkForward(2, min_train=1), range(9), end) == [([1, 2], [3, 4, 5]),
                                                                       ([0, 1, 2, 4, 5], [6, 7, 8])]


def test_the_purge_is_by_time_where_bars_are_missing():
    # A night lies between bars 3 and 20. Labels of two hours are settled before the next day's first bar.
    start = np.array([0, 1, 2, 3, 20, 21, 22, 23])
    found = split(CombinatorialPurgedSplit(2, 1, min_train=1), start, start + 2)
    assert found == [(span(4, 7), span(0, 3)), (span(0, 3), span(4, 7))]


@st.composite
def markets(draw):
    """Bars at uneven times, and label ends on or between bars, in no order."""
    rows = draw(st.integers(8, 48))
    some = lambda low, high: np.array(draw(st.lists(st.integers(low, high), min_size=rows, max_size=rows)))
    start = np.cumsum(some(1, 4))
    return start, start + some(0, draw(st.integers(0, 9)))


def overlap(start, end, row: int, test: list[int]) -> bool:
    """Whether the row's label shares an instant with the interval from the first start to the last end of a block."""
    return start[row] <= max(end[other] for other in test) and end[row] >= start[test[0]]


def bars_between(start, low: int, high: int) -> int:
    return int(((start > low) & (start < high)).sum())


def refusals(make) -> list | None:
    try:
        return make()
    except ValidationError:
        return None


@given(markets(), st.integers(1, 5), st.sampled_from(["expanding", "rolling"]), st.integers(0, 3), st.integers(1, 4))
def test_walk_forward_keeps_exactly_the_rows_that_are_settled_an_embargo_before_the_test(
        market, n_splits, window, embargo, min_train):
    start, end = market
    edges, wanted = block_edges(len(start), n_splits + 1), []
    for first, last in zip(edges[1:-1], edges[2:]):
        test, oldest = list(range(first, last)), first - edges[1] if window == "rolling" else 0
        wanted.append(([row for row in range(oldest, first) if not overlap(start, end, row, test)
                        and bars_between(start, end[row], start[first]) >= embargo], test))
    splitter = PurgedWalkForward(n_splits, window, embargo, min_train)
    eaten = any(len(train) < min_train for train, _ in wanted)
    assert refusals(lambda: split(splitter, start, end)) == (None if eaten else wanted)


@given(markets(), st.integers(2, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))),
       st.integers(0, 3), st.integers(1, 4))
def test_combinatorial_keeps_exactly_the_rows_that_overlap_no_block_and_are_not_embargoed(
        market, sizes, embargo, min_train):
    (start, end), (n_groups, n_test_groups) = market, sizes
    splitter = CombinatorialPurgedSplit(n_groups, n_test_groups, embargo, min_train)
    edges, eaten, wanted = block_edges(len(start), n_groups), False, []
    groups = [list(range(*pair)) for pair in zip(edges, edges[1:])]
    paths = splitter.get_paths()
    for number in range(splitter.get_n_splits()):
        blocks = [groups[g] for g in range(n_groups) if number in paths[:, g]]
        others = [group for group in groups if group not in blocks]
        free = lambda row, block: not overlap(start, end, row, block) and (
            row < block[0] or bars_between(start, max(end[block]), start[row]) >= embargo)
        kept = [[row for row in group if all(free(row, block) for block in blocks)] for group in others]
        eaten |= min(map(len, kept)) == 0 or sum(map(len, kept)) < min_train
        wanted.append((sum(kept, []), sum(blocks, [])))
    assert refusals(lambda: split(splitter, start, end)) == (None if eaten else wanted)


@given(st.integers(2, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))), st.integers(14, 40))
def test_every_path_is_every_row_once_and_every_row_is_tested_once_a_path(sizes, rows):
    splitter = CombinatorialPurgedSplit(*sizes, min_train=1)
    tests = [np.array(test) for _, test in fixed(splitter, rows, horizon=0)]
    n_paths = len(splitter.get_paths())
    assert n_paths * sizes[0] == len(tests) * sizes[1] and len(tests) == splitter.get_n_splits()
    assert np.bincount(np.concatenate(tests)).tolist() == [n_paths] * rows

    number_and_row = [np.column_stack([np.full(len(test), k), test]) for k, test in enumerate(tests)]
    paths = assemble_paths(tests, number_and_row)
    assert paths.shape == (n_paths, rows, 2)
    assert (paths[:, :, 1] == np.arange(rows)).all()                     # each prediction stands at its own row
    group = np.searchsorted(block_edges(rows, sizes[0]), np.arange(rows), side="right") - 1
    assert (paths[:, :, 0] == splitter.get_paths()[:, group]).all()      # and in the path it was promised to
    assert all(len(set(paths[:, row, 0])) == n_paths for row in range(rows))


@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 3), st.integers(60, 120))
def test_rolling_windows_have_the_same_length_in_every_fold(n_splits, horizon, embargo, rows):
    found = fixed(PurgedWalkForward(n_splits, "rolling", embargo, min_train=1), rows, horizon)
    assert {len(train) for train, _ in found} == {rows // (n_splits + 1) - horizon - embargo}


# skfolio purges by count. With bars in every hour and labels of one length a count is a time, and both must agree.
SIZES = st.tuples(st.integers(3, 7), st.integers(9, 14), st.integers(0, 4), st.integers(0, 3))


@given(SIZES, st.data())
def test_combinatorial_agrees_with_skfolio_where_labels_have_one_length(sizes, data):
    n_groups, size, horizon, embargo = sizes
    n_test_groups = data.draw(st.integers(2, n_groups - 1))
    ours = CombinatorialPurgedSplit(n_groups, n_test_groups, embargo, min_train=1)
    peer = CombinatorialPurgedCV(n_groups, n_test_groups, purged_size=horizon, embargo_size=embargo)
    rows = n_groups * size
    if size <= 2 * horizon + embargo:                                    # nothing is left between two test blocks
        with pytest.raises(ValidationError, match="keeps no row of group"):
            fixed(ours, rows, horizon)
        return
    theirs = [(train.tolist(), np.concatenate(tests).tolist()) for train, tests in peer.split(np.zeros((rows, 1)))]
    assert fixed(ours, rows, horizon) == theirs
    assert (ours.get_n_splits(), len(ours.get_paths())) == (peer.n_splits, peer.n_test_paths)
    assert ours.get_paths().T.tolist() == peer.recombined_paths.tolist()


@given(SIZES, st.sampled_from(["expanding", "rolling"]))
def test_walk_forward_agrees_with_skfolio_where_labels_have_one_length(sizes, window):
    n_splits, size, horizon, embargo = sizes
    gap, rows = horizon + embargo, (n_splits + 1) * size
    peer = WalkForward(size, size - gap, expand_train=window == "expanding", purged_size=gap)
    theirs = [(train.tolist(), test.tolist()) for train, test in peer.split(np.zeros((rows, 1)))]
    assert fixed(PurgedWalkForward(n_splits, window, embargo, min_train=1), rows, horizon) == theirs


@given(SIZES)
def test_the_plain_cases_agree_with_scikit_learn(sizes):
    n, size, horizon, embargo = sizes
    lists = lambda splitter, rows: [(a.tolist(), b.tolist()) for a, b in splitter.split(np.zeros((rows, 1)))]
    rows = (n + 1) * size
    assert fixed(PurgedWalkForward(n, embargo=embargo, min_train=1), rows, horizon) == lists(
        TimeSeriesSplit(n, gap=horizon + embargo), rows)
    assert fixed(CombinatorialPurgedSplit(n, 1, min_train=1), n * size, 0) == lists(KFold(n), n * size)


@pytest.mark.parametrize("splitter", [PurgedWalkForward(4, embargo=5), CombinatorialPurgedSplit(6, 2, embargo=5)],
                         ids=["walk-forward", "combinatorial"])
def test_barrier_labels_of_training_rows_do_not_overlap_the_test_part(sandbox, splitter):
    labels = triple_barrier_labels(sandbox, horizon=12)
    start, end = labels.index, pd.DatetimeIndex(labels["end_time"])
    assert len(set(end - start)) > 3                                     # otherwise a count would have done
    for train, test in splitter.split(labels, groups=labels["end_time"]):
        for block in np.split(test, np.flatnonzero(np.diff(test) > 1) + 1):
            before, behind = train[train < block[0]], train[train > block[-1]]
            assert (end[before] < start[block[0]]).all() and (start[behind] > end[block].max()).all()


@pytest.mark.parametrize("splitter", [PurgedWalkForward(3, min_train=1), CombinatorialPurgedSplit(4, 2, min_train=1)],
                         ids=["walk-forward", "combinatorial"])
def test_splitters_work_with_scikit_learn_and_accept_times_of_any_form(splitter):
    start, end, y = at(range(40)), at(np.arange(40) + 2), np.arange(40) % 2
    X = pd.DataFrame({"x": 0.0}, index=start)
    wanted = fixed(splitter, 40, 2)
    done = cross_validate(DummyClassifier(), X, y, groups=end, cv=splitter, return_indices=True)
    assert [rows.tolist() for rows in done["indices"]["train"]] == [train for train, _ in wanted]
    search = GridSearchCV(DummyClassifier(), {"strategy": ["prior", "stratified"]}, cv=splitter).fit(X, y, groups=end)
    assert search.n_splits_ == splitter.get_n_splits() == len(wanted)

    forms = [pd.Series(end), list(end), end.to_numpy(), np.array(list(end), dtype=object), end.as_unit("s"),
             end.tz_convert("Asia/Tokyo"), end.tz_localize(None)]
    for form in forms:
        assert [(a.tolist(), b.tolist()) for a, b in splitter.split(start, groups=form)] == wanted
    with pytest.raises(ValidationError, match="groups is None"):
        cross_validate(DummyClassifier(), X, y, cv=splitter)


def test_no_split_is_returned_if_a_later_one_is_invalid():
    start, end = np.arange(30), np.arange(30)
    end[10:20] = 25                                                      # the second block is settled late
    assert refusals(lambda: next(PurgedWalkForward(2, "rolling", min_train=1).split(at(start), groups=at(end)))) is None
    assert refusals(lambda: next(CombinatorialPurgedSplit(3, 1, min_train=1).split(at(start), groups=at(end)))) is None
