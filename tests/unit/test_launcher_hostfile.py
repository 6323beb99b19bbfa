import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.cpuset import CpuSet
from launcher.errors import UserError
from launcher.hostfile import parse, parse_list
from launcher.hostnames import MOST_HOSTS, expand
from launcher.hostselect import select

EXAMPLES = Path(__file__).parents[2] / "hostfiles"


def hosts(text):
    return [entry.host for entry in parse(text, "h").entries]


def one(text):
    (entry,) = parse(text, "h").entries
    return entry


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("node1", {}),
        ("me@node1", {"user": "me"}),
        ("node1:4", {"slots": 4}),
        ("me@node1:4 max_slots=8", {"user": "me", "slots": 4, "max_slots": 8}),
        ("node1 slots=4 max-slots=8", {"slots": 4, "max_slots": 8}),
        ("node1\t 4", {"slots": 4}),
        ("node1 4 # the rest is not read: $(x)", {"slots": 4}),
        ("10.0.0.7", {"host": "10.0.0.7"}),
        ("[2001:db8::0001]:2", {"host": "2001:db8::1", "slots": 2}),
        ("me@[::1] slots=2", {"host": "::1", "user": "me", "slots": 2}),
        ("node1 addr=10.0.0.1 ifname=ens5", {"addr": "10.0.0.1", "ifname": "ens5"}),
        ("node1 addr=[2001:db8::1]", {"addr": "2001:db8::1"}),
        ("node1 cores=0-3,8", {"cores": CpuSet.parse("0-3,8")}),
        ("a_b.c-d.example", {"host": "a_b.c-d.example"}),
    ],
)
def test_a_line(line, values):
    entry = one(line)
    assert entry.line == 1
    expected = {"host": "node1", "user": None, "slots": None, "max_slots": None, "addr": None} | values
    assert {key: getattr(entry, key) for key in expected} == expected


def test_order_comments_blank_lines_and_line_ends():
    text = "\ufeff# first\r\n\r\nb slots=2\r\n   # none\r\na # c\n\n"
    assert [(e.host, e.line) for e in parse(text, "h").entries] == [("b", 3), ("a", 5)]


def test_ranges():
    assert hosts("node[01-04,7]") == ["node01", "node02", "node03", "node04", "node7"]
    assert hosts("r[1-2]n[08-10]-ib") == ["r1n08-ib", "r1n09-ib", "r1n10-ib", "r2n08-ib", "r2n09-ib", "r2n10-ib"]
    assert {e.slots for e in parse("n[1-3]:2", "h").entries} == {2}
    assert len(hosts(f"n[1-{MOST_HOSTS}]")) == MOST_HOSTS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\n-oProxyCommand=x", ["h:2:", '"-oProxyCommand=x"']),
        ("$(id)", ['"$(id)"']),
        ("a;b", ['"a;b"']),
        ("a\nb\n\n A ", ["h:4:", "twice", "line 1", '"A"', "slots=N"]),
        ("n[1-3]\nn2", ["h:2:", "line 1", '"n2"']),
        ("n[1-3,2]", ["twice", '"n2"']),
        ("ñode", ['"ñode"']),
        ("node\u0661", ["not a host name"]),
        ("a slots=4x", ["slots must be from 1 to", '"4x"']),
        ("a slots=0", ['"0"']),
        ("a slots=\u0664", ["slots must"]),
        ("a:2 slots=2", ["said twice", '"slots=2"']),
        ("a slots = 4", ['"slots"', "slots=, max_slots="]),
        ("a slots=4 max_slots=2", ["max_slots is less", '"2"']),
        ("a gpus=4", ['"gpus=4"']),
        ("n[1-2] addr=10.0.0.1", ["one address for 2 hosts"]),
        ("a addr=node1", ["not an IP address", '"node1"']),
        ("a ifname=eth0;x", ["not an interface", '"eth0;x"']),
        ("a cores=x", ["not a list of cpus", '"x"']),
        ("a cores=", ["cores is a list"]),
        ("999.1.1.1", ["not an IP address"]),
        ("7", ["not an IP address", '"7"']),
        ("::1", ["needs brackets", '"::1"']),
        ("[fe80::1%eth0]", ["zone"]),
        ("n[1-", ["bracket"]),
        ("n[3-1]", ["backwards"]),
        ("n[a-b]", ['"a-b"']),
        (f"n[0-{MOST_HOSTS}]", ["more than 65536"]),
        ("n[1-999]m[1-999]", ["998001 names"]),
        ("r@oot@a", ["not a user name"]),
        ("-x@a", ["not a user name", '"-x"']),
        ("", ["h: a hostfile without hosts"]),
        ("# only\n", ["without hosts"]),
        ("a\x00b", ["h:1:", '"a?b"']),
        ("x" * 300, ["not a host name"]),
    ],
)
def test_a_fault_names_file_line_and_value(text, words):
    with pytest.raises(UserError) as fault:
        parse(text, "h")
    told = str(fault.value)
    assert all(word in told for word in words), told
    assert told.isprintable()
    assert len(told) < 300


