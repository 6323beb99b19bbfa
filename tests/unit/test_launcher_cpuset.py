import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.cpuset import CpuSet, union

SETS = st.frozensets(st.integers(0, 300)).map(CpuSet)


@given(SETS)
def test_parse_undoes_str(cpus):
    assert CpuSet.parse(str(cpus)) == cpus


@given(SETS, SETS)
def test_operators_are_those_of_sets(a, b):
    assert (a & b).ids == a.ids & b.ids
    assert (a | b).ids == a.ids | b.ids == union([a, b]).ids
    assert (a - b).ids == a.ids - b.ids


@pytest.mark.parametrize(
    ("text", "ids"), [("", []), ("\n", []), ("0-3,8\n", [0, 1, 2, 3, 8]), ("8,0", [0, 8]), ("1-2,2-3", [1, 2, 3])]
)
def test_reads_what_the_kernel_writes(text, ids):
    assert list(CpuSet.parse(text)) == ids


@pytest.mark.parametrize("text", ["a", "1-", "-1", "3-1", "0,,1", "0-999999999", "1;2"])
def test_refuses_and_names_the_fault(text):
    with pytest.raises(ValueError, match='"'):
        CpuSet.parse(text)
