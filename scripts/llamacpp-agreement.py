#!/usr/bin/env python3
"""Holds Longbit against llama.cpp: one tiny ternary model through both, log-probabilities compared.

  python -m venv venv && . venv/bin/activate && pip install xllamacpp numpy gguf
  cargo build --release
  python scripts/llamacpp-agreement.py [--longbit target/release/longbit] [--tolerance 0.02] [--keep FOLDER]

It writes a seeded model as a packed Hugging Face checkpoint, converts it with `longbit convert` to GGUF (linear
layers TQ2_0, head F32, architecture `bitnet`), lets llama.cpp (the PyPI wheel `xllamacpp`, no build needed) score
prefixes of a prompt on that file, and compares with `longbit logits` on the GGUF, with `longbit logits` on the
checkpoint, and with the float64 numpy reference of scripts/oracles. Exit code 0 when every log-probability of
every column agrees with llama.cpp within the tolerance, 1 when one does not, 2 when something could not be run.
`--self-check` leaves Longbit out: gguf-py writes the file, and only numpy is compared, which tells whether the
oracle itself is sound.

What makes a close agreement possible (3e-6 between llama.cpp and numpy):
- hidden_act "silu": llama.cpp runs every `bitnet` file with SiLU, whatever the file says;
- every linear layer has 256 columns: llama.cpp quantizes activations with one scale for each 256 columns, BitNet
  with one for each token, and for 256 columns that is the same;
- weight scales are powers of two: TQ2_0 stores them as f16;
- llama.cpp's flash attention is off and its KV cache is f32: with the defaults, attention is rounded to f16, int8
  activations downstream flip, and log-probabilities move by 0.1;
- the prompt keeps a distance from rounding ties (see scripts/oracles/reference.py).
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "oracles"))

from reference import LINEARS, Shape, choose_prompt, forward, log_softmax, pack_rows  # noqa: E402

WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 3, 2, 1, 128
SHAPE = Shape(LAYERS, HEADS, KV_HEADS, HEAD_DIM, 1e-5, 500000.0, "silu", True)
TOKENIZER = ROOT / "fixtures" / "tokenizer" / "bpe"
VOCABULARY = 512
TOKENS = 32
POSITIONS = [0, 1, 2, 3, 7, 15, 23, 31]
TIE_DISTANCE = 2e-4
NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.attn_sub_norm", "mlp.ffn_sub_norm")


class Failed(Exception):
    """Something could not be run; the message says what."""


def make_model(seed):
    """Tensors for the reference: norms and embedding exact in bfloat16, linear layers as (codes, scale)."""
    random = np.random.default_rng(seed)

    def bf16(values):
        return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)

    tensors = {
        "model.embed_tokens.weight": bf16(0.1 * random.standard_normal((VOCABULARY, WIDTH))),
        "model.norm.weight": bf16(1 + 0.25 * random.standard_normal(WIDTH)),
    }
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        for name in NORMS:
            tensors[f"{p}{name}.weight"] = bf16(1 + 0.25 * random.standard_normal(WIDTH))
        for name in LINEARS:
            rows = KV_HEADS * HEAD_DIM if name.endswith(("k_proj", "v_proj")) else WIDTH
            codes = random.choice(np.array([-1, 0, 1], np.int8), size=(rows, WIDTH), p=[0.34, 0.32, 0.34])
            tensors[p + name] = (codes, np.float32(2.0 ** -random.integers(3, 6)))
    return tensors


def write_checkpoint(folder, tensors):
    """The packed layout of microsoft/bitnet-b1.58-2B-4T, as a minimal safetensors file, with a tokenizer."""
    stored = {}

    def plain(name, values):
        bits = np.asarray(values, np.float32).view(np.uint32) >> 16
        stored[name] = ("BF16", values.shape, bits.astype("<u2").tobytes())

    for name, value in tensors.items():
        if isinstance(value, tuple):
            codes, scale = value
            rows = pack_rows(codes)
            stored[name + ".weight"] = ("U8", rows.shape, rows.tobytes())
            plain(name + ".weight_scale", np.array([scale], np.float32))
        else:
            plain(name, value)
    header, offset = {}, 0
    for name, (dtype, shape, data) in stored.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in stored.values():
            file.write(data)
    config = {
        "architectures": ["BitNetForCausalLM"],
        "bos_token_id": 509,
        "eos_token_id": 510,
        "hidden_act": SHAPE.activation,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "max_position_embeddings": 512,
        "model_type": "bitnet",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
        "rms_norm_eps": SHAPE.eps,
        "rope_theta": SHAPE.theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)


def write_gguf(path, tensors):
    """What `longbit convert` should write, by gguf-py; for --self-check."""
    import gguf

    w = gguf.GGUFWriter(str(path), "bitnet")
    w.add_context_length(512)
    w.add_embedding_length(WIDTH)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(WIDTH)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(SHAPE.eps)
    w.add_rope_freq_base(SHAPE.theta)
    w.add_rope_dimension_count(HEAD_DIM)
    w.add_vocab_size(VOCABULARY)
    vocabulary = json.loads((TOKENIZER / "gguf.json").read_text())
    w.add_tokenizer_model(vocabulary["tokenizer.ggml.model"])
    w.add_tokenizer_pre(vocabulary["tokenizer.ggml.pre"])
    w.add_token_list(vocabulary["tokenizer.ggml.tokens"])
    w.add_token_types(vocabulary["tokenizer.ggml.token_type"])
    w.add_token_merges(vocabulary["tokenizer.ggml.merges"])
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.attn_sub_norm": "attn_sub_norm",
        "mlp.ffn_sub_norm": "ffn_sub_norm",
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    }
    for name, value in tensors.items():
        block, _, inner = name.removesuffix(".weight").removeprefix("model.layers.").partition(".")
        target = f"blk.{block}.{names[inner]}" if block.isdigit() else names[name.removesuffix(".weight")]
        if isinstance(value, tuple):
            kind = gguf.GGMLQuantizationType.TQ2_0
            data = gguf.quants.quantize(value[0].astype(np.float32) * value[1], kind)
            w.add_tensor(f"{target}.weight", data, raw_dtype=kind)
        else:
            w.add_tensor(f"{target}.weight", value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@contextlib.contextmanager
def output_to(path):
    """Sends what C code prints to a file: llama.cpp tells its story on both streams."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            for number, copy in enumerate(saved, 1):
                os.dup2(copy, number)
                os.close(copy)