def test_a_list_of_hosts():
    assert [(e.host, e.slots) for e in parse_list("b,a:2,n[1,3]").entries] == [
        ("b", None),
        ("a", 2),
        ("n1", None),
        ("n3", None),
    ]
    for text in ("a,,b", "a b", "", "a,"):
        with pytest.raises(UserError, match="--hosts"):
            parse_list(text)


SIX = parse("n[1-4] slots=4\n[::1] slots=2\nbare", "h")


def chosen(**flags):
    left = select(SIX, **{"include": None, "exclude": None, "nnodes": None, **flags})
    return [(e.host, e.seats) for e in left.entries]


def test_filters():
    assert chosen(include="n3@n1") == [("n1", None), ("n3", None)]
    assert chosen(include="n1:0,2@[::1]:1") == [("n1", (0, 2)), ("::1", (1,))]
    assert chosen(include="n[2-3]:1") == [("n2", (1,)), ("n3", (1,))]
    assert chosen(exclude="n[1-3]@n4:0,1@bare") == [("n4", (2, 3)), ("::1", None)]
    assert chosen(exclude="n1:0,1,2,3@n2@n3@n4@bare") == [("::1", None)]
    assert chosen(nnodes=2) == [("n1", None), ("n2", None)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"include": "n9"}, ["--include", '"n9"', "hosts: n1"]),
        ({"include": "n1", "exclude": "n2"}, ["--include", "--exclude"]),
        ({"include": "n1:4"}, ["slots of n1 are 0 to 3", '"4"']),
        ({"include": "bare:0"}, ["bare has no slots", '":0"']),
        ({"include": "n1@n1"}, ["twice"]),
        ({"include": ""}, ["no such host"]),
        ({"exclude": "n[1-4]@[::1]@bare"}, ["leaves no host"]),
        ({"nnodes": 7}, ["--nnodes", "1 to 6", '"7"']),
        ({"nnodes": 0}, ["--nnodes", '"0"']),
    ],
)
def test_filters_that_cannot_be(flags, words):
    with pytest.raises(UserError) as fault:
        chosen(**flags)
    assert all(word in str(fault.value) for word in words), str(fault.value)


SIGNS = list("#[]-,@= ;|\\\t\n\0é")
WORDS = ["node1", "n[1-3]", "[::1]", "me@", ":4", " slots=2", " max_slots=", "\r\n"]
MORE = ["$(touch x)", "`id`", "-oX", " addr=10.0.0.1", " cores=0-3", "9" * 30]
PIECES = st.sampled_from([*SIGNS, *WORDS, *MORE])


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=12).map("".join)))
def test_whatever_a_file_holds_is_hosts_or_one_line(monkeypatch_process, text):
    try:
        found = parse(text, "h")
    except UserError as fault:
        assert str(fault).startswith("h:")  # noqa: PT017
        assert "\n" not in str(fault)  # noqa: PT017
        return
    for entry in found.entries:
        assert entry.host.isascii()
        assert not set(entry.host) & set(" \t;|&$`<>()\\'\"!*?@#")
        assert not entry.host.startswith("-")


@pytest.fixture(scope="module")
def monkeypatch_process():
    """No command is run, whatever is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", None)
        patch.setattr("os.system", None)
        yield


EXPECTED = {
    "plain": [("node1", None), ("node2", None)],
    "slots": [("node1", 2), ("node2", 2)],
    "mpich": [("node1", 2), ("node2", 2)],
    "lsf": [("node1", 2), ("node2", 2)],
    "ranges": [*((f"node{n:02d}", 2) for n in (1, 2, 3, 4, 7)), ("c1-a", None), ("c2-a", None)],
    "users": [("node1", 2), ("node2", 2)],
    "ipv6": [("2001:db8::1", 2), ("2001:db8::2", 2)],
    "networks": [("node1", 2), ("node2", 2), ("node3", 1)],
}


def test_every_example_is_tested():
    assert sorted(EXPECTED) == sorted(p.name for p in EXAMPLES.iterdir())


@pytest.mark.parametrize("name", EXPECTED)
def test_examples(name):
    found = parse((EXAMPLES / name).read_text(), name)
    assert [(e.host, e.slots) for e in found.entries] == EXPECTED[name]


def test_names_are_made_one_by_one():
    names = expand("n[1-60000]")
    assert next(names) == "n1"
