"""The tokenizer of the paper's repository restated with plain tensors, from the notes in tests/fixtures/rvq4.

Only tests use it: it stands for the reference where a checkpoint of other sizes is wanted than the stored one.
Shapes: B batch, N positions, D depth, C width, K codebook size.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipModel

State = dict[str, Tensor]
FIXTURE = Path(__file__).parents[1] / "fixtures/rvq4"


def stored_state() -> State:
    """The tensors of the stored checkpoint."""
    return torch.load(FIXTURE / "epoch_1.pt", weights_only=True)["state_dict"]


def settings_of(pix=(64, 8, 4), sem=(64, 8, 4), grid=8, latent=8, layers=(6, 7, 4), z_channels=32):
    """A description in the reference's form; pix and sem are (n_embed, embed_dim, depth)."""

    def quantizer(kind, sizes):
        return {
            "bottleneck_type": kind, "decay": 0.99, "restart_unused_codes": True, "shared_codebook": True,
            "n_embed": sizes[0], "embed_dim": sizes[1], "code_shape": [grid, grid, sizes[2]],
        }  # fmt: skip

    return {
        "model_type": "rqvaesigliptransformer_model",
        "rqvaesiglip": {
            "layer_recon": layers[0], "layer_sem": layers[1], "layer_shortcut": layers[2], "weight_shortcut": 0.6,
            "decoder_latent_shape": [latent, latent], "pretrained_model": "siglip_init",
            "ddconfig": {
                "attn_resolutions": [latent], "ch": 32, "ch_mult": [1, 1, 2, 2], "decoder_in_channels": z_channels,
                "num_res_blocks": 1, "resolution": 8 * latent,
            },
            "vq_pix": quantizer("rq", pix), "vq_sem": quantizer("rq_ema", sem),
        },
    }  # fmt: skip


def random_state(settings: dict, siglip: SiglipModel, seed: int = 0) -> State:
    """Weights at random under the reference's names, for a description of `settings_of`."""
    generator = torch.Generator().manual_seed(seed)
    s, width = settings["rqvaesiglip"], siglip.config.vision_config.hidden_size
    state = {f"siglip_model.{k}": v.clone() for k, v in siglip.state_dict().items()}

    def new(name, *shape, scale=0.2, about=0.0):
        state[name] = about + scale * torch.randn(*shape, generator=generator)

    def norm(name, size):
        new(f"{name}.weight", size, about=1.0)
        new(f"{name}.bias", size)

    def linear(name, out, of, *kernel):
        new(f"{name}.weight", out, of, *kernel, scale=(of * max(1, len(kernel) and kernel[0] ** 2)) ** -0.5)
        new(f"{name}.bias", out)

    def projection(name, of, out):
        wide = max(of, out)
        for n, size in (("norm1", of), ("norm3", of), ("norm2", out), ("mlp.norm", out)):
            norm(f"{name}.{n}", size)
        new(f"{name}.attn.qkv.weight", 3 * wide, of)
        new(f"{name}.attn.q_bias", wide)
        new(f"{name}.attn.v_bias", wide)
        state[f"{name}.attn.zero_k_bias"] = torch.zeros(wide)
        linear(f"{name}.attn.proj", out, out)
        linear(f"{name}.proj", out, of)
        linear(f"{name}.mlp.w0", 2 * out, out)
        linear(f"{name}.mlp.w1", 2 * out, out)
        linear(f"{name}.mlp.w2", out, 2 * out)

    def block(name, of, out, kernel=3):
        norm(f"{name}.norm1", of)
        linear(f"{name}.conv1", out, of, kernel, kernel)
        norm(f"{name}.norm2", out)
        linear(f"{name}.conv2", out, out, 3, 3)
        if of != out:
            linear(f"{name}.nin_shortcut", out, of, 1, 1)

    def attention(name, size):
        norm(f"{name}.norm", size)
        for part in ("q", "k", "v", "proj_out"):
            linear(f"{name}.{part}", size, size, 1, 1)

    for short in ("pix", "sem"):
        book = s[f"vq_{short}"]
        projection(f"prequant_{short}", width, book["embed_dim"])
        projection(f"postquant_{short}", book["embed_dim"], width)
        rows = torch.randn(book["n_embed"], book["embed_dim"], generator=generator)
        for depth in range(book["code_shape"][-1]):
            name = f"quantizer_{short}.codebooks.{depth}"
            state[f"{name}.weight"] = torch.cat([rows, torch.zeros(1, book["embed_dim"])])
            state[f"{name}.cluster_size_ema"], state[f"{name}.embed_ema"] = torch.ones(len(rows)), rows.clone()
    projection("prequant_shortcut", width, s["vq_pix"]["embed_dim"])
    drawn = s["ddconfig"]
    widths = [drawn["ch"] * m for m in drawn["ch_mult"]]
    block("post_quant_conv", width, drawn["decoder_in_channels"], 1)
    linear("decoder.conv_in", widths[-1], drawn["decoder_in_channels"], 3, 3)
    block("decoder.mid.block_1", widths[-1], widths[-1])
    attention("decoder.mid.attn_1", widths[-1])
    block("decoder.mid.block_2", widths[-1], widths[-1])
    at = widths[-1]
    for level in reversed(range(len(widths))):
        for i in range(drawn["num_res_blocks"] + 1):
            block(f"decoder.up.{level}.block.{i}", at, widths[level])
            at = widths[level]
            if s["decoder_latent_shape"][0] * 2 ** (len(widths) - 1 - level) in drawn["attn_resolutions"]:
                attention(f"decoder.up.{level}.attn.{i}", at)
        if level:
            linear(f"decoder.up.{level}.upsample.conv", at, at, 3, 3)
    norm("decoder.norm_out", at)
    linear("decoder.conv_out", 3, at, 3, 3)
    return state


