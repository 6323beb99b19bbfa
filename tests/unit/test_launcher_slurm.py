import gc
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import frames, slurm, trunk
from launcher.cluster import HostFacts
from launcher.cpuset import CpuSet
from launcher.errors import UserError
from launcher.hostfile import parse, parse_list
from launcher.launchsettings import LaunchSettings
from launcher.reach import reach
from launcher.topology import Topology
from launcher.trunk import Trunk

JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NODELIST": "node[01-02],gpu7",
    "SLURM_JOB_CPUS_PER_NODE": "4(x2),2",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}


def job(**more):
    found = slurm.allocation({**JOB, **more})
    assert found is not None
    return found


def test_no_job():
    assert slurm.allocation({}) is None
    assert slurm.allocation({"SLURM_CONF": "/etc/slurm.conf"}) is None


def test_nodes_and_cpus_of_a_job():
    assert [(n.host, n.cpus, n.tasks) for n in job().nodes] == [
        ("node01", 4, None),
        ("node02", 4, None),
        ("gpu7", 2, None),
    ]
    assert job(SLURM_RESTART_COUNT="3").restarts == 3


def test_tasks_that_were_asked_for_are_slots():
    entries = job(SLURM_NTASKS="5").hosts.entries
    assert [(e.slots, e.max_slots) for e in entries] == [(2, 4), (2, 4), (1, 2)]
    assert [e.slots for e in job().hosts.entries] == [None] * 3  # Slurm's own count of tasks is nobody's wish


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SLURM_JOB_CPUS_PER_NODE", "4(x2)", "SLURM_JOB_CPUS_PER_NODE: for 2 nodes, but SLURM_JOB_NODELIST has 3"),
        ("SLURM_JOB_CPUS_PER_NODE", "4(2)", 'SLURM_JOB_CPUS_PER_NODE: not a list of numbers as 4(x2),2: "4(2)"'),
        ("SLURM_JOB_NODELIST", "node[1-", 'SLURM_JOB_NODELIST: a bracket without its partner: "node[1-"'),
        ("SLURM_RESTART_COUNT", "x", 'SLURM_RESTART_COUNT: must be a number: "x"'),
        ("SLURM_HET_SIZE", "2", 'SLURM_HET_SIZE: a heterogeneous job: "2"'),
    ],
)
def test_words_of_slurm_that_cannot_be_understood(name, value, said):
    with pytest.raises(UserError) as fault:
        job(**{name: value})
    assert str(fault.value).startswith(said)


def test_one_srun_for_all_nodes():
    even = slurm.srun_words(["node01", "node02"], job())
    assert even[:3] == ("srun", "--kill-on-bad-exit=1", "--cpu-bind=none")
    assert even[-4:] == ("--nodes=2", "--ntasks=2", "--nodelist=node01,node02", "--cpus-per-task=4")
    uneven = slurm.srun_words(["node01", "gpu7"], job())
    assert not [word for word in uneven if word.startswith("--cpus-per-task")]


def test_a_hostfile_is_a_filter_of_the_job():
    chosen = slurm.only(parse("gpu7.cluster.org slots=2\nnode01\n", "hosts"), job())
    assert [(e.host, e.slots) for e in chosen.entries] == [("gpu7", 2), ("node01", None)]
    with pytest.raises(UserError, match='hosts:2: not a node of job 12: "node3"; its nodes are node01, node02, gpu7'):
        slurm.only(parse("node01\nnode3\n", "hosts"), job())
    with pytest.raises(UserError, match='hosts:1: srun takes no user: "me@node01"'):
        slurm.only(parse("me@node01\n", "hosts"), job())


def test_a_filter_that_says_nothing_of_slots_keeps_the_jobs_tasks():
    chosen = slurm.only(parse("gpu7 slots=1\nnode01\n", "hosts"), job(SLURM_NTASKS="5"))
    assert [(e.host, e.slots, e.max_slots) for e in chosen.entries] == [("gpu7", 1, None), ("node01", 2, 4)]


def test_who_reaches_what_and_how():
    alone = reach(LaunchSettings(), {})
    inside = reach(LaunchSettings(nnodes=2), JOB)
    here = reach(LaunchSettings(hosts="localhost"), JOB)
    assert ([e.host for e in alone.hosts.entries], alone.by_srun) == (["localhost"], False)
    assert ([e.host for e in inside.hosts.entries], inside.by_srun) == (["node01", "node02"], True)
    assert ([e.host for e in here.hosts.entries], here.by_srun) == (["localhost"], False)


def test_many_launchers_are_refused():
    step = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    with pytest.raises(UserError, match="srun starts this launcher 4 times"):
        reach(LaunchSettings(), step)
    reach(LaunchSettings(hosts="localhost"), step)  # four runs of one machine each are a wish


