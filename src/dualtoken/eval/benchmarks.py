"""`dualtoken eval generation --benchmark NAME`: drawings in the folders that the scorers of published benchmarks read.

Layouts are those that the scorers' own repositories document or read (`Benchmark.source`); nothing is fetched. A
picture that is there is not drawn again, so the same command goes on where a killed one stopped; the processes of
`accelerate launch` share the prompts by number. Every picture depends on its prompt and the seed alone.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from torch import accelerator
from tqdm import tqdm

from dualtoken.core.errors import UserError
from dualtoken.core.files import whole_or_not_at_all
from dualtoken.generation.sampling import DrawConfig
from dualtoken.mllm.assistant import Assistant

RUN = "dualtoken.json"  # beside the pictures: what they were drawn with; scorers do not look at it


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark, and where its pictures go below the output folder."""

    text: str
    name: str  # of its picture, or of its folder of pictures
    suffix: str = ".png"
    beside: dict[str, str] = field(default_factory=dict)  # other files: place -> content

    def place(self, number: int) -> str:
        """Of its picture of a number, from 0."""
        return f"{self.name}{number:04}{self.suffix}" if self.name.endswith("/") else self.name + self.suffix


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read and written.

    Args:
        prompts: the published file.
        published: where it is.
        source: whose layout it is.
        samples: pictures of each prompt, as published results have them.
        read: the content of the file -> its prompts in order.
        scorer: what to run then.
    """

    prompts: str
    published: str
    source: str
    samples: int
    read: Callable[[str], Iterator[Prompt]]
    scorer: str


def _geneval(content: str) -> Iterator[Prompt]:
    """Lines of JSON; OUTPUT/00000/metadata.jsonl is the line, OUTPUT/00000/samples/0000.png are its pictures."""
    for number, line in enumerate(line for line in content.splitlines() if line.strip()):
        beside = {f"{number:05}/metadata.jsonl": line + "\n"}
        yield Prompt(json.loads(line)["prompt"], f"{number:05}/samples/", beside=beside)


def _wise(content: str) -> Iterator[Prompt]:
    """A list of {"Prompt", "prompt_id"}; OUTPUT/PROMPT_ID.png."""
    for entry in json.loads(content):
        yield Prompt(entry["Prompt"], str(int(entry["prompt_id"])))


def _genai_bench(content: str) -> Iterator[Prompt]:
    """{"00000": {"prompt"}}; OUTPUT/00000.jpeg."""
    for number, entry in json.loads(content).items():
        yield Prompt(entry["prompt"], _plain(number), ".jpeg")


def _mjhq(content: str) -> Iterator[Prompt]:
    """{"ID": {"category", "prompt"}}; OUTPUT/CATEGORY/ID.png, as the reference folder has it."""
    for number, entry in json.loads(content).items():
        yield Prompt(entry["prompt"], f"{_plain(entry['category'])}/{_plain(number)}")


def _plain(name: str) -> str:
    """A name that stays in its folder. Raises ValueError for any other."""
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"{name!r} is no name of a file")
    return name


BENCHMARKS = {
    "geneval": Benchmark(
        "evaluation_metadata.jsonl", "https://github.com/djghosh13/geneval, folder prompts/",
        "README of djghosh13/geneval at af4902f, section Image generation", 4, _geneval,
        "python evaluation/evaluate_images.py OUTPUT --outfile results.jsonl --model-path DETECTOR",
    ),
    "wise": Benchmark(
        "cultural_common_sense.json, spatio-temporal_reasoning.json, natural_science.json; or WISE_Verified's merge",
        "https://github.com/PKU-YuanGroup/WISE, folders WISE_legacy/data/ (the paper's) and data_verified/",
        "README and gpt_eval.py of PKU-YuanGroup/WISE at eb51174", 1, _wise,
        "python gpt_eval.py --json_path PROMPTS --image_dir OUTPUT --output_dir RESULTS ... for each file of prompts",
    ),
    "genai-bench": Benchmark(
        "genai_image.json", "https://huggingface.co/datasets/BaiqiL/GenAI-Bench-1600 (527: zhiqiulin/GenAI-Bench-527)",
        "genai_bench/generate.py and evaluate.py of linzhiqiu/t2v_metrics at 6ecb74f", 1, _genai_bench,
        "python genai_bench/evaluate.py --model clip-flant5-xxl --output_dir PARENT --gen_model NAME, OUTPUT being "
        "PARENT/NAME",
    ),
    "mjhq-30k": Benchmark(
        "meta_data.json", "https://huggingface.co/datasets/playgroundai/MJHQ-30K, with mjhq30k_imgs.zip, the reference",
        "mjhq30k_imgs/CATEGORY/ID.jpg of that dataset; clean-fid reads both folders with their subfolders", 1, _mjhq,
        "cleanfid.fid.compute_fid(OUTPUT, 'mjhq30k_imgs'), or dualtoken eval scores --mjhq OUTPUT --mjhq_reference "
        "mjhq30k_imgs --inception_weights FILE",
    ),
}  # fmt: skip


@dataclass
class Written:
    """What one process did: pictures drawn now and before, and prompts that could not be drawn, with the reason."""

    prompts: int
    pictures: int = 0
    before: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)


def processes() -> PartialState:
    """The processes of accelerate launch, of which this is one, with a device for each."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not accelerator.is_available())


