"""Bytes of others that would run code if they were unpickled or imported: none of them ever does."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import falcon_7b, make_model, make_tokenizer, write_model

from falcon_dist import chat, checkpoint, compare, merge, train_state
from falcon_dist.chat_template import find_template
from falcon_dist.config import ModelConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.native import ADAPTER_CONFIG, load_config, load_model, load_tokenizer
from launcher import courier
from launcher.errors import LaunchError
from launcher.transport import AGENT, Channel, Spawned

ROOT = Path(__file__).parents[2]


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(params=["text", "binary", "torch"])
def bomb(request, tmp_path: Path) -> Iterator[bytes]:
    """A pickle in the protocol that is text, in one that is not, and as torch.save wraps it; it must not go off."""
    marker = tmp_path / "went-off"
    buffer = io.BytesIO()
    if request.param == "torch":
        torch.save({"weight": Bomb(marker)}, buffer)
    else:
        pickle.dump(Bomb(marker), buffer, 0 if request.param == "text" else pickle.HIGHEST_PROTOCOL)
    buffer.seek(0)
    torch.load(buffer, weights_only=False) if request.param == "torch" else pickle.load(buffer)  # noqa: S301
    marker.rmdir()  # it is a real one
    yield buffer.getvalue()
    assert not marker.exists()


def kept_by(model, tokenizer) -> train_state.Kept:
    weights = train_state.named_weights(model)
    return train_state.Kept(
        weights=weights,
        optimizer={f"exp_avg/{name}": torch.zeros_like(tensor) for name, tensor in weights.items()},
        steps=3,
        describe=partial(train_state.describe_model, model, tokenizer),
    )


def save(root: Path, kept: train_state.Kept) -> Path:
    """A checkpoint with every kind of file that a run writes."""
    shards = kept.shards(writers=1, max_bytes=100_000)
    with checkpoint.committed(root, 3, {"run_id": "r"}) as folder:
        train_state.write_shards(folder, shards, kept.tensors)
        train_state.write_rest(folder, kept, shards)
    return root / checkpoint.folder_name(3)


def use(path: Path, kept: train_state.Kept) -> list[str]:
    """Reads a checkpoint in every way there is; what was said against it."""
    said = []
    name, config = str(path), ModelConfig(name=str(path))
    for way in (
        lambda: train_state.load(path, kept),
        lambda: load_model(path, config, "bf16"),
        lambda: load_tokenizer(path, config),
        lambda: chat.load(name, chat.parse_args([name])),
    ):
        try:
            way()
        except (UserError, checkpoint.DamagedError) as error:
            said.append(str(error))
    return said


def test_a_bomb_in_any_file_of_a_checkpoint_is_named_and_never_goes_off(tmp_path: Path, bomb: bytes) -> None:
    kept = kept_by(make_model(falcon_7b()), make_tokenizer())
    path = save(tmp_path, kept)
    assert use(path, kept) == []
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert {"config.json", "counters.json", "manifest.json", "tokenizer.json", train_state.INDEX} < {
        file.name for file in files
    }
    for file in files:
        whole, manifest = file.read_bytes(), (path / checkpoint.MANIFEST).read_bytes()
        file.write_bytes(bomb)
        ((refused, reason),) = checkpoint.newest_verified(tmp_path).refused
        assert refused == path
        assert reason.startswith(str(file.relative_to(path)))
        if file.name != checkpoint.MANIFEST:
            sign(path)  # as somebody would who means it
            assert checkpoint.fault_of(path) is None
        said = use(path, kept)
        if file.suffix == ".safetensors" and file.parent.name == train_state.TRAIN_STATE:
            assert said[0].startswith(f'--resume: "{file}" cannot be used: ')
        if file.name == "config.json" or (file.parent == path and file.suffix == ".safetensors"):
            assert len(said) >= 2
        file.write_bytes(whole)
        (path / checkpoint.MANIFEST).write_bytes(manifest)


def sign(path: Path) -> None:
    """The manifest that a save would write for these bytes."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    for name in manifest["files"]:
        file = path / name
        manifest["files"][name] = checkpoint.entry(checkpoint.told_of(file))
    (path / checkpoint.MANIFEST).write_text(checkpoint.manifest_text(manifest["facts"], manifest["files"]))


