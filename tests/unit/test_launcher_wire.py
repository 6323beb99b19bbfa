import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import agent, courier, roster, rundir, survey
from launcher.checks import clock_notes, judge, older_checkpoints
from launcher.cluster import HostFacts
from launcher.config import Program
from launcher.crew import Crew
from launcher.errors import LaunchError, UserError
from launcher.events import Ended
from launcher.mirror import Mirror
from launcher.plan import NodePlan
from launcher.record import Record
from launcher.roster import Process
from launcher.transport import Channel, Spawned
from launcher.wire import Lines, Outbox

ROOT = Path(__file__).parents[2]


LIMITS = """
import resource, sys
from launcher.transport import allow_files
resource.setrlimit(resource.RLIMIT_NOFILE, (70, int(sys.argv[1])))
allow_files(3)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_many_hosts_have_the_open_files_that_they_need():
    words = [sys.executable, "-P", "-c", LIMITS, "100"]
    assert subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout == "(82, 100)\n"
    launch = str(Path(sys.executable).with_name("falcon-launch"))
    words = ["prlimit", "--nofile=66:66", launch, "--hosts", "node1,node2", "--nproc-per-node", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    told = "falcon-launch: open files: 76 are needed for 2 hosts, 66 are allowed; raise ulimit -Hn\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_nobody_waits_for_a_reader():
    reader, writer = os.pipe()
    outbox, lines = Outbox(writer), Lines(reader)
    for number in range(3000):
        outbox.put({"number": number, "text": "x" * 100})
    assert outbox.waiting > 0
    got = []
    while len(got) < 3000:
        got += lines.read()
        outbox.flush()
    assert [json.loads(line)["number"] for line in got] == list(range(3000))
    os.close(reader)
    outbox.put({})
    assert outbox.broken


def test_a_line_of_many_reads_is_one_line():
    reader, writer = os.pipe()
    lines, whole = Lines(reader), []
    os.write(writer, b"one\ntw")
    whole += lines.read()
    for _ in range(3):
        os.write(writer, b"o" * 20_000)
        whole += lines.read()
    os.write(writer, b"\n\nthree\n")
    os.close(writer)
    whole += [*lines.read(), *lines.read()]
    assert whole == [b"one", b"tw" + b"o" * 60_000, b"", b"three"]
    assert (lines.ended, lines.received) == (True, sum(map(len, whole)) + 4)
    os.close(reader)


def test_a_part_of_a_long_event_is_a_sign_of_life():
    channel = channel_to("import sys; print('{', end='', flush=True); sys.stdin.read()")
    channel.heard_at = 0.0
    assert channel.receive() == []
    assert channel.heard_at > 0
    channel.close()


def channel_to(code: str) -> Channel:
    words = [sys.executable, "-c", code]
    return Channel("node1", Spawned(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)))


def test_a_closed_channel_holds_no_descriptor_and_knows_the_last_words():
    before = len(list(Path("/proc/self/fd").iterdir()))
    errors = os.memfd_create("ssh")
    words = [sys.executable, "-c", "import sys; sys.exit('no route to host')"]
    pipe = subprocess.PIPE
    channel = Channel("node1", Spawned(subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=errors)), errors)
    assert [channel.close(), channel.close()] == [1, 1]
    assert channel.how_ended(1) == "exit code 1: no route to host"
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_a_login_prints_is_no_event():
    channel = channel_to("""print('welcome\\n[1]\\n{"event": "x"}\\n{"event": "hello"}\\n{"event": "y"}\\nnoise')""")
    events = []
    with pytest.raises(LaunchError, match='node1: the agent said something that is no event: "noise"'):
        while True:
            events += channel.receive()
    assert channel.last_words() == "[1]"
    channel.close()


def test_half_a_line_of_an_agent_that_was_killed_hides_nothing():
    """What it had begun to say is ended, and followed, by the word of the one beside it."""
    words = '{"event": "hello"}\\n{"event": "x"}\\n{"event": "outp\\n{"event": "died", "signal": 9}\\n'
    channel = channel_to(f"print('{words}', end='')")
    events = []
    while not channel.ended:
        events += channel.receive()
    assert [event["event"] for event in events] == ["hello", "x", "died"]
    assert channel.died == 9
    channel.close()


def test_the_courier_leaves_what_is_there_and_serves_no_stranger(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    (model / "big").write_bytes(os.urandom(3 << 20))
    (model / "deep/empty").touch()
    prepared = tmp_path / "prepared.json"
    prepared.write_text(json.dumps({"model": str(model), "rows": "hub/name", "parameters": 7}))

    def deliver(name, *, strangers):
        listening = socket.create_server(("127.0.0.1", 0))
        serving = threading.Thread(target=courier.offer, args=(listening, prepared, 1, "t"))
        serving.start()
        port = listening.getsockname()[1]
        for _ in range(strangers):
            with pytest.raises(OSError, match=r"gone|reset"):
                courier.receive("127.0.0.1", port, tmp_path / name, "another")
        courier.receive("127.0.0.1", port, tmp_path / name, "t")
        serving.join()
        listening.close()
        return json.loads((tmp_path / name).read_text())

    here = deliver("same", strangers=1)
    assert here == {"model": str(model), "rows": "hub/name", "parameters": 7}  # the same path with the same files


@pytest.mark.parametrize("said", [b"[" * 200_000 + b"\n", b"{}\n", b'{"token": "another"}\n', b'{"to'])
def test_a_stranger_of_the_courier_has_a_short_time_however_it_drips(monkeypatch, said):
    monkeypatch.setattr(courier, "STRANGER_S", 0.5)
    here, there = socket.socketpair()
    began = time.monotonic()

    def drip():
        with contextlib.suppress(OSError):
            for at in range(0, len(said), 50_000):
                there.sendall(said[at : at + 50_000])
            while time.monotonic() - began < 3:
                there.sendall(b" ")
                time.sleep(0.1)

    dripping = threading.Thread(target=drip)
    dripping.start()
    assert courier._admitted(here, "t") is None
    assert time.monotonic() - began < 2
    here.close()
    dripping.join()
    there.close()


def test_last_words_wait_a_while_for_room_in_the_pipe():
    reader, writer = os.pipe()
    outbox = Outbox(writer)
    outbox.put({"event": "output", "lines": ["x" * 300_000]})
    outbox.put({"event": "killed"})
    assert outbox.waiting
    taken = threading.Thread(target=lambda: (time.sleep(0.3), words.append(os.fdopen(reader, "rb").read())))
    words = []
    taken.start()
    outbox.flush_within(5)
    os.close(writer)
    taken.join()
    assert (outbox.waiting, words[0].splitlines()[-1]) == (0, b'{"event": "killed"}')
    reader, writer = os.pipe()
    outbox = Outbox(writer)
    outbox.put({"lines": ["x" * 300_000]})
    began = time.monotonic()
    outbox.flush_within(0.2)  # nobody reads
    assert time.monotonic() - began < 2
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("reset", [True, False])
def test_who_is_cut_off_from_node_0_says_so_and_is_taken_for_an_echo(tmp_path, reset):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        words = [sys.executable, "-P", "-m", "launcher.courier", "receive", "127.0.0.1"]
        port = str(listening.getsockname()[1])
        env = {**os.environ, courier.TOKEN: "t"}
        receiver = subprocess.Popen(
            [*words, port, str(tmp_path / "got")], stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT
        )
        taken, _ = listening.accept()
        if reset:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            taken.recv(1024)
        taken.close()
        tail = tuple(receiver.communicate(timeout=30)[1].splitlines())
    failed = Ended(code=receiver.returncode)
    assert failed.code == 1
    told = Record(SimpleNamespace(nodes=()), ())
    assert told.prepared(failed, tail)
    assert not told.prepared(Ended(code=0), ())
    assert told.prepare_tail == tail
    of_a_hub = ("Connection reset by peer",)
    assert not told.prepared(failed, of_a_hub)
    assert told.prepared(failed, tail)
    assert told.prepare_tail == of_a_hub


def test_node_0_that_lost_whom_it_sent_to_is_taken_for_an_echo(tmp_path):
    (tmp_path / "prepared.json").write_text(json.dumps({}))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        offered = [str(listening.fileno()), str(tmp_path / "prepared.json"), "1"]
        sender = subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher.courier", "offer", *offered],
            stderr=subprocess.PIPE, text=True, env={**os.environ, courier.TOKEN: "t"}, cwd=ROOT,
            pass_fds=[listening.fileno()],
        )  # fmt: skip
        with socket.create_connection(listening.getsockname()) as gone, gone.makefile("rwb") as stream:
            courier._write(stream, {"token": "t"})
            courier._read(stream)
        tail = tuple(sender.communicate(timeout=30)[1].splitlines())
    assert sender.returncode == 1
    assert Record(SimpleNamespace(nodes=()), ()).prepared(Ended(code=1), tail)


def test_a_received_folder_has_the_same_bytes(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    (source / "weights").write_bytes(os.urandom(2 << 20))
    (tmp_path / "prepared.json").write_text(json.dumps({"model": str(source)}))
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    serving = threading.Thread(target=courier.offer, args=(listening, tmp_path / "prepared.json", 1, "t"))
    serving.start()
    # In a mount namespace of another host the path does not exist; here a stream that says so.
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rwb") as stream:
        courier._write(stream, {"token": "t"})
        told = courier._read(stream)["folders"]["model"]
        courier._write(stream, {"want": "digests", "key": "model"})
        digests = courier._read(stream)
        courier._write(stream, {"want": "files", "key": "model"})
        courier._fetch(stream, tmp_path / "got", [tuple(f) for f in told["files"]], digests)
        courier._write(stream, {"want": "nothing"})
    serving.join()
    listening.close()
    assert hashlib.sha256((tmp_path / "got/weights").read_bytes()).hexdigest() == digests["weights"]


def test_what_was_received_once_and_has_changed_is_fetched_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/tokens").write_bytes(b"0123456789")
    (tmp_path / "prepared.json").write_text(json.dumps({"rows": str(tmp_path / "rows")}))

    def receive():
        listening = socket.create_server(("127.0.0.1", 0))
        serving = threading.Thread(target=courier.offer, args=(listening, tmp_path / "prepared.json", 1, "t"))
        serving.start()
        with socket.create_connection(listening.getsockname()) as connection, connection.makefile("rwb") as stream:
            courier._write(stream, {"token": "t"})
            told = courier._read(stream)["folders"]["rows"] | {"path": "/not/here"}
            path = courier._have(stream, "rows", told)
            courier._write(stream, {"want": "nothing"})
        serving.join()
        listening.close()
        return path

    path = receive()
    (path / "tokens").write_bytes(b"0123056789")
    assert (receive() / "tokens").read_bytes() == b"0123456789"
    assert "is not what was received once (sha256 differs); fetched anew" in capsys.readouterr().out


@pytest.mark.parametrize("there", [b"0123456789", b"another"])
def test_what_another_host_has_put_there_meanwhile_is_taken_if_it_is_the_same(tmp_path, there):
    sent, place = b"0123456789", tmp_path / "received/model"
    near, far = socket.socketpair()
    with near, far, near.makefile("rwb") as stream:
        far.sendall(sent)
        place.mkdir(parents=True)
        (place / "weights").write_bytes(there)
        digests = {"weights": hashlib.sha256(sent).hexdigest()}
        with contextlib.nullcontext() if there == sent else pytest.raises(OSError, match="not empty"):
            courier._fetch(stream, place, [("weights", len(sent), 0)], digests)
    assert [path.name for path in place.parent.iterdir()] == ["model"]
    assert (place / "weights").read_bytes() == there


def test_hosts_that_share_a_disk_never_write_into_the_same_folder(tmp_path):
    names = {courier._beside(tmp_path / "model", "partial").name for _ in range(50)}
    assert len(names) == 50
    assert all(name.startswith(f"model.partial-{socket.gethostname()}-") for name in names)
    courier._set_aside(tmp_path / "gone")


def test_a_file_outside_its_folder_is_refused(tmp_path):
    for name in ("../x", "/etc/x", "a/../../x"):
        with pytest.raises(ValueError, match="outside its folder"):
            courier._inside(tmp_path, name)


def test_files_sent_along_are_written_once(tmp_path):
    config = tmp_path / "runs/r/attempt_1/config.json"
    plan = NodePlan(
        host="h", node_rank=1, cwd="/", roster="", files={str(config): "{}\n"}, prepare=(), store=None, ranks=()
    )
    assert not rundir.settle(plan)
    assert config.read_text() == "{}\n"
    assert config.stat().st_mode & 0o777 == 0o600
    assert rundir.settle(plan)


def node_plan(folder, node_rank=1):
    attempt = folder / "runs/r/attempt_1"
    roster = str(attempt / f"agent_{node_rank:04d}.json")
    files = {str(attempt / "config.json"): "{}\n"}
    return NodePlan(
        host="h", node_rank=node_rank, cwd="/", roster=roster, files=files, prepare=(), store=None, ranks=()
    )


def test_hosts_that_share_a_disk_may_write_the_same_file_at_a_time(tmp_path, monkeypatch):
    """Between the writing of one host and its next step another one does all of it."""
    one, other = node_plan(tmp_path), dataclasses.replace(node_plan(tmp_path), node_rank=2)
    write = Path.write_text

    def slowly(path, text):
        monkeypatch.setattr(Path, "write_text", write)
        write(path, text)
        rundir.settle(other)

    monkeypatch.setattr(Path, "write_text", slowly)
    rundir.settle(one)
    (attempt,) = (tmp_path / "runs/r").iterdir()
    assert [path.name for path in attempt.iterdir()] == ["config.json"]


@pytest.mark.parametrize("launchers", [True, False])
def test_a_disk_that_hosts_share_among_themselves_is_not_the_launchers(tmp_path, launchers):
    plan, teller = node_plan(tmp_path), Teller()
    rundir.settle(plan)
    if launchers:
        Path(plan.roster).with_name("plan.json").write_text("{}\n")
    Crew(teller).prepare(dataclasses.replace(plan, node_rank=2))
    assert teller.told == (["prepared"] if launchers else ["apart", "prepared"])


def test_files_that_are_no_text_stay_on_their_host(tmp_path):
    (tmp_path / "trace.json.gz").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "stacks.txt").write_bytes("Fäden".encode()[:-4])  # cut where the process ended
    assert rundir.kept(tmp_path) == {"stacks.txt": "F\ufffd"}


def test_a_folder_that_is_only_remembered_as_missing_is_shared(tmp_path, monkeypatch):
    """As over NFS: until somebody makes the folder, what another host wrote into it is not seen."""
    plan = node_plan(tmp_path)
    assert not rundir.settle(plan)
    asked_again, make = [], Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda path, **how: (asked_again.append(path), make(path, **how)))
    has = rundir._has
    monkeypatch.setattr(rundir, "_has", lambda path, text: bool(asked_again) and has(path, text))
    assert rundir.settle(plan)


def test_the_survey_does_not_ask_for_a_run_folder_that_will_be(tmp_path, monkeypatch):
    asked, stat = [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **how: (asked.append(path), stat(path, **how))[1])
    told = survey.take("/", None, str(tmp_path / "r"))
    assert (told["place"], told["writable"], told["newest_step"]) == (str(tmp_path), True, 0)
    assert not [path for path in asked if path.is_relative_to(tmp_path / "r")]
    (tmp_path / "r/checkpoints/step-000001").mkdir(parents=True)
    told = survey.take("/", None, str(tmp_path / "r"))
    assert (told["place"], told["newest_step"]) == (str(tmp_path / "r"), 1)
    assert survey.take("/", None, str(tmp_path / "not/yet/r"))["place"] == str(tmp_path)


class Told:
    """What a mirror needs of a record."""

    def __init__(self, folder):
        self.apart, self.note = set(), print
        self.plan_of = lambda rank: SimpleNamespace(rank_dir=str(folder / f"rank_{rank:04d}"))


def test_what_is_written_into_a_shared_folder_is_not_written_once_more(tmp_path):
    record, plan = Told(tmp_path), node_plan(tmp_path)
    own = Mirror(record)
    roster.sign(plan)  # what an agent does first, here into the launcher's own folder
    own.told_apart(plan)
    own.append(1, 1, "stdout", ["a line"])
    assert (record.apart, (tmp_path / "rank_0001").exists()) == (set(), False)
    own.told_apart(node_plan(tmp_path, 2))
    own.append(2, 2, "stdout", ["a line"])
    own.keep(2, 2, {"result.json": "{}"})
    assert (record.apart, (tmp_path / "rank_0002/stdout").read_text()) == ({2}, "a line\n")
    assert (tmp_path / "rank_0002/result.json").read_text() == "{}"


def test_a_copy_that_cannot_be_made_ends_no_run_and_is_told_once(tmp_path):
    record, notes = Told(tmp_path), []
    own = Mirror(record, notes.append)
    record.apart.add(1)
    (tmp_path / "rank_0001").mkdir()
    (tmp_path / "rank_0001/stdout").symlink_to("/dev/full")
    for _ in range(2):
        own.append(1, 1, "stdout", ["a line"])
    own.keep(1, 1, {"stdout": "x", "result.json": "{}"})
    assert notes == ["output of ranks on other hosts is not copied into the run folder: No space left on device"]
    assert (tmp_path / "rank_0001/result.json").read_text() == "{}"


class Teller:
    """The agent, as far as a crew needs one."""

    unsent = 0

    def __init__(self):
        self.told = []

    def emit(self, event, **values):
        self.told.append(event)


def test_an_agent_has_signed_before_it_says_that_its_folder_is_its_own(tmp_path, monkeypatch):
    teller, plan = Teller(), node_plan(tmp_path)
    told = SimpleNamespace(_crew=Crew(teller))
    signed = []
    monkeypatch.setattr(roster, "sign", lambda taken: signed.append(list(teller.told)))
    agent.Agent._prepare(told, plan.to_json())
    assert (signed, teller.told) == ([[]], ["apart", "prepared"])


def test_a_run_folder_that_an_agent_makes_is_its_owners_alone(tmp_path):
    roster.sign(node_plan(tmp_path))
    assert {oct((tmp_path / name).stat().st_mode & 0o777) for name in ("runs/r", "runs/r/attempt_1")} == {"0o700"}


def test_a_process_is_known_by_more_than_its_number():
    this = Process.this()
    assert this.is_alive
    assert not Process(hostname=this.hostname, boot_id=this.boot_id, pid=this.pid, started=1).is_alive
    assert not Process(hostname="elsewhere", boot_id=this.boot_id, pid=this.pid, started=this.started).is_alive


def facts(**changes):
    known = {"python": "/py", "python_version": "3.11.7", "versions": {"torch": "2.13.0"}, "machine": str(id(changes))}
    return HostFacts(topology=None, **{**known, **changes})


def surveyed(**changes):
    told = {"code": "c", "cwd": True, "script": "s", "isa": "avx512_bf16", "disk_bytes": 1 << 40, "writable": True}
    return {**told, "place": "/runs", **changes}


SCRIPT = Program(module=False, argv=("x.py",))


def test_hosts_that_are_alike():
    assert judge(["a", "b"], [facts(), facts(python_version="3.11.9")], [surveyed()] * 2, "/w", SCRIPT) == ()


def test_skew_is_a_table():
    other = facts(python_version="3.12.1", versions={"torch": "2.8.0"})
    with pytest.raises(UserError) as fault:
        judge(["a", "b"], [facts(), other], [surveyed(), surveyed(code="d", script="t")], "/w", SCRIPT)
    assert str(fault.value).splitlines() == [
        'hosts: not the same software: "python, torch, falcon-dist code, script"; make them the same',
        "                  a       b",
        "python            3.11    3.12",
        "torch             2.13.0  2.8.0",
        "falcon-dist code  c       d",
        "script            s       t",
    ]


def test_what_is_missing_is_said_for_every_host():
    told = [surveyed(cwd=False), surveyed(script=None), surveyed(writable=False)]
    with pytest.raises(UserError) as fault:
        judge(["a", "b", "c"], [facts(), facts(), facts()], told, "/w", SCRIPT)
    assert [line.split(";")[0] for line in str(fault.value).splitlines()] == [
        'a: no such folder: "/w"',
        'b: no such script: "x.py"',
        'c: the run folder cannot be written: "/runs"',
    ]


def test_the_same_machine_under_two_names():
    with pytest.raises(UserError, match='the same machine as a: "b"'):
        judge(["a", "b"], [facts(machine="m"), facts(machine="m")], [surveyed()] * 2, "/w", None)


def test_differences_without_harm_are_notes():
    told = [surveyed(), surveyed(isa="amx_bf16", disk_bytes=5 << 20)]
    notes = judge(["a", "b"], [facts(), facts()], told, "/w", SCRIPT)
    assert notes == (
        "hosts differ in their widest instruction set; the slowest sets the pace: a avx512_bf16, b amx_bf16",
        "b has 0.0 GB left where the run folder is: /runs",
    )


def test_clocks_that_are_off_are_told():
    told = clock_notes(["a", "b", "c"], [0.0, 3600.2, -0.9])
    assert told == ("b: its clock is +3600 s off, and so are times in its logs",)


def test_a_run_goes_on_from_what_a_person_has_left_and_not_from_what_another_host_lacks():
    """Who takes the newest away wants an older one; a host that took over has what it once was sent."""
    assert older_checkpoints("a", 8, 8, 8, "/r") == ()
    left = 'a: has this run\'s checkpoints up to step 4 only, the newest known is of step 8: "/r/checkpoints"'
    assert older_checkpoints("a", 4, 8, 0, "/r") == (left,)
    with pytest.raises(LaunchError, match=r"up to step 4 only, .* put --runs-dir where all hosts see it"):
        older_checkpoints("a", 4, 8, 8, "/r")
    with pytest.raises(LaunchError, match=r"a: has no checkpoint of this run, the newest known is of step 8"):
        older_checkpoints("a", 0, 8, 0, "/r")
