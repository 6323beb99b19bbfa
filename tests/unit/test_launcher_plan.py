import json

import pytest
from topologies.trees import write_tree

from falcon_dist.config import EngineConfig, TrainConfig
from launcher import backends, environment, hello, network, planner, render, sysfs
from launcher.cluster import HostFacts, join
from launcher.config import LaunchConfig, LaunchSettings, Program
from launcher.errors import UserError
from launcher.hostfile import parse, this_machine
from launcher.placement import Policy, place
from launcher.plan import LaunchPlan, Site
from launcher.planner import Opened
from launcher.redaction import REDACTED, is_secret, redact

ENVIRON = {"PATH": "/bin", "HOME": "/h", "LC_ALL": "C", "HF_TOKEN": "hf_s3cret", "OMP_NUM_THREADS": "64", "X": "y"}
SCRIPT = Program(module=False, argv=("my script.py", "--log", "a b"))


@pytest.fixture
def make_plan(tmp_path):
    def make(
        program=SCRIPT, *, train=None, port=29511, versions=None, allocators=None, compiler="/g++", **launch
    ) -> LaunchPlan:
        topology = sysfs.read(write_tree(tmp_path, sockets=2))
        known = {"versions": versions or {}, "allocators": allocators or {}, "compiler": compiler}
        facts = [HostFacts(topology=topology, python="/py", **known)]
        cluster = join(this_machine(), facts, network.alone())
        config = LaunchConfig(launch=LaunchSettings(**launch), train=train or TrainConfig(), program=program)
        site = Site(run_id="r", attempt=1, run_dir="/runs/r", cwd="/work")
        return planner.build(config, cluster, place(cluster, Policy()), site, ENVIRON, opened=Opened(port=port))

    return make


def test_json_round_trip(make_plan):
    for plan in (make_plan(), make_plan(program=None)):
        assert LaunchPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_torchruns_names(make_plan):
    env = make_plan().ranks[1].env
    assert {name: env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", "29511")
    assert env["TORCHELASTIC_USE_AGENT_STORE"] == "True"


def test_only_listed_names_reach_a_rank(make_plan):
    env = make_plan(env=("X", "Y=z")).ranks[0].env
    assert (env["PATH"], env["LC_ALL"], env["HF_TOKEN"], env["X"], env["Y"]) == ("/bin", "C", "hf_s3cret", "y", "z")
    assert env["OMP_NUM_THREADS"] == "4"
    assert "X" not in make_plan().ranks[0].env
    assert environment.withheld(ENVIRON, ()) == ("OMP_NUM_THREADS",)
    assert environment.withheld(ENVIRON, ("OMP_NUM_THREADS",)) == ()
    trackers = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": "file:./mlruns"}
    assert environment.withheld(trackers, ("WANDB_MODE",)) == ("MLFLOW_TRACKING_URI",)


@pytest.mark.parametrize("asked", ["RANK=3", "NOT_SET_HERE"])
def test_an_env_that_cannot_be_given(make_plan, asked):
    with pytest.raises(UserError, match=asked.partition("=")[0]):
        make_plan(env=(asked,))


def test_our_program_is_handed_the_store_and_prepared(make_plan):
    plan = make_plan(program=None, port=None)
    assert [rank.takes_store for rank in plan.ranks] == [True, False]
    assert "FALCON_STORE_FD" in plan.ranks[0].env
    assert "FALCON_STORE_FD" not in plan.ranks[1].env
    assert plan.ranks[0].env["MASTER_PORT"] == "<probed>"
    assert plan.nodes[0].store is None
    (prepare,) = plan.nodes[0].prepare
    assert "RANK" not in prepare.env
    assert plan.ranks[0].argv[-4:] == ("--config", "/runs/r/attempt_1/config.json", "--run-dir", "/runs/r")


def test_arguments_are_not_touched(make_plan):
    assert make_plan().ranks[0].argv == ("/py", "my script.py", "--log", "a b")


def test_secrets_are_struck_out(make_plan):
    plan = make_plan(env=("API_KEY=k3y", "https_proxy=http://me:s3cret@proxy"))
    for shown in (plan.redacted().to_json(), render.plan_json(plan), render.plan_text(plan, ["API_KEY"])):
        text = json.dumps(shown)
        assert "s3cret" not in text
        assert "k3y" not in text


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "API_KEY", "WANDB_API_KEY", "DB_PASS", "SSH_PASSPHRASE", "MYSQL_PWD"),
        *("ACCESSKEY", "SIGNING_PRIVATEKEY", "AZURE_STORAGE_CONNECTION_STRING", "MY_JWT"),
    ],
)
def test_secret_names(name):
    assert is_secret(name)
    assert redact({name: "x"}) == {name: REDACTED}


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "PATH", "HOME", "KEYBOARD", "AUTHOR", "PWD", "OLDPWD"])
def test_names_of_no_secret(name):
    assert not is_secret(name)


