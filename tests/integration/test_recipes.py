"""Every recipe is data that loads; the article's run goes three steps."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from launching import run_python
from recipe_run import three_steps
from tiny_models import falcon_7b, write_model

from falcon_dist.config import TrainConfig, build, check_known, flatten, keys_of

RECIPES = sorted((Path(__file__).parents[2] / "falcon_dist" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(recipe: Path) -> None:
    values = flatten(tomllib.loads(recipe.read_text()), str(recipe))
    check_known(values, keys_of(TrainConfig))
    assert isinstance(build(TrainConfig, values), TrainConfig)


def test_falcon_7b_recipe_for_three_steps(tmp_path: Path) -> None:
    """The very recipe, on a model of the same family; tests/shape has it at the true width."""
    last = three_steps(tmp_path, write_model(tmp_path / "model", falcon_7b()))
    code = "import sys; from transformers import AutoConfig as C; print(C.from_pretrained(sys.argv[1]).model_type)"
    assert run_python(tmp_path, code, str(last)).stdout.strip() == "falcon"
