"""What each host does once before its ranks start: the model fetched, the rows packed. No process group exists."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from falcon_dist import contract
from falcon_dist.chat_template import set_template
from falcon_dist.config import ModelConfig, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.dataset import describe, prepare_rows
from falcon_dist.engine.foreign import check_weights
from falcon_dist.engine.native import ADAPTER_CONFIG, count_parameters, load_config, load_tokenizer
from falcon_dist.masking import check_packing
from falcon_dist.packaged import PREFIX, packaged_model
from falcon_dist.trial import check_model

PREPARED_FILE: Final = "prepared.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Where this host has what the ranks need."""

    model: str
    """Folder or hub name."""
    rows: str
    """Folder of the packed store."""
    parameters: int

    @classmethod
    def read(cls, run_dir: Path, env: Mapping[str, str] = os.environ) -> Prepared:
        """Raises UserError where the run was not prepared on this host."""
        try:
            return cls(**json.loads(Path(env.get(contract.PREPARED, run_dir / PREPARED_FILE)).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f'prepare: nothing prepared in "{run_dir}"; run python -m falcon_dist prepare '
                f"--config {run_dir / 'config.json'} on this host first"
            ) from error


def prepare(config: TrainConfig, run_dir: Path, env: Mapping[str, str]) -> Prepared:
    """Makes everything ready and writes prepared.json; prints what it did.

    Raises:
        UserError: model or data cannot be used, or the chosen backend cannot be built here.
    """
    if config.engine.kind == "ipex":
        from falcon_dist.engine.ipex import check_installed

        check_installed()
    from_node_0 = contract.PREPARED in env
    prepared = Prepared.read(run_dir, env) if from_node_0 else _model_and_rows(config)
    if env.get(contract.BACKEND) == "ccl":
        _build_ccl()  # after all that can refuse a run sooner
    if not from_node_0:
        (run_dir / PREPARED_FILE).write_text(json.dumps(asdict(prepared), indent=1) + "\n")
    return prepared


def _model_and_rows(config: TrainConfig) -> Prepared:
    model, parameters = _checked_model(config)
    tokenizer = load_tokenizer(model, config.model)
    set_template(tokenizer, config.data.template)
    store = prepare_rows(config.data, tokenizer)
    print("\n".join(describe(store)), flush=True)
    return Prepared(model=model, rows=str(store.path), parameters=parameters)


def _checked_model(config: TrainConfig) -> tuple[str, int]:
    """Folder or hub name of a model that can be trained so, and its number of parameters.

    Raises:
        UserError: there is no such model, or it cannot be trained so.
    """
    model = find_model(config.model)
    check_weights(model)
    if (Path(model) / ADAPTER_CONFIG).is_file():
        raise UserError(
            f'model.name: adapters of a LoRA run, not a model: "{config.model.name}"; merge them into one first: '
            f"falcon merge {config.model.name} --into FOLDER"
        )
    plan = load_config(model, config.model)
    if getattr(plan, "quantization_config", None) is not None:
        raise UserError(f'model.name: its weights are quantised: "{config.model.name}"; train the one it was made from')
    check_packing(plan, config.data.packing_kind != "off")
    check_model(config, plan)
    parameters = count_parameters(plan)
    print(f"model: {config.model.name}, {parameters:,} parameters", flush=True)
    return model, parameters


def _build_ccl() -> None:
    """Compiles the ccl backend now, once a host: ranks would wait for each other's compilers in a collective."""
    from falcon_dist.ccl import ensure_built

    start = time.monotonic()
    path = ensure_built()
    print(f"ccl backend: {path.name}, ready after {time.monotonic() - start:.1f} s", flush=True)


def find_model(config: ModelConfig) -> str:
    """Folder or hub name that from_pretrained takes.

    Raises:
        UserError: a path that does not exist, or a package that is not installed.
    """
    if config.name.startswith(PREFIX):
        return str(packaged_model(config.name))
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        return str(folder.absolute())  # ranks work elsewhere, and other hosts are sent what is named so
    if config.name.startswith((".", "/", "~")):
        raise UserError(f'model.name: no such folder: "{config.name}"')
    return config.name