def llamacpp(path, ids, log):
    """Log-probabilities [positions, vocabulary] after the prefixes that end at POSITIONS."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 256
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    out = np.full((len(POSITIONS), VOCABULARY), np.nan)
    try:
        with output_to(log):
            server = xllamacpp.Server(params)
            for row, position in zip(out, POSITIONS):
                request = {
                    "prompt": [int(i) for i in ids[: position + 1]],
                    "max_tokens": 1,
                    "logprobs": VOCABULARY,
                    "temperature": 1.0,
                    "cache_prompt": False,
                    # The probabilities are those of the raw logits. The bias only keeps the drawn token from
                    # being an end token or half a character, for which the server reports none.
                    "logit_bias": [[0, 1e6]],
                }
                reply = server.handle_completions(request)
                reply = json.loads(reply) if isinstance(reply, (str, bytes)) else reply
                reply = reply[0] if isinstance(reply, list) else reply
                for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                    row[entry["id"]] = entry["logprob"]
            del server
            time.sleep(0.2)  # its last words come from another thread
    except Exception as error:
        errors = [line for line in log.read_text(errors="replace").splitlines() if " E " in line]
        raise Failed("\n".join([f"llama.cpp does not run {path}: {error}", *errors[:5]])) from error
    if np.isnan(out).any():
        raise Failed(f"llama.cpp left {int(np.isnan(out).sum())} log-probabilities out")
    return out


def call(*command):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if result.returncode != 0:
        raise Failed(
            f"{' '.join(map(str, command))}\nexit code {result.returncode}\n{result.stdout}{result.stderr}"
        )


def longbit_logits(longbit, model, ids, out):
    tokens = ",".join(str(i) for i in ids)
    call(
        longbit, "logits", "--model", model, "--tokens", tokens, "--kv", "f32", "--head", "f32", "--out", out
    )
    raw = out.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])["logits"]
    if entry["dtype"] != "F32" or entry["shape"] != [len(ids), VOCABULARY]:
        raise Failed(f"{out} holds {entry}")
    begin, end = (8 + length + offset for offset in entry["data_offsets"])
    return np.frombuffer(raw[begin:end], "<f4").reshape(entry["shape"]).astype(np.float64)


def compare(args, folder):
    tensors = make_model(args.seed)
    write_checkpoint(folder / "checkpoint", tensors)
    file = folder / "model.gguf"
    if args.self_check:
        write_gguf(file, tensors)
    else:
        if not args.longbit.is_file():
            raise Failed(
                f"{args.longbit} is not a file: build it with `cargo build --release` or name it with --longbit"
            )
        call(args.longbit, "convert", folder / "checkpoint", file, "--type", "tq2_0", "--head", "f32")
    ids = choose_prompt(SHAPE, tensors, VOCABULARY, TOKENS, TIE_DISTANCE, args.seed)
    columns = {"numpy float64": forward(SHAPE, tensors, ids)[0]}
    if not args.self_check:
        columns["longbit, GGUF"] = longbit_logits(args.longbit, file, ids, folder / "gguf.safetensors")
        checkpoint = folder / "checkpoint"
        columns["longbit, checkpoint"] = longbit_logits(
            args.longbit, checkpoint, ids, folder / "hf.safetensors"
        )
    theirs = llamacpp(file, ids, folder / "llamacpp.log")

    print(
        f"largest difference of {VOCABULARY} log-probabilities from llama.cpp's, and whether the likeliest "
        "token is the same"
    )
    print("position  " + "".join(f"{name:>24}" for name in columns))
    worst = dict.fromkeys(columns, 0.0)
    for row, position in zip(theirs, POSITIONS):
        cells = []
        for name, logits in columns.items():
            ours = log_softmax(logits[position])
            difference = float(np.abs(ours - row).max())
            # A value that is not a number is worse than any.
            worst[name] = max(worst[name], difference if np.isfinite(difference) else np.inf)
            cells.append(f"{difference:.2e} {'same' if ours.argmax() == row.argmax() else 'other':>5}")
        print(f"{position:>8}  " + "".join(f"{cell:>24}" for cell in cells))
    print(f"{'worst':>8}  " + "".join(f"{value:.2e}      ".rjust(24) for value in worst.values()))
    passed = max(worst.values()) <= args.tolerance
    print(f"{'PASS' if passed else 'FAIL'}: tolerance {args.tolerance}")
    return 0 if passed else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--longbit", type=Path, default=ROOT / "target/release/longbit", help="the binary to check"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.02, help="largest difference of a log-probability"
    )
    parser.add_argument("--seed", type=int, default=1, help="of weights and prompt")
    parser.add_argument("--keep", type=Path, help="write everything to this new folder and leave it there")
    parser.add_argument("--self-check", action="store_true", help="compare llama.cpp with numpy alone")
    args = parser.parse_args()
    try:
        if args.keep:
            args.keep.mkdir(parents=True)
            return compare(args, args.keep)
        with tempfile.TemporaryDirectory() as folder:
            return compare(args, Path(folder))
    except (Failed, OSError, ImportError) as error:
        print(f"llamacpp-agreement: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
