"""Models that cannot be trained are refused while a run is prepared, before a row is packed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import write_model

from falcon_dist.config import DataConfig, ModelConfig, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.native import ADAPTER_CONFIG
from falcon_dist.prepare import PREPARED_FILE, prepare


def refusal(model: Path, **data: object) -> str:
    """What preparing a run of this model says."""
    config = TrainConfig(model=ModelConfig(name=str(model)), data=DataConfig(**{"name": "none-such", **data}))
    with pytest.raises(UserError) as error:
        prepare(config, model.parent, {})
    assert not (model.parent / PREPARED_FILE).exists()
    return str(error.value)


def test_adapters_are_no_model_and_their_merging_is_named(tmp_path: Path) -> None:
    adapter = tmp_path / "step-000004"
    adapter.mkdir()
    base = write_model(tmp_path / "base")
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": str(base)}))
    said = refusal(adapter)
    assert said.startswith(f'model.name: adapters of a LoRA run, not a model: "{adapter}"; ')
    assert f"falcon merge {adapter} --into FOLDER" in said
