"""The forward pass of a ternary decoder in plain numpy, for the scripts in this folder.

Everything is float64 except what BitNet defines as integers: activations become int8 codes with one scale a token,
weights are in {-1, 0, 1}, and their dot products are exact. Hugging Face transformers in float32 agrees with it to
about 1e-5 as long as no activation lies so close to a rounding tie that float32 and float64 round it to different
codes; one such flip moves logits by up to 0.1. `choose_prompt` therefore picks prompts that keep a distance from
every tie, so that a golden file says what the model computes and not which way one machine happened to round.
"""

from dataclasses import dataclass

import numpy as np

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass
class Shape:
    """What the forward pass needs to know of a `config.json`."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    activation: str  # "relu2" or "silu"
    sub_norms: bool


def absmean(weight):
    """Ternary codes and their scale m = max(mean |W|, 1e-5): codes are clamp(round(W / m), -1, 1)."""
    scale = np.float32(max(np.abs(weight.astype(np.float64)).mean(), 1e-5))
    return np.clip(np.rint(weight.astype(np.float32) / scale), -1, 1).astype(np.int8), scale


def absmean_tie_distance(weight):
    """How near |W| / m comes to 0.5, where rounding would be a matter of luck."""
    scale = max(np.abs(weight.astype(np.float64)).mean(), 1e-5)
    return np.abs(np.abs(weight.astype(np.float64)) / scale - 0.5).min()


def pack_rows(codes):
    """Hugging Face's packing: rows r, R+r, 2R+r, 3R+r share byte row r, lowest bits first, stored as code + 1."""
    quarter = codes.shape[0] // 4
    assert codes.shape[0] == 4 * quarter
    groups = (codes + 1).astype(np.uint8).reshape(4, quarter, codes.shape[1])
    return groups[0] | groups[1] << 2 | groups[2] << 4 | groups[3] << 6


def log_softmax(logits):
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def forward(shape, tensors, ids):
    """Logits and tie distances of a prompt.

    `tensors` has the Hugging Face names; a linear layer's value is a pair (codes int8 [rows, columns], multiplier).
    Returns (logits [tokens, vocabulary] float64, tie distance [tokens]: the least distance of any activation of that
    token, in units of int8 codes, from the middle between two codes).
    """
    tokens = len(ids)
    ties = np.full(tokens, 0.5)

    def norm(x, name):
        return tensors[name].astype(np.float64) * (x / np.sqrt((x * x).mean(-1, keepdims=True) + shape.eps))

    def linear(x, name):
        codes, multiplier = tensors[name]
        scale = 127.0 / np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
        scaled = x * scale
        np.minimum(ties, np.abs(scaled - np.floor(scaled) - 0.5).min(-1), out=ties)
        quantized = np.clip(np.rint(scaled), -128, 127)
        # Every product and partial sum is an integer below 2^53, so the float64 product is exact.
        return (quantized @ codes.astype(np.float64).T) * (float(multiplier) / scale)

    half = shape.head_dim // 2
    angles = np.arange(tokens)[:, None] * shape.theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rope(x):
        low, high = x[..., :half], x[..., half:]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    causal = np.where(np.tri(tokens, dtype=bool), 0.0, -np.inf)
    embedding = tensors["model.embed_tokens.weight"].astype(np.float64)
    stream = embedding[ids]
    for layer in range(shape.layers):
        p = f"model.layers.{layer}."
        x = norm(stream, p + "input_layernorm.weight")
        q = rope(linear(x, p + "self_attn.q_proj").reshape(tokens, shape.heads, shape.head_dim))
        k = rope(linear(x, p + "self_attn.k_proj").reshape(tokens, shape.kv_heads, shape.head_dim))
        v = linear(x, p + "self_attn.v_proj").reshape(tokens, shape.kv_heads, shape.head_dim)
        mixed = np.empty_like(q)
        for head in range(shape.heads):
            kv = head // (shape.heads // shape.kv_heads)
            scores = np.exp(log_softmax(q[:, head] @ k[:, kv].T / np.sqrt(shape.head_dim) + causal))
            mixed[:, head] = scores @ v[:, kv]
        mixed = mixed.reshape(tokens, -1)
        if shape.sub_norms:
            mixed = norm(mixed, p + "self_attn.attn_sub_norm.weight")
        stream = stream + linear(mixed, p + "self_attn.o_proj")
        x = norm(stream, p + "post_attention_layernorm.weight")
        gate, up = linear(x, p + "mlp.gate_proj"), linear(x, p + "mlp.up_proj")
        y = np.maximum(gate, 0) ** 2 * up if shape.activation == "relu2" else gate / (1 + np.exp(-gate)) * up
        if shape.sub_norms:
            y = norm(y, p + "mlp.ffn_sub_norm.weight")
        stream = stream + linear(y, p + "mlp.down_proj")
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return norm(stream, "model.norm.weight") @ head.astype(np.float64).T, ties


def choose_prompt(shape, tensors, vocabulary, length, distance, seed):
    """A prompt of random tokens, each of which keeps `distance` from every rounding tie (in units of int8 codes).

    A token changes nothing before it, so the prompt grows one accepted token at a time.
    """
    order = np.random.default_rng(seed)
    ids = np.empty(0, np.int64)
    while len(ids) < length:
        for candidate in order.permutation(vocabulary):
            grown = np.append(ids, candidate)
            if forward(shape, tensors, grown)[1][-1] >= distance:
                ids = grown
                break
        else:
            raise SystemExit(
                f"no token at position {len(ids)} keeps {distance} from every tie; lower the distance"
            )
    return ids