def test_a_step_tells_of_its_own_tasks_not_of_the_jobs():
    one = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}
    assert [(n.cpus, n.tasks) for n in job(**one).nodes] == [(4, None), (4, None), (2, None)]
    kept = job(SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1", SLURM_NTASKS="5")  # salloc's own shell
    assert [n.tasks for n in kept.nodes] == [2, 2, 1]
    inside = reach(LaunchSettings(), {**JOB, **one})
    assert [(e.host, e.slots) for e in inside.hosts.entries] == [("node01", None), ("node02", None), ("gpu7", None)]
    with pytest.raises(UserError, match="SLURM_TASKS_PER_NODE: for 1 nodes"):
        job(SLURM_NTASKS="1", SLURM_TASKS_PER_NODE="1")


@pytest.mark.parametrize("odd", [{"SLURM_HET_SIZE": "2"}, {"SLURM_JOB_CPUS_PER_NODE": "4"}])
def test_this_machine_alone_is_no_business_of_slurms(odd):
    here = reach(LaunchSettings(hosts="localhost"), JOB | odd)
    assert ([e.host for e in here.hosts.entries], here.by_srun, here.notes([])) == (["localhost"], False, ())
    for others in (None, "node01"):
        with pytest.raises(UserError, match="SLURM_"):
            reach(LaunchSettings(hosts=others), JOB | odd)


def test_cpus_that_differ_from_what_the_job_has_are_told():
    def sees(count):
        topology = Topology(sockets=(), allowed=CpuSet.of(range(count)), mems_allowed=CpuSet())
        return HostFacts(topology=topology, python="", versions={})

    told = slurm.notes(job(SLURMD_NODENAME="node01"), ["localhost", "node02", "gpu7"], [sees(1), sees(4), sees(8)])
    assert len(told) == 2
    assert told[0].startswith("node01: 1 of the 4 cpus that the job has there can be used; --cpus-per-task was lost")
    assert told[1] == "gpu7: 8 cpus can be used, the job has 2 there: this Slurm does not confine jobs"


def test_an_srun_that_fails_at_once_is_an_exit_code_and_no_traceback(monkeypatch):
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    trunk = Trunk(["node1"], ["false"])
    branch = trunk.branches["node1"]
    assert branch.over.wait(10)
    branch.stdin.write(b"{}\n")
    for thread in threading.enumerate():
        if thread.name.startswith("srun"):
            thread.join(10)
    assert (branch.wait(), raised) == (1, [])


def test_channels_of_one_srun_leave_no_descriptor_behind(monkeypatch):
    monkeypatch.setattr(slurm, "srun_words", lambda *_: ("sh", "-c", "echo no such node >&2; exit 1"))
    gc.collect()  # what the test before left open is not to be closed in the middle of this one
    before = len(list(Path("/proc/self/fd").iterdir()))
    for one in list(trunk.within(job())(parse_list("node01,node02").entries)):
        one.close()
        assert one.last_words() == "no such node"
    for thread in threading.enumerate():
        if thread.name.startswith("srun"):
            thread.join(10)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


lines_ = st.lists(st.tuples(st.sampled_from(["node1", "node10"]), st.binary(max_size=3000)))


@given(lines_)
def test_lines_of_all_tasks_arrive_whole(said):
    said = [(host, line.replace(b"\n", b"")) for host, line in said]
    joiner = frames.Joiner(frozenset({"node1", "node10"}))
    pieces = [piece for host, line in said for piece in frames.up(host, line)]
    assert all(len(piece) < 1024 and piece.endswith(b"\n") for piece in pieces)
    whole = [found for piece in pieces if (found := joiner.take(piece[:-1]))]
    assert [(one.host, one.line) for one in whole] == said


def test_pieces_of_two_tasks_mix():
    one, two = (list(frames.up(host, host.encode() * 200)) for host in ("node1", "node2"))
    joiner = frames.Joiner(frozenset({"node1", "node2"}))
    found = [joiner.take(piece[:-1]) for pair in zip(one, two, strict=True) for piece in pair]
    assert [(said.host, said.line) for said in found if said] == [(h, h.encode() * 200) for h in ("node1", "node2")]
    assert joiner.take(frames.up_end("node2", 3)[:-1]) == frames.Said(host="node2", code=3)


@pytest.mark.parametrize("noise", [b"", b"welcome", b"node3 +x", b"node1 ?x", b"\xff"])
def test_other_peoples_lines_are_no_pieces(noise):
    with pytest.raises(ValueError, match=r".*"):
        frames.Joiner(frozenset({"node1"})).take(noise)


def test_each_task_takes_what_is_for_it():
    assert frames.taken("node1", b'node1 {"command": "start"}') == b'{"command": "start"}'
    assert frames.taken("node1", b'node10 {"command": "start"}') is None
    assert frames.taken("node1", frames.down_end("node1").rstrip(b"\n")) == b""


def test_pieces_of_a_long_line_are_put_together_once():
    joiner = frames.Joiner(frozenset({"node1"}))
    for piece in (b"a", b"b"):
        assert joiner.take(b"node1 +" + piece) is None
    assert joiner._parts == {"node1": [b"a", b"b"]}
    assert joiner.take(b"node1 =c") == frames.Said(host="node1", line=b"abc")
    assert joiner.take(b"node1 =d") == frames.Said(host="node1", line=b"d")
