"""Ways of computing a position, all with the codes of the plain one."""

from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from dualtoken.core.errors import UserError
from dualtoken.generation import image
from dualtoken.generation.context import split
from dualtoken.generation.llm_cache import FixedContext, GrowingContext
from dualtoken.generation.sampling import DrawConfig, HeadSampling
from dualtoken.mllm.projector import ProjectorConfig
from dualtoken.tokenizer.quantizer import QuantizerConfig
from dualtoken.tokenizer.quantizers import QUANTIZERS, build_quantizer
from tests.generation.lively import chats, inputs, lively, shared

LIKELIEST, FREE = HeadSampling(temperature=0.0), HeadSampling(temperature=1.0, top_k=0, top_p=1.0)


def draw(model, given, engine, guidance, sampling, **options):
    config = DrawConfig(guidance, sampling, sampling, engine=engine, **options)
    return model.generate(**given, generation_mode="image", draw=config, seed=5)


def same(one, two):
    return torch.equal(one.pixel, two.pixel) and torch.equal(one.semantic, two.semantic)


@pytest.mark.parametrize("sampling", [LIKELIEST, FREE], ids=["greedy", "seeded"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("engine", ["static", "graph"])  # off the GPU, "graph" has nothing to record
def test_pictures_are_those_of_the_plain_engine(engine, guidance, sampling):
    model, processor = shared()
    given = inputs(processor, chats())  # prompts of different length, so that rows are padded
    plain = draw(model, given, "plain", guidance, sampling)
    assert same(draw(model, given, engine, guidance, sampling), plain)
    assert same(
        draw(model, given, engine, guidance, sampling, semantic_codes=False),
        draw(model, given, "plain", guidance, sampling, semantic_codes=False),
    )
    assert len({tuple(row) for row in plain.pixel.flatten(1).tolist()}) > 1


@pytest.mark.parametrize(
    ("attention", "kind"), [("sdpa", torch.bfloat16), ("eager", torch.bfloat16), ("sdpa", torch.float16)]
)
def test_under_autocast_pictures_are_those_of_the_plain_engine(monkeypatch, attention, kind):
    model, processor = shared()
    masks, read = [], GrowingContext._pass
    monkeypatch.setattr(model.llm.config, "_attn_implementation", attention)
    monkeypatch.setattr(FixedContext, "_pass", lambda context, *given: masks.append(given[1]) or read(context, *given))
    given = inputs(processor, chats())  # padded rows
    with torch.autocast("cpu", kind):
        plain = draw(model, given, "plain", 3.0, FREE)
        assert same(draw(model, given, "static", 3.0, FREE), plain)
    assert all(mask.to(kind).isfinite().all() for mask in masks)  # as attention takes them


class NoStream:
    """In place of a CUDA stream: what is asked of it, in order."""

    def __init__(self, name, said):
        self.name, self.said = name, said

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")


def test_heads_side_by_side_wait_for_the_state_and_are_waited_for(monkeypatch):
    """The order of work on two streams, which a GPU alone has; the codes are those of one after the other."""
    model, processor = shared()
    given, said = inputs(processor, chats()[:2]), []
    plain = draw(model, given, "plain", 3.0, FREE)
    real, choose, main = image.Drawing.__init__, image.Drawing._choose_by, NoStream("main", said)

    def with_two_streams(drawing, *arguments):
        real(drawing, *arguments)
        drawing.beside = NoStream("beside", said)

    monkeypatch.setattr(image.Drawing, "__init__", with_two_streams)
    monkeypatch.setattr(image.Drawing, "_choose_by", lambda d, name, *rest: said.append(name) or choose(d, name, *rest))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(said.append(f"on {stream.name}")))
    assert same(draw(model, given, "graph", 3.0, FREE), plain)
    assert said[:5] == ["beside waits for main", "on beside", "semantic", "pixel", "main waits for beside"]


def test_a_step_is_recorded_on_its_own_stream_and_no_other_at_the_same_time(monkeypatch):
    """A recording with stand-ins for what a GPU alone has."""
    said, streams = [], []

    def stream(*device):
        streams.append(NoStream(f"stream {len(streams)}", said))
        return streams[-1]

    @contextmanager
    def graph(recording, stream, capture_error_mode):
        said.append(f"recorded on {stream.name}, {capture_error_mode}, {image.ONE_AT_A_TIME.locked()}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: NoStream("main", said))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: said.append("played")))
    steps = [image.Recorded(lambda: said.append("step")) for _ in range(2)]
    for number, step in enumerate(steps):
        for _ in range(image.WARM_UP):
            step()
        said.clear()
        step()
        step()
        assert said == [f"recorded on stream {number}, thread_local, True", "step", "played", "played"]
    assert not image.ONE_AT_A_TIME.locked()


def test_a_model_with_learnt_places_draws_the_same():
    model, processor = lively(projector=ProjectorConfig(places=True))
    given = inputs(processor, chats()[:2])
    assert same(draw(model, given, "static", 3.0, FREE), draw(model, given, "plain", 3.0, FREE))


def test_a_compiled_step_draws_the_same(monkeypatch):
    real = torch.compile
    # The graph as torch.compile takes it from the code, run without a C++ compiler.
    monkeypatch.setattr(torch, "compile", lambda step, **options: real(step, backend="eager", **options))
    model, processor = shared()
    given = inputs(processor, chats()[:2])
    assert same(draw(model, given, "compiled", 3.0, FREE), draw(model, given, "plain", 3.0, FREE))


@torch.no_grad()
def test_states_on_fixed_addresses_are_those_of_growing_ones():
    model, processor = shared()
    given = inputs(processor, chats())
    rows = image.join(model, split(model.config, given["input_ids"], given["attention_mask"],
                                   model.look(given["pixel_values"])), 3)  # fmt: skip
    contexts = [kind(model, rows.mask, rows.positions, 3) for kind in (GrowingContext, FixedContext)]
    more = torch.randn(len(rows.mask), 3, 32, generator=torch.Generator().manual_seed(0))
    for embeds in (rows.embeds, *more.split(1, 1)):
        growing, fixed = (context.read(embeds) for context in contexts)
        torch.testing.assert_close(fixed, growing, atol=1e-5, rtol=1e-5)
    where = contexts[1].cache.layers[0].keys.data_ptr()
    contexts[1].read(more[:, :1])
    assert contexts[1].cache.layers[0].keys.data_ptr() == where


def test_what_an_engine_cannot_do_is_one_error():
    with pytest.raises(UserError, match="draw engine 'fast' must be"):
        DrawConfig(engine="fast")
    model, processor = lively()
    model.llm.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(UserError, match=r"layers of full_attention, sliding_attention .* engines but 'plain'"):
        draw(model, inputs(processor, chats()[:1]), "static", 1.0, FREE)


def test_the_engine_is_kept_with_the_model_and_old_settings_have_none():
    config = DrawConfig(engine="static")
    assert DrawConfig.from_dict(asdict(config)) == config
    old = {"guidance": 3.0, "pixel": vars(FREE), "semantic": vars(FREE), "semantic_codes": True}
    assert image.engine_of(shared()[0], DrawConfig()).engine == "plain"  # there is no GPU under it
    assert DrawConfig.from_dict(old).engine == "auto"


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_rows_of_codes_are_those_that_are_looked_up(kind):
    if kind in ("residual_lfq", "residual_fsq", "simvq"):
        pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    quantizer = build_quantizer(QuantizerConfig(kind=kind, codebook_size=64, code_dim=8, depth=2)).eval()
    codes = torch.randint(64, (3, 5, 2))
    assert torch.equal(quantizer.rows_of(codes), quantizer.lookup(codes))
    with pytest.raises(UserError, match="this codebook has 64 rows"):
        quantizer.lookup(codes + 64)


@torch.no_grad()
def test_a_drawing_begins_anew_with_other_prompts_in_the_same_room():
    model, processor = shared()
    config = DrawConfig(3.0, FREE, FREE, engine="static")
    asked = [inputs(processor, [chat, chats()[0]]) for chat in (chats()[2], chats()[0])]
    asked = [split(model.config, one["input_ids"], one["attention_mask"], None) for one in asked]
    rows = [image.join(model, contexts, model.config.positions) for contexts in asked]

    def drawn(drawing):
        drawing.begin()
        for _ in range(model.config.positions - 1):
            drawing.advance()
        return {name: codes.clone() for name, codes in drawing.codes.items()}

    drawing = image.Drawing(model, rows[0], 1, config, [1, 2])
    first = drawn(drawing)
    drawing.restart(rows[1], [3, 4])
    second, fresh = drawn(drawing), drawn(image.Drawing(model, rows[1], 1, config, [3, 4]))
    assert all(torch.equal(second[name], fresh[name]) for name in fresh)
    assert not torch.equal(second["pixel"], first["pixel"])


def test_auto_records_on_a_gpu_what_it_was_run_with(monkeypatch):
    model, _ = lively()
    pytest.importorskip("triton")
    monkeypatch.setattr(image, "kernels_at_hand", lambda device: True)
    assert image.engine_of(model, DrawConfig()).engine == "graph"
    assert image.engine_of(model, DrawConfig(engine="static")).engine == "static"
    model.llm.config.hidden_act = "gelu"
    assert image.engine_of(model, DrawConfig()).engine == "plain"
    monkeypatch.setattr(image, "kernels_at_hand", lambda device: False)  # no GPU, or one without what they need
    model.llm.config.hidden_act = "silu"
    assert image.engine_of(model, DrawConfig()).engine == "plain"


def test_a_recording_is_known_by_all_that_it_holds_on_to():
    import peft

    model, _ = lively()
    config = DrawConfig()
    known = [image.recorded_for(model, config)]

    def changes():
        known.append(image.recorded_for(model, config))
        return known[-1] != known[-2]

    assert not changes()
    config.pixel.temperature = 0.5  # in place
    assert changes()
    head = model.pixel_head.classifiers[0].weight
    head.data = head.data.clone()
    assert changes()
    model.config.output = "pixel"
    assert changes()
    with torch.autocast("cuda", torch.bfloat16):
        assert changes()
    assert changes() and not changes()
    with torch.inference_mode():
        assert changes()
    assert changes() and not changes()
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        assert changes()
        torch.use_deterministic_algorithms(True)
        assert changes() and not changes()
    finally:
        products.fp32_precision = before
        torch.use_deterministic_algorithms(False)
    assert changes() and not changes()
    model.llm.train(not model.llm.training)
    assert changes()
    hook = model.llm.register_forward_hook(lambda *_: None)
    assert changes()
    hook.remove()
    assert changes()
    adapted = peft.LoraModel(model.llm, peft.LoraConfig(r=2, target_modules=["q_proj"]), "default")
    assert changes() and not changes()
    adapted.disable_adapter_layers()
    assert changes()
    adapted.enable_adapter_layers()
    assert changes() and not changes()
    model.llm.model.layers[0].self_attn.q_proj.set_scale("default", 0.5)
    assert changes() and not changes()
    adapted.merge_adapter()
    assert changes()
    other, _ = lively()  # adapters without a scale
    peft.IA3Model(other.llm, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "default")
    assert image.recorded_for(other, config)


def test_what_is_kept_is_taken_by_one_alone_and_for_its_key():
    keep = image.Keep()
    keep.put((1,), "drawing", "step")
    assert keep.take((1,)) == ("drawing", "step") and keep.take((1,)) is None
    keep.put((1,), "drawing", "step")
    assert keep.take((2,)) is None and keep.take((1,)) is None
