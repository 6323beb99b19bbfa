"""The ccl backend between hosts: gloo's results, and errors that name ranks when a peer or the network fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.hosts import Host, Hosts
from cluster.machine import command_line

PROGRAMS = Path(__file__).parents[1] / "integration" / "ccl_programs"
STORE_PORTS = range(29500, 29600)
TIMEOUT_S = 8
BLOCK = f"""
table inet blocked {{
  chain arriving {{
    type filter hook input priority 0;
    iifname "eth0" tcp flags & (syn | ack) == syn tcp dport != {STORE_PORTS[0]}-{STORE_PORTS[-1]} drop
  }}
}}
"""
NEXT_PROCESS = "open('/proc/sys/kernel/ns_last_pid', 'w').write('5000')"
unused = iter(STORE_PORTS)  # a connection that was cut keeps its port for minutes


def start(hosts: Hosts, program: str, *args: str, **second_env: str) -> list[subprocess.Popen[str]]:
    """One rank on each of the first two hosts; ``second_env`` is for rank 1 only."""
    common = {
        "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": str(next(unused)),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    return [
        hosts[rank].enter(
            sys.executable,
            str(PROGRAMS / program),
            *args,
            env=os.environ | common | {"RANK": str(rank)} | (second_env if rank else {}),
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]


def end(ranks: list[subprocess.Popen[str]], timeout_s: float = 60) -> list[str]:
    """What the ranks wrote, after their ends."""
    try:
        return [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def await_ready(rank: subprocess.Popen[str]) -> None:
    """Returns when the rank's first collective is done."""
    assert rank.stdout
    for line in rank.stdout:
        if line == "ready\n":
            return
    raise AssertionError("the rank ended before its first collective")


def signalled(number: signal.Signals) -> Callable[[Host], None]:
    def act(host: Host) -> None:
        (pid,) = [pid for pid in host.find("steady.py") if command_line(pid).startswith(sys.executable)]
        os.kill(pid, number)

    return act


@pytest.mark.parametrize("part", ["reductions", "movement", "groups"])
def test_every_result_between_hosts_equals_gloo(hosts: Hosts, part: str) -> None:
    ranks = start(hosts, "collectives.py", part)
    for text in end(ranks, timeout_s=150):
        assert "equal" in text, text
    assert [rank.returncode for rank in ranks] == [0, 0]


@pytest.mark.parametrize(
    ("strike", "undo"),
    [
        pytest.param(Host.cut, Host.heal, id="cut"),
        pytest.param(signalled(signal.SIGKILL), None, id="killed"),
        pytest.param(signalled(signal.SIGSTOP), signalled(signal.SIGKILL), id="frozen"),
    ],
)
def test_rank_0_names_rank_1_within_the_timeout(
    hosts: Hosts, strike: Callable[[Host], None], undo: Callable[[Host], None] | None
) -> None:
    ranks = start(hosts, "steady.py", str(TIMEOUT_S))
    await_ready(ranks[0])
    strike(hosts[1])
    try:
        (text,) = end(ranks[:1])
    finally:
        if undo:
            undo(hosts[1])
        ranks[1].send_signal(signal.SIGCONT)  # what waits for a stopped process stops with it
        end(ranks[1:])
    assert re.search(r"DistBackendError: rank 0 of group 0, all_reduce #\d+ of 262144 Float .*rank 1", text), text
    assert ranks[0].returncode == 1
    assert took(text) < TIMEOUT_S + 6


def test_a_cut_rank_ends_by_itself(hosts: Hosts) -> None:
    ranks = start(hosts, "steady.py", str(TIMEOUT_S))
    await_ready(ranks[0])
    hosts[1].cut()
    try:
        text = end(ranks)[1]
    finally:
        hosts[1].heal()
    assert re.search(r"DistBackendError: rank 1 of group 0, all_reduce #\d+ .*rank 0", text), text
    assert took(text) < TIMEOUT_S + 6


def test_a_blocked_port_is_an_error_that_says_where_to_look(hosts: Hosts) -> None:
    for host in hosts.hosts[:2]:
        blocked = host.enter("nft", "-f", "-", stdin=subprocess.PIPE)
        blocked.communicate(BLOCK)
        assert blocked.returncode == 0
    try:
        texts = end(start(hosts, "steady.py", str(TIMEOUT_S)))
    finally:
        for host in hosts.hosts[:2]:
            host.run("nft", "delete", "table", "inet", "blocked")
    for rank, text in enumerate(texts):
        assert re.search(rf"rank {rank}, opening a ccl group of ranks 0,1: .*firewall", text), text
        assert took(text) < TIMEOUT_S + 6


@pytest.mark.parametrize(("interface", "words"), [("lo", "here FI_TCP_IFACE is lo"), ("none7", "no such interface")])
def test_a_wrong_interface_is_an_error_that_names_it(hosts: Hosts, interface: str, words: str) -> None:
    first, second = end(start(hosts, "steady.py", str(TIMEOUT_S), FI_TCP_IFACE=interface, CCL_KVS_IFACE=interface))
    assert re.search("rank 0, opening a ccl group of ranks 0,1|rank 0 .*did not come", first), first
    assert words in second, second
    assert took(first) < TIMEOUT_S + 6
    assert took(second) < TIMEOUT_S + 6


def test_two_hosts_that_look_like_one_process_are_refused(hosts: Hosts) -> None:
    """As in containers: one host name, and ranks with equal process ids."""
    hosts[1].run("hostname", hosts[0].name)
    try:
        for host in hosts.hosts[:2]:
            host.run(sys.executable, "-c", NEXT_PROCESS)
        texts = end(start(hosts, "steady.py", str(TIMEOUT_S)))
    finally:
        hosts[1].run("hostname", hosts[1].name)
    for text in texts:
        assert "oneCCL takes two such ranks for one: give every host a name of its own" in text, text


def took(text: str) -> float:
    """Seconds the failing call took."""
    found = re.search(r"failed after (\S+) s", text)
    assert found, text
    return float(found[1])
