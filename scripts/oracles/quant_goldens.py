#!/usr/bin/env python3
"""Reference bytes of every ternary and block-quantized tensor format: writes fixtures/quant_goldens.

One ternary matrix [8, 512] with scale 0.40625 in each packing, an activation quantization, the exact matrix-vector
product, and an embedding table [4, 512] in GGML's block formats with its dequantized values. index.json has the
type and shape of each .bin file (little-endian, row-major).

TQ1_0, TQ2_0, Q8_0, Q5_0 and Q4_0 are quantized, and Q6_K is dequantized, by gguf-py. The packings written out
below were compared with the C code of their projects: I2_S of bitnet.cpp (x86 and ARM order), IQ1_BN and IQ2_BN of
ik_llama.cpp.

Needs: pip install numpy gguf.  Call: python scripts/oracles/quant_goldens.py [FOLDER]
"""

import json
import os
import sys

import gguf
import numpy as np
from reference import pack_rows

OUT = sys.argv[1] if len(sys.argv) > 1 else "fixtures/quant_goldens"
SCALE = 0.40625
Q = gguf.GGMLQuantizationType
POWERS = np.array([1, 3, 9, 27, 81])


def bytes_of(value, dtype):
    return np.frombuffer(dtype(value).tobytes(), np.uint8)


def i2_s(codes, block):
    """Four groups of block/4 values share bytes, first group on top; then one scale and 28 zeros."""
    c = (codes.reshape(-1) + 1).astype(np.uint8).reshape(-1, 4, block // 4)
    packed = c[:, 0] << 6 | c[:, 1] << 4 | c[:, 2] << 2 | c[:, 3]
    return np.concatenate([packed.reshape(-1), bytes_of(SCALE, np.float32), np.zeros(28, np.uint8)])


def iq2_bn(codes):
    """A row: f32 scale, then 16 bytes for each 64 values, the first 16 values in the low bits."""
    rows = []
    for row in codes:
        c = (row + 1).astype(np.uint8).reshape(-1, 4, 16)
        packed = c[:, 0] | c[:, 1] << 2 | c[:, 2] << 4 | c[:, 3] << 6
        rows += [bytes_of(SCALE, np.float32), packed.reshape(-1)]
    return np.concatenate(rows)


def iq1_bn(codes):
    """A row: f16 scale, then 13 bytes for each 64 values: 12 bytes of 5 trits for the first 15 of every 16 values, and
    one byte for the four sixteenth values. A byte holds ceil(256 v / 243) of the trits' value v, lowest trit first."""
    rows = []
    for row in codes:
        c = (row + 1).astype(np.int64).reshape(-1, 4, 16)
        fives = (c[:, :, :15].reshape(-1, 4, 3, 5) * POWERS).sum(-1).reshape(-1, 12)
        lasts = (c[:, :, 15] * POWERS[:4]).sum(-1, keepdims=True)
        packed = (256 * np.concatenate([fives, lasts], 1) + 242) // 243
        rows += [bytes_of(SCALE, np.float16), packed.astype(np.uint8).reshape(-1)]
    return np.concatenate(rows)


def quantize_activations(x):
    """s = 127 / max(max |x|, 1e-5); codes = clamp(round half to even(x s), -128, 127), for each row in float32."""
    s = np.float32(127) / np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    return np.clip(np.rint(x * s), -128, 127).astype(np.int8), s


random = np.random.default_rng(42)
ternary = random.choice(np.array([-1, 0, 1], np.int8), size=(8, 512), p=[0.34, 0.32, 0.34])
x = random.standard_normal((2, 512)).astype(np.float32)
act_q, act_s = quantize_activations(x)
y = (act_q.astype(np.int32) @ ternary.T.astype(np.int32)).astype(np.float32) * (np.float32(SCALE) / act_s)
files = {
    "ternary": ternary,
    "x": x,
    "act_q": act_q,
    "act_s": act_s,
    "y": y,
    "hf_u8": pack_rows(ternary),
    "i2_s_x86": i2_s(ternary, 128),
    "i2_s_arm": i2_s(ternary, 64),
    "iq2_bn": iq2_bn(ternary),
    "iq1_bn": iq1_bn(ternary),
}
table = random.standard_normal((4, 512)).astype(np.float32)
for name, kind in (("tq2_0", Q.TQ2_0), ("tq1_0", Q.TQ1_0)):
    files[name] = gguf.quants.quantize(ternary.astype(np.float32) * np.float32(SCALE), kind)
    assert (np.sign(gguf.quants.dequantize(files[name], kind)) == ternary).all()
files["emb_f32"] = table
for name, kind in (("q8_0", Q.Q8_0), ("q4_0", Q.Q4_0), ("q5_0", Q.Q5_0)):
    files[f"emb_{name}"] = gguf.quants.quantize(table, kind)
    files[f"emb_{name}_deq"] = gguf.quants.dequantize(files[f"emb_{name}"], kind)
# gguf-py cannot quantize to Q6_K, so the blocks are random bytes with a sane scale.
q6_k = random.integers(0, 256, (4, 2 * 210), dtype=np.uint8)
q6_k.reshape(4, 2, 210)[:, :, 208:] = bytes_of(0.0123, np.float16)
files["emb_q6_k"] = q6_k
files["emb_q6_k_deq"] = gguf.quants.dequantize(q6_k, Q.Q6_K)

os.makedirs(OUT, exist_ok=True)
for name, array in files.items():
    array.tofile(f"{OUT}/{name}.bin")
index = {name: [str(array.dtype), list(array.shape)] for name, array in files.items()}
json.dump(index, open(f"{OUT}/index.json", "w"), indent=1)
print({name: array.nbytes for name, array in files.items()})