def compared(model: Path) -> None:
    """A model with itself; a command that is refused leaves its group to the end of its process."""
    try:
        compare.compare([str(model), str(model), "--prompt", "Hi?"])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_models_that_are_pickles_are_refused_with_the_cure(tmp_path: Path, bomb: bytes, name: str) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "aside")
    (folder / name).write_bytes(bomb)
    message = f'no safetensors in "{folder}", only pickle: "{name}"; .* convert it to safetensors'
    for way in (
        lambda: load_model(folder, ModelConfig(name=str(folder)), "bf16"),
        lambda: chat.chat([str(folder)]),
        lambda: compared(folder),
    ):
        with pytest.raises(UserError, match=message):
            way()
    (tmp_path / "aside").rename(folder / "model.safetensors")  # beside safetensors it is left alone
    load_model(folder, ModelConfig(name=str(folder)), "bf16")


def test_adapters_that_are_a_pickle_are_refused(tmp_path: Path, bomb: bytes) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": str(write_model(tmp_path / "base"))}))
    (adapter / "adapter_model.bin").write_bytes(bomb)
    for way in (
        lambda: load_model(adapter, ModelConfig(name=str(adapter)), "bf16"),
        lambda: merge.merge([str(adapter), "--into", str(tmp_path / "merged")]),
    ):
        with pytest.raises(UserError, match=r'only pickle: "adapter_model.bin"'):
            way()


@pytest.fixture
def bringing_code(tmp_path: Path) -> Iterator[Path]:
    """A model folder with Python code, which leaves a mark when it is imported; a person at the terminal says yes."""
    folder, marker = write_model(tmp_path / "model"), tmp_path / "imported"
    for file in ("own.py", "custom_generate/generate.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(f"import os\nos.mkdir({str(marker)!r})\nConfig = Model = Tokenizer = generate = 1\n")
    change(folder / "config.json", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    yield folder
    assert not marker.exists()


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_model_that_transformers_knows_does_not_bring_its_own_code(bringing_code: Path) -> None:
    config = ModelConfig(name=str(bringing_code))
    model = load_model(bringing_code, config, "bf16")
    assert type(model).__module__ == "transformers.models.falcon.modeling_falcon"
    load_config(bringing_code, config)
    load_tokenizer(bringing_code, config)


def test_a_model_that_needs_its_own_code_is_refused_and_nobody_is_asked(bringing_code: Path, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked at the terminal"))
    config = ModelConfig(name=str(bringing_code))
    change(bringing_code / "config.json", model_type="their-own")
    change(
        bringing_code / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["own.Tokenizer", None]},
        tokenizer_class="Own",
    )
    for way in (
        lambda: load_model(bringing_code, config, "bf16"),
        lambda: load_config(bringing_code, config),
        lambda: load_tokenizer(bringing_code, config),
        lambda: chat.chat([str(bringing_code)]),
        lambda: compared(bringing_code),
    ):
        with pytest.raises(UserError, match=r"needs Python code of its own \(own.py\), which is not run") as error:
            way()
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"data.template: no such template or model"):
        find_template(str(bringing_code))


def test_a_configuration_that_transformers_refuses_is_one_line(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    change(folder / "config.json", layer_norm_epsilon="seven")
    for way in (load_config, partial(load_model, precision="bf16")):
        with pytest.raises(UserError, match=r"model.name: cannot load .*layer_norm_epsilon") as error:
            way(folder, ModelConfig(name=str(folder)))  # type: ignore[operator]
        assert "\n" not in str(error.value)


def speaking(code: str, *args: str) -> Channel:
    words = [sys.executable, "-c", code, *args]
    return Channel("node1", Spawned(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)))


def test_a_bomb_to_the_launcher_is_no_event(tmp_path: Path, bomb: bytes) -> None:
    (tmp_path / "bomb").write_bytes(bomb)
    code = 'import sys; print(\'{"event": "hello"}\', flush=True); '
    code += "sys.stdout.buffer.write(open(sys.argv[1], 'rb').read() + b'\\n')"
    channel = speaking(code, str(tmp_path / "bomb"))
    with pytest.raises(LaunchError, match="node1: the agent said something that is no event"):
        while True:
            channel.receive()
    channel.close()


def test_a_bomb_to_the_agent_is_told_and_ends_it(bomb: bytes) -> None:
    done = subprocess.run(AGENT, input=bomb + b"\n", capture_output=True, timeout=60, check=False)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events if event["event"] != "alive"][:2] == ["hello", "fault"]
    assert b"Traceback" not in done.stderr


