"""Which tokenizer made some codes: a few letters that stand for everything their making depends on."""

import hashlib
import json

from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer


def fingerprint(tokenizer: DualTokenVisionTokenizer) -> str:
    """16 hex digits over the shape and weights of the tokenizer, in float32.

    The decoder is left out: codes do not depend on it, so codes stay good where it is trained on.
    """
    config = {part: getattr(tokenizer.config, part) for part in ("backbone", "pixel", "semantic", "pixel_encoder")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if not name.startswith("decoder."):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().flatten().numpy())
    return digest.hexdigest()[:16]
