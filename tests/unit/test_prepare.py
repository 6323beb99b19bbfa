"""Models that cannot be trained are refused while a run is prepared, before a row is packed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import write_model
from transformers import (
    BloomConfig,
    FalconH1Config,
    Gemma2Config,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    T5Config,
)

from falcon_dist import contract
from falcon_dist.config import DataConfig, ModelConfig, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.native import ADAPTER_CONFIG
from falcon_dist.prepare import PREPARED_FILE, prepare
from falcon_dist.trial import _small, check_model

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "head_dim": 16,
}
MIXING = {
    "falcon_h1": FalconH1Config(
        **SMALL,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_chunk_size=32,
    ),
    "lfm2": Lfm2Config(**SMALL, layer_types=["full_attention", "full_attention", "conv", "conv"]),
}
WINDOWED = MistralConfig(**SMALL, sliding_window=48)


def refusal(model: Path, **data: object) -> str:
    """What preparing a run of this model says."""
    config = TrainConfig(model=ModelConfig(name=str(model)), data=DataConfig(**{"name": "none-such", **data}))
    with pytest.raises(UserError) as error:
        prepare(config, model.parent, {})
    assert not (model.parent / PREPARED_FILE).exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def written(plan: PreTrainedConfig, folder: Path) -> Path:
    """A model folder of which only the plan is there."""
    plan.save_pretrained(folder)
    return folder


def with_data(**data: object) -> TrainConfig:
    return TrainConfig(data=DataConfig(**data))


def test_a_run_that_is_refused_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("falcon_dist.prepare._build_ccl", lambda: pytest.fail("the ccl backend was compiled first"))
    absent, model = TrainConfig(model=ModelConfig(name="./none-such")), write_model(tmp_path / "model")
    for config, said in (
        (absent, r'^model\.name: no such folder: "\./none-such"$'),
        (TrainConfig(model=ModelConfig(name=str(model)), data=DataConfig(name="./none-such")), "none-such"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(config, tmp_path, {contract.BACKEND: "ccl"})
    assert not (tmp_path / PREPARED_FILE).exists()


def test_adapters_are_no_model_and_their_merging_is_named(tmp_path: Path) -> None:
    adapter = tmp_path / "step-000004"
    adapter.mkdir()
    base = write_model(tmp_path / "base")
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": str(base)}))
    said = refusal(adapter)
    assert said.startswith(f'model.name: adapters of a LoRA run, not a model: "{adapter}"; ')
    assert f"falcon merge {adapter} --into FOLDER" in said


@pytest.mark.parametrize("kind", MIXING)
def test_layers_that_carry_on_past_every_mask_are_refused_with_packing_alone(tmp_path: Path, kind: str) -> None:
    said = refusal(written(MIXING[kind], tmp_path / "model"))
    assert said.startswith(f'data.packing: "{kind}" carries on what it read where no mask stops it')
    assert said.endswith("; set data.packing=false")
    check_model(with_data(packing=False), MIXING[kind])


@pytest.mark.parametrize("packing", [True, False])
def test_rows_longer_than_a_window_are_refused_with_and_without_packing(tmp_path: Path, packing: bool) -> None:
    said = refusal(written(WINDOWED, tmp_path / "model"), packing=packing, max_length=49)
    assert said.startswith('data.max_length: "mistral" looks back 48 tokens, ')
    assert ': "49"; set data.max_length=48, or take a model' in said
    check_model(with_data(packing=packing, max_length=48), WINDOWED)


def test_a_window_that_no_layer_has_is_none() -> None:
    check_model(with_data(), Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=48))


@pytest.mark.parametrize(
    "plan", [BloomConfig(hidden_size=64, n_head=4, n_layer=2), MambaConfig(hidden_size=64), T5Config()]
)
def test_models_that_do_not_take_our_masks_are_refused(tmp_path: Path, plan: PreTrainedConfig) -> None:
    folder = written(plan, tmp_path / "model")
    said = refusal(folder)
    assert said.startswith(f"model.name: models of this kind ({plan.model_type}) do not run with the masks of packed ")
    assert said.endswith(f': "{folder}"; take one of another kind')


def test_experts_that_get_other_tokens_beside_the_same_ones_are_no_leak() -> None:
    check_model(with_data(), MixtralConfig(**SMALL))


def test_what_is_tried_is_small_and_has_every_kind_of_layer() -> None:
    found = _small(MIXING["lfm2"], "sdpa")
    assert len(found.model.layers) == 3
    assert _small(WINDOWED, "sdpa").config.num_hidden_layers == 2
    assert (WINDOWED.num_hidden_layers, WINDOWED.vocab_size) == (4, 128)


def test_a_model_without_sdpa_is_tried_the_way_it_trains() -> None:
    check_model(with_data(), Gemma2Config(**SMALL))