def write_benchmark(
    assistant: Assistant,
    model: str,
    benchmark: str,
    prompts: str | None,
    output: str | None,
    config: DrawConfig,
    samples: int | None = None,
    template: str = "{}",
    batch_size: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw the prompts of a file, this process's share of them, into the layout of a benchmark.

    Args:
        model: what to call the model in the record of the run.
        prompts, output: the published file, or several with commas between them, and the folder to fill.
        samples: pictures of each prompt; None = as published results have them.
        template: what the model is told, `{}` being the prompt.
    Raises UserError for a file that is not the benchmark's, a folder that was filled otherwise, or where nothing could
    be drawn.
    """
    known = BENCHMARKS[benchmark]
    if output is None:
        raise UserError(f"--output: give the folder that is to be filled for {benchmark}")
    if template.count("{}") != 1:
        raise UserError(f'--template {template!r}: give a text with one "{{}}", the place of the prompt')
    if samples is not None and (samples < 1 or (samples > 1 and known.samples == 1)):
        raise UserError(f"--samples {samples}: {benchmark} takes {'at least 1' if known.samples > 1 else '1'} a prompt")
    listed, folder, each = read_prompts(benchmark, prompts), Path(output), samples or known.samples
    settings = {
        "benchmark": benchmark, "layout": known.source, "model": model, "prompts": len(listed),
        "prompts_hash": _digest(listed), "samples": each, "template": template, "seed": seed,
        "drawing": asdict(config),
        "size": assistant.processor.image_processor.size, "saved": "as drawn, not resized; PNG, or JPEG of quality 95",
    }  # fmt: skip
    state = processes()
    _same_run(folder / RUN, settings, state.is_main_process)
    numbers = range(len(listed))[state.process_index :: state.num_processes]
    done, waiting = Written(len(numbers)), []
    for number in numbers:
        prompt = listed[number]
        for place, content in prompt.beside.items():
            _write_text(folder / place, content)
        missing = [j for j in range(each) if not (folder / prompt.place(j)).is_file()]
        done.before += each - len(missing)
        waiting += [(prompt, j, seed + number * each + j) for j in missing]
    for first in tqdm(range(0, len(waiting), batch_size), desc="drawings", unit=" batches", disable=None):
        _draw(assistant, waiting[first : first + batch_size], config, template, folder, done)
    who = f"process {state.process_index} of {state.num_processes}: " if state.num_processes > 1 else ""
    print(f"{who}{done.pictures} pictures drawn, {done.before} were there -> {output}")
    if done.failed:
        print(f"{len(done.failed)} could not be drawn, the first: {done.failed[0]}")
    if numbers and not done.pictures + done.before:
        raise UserError(f"no prompt of {prompts} could be drawn, the first: {done.failed[0]['reason']}")
    print(f"then: {known.scorer}")
    result = settings | asdict(done) | {"process": state.process_index, "processes": state.num_processes}
    _write_text(folder / f"dualtoken-{state.process_index}-of-{state.num_processes}.json", json.dumps(result, indent=1))
    return result


def read_prompts(benchmark: str, paths: str | None) -> list[Prompt]:
    """The prompts of a published file, or of several with commas between them, in order.

    Raises UserError for no file, another file, and two pictures of one place.
    """
    known, listed = BENCHMARKS[benchmark], []
    what = f"{benchmark} takes {known.prompts}, published at {known.published}"
    if not paths:
        raise UserError(f"--prompts is missing: {what}")
    for path in [paths] if Path(paths).is_file() else paths.split(","):
        if not Path(path).is_file():
            raise UserError(f"--prompts {path}: no such file; {what}")
        try:
            found = list(known.read(Path(path).read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise UserError(f"--prompts {path}: not a file of {benchmark} ({said}); {what}") from None
        if not found:
            raise UserError(f"--prompts {path}: holds no prompt; {what}")
        listed += found
    if len({prompt.name for prompt in listed}) < len(listed):
        raise UserError(f"--prompts {paths}: two prompts have one number; {what}")
    return listed


def _digest(listed: list[Prompt]) -> str:
    """12 hex digits over all prompts and what stands beside their pictures."""
    content = json.dumps([asdict(prompt) for prompt in listed], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _draw(
    assistant: Assistant, jobs: list[tuple[Prompt, int, int]], config: DrawConfig, template: str, folder: Path,
    done: Written,
) -> None:  # fmt: skip
    """Draw and write a batch; where it cannot be drawn, one by one, and what fails alone is counted."""
    try:
        texts = [template.replace("{}", prompt.text) for prompt, _, _ in jobs]
        made = assistant.draw(texts, 1, config, [seed for _, _, seed in jobs])
    except UserError as error:
        if len(jobs) > 1:
            for job in jobs:
                _draw(assistant, [job], config, template, folder, done)
        else:
            prompt, number, _ = jobs[0]
            done.failed.append({"place": prompt.place(number), "prompt": prompt.text, "reason": str(error)})
        return
    for (prompt, number, _), (picture,) in zip(jobs, made, strict=True):
        _save(picture, folder / prompt.place(number))
        done.pictures += 1


def _save(picture: Image.Image, path: Path) -> None:
    """Whole or not at all, in the format of the suffix."""
    with whole_or_not_at_all(path) as draft:
        if path.suffix == ".png":
            picture.save(draft, format="PNG")
        else:
            picture.save(draft, format="JPEG", quality=95, subsampling=0)


def _write_text(path: Path, content: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        with whole_or_not_at_all(path) as draft:
            draft.write_text(content, encoding="utf-8")


def _same_run(path: Path, settings: dict[str, Any], write: bool) -> None:
    """Note the settings beside the pictures, or raise UserError where pictures were drawn there with others."""
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = {}
        other = next((name for name, value in settings.items() if found.get(name) != value), None)
        if other:
            raise UserError(
                f"--output {path.parent}: its pictures were drawn with another {other} ({found.get(other)} there, "
                f"{settings[other]} here); take another folder"
            )
    elif write:
        _write_text(path, json.dumps(settings, indent=1, ensure_ascii=False))
