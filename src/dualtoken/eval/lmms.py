"""The multimodal model in lmms-eval: `lmms_eval --model dualtoken --model_args pretrained=DIR --tasks mme,pope ...`.

lmms-eval finds it by the entry point `lmms_eval.models`, which names `manifest`. `Answers` does the work and knows of
lmms-eval only the form of its requests (docs/guides/model_guide.md there, "simple" models); `lmms_plugin.py` makes it
one of lmms-eval's classes. Tables 4 and 5a are the tasks mmbench_en_dev, mme, seedbench, vqav2_val, mmvet, ai2d,
mmmu_val, pope, ocrbench, textvqa_val and mathvista_testmini.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from dualtoken.core.errors import UserError
from dualtoken.mllm.assistant import Assistant, Chat, user

PLACE = re.compile(r"<image(?: \d+)?>")  # where a task's text has a picture
NEW_TOKENS = 256  # of an answer, where a task says nothing
SAMPLING = ("temperature", "top_p", "num_beams")


class Answers:
    """Answers requests of lmms-eval with one model.

    Args:
        pretrained: a preset, or the directory of a multimodal model.
        device: None = the GPU where there is one.
        batch_size: prompts at once.
    Raises UserError for a model that is not there, and for a batch size that is no number.
    """

    def __init__(self, pretrained: str = "mini", device: str | None = None, batch_size: int | str = 1):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"--batch_size {batch_size}: give a whole number from 1")
        state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
        if state.num_processes > 1:
            device = str(state.device)  # lmms-eval names none of its own for each process
        self.assistant = Assistant.open(pretrained, "--model_args pretrained", device)
        self.batch_size, self.device = int(batch_size), self.assistant.model.device
        self.failed: list[str] = []  # why requests got no answer
        self.task_dict: dict[str, Any] = {}  # task -> split -> documents; lmms-eval fills it

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, cut before the first of its stop words.

        A request that the model cannot take (too long, no picture that can be read) gets "" and is counted.
        """
        answers, before = [""] * len(requests), len(self.failed)
        asked, groups = {}, {}  # by place; places by options, as one call of generate has one set of them
        for place, request in enumerate(requests):
            try:
                asked[place] = self._asked(request.args)
                groups.setdefault(repr(sorted(asked[place][1].items())), []).append(place)
            except UserError as error:
                self.failed.append(str(error))
        with tqdm(total=len(requests), desc="answers", disable=None) as progress:
            for places in groups.values():
                for first in range(0, len(places), self.batch_size):
                    group = places[first : first + self.batch_size]
                    said = self._answer([asked[i][0] for i in group], asked[group[0]][1])
                    for i, text in zip(group, said, strict=True):
                        answers[i] = _cut(text, asked[i][2])
                    progress.update(len(group))
        self._tell(before, len(requests))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each request its continuation's loss and whether it is what the model would have said.

        The loss is in nats a token, mean over the continuation. lmms-eval's interface speaks of log-likelihoods, but
        its evaluator takes the choice of the lowest value ("we just use the argmin here", lmms_eval/api/task.py at
        75571cf), as its own models return losses. A request that fails has an infinite one, and is counted.
        """
        found, before = [], len(self.failed)
        for request in tqdm(requests, desc="continuations", disable=None):
            context, wanted, *rest = request.args  # where a context is empty, lmms-eval gives no pictures
            try:
                document, pictures = self._shown(*rest) if rest else (None, [])
                continuation = wanted(document) if callable(wanted) else wanted
                found.append(self._loss([user(*parts_of(context, pictures))], str(continuation)))
            except UserError as error:
                self.failed.append(str(error))
                found.append((float("inf"), False))
        self._tell(before, len(requests))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: Tables 4 and 5a need no second round."""
        raise NotImplementedError("tasks of several rounds are not offered by the model dualtoken")

    def _asked(self, args: tuple) -> tuple[Chat, dict[str, Any], list[str]]:
        """A request -> chat, options of generate, stop words."""
        context, options, *place = args
        _, pictures = self._shown(*place)
        stops = options.get("until") or []
        chosen = {name: options[name] for name in SAMPLING if options.get(name) is not None}
        if not chosen.get("temperature"):
            chosen = {"num_beams": chosen["num_beams"]} if chosen.get("num_beams", 1) > 1 else {}
        else:
            chosen["do_sample"] = True
        chosen["max_new_tokens"] = int(options.get("max_new_tokens") or NEW_TOKENS)
        chat = [user(*parts_of(context, pictures))]
        return chat, chosen, [stops] if isinstance(stops, str) else list(stops)

    def _shown(
        self, visuals: Callable[[Any], Any] | None, number: int, task: str, split: str
    ) -> tuple[Any, list[Image.Image | str]]:
        """A document and its pictures. Raises UserError for those that cannot be read, and for other things."""
        try:
            document = self.task_dict[task][split][number]
            return document, _pictures(visuals, document)
        except OSError as error:  # Pillow's, of a damaged picture that the data set or the task opens
            raise UserError(f"document {number} of {task}: {error}") from None

    def _answer(self, chats: list[Chat], options: dict[str, Any]) -> list[str]:
        """What the model says; where a batch fails, one by one, and what fails alone is noted."""
        try:
            longest = self._inputs(chats)["input_ids"].shape[1]
            room = self.assistant.model.context - longest
            if room < 1:
                raise UserError(f"a prompt of {longest} tokens, the LLM takes {self.assistant.model.context}")
            return self.assistant.ask(chats, **options | {"max_new_tokens": min(options["max_new_tokens"], room)})
        except UserError as error:
            if len(chats) > 1:
                return [text for chat in chats for text in self._answer([chat], options)]
            self.failed.append(str(error))
            return [""]

    @torch.no_grad()
    def _loss(self, chat: Chat, continuation: str) -> tuple[float, bool]:
        """Mean loss of a continuation's tokens, and whether each is the likeliest."""
        model, processor = self.assistant.model, self.assistant.processor
        inputs = self._inputs([chat]).to(self.device)
        ids = processor.tokenizer.encode(continuation, add_special_tokens=False, split_special_tokens=True)
        if not ids:
            raise UserError(f"continuation {continuation!r} has no tokens")
        wanted = torch.tensor([ids], device=self.device)
        joined = torch.cat([inputs["input_ids"], wanted], 1)
        if joined.shape[1] > model.context:
            raise UserError(f"a prompt of {joined.shape[1]} tokens, the LLM takes {model.context}")
        logits = model(joined, pixel_values=inputs.get("pixel_values")).logits[:, -len(ids) - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits[0], wanted[0])
        return float(loss), bool((logits.argmax(-1) == wanted).all())

    def _inputs(self, chats: list[Chat]) -> Any:
        return self.assistant.processor.apply_chat_template(chats, add_generation_prompt=True)

    def _tell(self, before: int, total: int) -> None:
        failed = self.failed[before:]
        if failed:
            print(f"{len(failed)} of {total} requests got no answer and count as wrong, the first: {failed[0]}")