@pytest.mark.parametrize("login", ["me:s3cret", "me", "me:s3@cret", "me@example.org:s3cret"])
def test_a_login_in_an_address_is_no_part_of_what_is_shown(login):
    told = redact({"TRACKER": f"https://{login}@host:5000/a@b, http://other/"})
    assert told == {"TRACKER": f"https://{REDACTED}@host:5000/a@b, http://other/"}


def test_shape_of_the_json(make_plan):
    shown = render.plan_json(make_plan())
    assert list(shown) == ["nodes"]
    assert list(shown["nodes"][0]) == ["host", "node_rank", "ranks"]
    keys = ["rank", "local_rank", "cpus", "comm_cpus", "mem_nodes", "threads", "argv", "env"]
    assert list(shown["nodes"][0]["ranks"][0]) == keys


def test_text(make_plan):
    assert render.plan_text(make_plan(port=None)).splitlines() == [
        "host       rank  local_rank  cpus  numa  threads",
        "localhost  0     0           0-3   0     4",
        "localhost  1     1           4-7   1     4",
        "",
        "command     /py 'my script.py' --log 'a b'",
        "rendezvous  127.0.0.1:<probed>, store kept by the agent of node 0",
        "backend     gloo",
        "env         OMP_NUM_THREADS=4 MKL_NUM_THREADS=4 GLOO_SOCKET_IFNAME=lo FALCON_BACKEND=gloo "
        "HF_TOKEN='<redacted>' (rank 0; all of it: --dry-run --json)",
        "run folder  /runs/r",
    ]


def test_backend_is_chosen_aloud(make_plan):
    assert make_plan(program=None).backend == "gloo"
    assert make_plan(program=None, versions={"oneccl-cpu-devel": "2022.1"}).backend == "ccl"
    assert make_plan(program=None, versions={"oneccl-cpu-devel": "2022.1"}, compiler="").backend == "gloo"
    assert make_plan(program=None, backend="ccl").backend == "ccl"  # not asked for its versions: taken at its word


@pytest.mark.parametrize(
    ("backend", "versions", "words"),
    [
        ("ccl", {"torch": "2.13.0"}, 'oneCCL is not installed on localhost: "ccl"; pip install'),
        ("ccl-intel", {"torch": "2.13.0"}, r'not installed: "ccl-intel"; use --backend ccl.* \(localhost\)'),
        ("ccl-intel", {"torch": "2.13.0", "oneccl-bind-pt": "2.8.0"}, "2.8.0 is not for torch 2.13.0"),
    ],
)
def test_a_backend_asked_for_is_had_or_refused(make_plan, backend, versions, words):
    with pytest.raises(UserError, match=words):
        make_plan(program=None, backend=backend, versions=versions)
    fitting = {"torch": "2.8.0", "oneccl-bind-pt": "2.8.0", "oneccl-cpu-devel": "2021.15.2"}
    assert make_plan(program=None, backend=backend, versions=fitting).backend == backend


def test_every_rank_is_told_all_that_oneccl_reads(make_plan):
    plan = make_plan(env=("CCL_LOG_LEVEL=info",))
    names = ("CCL_PROCESS_LAUNCHER", "CCL_LOCAL_RANK", "CCL_LOCAL_SIZE", "FI_PROVIDER", "CCL_WORKER_OFFLOAD")
    assert [plan.ranks[1].env[name] for name in names] == ["none", "1", "2", "tcp", "0"]
    assert plan.ranks[0].env["CCL_LOG_LEVEL"] == "info"


@pytest.mark.parametrize(
    ("fabrics", "provider"), [(("verbs", "verbs"), "verbs"), (("verbs", "tcp"), "tcp"), (("psm3",), "tcp")]
)
def test_the_provider_is_one_that_every_host_has(tmp_path, fabrics, provider):
    topology = sysfs.read(write_tree(tmp_path))
    facts = [HostFacts(topology=topology, python="/py", versions={}, fabric=fabric) for fabric in fabrics]
    meeting = network.Meeting(addr="10.0.0.1", ifnames=("eth0",) * len(fabrics))
    hosts = parse("\n".join("ab"[: len(fabrics)]), "hosts")
    assert backends.fabric_of(join(hosts, facts, meeting)) == provider


