"""Speed and memory, ours beside the references and the hardware's limit, in one run.

    uv run python -m benchmarks                     all, on the CPU; about half an hour on two idle cores
    uv run python -m benchmarks quantizer drawing   some
    uv run python -m benchmarks drawing --device cuda
    uv run python -m benchmarks --size tiny --output runs/tiny     that it runs; its figures mean nothing

On a CPU each case runs in a process of its own. Written: NAME-DEVICE.json, .md and, where something grows,
.svg; at full size into docs/benchmarks/, and the tables into docs/benchmarks.md.
"""

import argparse
import gc
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.measure import Case, Options, measure
from benchmarks.report import Result, insert, plot, table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
NAMES = ("quantizer", "losses", "tokenizer", "drawing", "startup")
MARK = "RESULT "  # what a case's process prints before its result


def cases(name: str, options: Options) -> list[Case]:
    """The cases of a benchmark, in order: `cases` of benchmarks/NAME.py, but those left out."""
    made = importlib.import_module(f"benchmarks.{name}").cases(options)
    return [c for c in made if not any(word in f"{c.group}, {c.name}" for word in options.without)]


def run_alone(name: str, number: int, options: Options) -> Result:
    """One case in a new process; an "error" in one line where it failed."""
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        name,
        "--case",
        str(number),
        "--options",
        json.dumps(asdict(options)),
    ]
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode == 0 and found:
        return json.loads(found[-1].removeprefix(MARK))
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"error": f"failed: {last[:160]}"}


def run_here(name: str, number: int, options: Options) -> Result:
    """One case in this process, as on a GPU, whose memory is counted by the allocator and free again after a case."""
    import torch

    try:
        return measured(name, number, options)
    except Exception as error:
        return {"error": f"failed: {type(error).__name__}: {error}".splitlines()[0][:160]}
    finally:
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def measured(name: str, number: int, options: Options) -> Result:
    """A case's figures."""
    found = measure(cases(name, options)[number], options)
    return asdict(found) | {"median": found.median}


def print_case(name: str, number: int, options: Options) -> None:
    """What a case's own process does."""
    print(MARK + json.dumps(measured(name, number, options)))


def run(name: str, options: Options) -> Iterator[Result]:
    """The cases of a benchmark, one after the other."""
    for number, case in enumerate(cases(name, options)):
        told = {"group": case.group, "name": case.name, "role": case.role, "rows": case.rows, "series": case.series}
        result = told | (run_alone if options.device == "cpu" else run_here)(name, number, options)
        print(
            f"  {case.group}, {case.name}: {result.get('error') or format(result['median'], '.4g') + ' s'}", flush=True
        )
        yield result


def surroundings(options: Options) -> dict[str, Any]:
    """Device, versions and commit."""
    import torch

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    cpu = f"CPU {_processor()}, {torch.get_num_threads()} threads"
    return {
        "device": cpu if options.device == "cpu" else torch.cuda.get_device_name(),
        "commit": git("rev-parse", "--short", "HEAD") + (" and changes" if git("status", "--porcelain", "src") else ""),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(name: str, results: list[Result], options: Options, output: Path, page: bool, complete: bool = True) -> None:
    """JSON, table and plot of a benchmark into a folder; with `page` the table also into docs/benchmarks.md.

    What is not complete is called NAME-DEVICE.part, and no page.
    """
    device = "cpu" if options.device == "cpu" else "gpu"
    about, stem = surroundings(options), f"{name}-{device}" + ("" if complete else ".part")
    output.mkdir(parents=True, exist_ok=True)
    whole = {"benchmark": name, **about, "options": asdict(options), "cases": results}
    (output / f"{stem}.json").write_text(json.dumps(whole, indent=1) + "\n")
    described = f"{about['device']}; commit {about['commit']}; torch {about['torch']}; {about['date']}"
    less = "" if options.largest == Options.largest else f" --largest {options.largest}"
    less += "".join(f" --without {word!r}" for word in options.without)
    text = f"`python -m benchmarks {name}{less}`: {described}\n\n{table(results)}\n"
    plotted = plot(results, output / f"{stem}.svg", name)
    (output / f"{stem}.md").write_text(text + (f"\n![growth]({stem}.svg)\n" if plotted else ""))
    if page and complete:
        insert(PAGE, stem, text + (f"\n![growth]({output.name}/{stem}.svg)\n" if plotted else ""))
    print(f"\n{text}\nwritten: {output / stem}.json, .md")


def check(options: Options, parser: argparse.ArgumentParser) -> None:
    """What cannot run ends here, before the work."""
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch finds no GPU; leave the option out to run on the CPU")
    if options.reference is not None:
        from benchmarks.quantizer import load

        try:
            load(Path(options.reference))
        except (FileNotFoundError, ImportError) as error:
            parser.error(str(error))


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="of each case")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each case, but at least one time")
    parser.add_argument("--largest", type=int, default=2**20, help="leave out cases of more rows (saves minutes)")
    parser.add_argument(
        "--without", metavar="WORDS", action="append", default=[],
        help="leave out cases with these words in their title, such as compiled; can be given again",
    )  # fmt: skip
    parser.add_argument(
        "--reference", type=os.path.abspath, help="a checkout of the paper's repository, for its quantiser"
    )
    parser.add_argument("--output", type=Path, help="folder; default at full size: docs/benchmarks")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    if given.case is not None:
        told = json.loads(given.options)
        print_case(given.names[0], given.case, Options(**told | {"without": tuple(told["without"])}))
        return
    chosen = ("size", "device", "repeats", "seconds", "largest", "reference")
    options = Options(**{key: getattr(given, key) for key in chosen}, without=tuple(given.without))
    check(options, parser)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    page = given.output is None and not options.tiny
    output = given.output or (PAGE.parent / "benchmarks" if page else Path("runs/benchmarks-tiny"))
    usual = [name for name in NAMES if name != "startup" or options.device == "cpu"]  # starting needs no GPU
    for name in given.names or usual:
        print(f"{name}:", flush=True)
        results, complete = [], False
        try:
            for result in run(name, options):
                results.append(result)
            complete = True
        finally:  # what was measured before an end that someone else made is kept too
            if results:
                write(name, results, options, output, page, complete)


if __name__ == "__main__":
    main()
