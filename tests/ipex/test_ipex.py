"""--engine ipex in its own environment, against the native engine there: ``make test-ipex``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import launch, only_run, run_python, step_records, write_inputs
from tiny_models import SHAPES, make_model

from falcon_dist.contract import UserError
from falcon_dist.engine import ipex

STEP = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from tiny_models import SHAPES, make_model
from falcon_dist.engine import ipex
from falcon_dist.engine.adamw import MasterAdamW, decayed_groups
model = make_model(SHAPES[sys.argv[2]]()).to(getattr(torch, sys.argv[3])).train()
if sys.argv[4] == "ipex":
    ipex.optimize(model)
optimizer = MasterAdamW(decayed_groups(model.named_parameters(), 0.0), lr=1e-2)
torch.manual_seed(1)
rows = torch.randint(0, 512, (2, 48))
losses = []
for _ in range(6):
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(losses)
"""


LEAK = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from tiny_models import SHAPES, make_model
from falcon_dist.config import EngineConfig, ModelConfig
from falcon_dist.engine import ipex
from falcon_dist.engine.attention import SEGMENTS, register
from falcon_dist.engine.form import TrainingForm, choose
from falcon_dist.masking import Masking, leak
register()
plan = SHAPES[sys.argv[2]](**{"alibi": False} if sys.argv[2] == "falcon-rw" else {})
model = make_model(plan, SEGMENTS).to(getattr(torch, sys.argv[3])).train()
ipex.optimize(model)
form = TrainingForm(model, choose(model.config, ModelConfig(), EngineConfig(kind="ipex")))
found = [leak(model, batch=2)]
with form.training():
    assert Masking.of(model).segments
    found.append(leak(model, batch=2))
print(found)
"""


def losses(tmp_path: Path, shape: str, dtype: str, engine: str) -> list[float]:
    """Six steps in a process of their own: the extension's kernels, once there, stay."""
    tests = str(Path(__file__).parents[1])
    return list(json.loads(run_python(tmp_path, STEP, tests, shape, dtype, engine).stdout.splitlines()[-1]))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", ["falcon-7b", "llama"])
def test_six_steps_come_to_the_losses_of_the_plain_fp32_model(tmp_path: Path, shape: str, dtype: str, bound: float):
    wanted = losses(tmp_path, shape, "float32", "native")
    found = losses(tmp_path, shape, dtype, "ipex")
    assert wanted[-1] < 0.7 * wanted[0]
    assert max(abs(a - b) / a for a, b in zip(wanted, found, strict=True)) <= bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_leaks_between_packed_samples_in_either_form(tmp_path: Path, shape: str, dtype: str) -> None:
    told = run_python(tmp_path, LEAK, str(Path(__file__).parents[1]), shape, dtype)
    assert json.loads(told.stdout.splitlines()[-1]) == [0.0, 0.0]


def test_what_it_says_it_changed_is_what_changed() -> None:
    model = make_model(SHAPES["falcon-7b"]()).to(torch.bfloat16).train()
    before = {name: (type(module), module.state_dict()) for name, module in model.named_modules()}
    changes = ipex.optimize(model)
    after = {name: type(module) for name, module in model.named_modules()}
    assert (changes.layers, changes.kept) == ({}, {"FalconLinear": 8, "Linear": 1})
    assert after == {name: kind for name, (kind, _) in before.items()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[""][1][name])
    assert {"layer_norm", "cat", "sum"} <= set(changes.operators)
    assert "gelu" not in changes.operators
    assert "layers replaced: none; kept: 8 FalconLinear, 1 Linear; " in changes.line()


def test_run_on_two_ranks_as_of_2023_goes_by_the_extension_and_says_so(tmp_path: Path) -> None:
    recipe = str(write_inputs(tmp_path))
    flags = ("--nproc-per-node", "2", "--recipe", recipe, "--backend", "gloo", "--set", "loop.max_steps=4")
    done = launch(tmp_path, *flags, "--runs-dir", "native", "--engine", "native")
    assert done.returncode == 0, done.stdout + done.stderr
    done = launch(tmp_path, *flags, "--use_ipex", "True")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--use_ipex True: now --engine ipex" in done.stdout
    assert "layers replaced: none; kept: 8 FalconLinear, 1 Linear; " in done.stdout
    assert "engine: ipex; training by segments attention" in done.stdout
    run, (native,) = only_run(tmp_path), (tmp_path / "native").iterdir()
    told = [json.loads(path.read_text())["summary"]["engine"] for path in run.glob("attempt_1/rank_*/result.json")]
    assert [engine["kind"] for engine in told] == ["ipex", "ipex"]
    pairs = zip(step_records(native).values(), step_records(run).values(), strict=True)
    assert all(abs(a["loss"] - b["loss"]) <= 1e-2 * a["loss"] and a["rows"] == b["rows"] for a, b in pairs)
    (checkpoint,) = (run / "checkpoints").glob("step-000004")
    code = "import sys; from transformers import AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1])"
    assert "MISSING" not in run_python(tmp_path, code, str(checkpoint)).stderr


def test_without_its_torch_it_is_refused_before_it_can_end_the_process(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    with pytest.raises(UserError, match=r'2\.8\.0 does not fit torch 2\.13\.0\+cpu: "ipex"; run make ipex-venv'):
        ipex.check_installed()


def test_importing_the_package_alone_does_not_load_the_extension() -> None:
    code = "import sys, falcon_dist.engine.ipex; print('intel_extension_for_pytorch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