@pytest.mark.parametrize(
    ("devices", "provider"), [((), "tcp"), (("mlx5_0",), "verbs"), (("hfi1_0",), "psm3"), (("rdmap0s6",), "efa")]
)
def test_a_host_tells_its_fabric(tmp_path, devices, provider):
    for name in devices:
        (tmp_path / name).mkdir()
    assert hello.fabric(tmp_path) == provider
    assert hello.fabric(tmp_path / "none") == "tcp"


def test_a_memory_allocator_is_the_hosts_own(make_plan):
    found = {"tcmalloc": "/usr/lib/libtcmalloc.so.4"}
    plan = make_plan(allocators=found, memory_allocator="tcmalloc")
    assert {rank.env["LD_PRELOAD"] for rank in plan.ranks} == {"/usr/lib/libtcmalloc.so.4"}
    assert "GLIBC_TUNABLES" not in plan.ranks[0].env
    assert "LD_PRELOAD" not in make_plan(allocators=found).ranks[0].env
    with pytest.raises(UserError, match='--memory-allocator: localhost has no library of it: "jemalloc"; install'):
        make_plan(allocators=found, memory_allocator="jemalloc")


@pytest.mark.parametrize(("strategy", "threshold"), [("ddp", 4 << 30), ("full-lowmem", 256 << 20)])
def test_little_memory_is_not_kept_in_blocks_that_fit_nothing(make_plan, strategy, threshold):
    env = make_plan(program=None, train=TrainConfig(strategy=strategy)).ranks[0].env
    assert env["GLIBC_TUNABLES"].startswith(f"glibc.malloc.mmap_threshold={threshold}:")


def test_one_interface_for_all_that_communicate(make_plan):
    env = make_plan().ranks[0].env
    assert [env[name] for name in ("GLOO_SOCKET_IFNAME", "CCL_KVS_IFACE", "FI_TCP_IFACE")] == ["lo"] * 3
    assert not {"OMP_PROC_BIND", "KMP_AFFINITY"} & set(env)  # they would narrow the mask that loaders inherit


def test_other_hosts_receive_what_the_first_prepares(tmp_path):
    topology = sysfs.read(write_tree(tmp_path))
    hosts = parse("a\nb\nc", "hosts")
    facts = [HostFacts(topology=topology, python="/py", versions={}, identity={"HOME": f"/home/{n}"}) for n in "abc"]
    meeting = network.Meeting(addr="10.0.0.1", ifnames=("eth0", "ens5", "ib0"))
    cluster = join(hosts, facts, meeting)
    site = Site(run_id="r", attempt=1, run_dir="/runs/r", cwd="/work")
    opened = Opened(port=1, courier_port=2, courier_token="t0ken")
    plan = planner.build(LaunchConfig(), cluster, place(cluster, Policy()), site, ENVIRON, opened=opened)
    first, second, _ = plan.nodes
    assert [task.argv[3] for task in first.prepare] == ["falcon_dist", "launcher.courier"]
    assert [task.argv[4:] for task in second.prepare] == [
        ("receive", "10.0.0.1", "2", "/runs/r/attempt_1/prepare_0001/prepared.json")
    ]
    assert second.ranks[0].env["FALCON_PREPARED"] == "/runs/r/attempt_1/prepare_0001/prepared.json"
    assert "FALCON_PREPARED" not in first.ranks[0].env
    assert [n.ranks[0].env["GLOO_SOCKET_IFNAME"] for n in plan.nodes] == ["eth0", "ens5", "ib0"]
    assert [n.ranks[0].env["HOME"] for n in plan.nodes] == ["/home/a", "/home/b", "/home/c"]
    assert (first.cwd, second.cwd) == ("/work", "/runs/r/attempt_1")
    assert "t0ken" not in json.dumps(plan.redacted().to_json())
    assert "t0ken" not in " ".join(word for node in plan.nodes for task in node.prepare for word in task.argv)


def test_an_engine_that_a_host_lacks_is_refused_before_anything_starts(make_plan):
    wanted = {"program": None, "train": TrainConfig(engine=EngineConfig(kind="ipex"))}
    with pytest.raises(UserError, match=r"^--engine: intel-extension-for-pytorch is not installed on .*make ipex-venv"):
        make_plan(**wanted, versions={"torch": "2.13.0"})
    assert make_plan(**wanted, versions={"torch": "2.8.0", "intel-extension-for-pytorch": "2.8.0"}).ranks
