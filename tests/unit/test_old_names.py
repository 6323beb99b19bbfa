"""Every argument of the 2023 recipe: what it is today, said aloud."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from falcon_dist.config import TrainConfig, keys_of
from falcon_dist.contract import UserError
from falcon_dist.old_names import CPU_ISA, OLD, translate
from launcher import flags
from launcher.config import load

RECIPE = ["--set", "checkpoint.links=./results", "--env", CPU_ISA]
SETS = {
    "--model_name tiiuae/falcon-7b": "model.name=tiiuae/falcon-7b",
    "--model_name_or_path ./m": "model.name=./m",
    "--model_id ./m": "model.name=./m",
    "--dataset_name timdettmers/openassistant-guanaco": "data.name=timdettmers/openassistant-guanaco",
    "--dataset_text_field text": "data.text_field=text",
    "--max_seq_length 512": "data.max_length=512",
    "--max_length 512": "data.max_length=512",
    "--packing True": "data.packing=true",
    "--packing": "data.packing=true",
    "--packing=False": "data.packing=false",
    "--bf16 True": "precision=bf16-autocast",
    "--bf16": "precision=bf16-autocast",
    "--bf16 False": "precision=fp32",
    "--gradient_checkpointing": "loop.grad_checkpointing=true",
    "--per_device_train_batch_size 4": "loop.micro_batch=4",
    "--gradient_accumulation_steps 2": "loop.grad_accum=2",
    "--num_train_epochs 3": "loop.epochs=3",
    "--max_steps 100": "loop.max_steps=100",
    "--max_steps -1": "loop.max_steps=none",
    "--learning_rate 2e-4": "optim.lr=2e-4",
    "--lr_scheduler_type cosine": "optim.schedule=cosine",
    "--lr_scheduler_type constant_with_warmup": "optim.schedule=constant",
    "--warmup_steps 10": "optim.warmup_steps=10",
    "--warmup_ratio 0.03": "optim.warmup_share=0.03",
    "--weight_decay 0.1": "optim.weight_decay=0.1",
    "--max_grad_norm 0.3": "optim.max_grad_norm=0.3",
    "--adam_beta1 0.9": "optim.beta1=0.9",
    "--adam_beta2 0.95": "optim.beta2=0.95",
    "--adam_epsilon 1e-6": "optim.eps=1e-6",
    "--seed 7": "seed=7",
    "--save_strategy no": "checkpoint.every=0",
    "--save_strategy epoch": "checkpoint.every=0",
    "--save_steps 50": "checkpoint.every=50",
    "--save_total_limit 2": "checkpoint.keep_last=2",
    "--load_best_model_at_end True": "checkpoint.keep_best=true",
    "--evaluation_strategy steps": "evaluate.every=500",
    "--eval_strategy epoch": "evaluate.every=0",
    "--eval_steps 20": "evaluate.every=20",
    "--logging_steps 5": "report.log_every=5",
    "--report_to none": "report.to=[]",
    "--report_to tensorboard": 'report.to=["tensorboard"]',
    "--report_to wandb tensorboard": 'report.to=["wandb", "tensorboard"]',
    "--report_to all": 'report.to=["tensorboard", "wandb", "mlflow"]',
}
TOLD = [
    *(
        "--use_ipex True",
        "--use_ipex",
        "--use_ipex False",
        "--no_cuda True",
        "--no_cuda",
        "--use_cpu True",
        "--fp16 False",
        "--tf32 False",
    ),
    *("--tokenizer ./m", "--tokenizer_name ./m", "--dataset_batch_size 100", "--num_of_sequences 10"),
    *("--chars_per_token 3.6", "--group_by_length True", "--remove_unused_columns False", "--jit_mode_eval True"),
    *("--torchdynamo inductor", "--torch_compile True", "--ddp_find_unused_parameters False"),
    *("--per_device_eval_batch_size 8", "--optim adamw_torch_fused", "--data_seed 3", "--overwrite_output_dir"),
    *("--save_strategy steps", "--save_safetensors True", "--logging_strategy steps", "--logging_dir ./logs"),
    *("--push_to_hub True", "--push_to_hub_model_id me/x", "--hub_model_id me/x", "--resume_from_checkpoint False"),
]
FLAGS = {
    "--ddp_backend ccl": ["--backend", "ccl"],
    "--xpu_backend gloo": ["--backend", "gloo"],
    "--resume_from_checkpoint True": ["--resume", "auto"],
    "--resume_from_checkpoint": ["--resume", "auto"],
}


@pytest.mark.parametrize("old", SETS)
def test_old_arguments_that_are_settings_now(old: str) -> None:
    argv, lines = translate(old.split())
    assert argv == ["--set", SETS[old], *RECIPE]
    assert SETS[old] in lines[0]
    assert SETS[old].partition("=")[0] in keys_of(TrainConfig)


@pytest.mark.parametrize("old", TOLD)
def test_old_arguments_with_nothing_to_set_say_why(old: str) -> None:
    argv, lines = translate(old.split())
    assert argv == RECIPE
    assert lines[0].startswith(old.split(maxsplit=1)[0])
    assert len(lines[0]) > len(old) + 2


@pytest.mark.parametrize("old", FLAGS)
def test_old_arguments_that_are_flags_now(old: str) -> None:
    assert translate(old.split()).argv == [*FLAGS[old], *RECIPE]


@pytest.mark.parametrize("beside", ["--warmup_ratio 0.03", "--warmup_steps 100", "--recipe falcon-7b-lora"])
def test_the_constant_schedule_of_old_does_not_warm_up(beside: str) -> None:
    """transformers' own has none, whatever stands beside it; a setting of today does."""
    for words in (f"--lr_scheduler_type constant {beside}", f"{beside} --lr_scheduler_type=constant"):
        argv, lines = translate(words.split())
        optim = load(flags.parse(argv).flags).train.optim
        assert (optim.schedule, optim.warmup_steps, optim.warmup_share) == ("constant", 0, 0.0)
        assert any("it never warmed up" in line for line in lines)
    argv, _ = translate(["--lr_scheduler_type", "constant", "--set", "optim.warmup_steps=7"])
    assert load(flags.parse(argv).flags).train.optim.warmup_steps == 7


