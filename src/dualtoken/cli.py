"""The command line: a dict of functions, each imported when it is called, so that `--help` is quick."""

import importlib
import os
import shlex
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from dualtoken.core.errors import UserError

RECIPES = Path(__file__).parent / "recipes"


class Command(NamedTuple):
    """Where a function is, what it does, and how it is called."""

    target: str
    help: str
    example: str
    optional: str = ""  # an argument that may be given without its option's name
    page: bool = False  # what it writes to --output is put beside it as a page to read


GROUPS = {
    "data": "look at data",
    "eval": "measure a model",
    "analyze": "look into a model",
}  # what groups of commands are for
SHORT = {"-n": "--number", "--out": "--output"}  # other spellings of options


COMMANDS: dict[str, Command | dict[str, Command]] = {
    "demo": Command(
        "dualtoken.app.demo:demo",
        "the bundled miniature at work on unseen pictures: a report to look at",
        "dualtoken demo --image my.jpg",
    ),
    "info": Command("dualtoken.app.info:info", "parameters by part, sizes and codes of a model", "dualtoken info mini"),
    "chat": Command(
        "dualtoken.app.converse:chat",
        "ask about pictures, once or in a conversation",
        'dualtoken chat --image my.jpg "what color is the circle ?"',
        "question",
    ),
    "draw": Command(
        "dualtoken.app.converse:draw",
        "pictures from words",
        'dualtoken draw "a large plain red star on a black background" -n 4 --guidance 3 --seed 0 --out drawings',
    ),
    "edit": Command(
        "dualtoken.app.converse:edit",
        "a picture changed as an instruction says",
        'dualtoken edit my.png "make the red star blue"',
    ),
    "story": Command(
        "dualtoken.app.converse:story",
        "words and pictures in turn",
        'dualtoken story "tell a story in two pictures about a red star"',
    ),
    "serve": Command(
        "dualtoken.app.serve:serve",
        "an HTTP server that OpenAI's clients can talk to",
        "dualtoken serve --model mini --port 8000",
    ),
    "app": Command(
        "dualtoken.app.web:app",
        "a model in the browser: tokenize, look, draw, edit, tell",
        "dualtoken app --port 7860",
    ),
    "encode": Command(
        "dualtoken.app.files:encode",
        "pictures -> a file of codes; shards of pictures -> shards of codes",
        'dualtoken encode "shards/{000..099}.tar" --out codes/',
    ),
    "decode": Command(
        "dualtoken.app.files:decode", "codes -> pictures", "dualtoken decode codes.safetensors --output out/"
    ),
    "reconstruct": Command(
        "dualtoken.app.files:reconstruct",
        "pictures -> codes -> pictures",
        "dualtoken reconstruct photos/ --output out/",
    ),
    "data": {
        "inspect": Command(
            "dualtoken.app.shards:inspect",
            "what is in shards of pictures or codes: a table and a picture grid",
            "dualtoken data inspect codes/000.tar --output look/",
        ),
        "scenes": Command(
            "dualtoken.app.shards:scenes",
            "write drawn scenes with captions as webdataset shards",
            "dualtoken data scenes shards/ --images 40000",
        ),
    },
    "eval": {
        "reconstruction": Command(
            "dualtoken.eval.commands:reconstruction",
            "PSNR, SSIM and Frechet distances of reconstructions",
            "dualtoken eval reconstruction --data photos/ --output result.json",
            page=True,
        ),
        "zero-shot": Command(
            "dualtoken.eval.commands:zero_shot",
            "zero-shot accuracy from semantic codes, beside the continuous teacher",
            "dualtoken eval zero-shot --model mini",
            page=True,
        ),
        "retrieval": Command(
            "dualtoken.eval.commands:retrieval",
            "image-text retrieval R@1 from semantic codes, beside the continuous teacher",
            "dualtoken eval retrieval --model mini",
            page=True,
        ),
        "understanding": Command(
            "dualtoken.eval.understanding:understanding",
            "answers to questions by type, and captions, of unseen scenes",
            "dualtoken eval understanding --output result.json",
            page=True,
        ),
        "generation": Command(
            "dualtoken.eval.generation:generation",
            "drawings and edits of unseen scenes, judged by rule from the picture",
            "dualtoken eval generation --output result.json --pictures sheets/",
            page=True,
        ),
        "reader": Command(
            "dualtoken.eval.generation:reader",
            "how often the reader that judges drawings is right, on true pictures",
            "dualtoken eval reader --drawings 1000",
            page=True,
        ),
        "scores": Command(
            "dualtoken.eval.scores:scores",
            "result files of benchmarks' scorers (GenEval, WISE, ...) in one report",
            "dualtoken eval scores --geneval results.jsonl --output report.json",
            page=True,
        ),
    },
    "analyze": {
        "layers": Command(
            "dualtoken.app.analyze:layers",
            "how alike the layers of backbones are, and where to tap them for pixels",
            "dualtoken analyze layers --backbones mini --data photographs",
        ),
        "clusters": Command(
            "dualtoken.app.analyze:clusters",
            "pictures that shallow and deep layers put together",
            "dualtoken analyze clusters --data photos/ --clusters 100",
        ),
        "feature-space": Command(
            "dualtoken.app.analyze:feature_space",
            "a map of pixel and semantic features, and how far they overlap",
            "dualtoken analyze feature-space --models mini --normalize true",
        ),
        "codebooks": Command(
            "dualtoken.app.analyze:codebooks",
            "use and entropy of codes, and what one vocabulary says of the other",
            "dualtoken analyze codebooks --model mini --data photos/",
        ),
        "cost": Command(
            "dualtoken.app.analyze:cost",
            "parameters, operations, memory and time, one vocabulary against two",
            "dualtoken analyze cost --model paper-3b --training true",
        ),
    },
    "reproduce": Command(
        "dualtoken.paper.reproduce:reproduce",
        "tables and figures of the paper",
        "dualtoken reproduce fig3 --out reproduced",
    ),
    "report": Command(
        "dualtoken.app.result_page:report",
        "results of eval and reproduce -> one page to read",
        "dualtoken report result.json --output report.html",
    ),
    "convert": Command(
        "dualtoken.tokenizer.convert:convert",
        "a tokenizer checkpoint of the paper's repository -> directories of ours",
        "dualtoken convert epoch_1.pt --description config.json --output converted",
    ),
    "train-encoder": Command(
        "dualtoken.training.encoder:train_encoder",
        "train an image-text encoder (the pretrained SigLIP of the miniature)",
        "dualtoken train-encoder --config mini-encoder",
    ),
    "train-tokenizer": Command(
        "dualtoken.training.tokenizer:train_tokenizer",
        "train the vision tokenizer on scenes, a folder or shards",
        "dualtoken train-tokenizer --config mini-tokenizer --data.source photos/",
    ),
    "train-mllm": Command(
        "dualtoken.training.mllm:train_mllm",
        "train the multimodal LLM in all stages, or in one",
        "dualtoken train-mllm --config mini-mllm --stages all",
    ),
    "plan": Command(
        "dualtoken.app.plan:plan",
        "what a large run of train-mllm takes: memory, tokens, steps, disk",
        "dualtoken plan qwen2.5-3b --devices 64 --images 60M --shard true",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 after a mistake of the user's or an error of files."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:  # the other kind: a full disk, no permission, a file for a folder
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def run() -> None:
    """The installed `dualtoken`. Quiet where what reads its output stops reading (`dualtoken info | head`)."""
    try:
        status = main()
        if status == 0:
            _leave_the_others()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        status = 1
    sys.exit(status)


def _leave_the_others() -> None:
    """End what processes talk over while Python is whole: torch's threads that are ended with it may abort."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _run(arguments: list[str]) -> int:
    table, path = COMMANDS, ["dualtoken"]
    while True:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_help(table, path))
            return 0
        if arguments[0] == "--version":
            print(importlib.import_module("importlib.metadata").version("dualtoken"))
            return 0
        name = arguments.pop(0)
        if name not in table:
            near = get_close_matches(name, table, 1, 0.4)
            hint = f": did you mean {near[0]!r}?" if near else "."
            raise UserError(f"{' '.join(path)} has no command {name!r}{hint} See {' '.join(path)} --help")
        path.append(name)
        if isinstance(table[name], Command):
            return _call(table[name], path, arguments)
        table = table[name]


def _help(table: dict, path: list[str]) -> str:
    """The commands of a table with an example each."""
    lines = [f"usage: {' '.join(path)} COMMAND [options]", ""]
    if path == ["dualtoken"]:
        about = "Pictures as pixel and semantic codes, and a language model that reads and writes both (DualToken)."
        lines[1:1] = ["", about, "Start with: dualtoken demo"]
    for name, command in table.items():
        text = command.help if isinstance(command, Command) else f"{', '.join(command)}: {GROUPS[name]}"
        lines.append(f"  {name:16} {text}")
    examples = [c.example for c in table.values() if isinstance(c, Command)]
    return "\n".join([*lines, "", "examples:", *(f"  {e}" for e in examples), "", "Options: COMMAND --help"])


def _call(command: Command, path: list[str], arguments: list[str]) -> int:
    """Parse options for the function and call it. A recipe's name stands for its file."""
    import jsonargparse

    typed = [*path, *arguments]
    arguments = [_recipe(arguments[i - 1] if i else "", _whole(a)) for i, a in enumerate(arguments)]
    module, name = command.target.split(":")
    function = getattr(importlib.import_module(module), name)
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()  # one for each small file
    parser = jsonargparse.ArgumentParser(
        prog=" ".join(path),
        description=command.help,
        epilog=f"example: {command.example}",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML recipe, by path or by name")
    parser.add_function_arguments(function, as_positional=True, sub_configs=True, skip={command.optional} - {""})
    if command.optional:
        parser.add_argument(command.optional, nargs="?", help="without it, a conversation")
    try:
        settings = parser.parse_args(arguments)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(_explain(str(error), parser, path)) from None
    settings.pop("config", None)
    function(**parser.instantiate(settings).as_dict())
    if command.page and settings.output and Path(settings.output).is_file():
        write_page = importlib.import_module("dualtoken.app.result_page").write_page
        write_page([Path(settings.output)], Path(settings.output).with_suffix(".html"), path[-1], shlex.join(typed))
    return 0


def _whole(argument: str) -> str:
    """An argument with its option spelled as the function has it: `--out=DIR` -> `--output=DIR`."""
    option, sign, value = argument.partition("=")
    return SHORT.get(option, option) + sign + value


def _recipe(option: str, value: str) -> str:
    """`--config NAME` -> the path of the shipped recipe. Raises UserError naming those there are."""
    prefix, text = ("--config=", value[9:]) if value.startswith("--config=") else ("", value)
    if (option != "--config" and not prefix) or Path(text).is_file():
        return value
    shipped = {p.stem: str(p) for p in sorted(RECIPES.glob("*.yaml"))}
    if text not in shipped:
        raise UserError(f"--config {text}: no such file or recipe; shipped recipes: {', '.join(shipped)}")
    return prefix + shipped[text]


def _explain(message: str, parser, path: list[str]) -> str:
    """jsonargparse's message in one line, with the nearest valid key for one that is not known."""
    import re

    keys = [a.dest for a in parser._actions if a.dest not in ("help", "config")]
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    found = re.search(r"(?i)(?:unrecognized arguments: -*|key '|option '|keys: \W*)([\w.\-]+)", line)
    if found and found[1] not in keys:
        name = found[1].replace("-", "_")
        last = {key.split(".")[-1]: key for key in reversed(keys)}
        near = get_close_matches(name, keys, 1, 0.8) or get_close_matches(name.split(".")[-1], last, 1, 0.5)
        hint = f"; the nearest valid key is {last.get(near[0], near[0])!r}" if near else ""
        return f"unknown key {found[1]!r}{hint} (all: {' '.join(path)} --help)"
    return f"{line[:400]} (options: {' '.join(path)} --help)"
