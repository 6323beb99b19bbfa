"""``python -m falcon_dist VERB``: the programs that need torch. People type ``falcon`` or ``falcon-launch``."""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NoReturn

from falcon_dist import contract
from falcon_dist.contract import (
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_UNSOUND,
    EXIT_USER_ERROR,
    RankResult,
    UnsoundError,
    UserError,
)

SPOKEN: Final = ("chat", "compare", "estimate", "merge", "preview", "push", "quantize")
"""Verbs for people: each a module with a function of its name."""
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
VERBS: Final = ("prepare", "train", *SPOKEN)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; a UserError becomes its one line and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in VERBS:
        print(f"usage: python -m falcon_dist {{{','.join(VERBS)}}} ...", file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        return _run(words[0], words[1:])
    except UserError as error:
        _last_words(str(error))
        return EXIT_USER_ERROR
    except UnsoundError as error:
        _last_words(str(error))
        return EXIT_UNSOUND
    except Exception as error:  # noqa: BLE001 - the rank's last words, told once and then kept
        _last_words(f"{type(error).__name__}: {error}".splitlines()[0], traceback.format_exc().rstrip())
        return EXIT_FAILED


def _run(verb: str, words: list[str]) -> int:
    if verb in SPOKEN:
        return _speak(verb, words)
    _quiet()
    if verb == "prepare":
        return _prepare(words)
    parser = argparse.ArgumentParser(prog=f"python -m falcon_dist {verb}")
    parser.add_argument("--config", type=Path, required=True, help="a config.json of a run")
    parser.add_argument("--run-dir", type=Path, help="the run folder (default: the config's)")
    parser.add_argument("--resume", action="store_true", help="go on from the newest verified checkpoint")
    args = parser.parse_args(words)
    from falcon_dist.settings import read_config

    config = read_config(args.config)
    folder = (args.run_dir or args.config.parent).resolve()
    with _imports():
        from falcon_dist.train import train

    result = train(config, folder, resume=args.resume).result
    if contract.RANK_DIR in os.environ:
        _keep(result, Path(os.environ[contract.RANK_DIR]))
    return EXIT_STOPPED if result.status == "stopped" else 0


def _speak(verb: str, words: list[str]) -> int:
    """A verb for people, who may interrupt it, or read as much as they want and leave."""
    try:
        _quiet()
        with _imports():
            module = importlib.import_module(f"falcon_dist.{verb}")
        code = int(getattr(module, verb)(words))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return EXIT_FAILED


def _prepare(words: list[str]) -> int:
    """Packs the rows of a recipe, for runs to find them; of a run, what its ranks need is told in its folder too."""
    parser = argparse.ArgumentParser(
        prog="falcon prepare", description="Packs the rows of a recipe for its runs to find."
    )
    parser.add_argument("--config", required=True, metavar="RUN|RECIPE", help="a run folder or a recipe's name or file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a training setting")
    parser.add_argument(
        "--run-dir", type=Path, help="for prepared.json (default: the run's folder; a recipe needs none)"
    )
    args = parser.parse_args(words)
    with _imports():
        from falcon_dist.prepare import prepare
        from falcon_dist.settings import load

    config, source = load(args.config, args.set), Path(args.config)
    with tempfile.TemporaryDirectory() as nowhere:
        beside = source if source.is_dir() else source.parent if source.suffix == ".json" else Path(nowhere)
        prepare(config, (args.run_dir or beside).resolve(), os.environ)
    return 0


def _keep(result: RankResult, folder: Path) -> None:
    try:
        result.write(folder)
    except OSError as error:
        raise UserError(
            f'the result cannot be written to "{folder}": {error.strerror}; is the run folder gone?'
        ) from error


def _last_words(error: str, shown: str | None = None) -> None:
    """Wherever they can be left: the exit code says what is to be done next, also where the disk takes no more."""
    with suppress(OSError):
        print(shown or error, file=sys.stderr, flush=True)
    with suppress(OSError):
        _leave_failure(error)


def _leave_failure(error: str) -> None:
    folder = os.environ.get(contract.RANK_DIR)
    if folder and Path(folder).is_dir():
        RankResult(status="failed", error=error).write(Path(folder))


def _quiet() -> None:
    """Libraries' progress bars and advice stay out of the ranks' logs; their warnings and errors do not."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    with _imports():
        from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    for name in ("torch.distributed", "torch.utils._pytree", "torchao", "accelerate.accelerator"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed, which transformers imports where it is installed, sets its logger's level itself.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


@contextmanager
def _imports() -> Iterator[None]:
    """What is imported stays: looking for garbage among it would take a fifth of a start, and of every later round."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _leave(code: int) -> NoReturn:
    """Ends the process. torch 2.13 with gloo can abort while the interpreter is taken down, after all is done.

    A rank that failed leaves the same way: its group still stands, and its peers wait for the end of its connections.
    """
    if sys.argv[1:2] == ["train"] and (code or os.environ.get(contract.BACKEND, "gloo") == "gloo"):
        with suppress(OSError):
            sys.stdout.flush()
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    _leave(main())