def test_a_bomb_to_the_courier_is_a_stranger(tmp_path: Path, bomb: bytes) -> None:
    (tmp_path / "prepared.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = threading.Thread(target=courier.offer, args=(listening, tmp_path / "prepared.json", 1, "t"))
        serving.start()
        with socket.create_connection(listening.getsockname()) as stranger:
            stranger.sendall(bomb + b"\n")
            with suppress(ConnectionResetError):  # not all of it was read
                assert stranger.recv(1) == b""
        courier.receive("127.0.0.1", listening.getsockname()[1], tmp_path / "got", "t")
        serving.join()


def test_a_bomb_from_the_courier_is_refused(tmp_path: Path, bomb: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(bomb + b"\n")

        serving = threading.Thread(target=answer)
        serving.start()
        with pytest.raises(ValueError, match=r"."):
            courier.receive("127.0.0.1", listening.getsockname()[1], tmp_path / "got", "t")
        serving.join()
    assert not (tmp_path / "got").exists()


FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
CALLS = {"load_state_dict_from_url", "read_pickle", "all_gather_object", "broadcast_object_list", "gather_object"}
CALLS |= {"scatter_object_list", "send_object_list", "recv_object_list", "rpc_sync", "rpc_async", "init_rpc"}


@pytest.mark.parametrize("package", ["launcher", "falcon_dist"])
def test_no_module_of_ours_unpickles(package: str) -> None:
    """Every message goes through json, for there is nothing else: neither the modules nor the calls of torch."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named = {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN
            elif isinstance(node, ast.ImportFrom):
                named = {str(node.module).split(".")[0]} & FORBIDDEN | {alias.name for alias in node.names} & CALLS
            elif isinstance(node, ast.Attribute):
                whole = ast.unparse(node)
                named = {node.attr} & CALLS | {whole} & {"torch.load", "multiprocessing.connection"}
            elif isinstance(node, ast.keyword):
                taken = node.arg in ("allow_pickle", "trust_remote_code") and ast.unparse(node.value) != "False"
                named = {str(node.arg)} if taken else set()
            else:
                continue
            found += [f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {name}" for name in named]
    assert found == []


def test_every_from_pretrained_says_no_to_code() -> None:
    """Left out, transformers asks at the terminal, and runs the code if somebody says yes."""
    silent = []
    for path in sorted((ROOT / "falcon_dist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("Auto"):
                made = ast.unparse(node.func).endswith(".from_pretrained")
                if made and "trust_remote_code" not in {keyword.arg for keyword in node.keywords}:
                    silent.append(f"{path.name}:{node.lineno}")
    assert silent == []


def test_a_tokenizer_that_ends_no_text_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    change(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match=r'model.name: no end-of-text token in the tokenizer of ".*/model"; name one'):
        load_tokenizer(folder, ModelConfig(name=str(folder)))