def project(x: Tensor, state: State, name: str, causal: bool) -> Tensor:
    """An attention projection of the reference: [B, N, in] -> [B, N, out]."""

    def norm(y, n, eps=1e-5):
        return F.layer_norm(y, y.shape[-1:], state[f"{name}.{n}.weight"], state[f"{name}.{n}.bias"], eps)

    def linear(y, n):
        return F.linear(y, state[f"{name}.{n}.weight"], state[f"{name}.{n}.bias"])

    out = len(state[f"{name}.proj.bias"])
    wide, narrow = max(x.shape[-1], out), min(x.shape[-1], out)
    q_bias = state[f"{name}.attn.q_bias"]
    bias = torch.cat([q_bias, torch.zeros_like(q_bias), state[f"{name}.attn.v_bias"]])
    q, k, v = F.linear(norm(x, "norm1"), state[f"{name}.attn.qkv.weight"], bias).split(wide, -1)
    q, k, v = (p.view(*p.shape[:2], wide // narrow, narrow).transpose(1, 2) for p in (q, k, v))
    scores = q @ k.transpose(-1, -2) / narrow**0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
    heads = scores.softmax(-1) @ v
    merged = heads.mean(1) if out == narrow else heads.transpose(1, 2).flatten(2)
    y = linear(norm(x, "norm3"), "proj") + linear(merged, "attn.proj")
    z = norm(norm(y, "norm2"), "mlp.norm", 1e-6)
    return y + linear(F.gelu(linear(z, "mlp.w0"), approximate="tanh") * linear(z, "mlp.w1"), "mlp.w2")


def nearest(x: Tensor, rows: Tensor) -> Tensor:
    """Index of the nearest of K rows for x [..., C]."""
    return (x[..., None, :] - rows).square().sum(-1).argmin(-1)


def quantize(x: Tensor, rows: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of rows, codes [..., D], and the mean over depths of the squared error."""
    total, codes, errors = torch.zeros_like(x), [], []
    for _ in range(depth):
        codes.append(nearest(x - total, rows))
        total = total + rows[codes[-1]]
        errors.append((x - total).square().mean())
    return total, torch.stack(codes, -1), torch.stack(errors).mean()


def decode(x: Tensor, state: State, settings: dict) -> Tensor:
    """Features after the pixel quantiser [B, N, C] -> images, not clamped."""
    drawn, latent = settings["ddconfig"], settings["decoder_latent_shape"]

    def convolve(y, n):
        weight = state[f"{n}.weight"]
        return F.conv2d(y, weight, state[f"{n}.bias"], padding=weight.shape[-1] // 2)

    def norm(y, n):
        return F.group_norm(y, 32, state[f"{n}.weight"], state[f"{n}.bias"], 1e-6)

    def block(y, n):
        z = convolve(F.silu(norm(y, f"{n}.norm1")), f"{n}.conv1")
        z = convolve(F.silu(norm(z, f"{n}.norm2")), f"{n}.conv2")
        return z + (convolve(y, f"{n}.nin_shortcut") if f"{n}.nin_shortcut.weight" in state else y)

    def attend(y, n):
        z = norm(y, f"{n}.norm")
        q, k, v = (convolve(z, f"{n}.{p}").flatten(2) for p in "qkv")
        scores = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
        return y + convolve((v @ scores.transpose(1, 2)).view_as(z), f"{n}.proj_out")

    side = round(x.shape[1] ** 0.5)
    y = x.transpose(1, 2).unflatten(2, (side, side))
    y = F.interpolate(y, size=tuple(latent), mode="bilinear")
    y = convolve(block(y, "post_quant_conv"), "decoder.conv_in")
    y = block(attend(block(y, "decoder.mid.block_1"), "decoder.mid.attn_1"), "decoder.mid.block_2")
    for level in reversed(range(len(drawn["ch_mult"]))):
        for i in range(drawn["num_res_blocks"] + 1):
            y = block(y, f"decoder.up.{level}.block.{i}")
            if f"decoder.up.{level}.attn.{i}.q.weight" in state:
                y = attend(y, f"decoder.up.{level}.attn.{i}")
        if level:
            y = convolve(F.interpolate(y, scale_factor=2.0), f"decoder.up.{level}.upsample.conv")
    return convolve(F.silu(norm(y, "decoder.norm_out")), "decoder.conv_out")


@torch.no_grad()
def infer(state: State, settings: dict, siglip: dict, images: Tensor, text: Tensor) -> State:
    """What the reference computes in evaluation, under the names of the stored outputs."""
    s = settings["rqvaesiglip"]
    model = SiglipModel(SiglipConfig(**siglip)).eval()
    model.load_state_dict({k.removeprefix("siglip_model."): v for k, v in state.items() if k.startswith("siglip")})
    seen = model.vision_model(images, output_hidden_states=True).hidden_states
    found: State = {f"hidden_{i}": h for i, h in enumerate(seen[: s["layer_sem"] + 1])}
    pix = project(seen[s["layer_recon"]], state, "prequant_pix", False)
    pix = pix + s["weight_shortcut"] * project(seen[s["layer_shortcut"]], state, "prequant_shortcut", False)
    sem = project(seen[s["layer_sem"]], state, "prequant_sem", False)
    for name, latent in (("pix", pix), ("sem", sem)):
        rows = state[f"quantizer_{name}.codebooks.0.weight"][:-1]
        total, codes, loss = quantize(latent, rows, s[f"vq_{name}"]["code_shape"][-1])
        found |= {f"latent_{name}_prequant": latent, f"latent_{name}_quantised": total, f"code_{name}": codes}
        found |= {f"quant_loss_{name}_eval": loss, f"post_{name}": project(total, state, f"postquant_{name}", True)}
    x = found["post_sem"]
    for layer in model.vision_model.encoder.layers[s["layer_sem"] :]:
        x = layer(x, attention_mask=None)
    found["pooled"] = model.vision_model.head(model.vision_model.post_layernorm(x))
    found["recon"] = decode(found["post_pix"], state, s)
    texts = model.text_model(text).pooler_output
    return found | {"text_features": F.normalize(texts, dim=-1)}
