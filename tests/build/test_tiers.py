"""The default tier leaves out combinations of parameters, but no pair of values and no function."""

import itertools
from types import SimpleNamespace

import pytest

from tests.support.tiers import MOST, beyond_pairs, covering, left_out, longest_first

pytestmark = pytest.mark.fast


def pairs(combination):
    return set(itertools.combinations(sorted(combination.items()), 2))


@pytest.mark.parametrize("sizes", [(5, 4), (10, 3, 2), (3, 3, 3, 3), (40, 2, 4, 2)])
def test_each_pair_of_values_is_kept(sizes):
    combinations = [
        dict(zip("abcd", values, strict=False))
        for values in itertools.product(*map(range, sizes))
    ]  # fmt: skip
    chosen = covering(combinations)
    kept = set().union(*(pairs(combinations[place]) for place in chosen))
    assert kept == set().union(*map(pairs, combinations))
    first, second = sorted(sizes)[-2:]
    assert first * second <= len(chosen) <= 2 * first * second
    assert chosen == covering(combinations)  # alike in each process


class Item(SimpleNamespace):
    __hash__ = object.__hash__


def cases(name, *sizes, **marks):
    values = [[object() for _ in range(size)] for size in sizes]
    together = {"together": True} if marks.pop("together", False) else {}
    marker = {mark: SimpleNamespace(args=args, kwargs=together) for mark, args in marks.items()}.get
    return [
        Item(
            nodeid=f"{name}[{place}]", get_closest_marker=marker,
            callspec=SimpleNamespace(
                params=dict(zip("abc", combination, strict=False)), id=str(place)
            ),
        )
        for place, combination in enumerate(itertools.product(*values))
    ]  # fmt: skip


def test_what_is_left_out():
    alone = Item(nodeid="test_alone", get_closest_marker={}.get)
    few, many = cases("test_few", MOST), cases("test_many", 4, 3, 3)
    marked, long = cases("test_marked", 2, full=()), cases("test_long", 3, 2, few=(2,))
    out = left_out([alone, *few, *many, *marked, *long])
    assert len(few) == MOST and not out & {alone, *few}
    assert out >= set(marked) and len(set(long) - out) == 2
    assert len(set(many) - out) == MOST


def test_pairwise_functions_have_each_pair_and_no_more():
    marked, others = cases("test_marked", 6, 3, 4, pairwise=()), cases("test_others", 6, 3, 4)
    out = beyond_pairs([*marked, *others])
    kept = [case.callspec.params for case in marked if case not in out]
    assert out < set(marked) and 6 * 4 <= len(kept) < 6 * 3 * 4 * 2 / 3
    every = set().union(*(pairs(case.callspec.params) for case in marked))
    assert every == set().union(*map(pairs, kept))


def test_functions_of_a_module_are_left_the_same_values():
    one, two = (cases(f"test_a.py::{name}", 40, few=(6,), together=True) for name in ("one", "two"))
    other = cases("test_b.py::one", 40, few=(6,), together=True)
    out = left_out([*one, *two, *other])
    kept = [[case.callspec.id for case in group if case not in out] for group in (one, two, other)]
    assert len(kept[0]) == 6 and kept[0] == kept[1] == kept[2]


def test_long_tests_begin_each_process_share(monkeypatch):
    items = [
        Item(nodeid=str(n), get_closest_marker={"long": n in (3, 8, 9)}.get) for n in range(11)
    ]
    for processes in (1, 2, 3):
        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", str(processes))
        order = [int(item.nodeid) for item in longest_first(items)]
        assert sorted(order) == list(range(11))
        size = -(-len(items) // processes)
        assert {3, 8, 9} >= {order[n * size] for n in range(processes)}
        assert {3, 8, 9} <= {place for n in range(processes) for place in order[n * size :][:3]}
