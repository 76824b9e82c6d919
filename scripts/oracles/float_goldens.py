#!/usr/bin/env python3
"""Codes of 8-bit floats and of binary16, as PyTorch has them: writes fixtures/float_goldens.

x.bin          numbers (float32, little-endian): ties between neighbouring codes of both 8-bit formats and the floats
               beside them, subnormals, overflow, infinities, NaN, and random ones
e4m3.bin       their codes in float8_e4m3fn, one byte each; x is clamped to the largest number before
e5m2.bin       the same in float8_e5m2; PyTorch alone would round what is beyond the largest number to infinity
f16.bin        the same in float16, two bytes each, not clamped
*_values.bin   what the 256 codes of an 8-bit format mean (float32)

Needs: pip install torch numpy.  Call: python scripts/oracles/float_goldens.py [FOLDER]
"""

import os
import sys

import numpy as np
import torch

OUT = sys.argv[1] if len(sys.argv) > 1 else "fixtures/float_goldens"
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def values(dtype):
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()


def inputs():
    rng = np.random.default_rng(8)
    parts = [
        np.array([0.0, 448, 464, 465, 480, 57344, 61439, 61440, 65504, 65519, 65520, 1e9, 3e38, np.inf, np.nan]),
        np.array([2.0**-9, 2.0**-10, 2.0**-11, 2.0**-16, 2.0**-17, 2.0**-18, 2.0**-24, 2.0**-25, 1e-30, 1e-42]),
        rng.standard_normal(512) * 2.0 ** rng.integers(-28, 18, 512),
        rng.standard_normal(256),
    ]
    for dtype in FORMATS.values():
        v = values(dtype)[:128]
        v = np.sort(v[np.isfinite(v)])
        ties = (v[1:] + v[:-1]) / np.float32(2)
        parts += [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0))]
    x = np.concatenate([np.asarray(p, np.float32) for p in parts])
    return np.concatenate([x, -x])


def main():
    os.makedirs(OUT, exist_ok=True)
    x = torch.from_numpy(inputs())

    def write(name, array):
        array.tofile(os.path.join(OUT, name + ".bin"))

    write("x", x.numpy())
    write("f16", x.half().view(torch.int16).numpy())
    for name, dtype in FORMATS.items():
        largest = torch.finfo(dtype).max
        write(name, x.clamp(-largest, largest).to(dtype).view(torch.uint8).numpy())
        write(name + "_values", values(dtype))
    print(f"{len(x)} numbers in {OUT}")


if __name__ == "__main__":
    main()