def test_output_dir_is_where_the_links_go() -> None:
    argv, lines = translate(["--output_dir", "./out"])
    assert argv == ["--set", "checkpoint.links=./out", "--env", CPU_ISA]
    assert lines[1] == f"as the recipe of 2023: --env {CPU_ISA}"


def test_every_old_name_is_in_these_tables() -> None:
    tested = {line.split()[0].partition("=")[0][2:] for line in (*SETS, *TOLD, *FLAGS)}
    assert tested | {"output_dir"} == set(OLD)


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("--fp16 True", "use --bf16 True"),
        ("--no_cuda False", "CPUs only"),
        ("--use_cpu False", "CPUs only"),
        ("--tf32 True", "CPUs only"),
        ("--save_safetensors False", "pickle is never written"),
        ("--ddp_backend nccl", '"gloo" or "ccl": "nccl"'),
        ("--optim paged_adamw_32bit", 'only AdamW with exact fp32 state is here: "paged_adamw_32bit"'),
        ("--optim adamw_torch_4bit", "leave it out"),
        ("--evaluation_strategy never", '"steps" or "epoch": "never"'),
        ("--save_strategy best", '"steps" or "epoch": "best"'),
        ("--resume_from_checkpoint ./results/checkpoint-500", "use --resume RUN"),
        ("--max_seq_length", "--max_seq_length: a value is missing"),
        ("--learning_rate --bf16", "--learning_rate: a value is missing"),
    ],
)
def test_what_cannot_be_done_is_refused(old: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        translate(old.split())
    assert message in str(error.value)


def test_the_command_of_2023() -> None:
    typed = ["--nproc_per_node", "2", "--bf16", "True", "--use_ipex", "True", "--max_seq_length", "512"]
    argv, lines = translate(typed)
    assert argv == [
        *("--set", "precision=bf16-autocast", "--set", "data.max_length=512", "--nproc_per_node", "2"),
        *RECIPE,
    ]
    assert lines == (
        "--bf16 True: now precision=bf16-autocast; fp32 weights under bf16 autocast, as then",
        "--use_ipex True: intel_extension_for_pytorch is not installed here; "
        "torch itself reaches oneDNN's AMX and AVX-512 kernels now",
        "--max_seq_length 512: now data.max_length=512",
        f"as the recipe of 2023: --set checkpoint.links=./results --env {CPU_ISA}",
        "no model or recipe named: the demo is trained; Falcon-7B is --recipe falcon-7b",
    )
    for named in (["--recipe", "falcon-7b"], ["--model_name", "./m"], ["--resume", "r"], ["my.py"]):
        assert len(translate(["--bf16", *named]).lines) == 2 + named[0].startswith("--model")
    assert len(translate(["--bf16", "--set=data.name=x"]).lines) == 2


def test_use_ipex_takes_the_extension_where_it_is_installed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "intel_extension_for_pytorch").mkdir()
    (tmp_path / "intel_extension_for_pytorch" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert translate(["--use_ipex", "True"]).argv == ["--engine", "ipex", *RECIPE]


def test_settings_of_today_win_and_order_of_old_names_does_not_matter() -> None:
    assert translate(["--set", "data.max_length=64", "--max-seq-length=512"]).argv[:4] == [
        *("--set", "data.max_length=512", "--set", "data.max_length=64"),
    ]
    both = [
        translate(a.split()).argv[:4]
        for a in ("--eval_steps 9 --evaluation_strategy steps", "--evaluation_strategy steps --eval_steps 9")
    ]
    assert both[0] == both[1] == ["--set", "evaluate.every=500", "--set", "evaluate.every=9"]
    given = translate(["--bf16", "--env", "ONEDNN_MAX_CPU_ISA=DEFAULT"]).argv
    assert CPU_ISA not in given


@pytest.mark.parametrize(
    "argv",
    [
        *(["--recipe", "demo"], ["--", "my.py", "--bf16", "True"], ["-m", "x", "--bf16"], []),
        *(["my.py", "--bf16"], ["--json", "my.py", "--bf16"], ["--set", "a=b", "my.py", "--fp16", "True"]),
    ],
)
def test_other_command_lines_are_left_alone(argv: list[str]) -> None:
    assert translate(argv, ["--json"]) == (argv, ())


@pytest.mark.parametrize("flag", [["-ppn", "1"], ["-H", "hosts"], ["-f", "hosts"], ["-i", "a"], ["-e", "a"]])
def test_short_flags_take_their_value_wherever_they_stand(flag: list[str]) -> None:
    now = ["--set", "precision=bf16-autocast", "--set", "data.max_length=64", *flag, *RECIPE]
    assert translate([*flag, "--bf16", "True", "--max_seq_length", "64"]).argv == now
    assert translate(["--bf16", "True", *flag, "--max_seq_length", "64"]).argv == now
    assert translate([*flag, "--bf16", "--max_seq_length", "64", "my.py", "--bf16"]).argv == [*now, "my.py", "--bf16"]
    assert translate(["--resume_from_checkpoint", *flag]).argv == ["--resume", "auto", *flag, *RECIPE]


def test_a_list_of_trackers_is_no_program() -> None:
    argv, lines = translate(["--report_to", "wandb", "tensorboard", "my.py", "--bf16"])
    assert argv == ["--set", 'report.to=["wandb", "tensorboard"]', *RECIPE, "my.py", "--bf16"]
    assert lines[0].startswith("--report_to wandb tensorboard: now report.to=")


def test_the_standard_library_is_enough() -> None:
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import falcon_dist.old_names; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")