def parts_of(context: str, pictures: list[Any]) -> list[Any]:
    """A task's text and its pictures in the order in which the model is to see them.

    Pictures stand where the text has places for just as many (`<image>`, `<image 1>`), else before it, as in training.
    """
    if len(PLACE.findall(context)) != len(pictures):
        return [*pictures, PLACE.sub("", context).strip()]
    parts: list[Any] = []
    for number, text in enumerate(PLACE.split(context)):
        parts += [pictures[number - 1]] if number else []
        parts += [text.strip()] if text.strip() else []
    return parts


def manifest() -> Any:
    """What lmms-eval asks of the entry point: which class is the model `dualtoken`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("dualtoken", simple_class_path="dualtoken.eval.lmms_plugin.DualToken")


def _pictures(visuals: Callable[[Any], Any] | None, document: Any) -> list[Image.Image | str]:
    """Pictures of a document. Raises UserError for anything else that a task may show."""
    shown = (visuals(document) if visuals is not None else None) or []
    for one in shown:
        if not isinstance(one, Image.Image | str) or str(one).endswith((".mp4", ".avi", ".mov", ".mkv", ".webm")):
            raise UserError(f"a task shows {type(one).__name__} {str(one)[:60]}: the model takes pictures only")
    return list(shown)


def _cut(text: str, stops: list[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()
