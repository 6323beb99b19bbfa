import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from launcher import doors
from launcher.errors import LaunchError, UserError
from launcher.hostfile import parse
from launcher.network import candidates, check_others, choose, unprobed

TOLD = {
    "addresses": {"127.0.0.1": "lo", "172.17.0.1": "docker0", "192.168.0.5": "eth0", "10.0.0.1": "ib0", "::1": "lo"},
    "ports": dict.fromkeys(["127.0.0.1", "172.17.0.1", "192.168.0.5", "10.0.0.1", "::1"], 4000),
    "entered_by": ["10.0.0.1"],
    "loopback_name": None,
}
TWO = parse("a\nb", "h")


def reached(*addrs, ifname="eth7"):
    return {addr: {"source": "x", "ifname": ifname} for addr in addrs}


def test_the_address_the_launcher_came_by_is_first_and_bridges_are_last():
    assert candidates(TWO, TOLD) == ("10.0.0.1", "192.168.0.5", "172.17.0.1")


def test_the_first_address_that_all_have_reached_and_each_ones_interface():
    tried = candidates(TWO, TOLD)
    meeting = choose(parse("a\nb\nc", "h"), TOLD, tried, [reached(*tried), reached("192.168.0.5", ifname="ens5")])
    assert (meeting.addr, meeting.ifnames) == ("192.168.0.5", ("eth0", "eth7", "ens5"))


def test_no_address_that_all_have_reached():
    with pytest.raises(LaunchError) as fault:
        choose(TWO, TOLD, ("10.0.0.1", "192.168.0.5"), [{}])
    assert str(fault.value).splitlines() == [
        'a: no address of it is reached by all hosts: "10.0.0.1, 192.168.0.5"; open the firewall, or give addr= and '
        "ifname= in the hostfile",
        "  b reached none of them",
    ]


def test_the_hostfile_decides():
    assert candidates(parse("a addr=192.168.0.5\nb", "h"), TOLD) == ("192.168.0.5",)
    assert candidates(parse("a ifname=docker0\nb", "h"), TOLD) == ("172.17.0.1",)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("a addr=127.0.0.1", "h:1: other hosts cannot reach a loopback address"),
        ("a addr=10.9.9.9", 'h:1: not an address of a: "10.9.9.9"; it has 10.0.0.1'),
        ("a ifname=eth9", 'h:1: not an interface of a: "eth9"; it has docker0, eth0, ib0, lo'),
    ],
)
def test_an_address_that_cannot_be(line, fault):
    with pytest.raises(UserError) as raised:
        candidates(parse(f"{line}\nb", "h"), TOLD)
    assert str(raised.value).startswith(fault)


OWN = {"10.0.0.2": "ib0", "192.168.0.6": "eth0"}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("b addr=10.9.9.9", 'h:2: not an address of b: "10.9.9.9"; it has 10.0.0.2, 192.168.0.6'),
        ("b ifname=eth9", 'h:2: not an interface of b: "eth9"; it has eth0, ib0'),
        ("b addr=127.0.0.1", "h:2: other hosts cannot reach a loopback address"),
        ("b addr=10.0.0.2 ifname=eth0", 'h:2: 10.0.0.2 of b is on ib0: "eth0"; give one of the two'),
    ],
)
def test_other_hosts_are_held_to_the_hostfile_too(line, fault):
    with pytest.raises(UserError) as raised:
        check_others(parse(f"a\n{line}", "h"), [OWN])
    assert str(raised.value).startswith(fault)
    check_others(parse("a\nb addr=10.0.0.2 ifname=ib0\nc", "h"), [OWN, {}])


def test_who_is_cut_off_while_others_are_not_is_at_fault():
    hosts = parse("a\nb\nc", "h")
    for knocks, blamed in (([reached("10.0.0.1"), {}], ("c",)), ([{}, {}], ())):
        with pytest.raises(LaunchError) as fault:
            choose(hosts, TOLD, ("10.0.0.1",), knocks)
        assert fault.value.hosts == blamed


def test_a_way_by_another_interface_than_the_hostfile_wants_is_none():
    tried, hosts = candidates(TWO, TOLD), parse("a\nb ifname=ens5", "h")
    ways = reached(*tried[:1]) | reached(*tried[1:], ifname="ens5")
    assert choose(hosts, TOLD, tried, [ways]).addr == tried[1]
    with pytest.raises(LaunchError):
        choose(hosts, TOLD, tried, [reached(*tried)])


def test_who_is_to_leave_by_an_interface_without_such_an_address_does_not_knock(monkeypatch):
    called = []
    monkeypatch.setattr(doors, "addresses", lambda: {"127.0.0.1": "lo", "fd00::9": "eth9"})
    monkeypatch.setattr(doors, "_call", lambda *to: called.append(to))
    for source in ("eth9", "lo"):
        doors.knock({"127.0.0.1": 9}, "t", source)
    assert called == [("127.0.0.1", 9, "127.0.0.1")]


def test_a_dry_run_says_what_was_not_probed():
    assert unprobed(TWO).addr == "<probed>"
    assert unprobed(parse("a addr=10.0.0.1\nb ifname=e", "h")).ifnames == ("<probed>", "e")


def test_knocking_at_this_machines_own_doors():
    opened = doors.Doors()
    told = opened.facts()
    assert told["addresses"]["127.0.0.1"] == "lo"
    addr = {"127.0.0.1": told["ports"]["127.0.0.1"]}
    with ThreadPoolExecutor() as pool:
        for token, found in ((told["token"], {"127.0.0.1": {"source": "127.0.0.1", "ifname": "lo"}}), ("other", {})):
            knocking = pool.submit(doors.knock, addr, token, None)
            while not knocking.done():
                for _, answer in opened.answers():
                    answer()
            assert knocking.result() == found
    opened.close()


def test_lines_of_the_hosts_file(tmp_path, monkeypatch):
    monkeypatch.setattr(doors, "HOSTS_FILE", tmp_path / "hosts")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1  node1.x node1 # own\n10.0.0.1 node2\n")
    assert doors.loopback_line("node1") == f"{tmp_path}/hosts:2: 127.0.1.1 node1.x node1"
    assert doors.loopback_line("node2") is None


def test_an_address_that_never_answers_holds_nobody_up():
    opened = doors.Doors()
    told = opened.facts()
    with socket.create_server(("127.0.0.2", 0)) as silent, ThreadPoolExecutor() as pool:
        ports = {"127.0.0.1": told["ports"]["127.0.0.1"], "127.0.0.2": silent.getsockname()[1]}
        begun = time.monotonic()
        knocking = pool.submit(doors.knock, ports, told["token"], None)
        while not knocking.done():
            for _, answer in opened.answers():
                answer()
        assert list(knocking.result()) == ["127.0.0.1"]
        assert time.monotonic() - begun < 2
    opened.close()
