#!/usr/bin/env python3
"""A Llama-shaped 1.58-bit checkpoint with golden logits from Hugging Face transformers: writes fixtures/hf_llama.

The layout is that of tiiuae/Falcon3-*-1.58bit and HF1BitLLM/Llama3-8B-1.58-100B-tokens: LlamaForCausalLM, SiLU, no
norms inside the blocks, U8 packed weights whose `weight_scale` is 1 / mean |W| and is divided by, an untied
bfloat16 head, tensors in two shards. heads * head_dim differs from hidden, as in Falcon3.

Needs: the environment of README.md in this folder.  Call: python scripts/oracles/hf_llama.py [FOLDER]
"""

import json
import os
import sys

os.environ.setdefault(
    "TORCHDYNAMO_DISABLE", "1"
)  # the quantization helpers run as they are written, uncompiled
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from reference import LINEARS, Shape, absmean, choose_prompt, forward, pack_rows
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

OUT = sys.argv[1] if len(sys.argv) > 1 else "fixtures/hf_llama"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 11,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "is_bitnet_config": True,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "bitnet"},
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000042,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256,
}
SHAPE = Shape(2, 4, 2, 128, 1e-6, 1000042.0, "silu", False)
TOKENS = 32
TIE_DISTANCE = 5e-4

generator = torch.Generator().manual_seed(20)
hidden, inter = CONFIG["hidden_size"], CONFIG["intermediate_size"]
q_rows, kv_rows = 4 * 128, 2 * 128
ROWS = dict(zip(LINEARS, (q_rows, kv_rows, kv_rows, hidden, inter, inter, hidden)))
COLUMNS = dict(zip(LINEARS, (hidden, hidden, hidden, q_rows, hidden, hidden, inter)))


def normal(*shape):
    return torch.randn(*shape, generator=generator)


checkpoint, exact = {}, {}


def plain(name, tensor):
    checkpoint[name] = tensor.to(torch.bfloat16).contiguous()
    exact[name] = checkpoint[name].float().numpy()


plain("model.embed_tokens.weight", 0.1 * normal(CONFIG["vocab_size"], hidden))
for layer in range(CONFIG["num_hidden_layers"]):
    p = f"model.layers.{layer}."
    plain(p + "input_layernorm.weight", 1 + 0.25 * normal(hidden))
    plain(p + "post_attention_layernorm.weight", 1 + 0.25 * normal(hidden))
    for name in LINEARS:
        codes, mean = absmean((0.05 * normal(ROWS[name], COLUMNS[name])).numpy())
        scale = torch.tensor([1.0 / mean]).to(torch.bfloat16)
        checkpoint[p + name + ".weight"] = torch.from_numpy(pack_rows(codes))
        checkpoint[p + name + ".weight_scale"] = scale
        exact[p + name] = (codes, 1.0 / float(scale))
plain("model.norm.weight", 1 + 0.25 * normal(hidden))
plain("lm_head.weight", 0.1 * normal(CONFIG["vocab_size"], hidden))

os.makedirs(OUT, exist_ok=True)
json.dump(CONFIG, open(f"{OUT}/config.json", "w"), indent=2)
# The first shard ends inside layer 1, as real shards do: no layer is promised to lie in one file.
shards = [{}, {}]
for name, tensor in checkpoint.items():
    second = name.startswith(("model.layers.1.mlp", "model.norm", "lm_head"))
    shards[second][name] = tensor
weight_map = {}
for i, shard in enumerate(shards):
    file = f"model-{i + 1:05}-of-00002.safetensors"
    save_file(shard, f"{OUT}/{file}", metadata={"format": "pt"})
    weight_map.update({name: file for name in shard})
total = sum(t.numel() * t.element_size() for t in checkpoint.values())
index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
json.dump(index, open(f"{OUT}/model.safetensors.index.json", "w"), indent=2)

ids = choose_prompt(SHAPE, exact, CONFIG["vocab_size"], TOKENS, TIE_DISTANCE, seed=21)
model = LlamaForCausalLM.from_pretrained(OUT, dtype=torch.float32, attn_implementation="eager").eval()
for parameter in [*model.parameters(), *model.buffers()]:
    if parameter.is_floating_point():  # the loader may leave some in the type of the checkpoint
        parameter.data = parameter.data.float()
linear = model.model.layers[0].mlp.down_proj
assert type(linear).__name__ == "BitLinear" and linear.weight.dtype == torch.uint8, linear
with torch.no_grad():
    out = model(torch.from_numpy(ids)[None], output_hidden_states=True)
golden = {"input_ids": torch.from_numpy(ids).to(torch.int32), "logits": out.logits[0].float().contiguous()}
for i, state in enumerate(out.hidden_states):
    golden[f"hidden.{i}"] = state[0].float().contiguous()
save_file(golden, f"{OUT}/golden.safetensors")

logits, ties = forward(SHAPE, exact, ids)
difference = float(np.abs(logits - golden["logits"].numpy()).max())
assert difference < 1e-4, f"transformers and the numpy reference differ by {difference}"
info = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "dtype": "float32",
    "attention": "eager",
    "linear": type(linear).__name__,
    "tie_distance": float(ties.min()),
    "max_abs_vs_float64_reference": difference,
    "logit_absmax": float(out.logits.abs().max()),
    "tensors": {
        "input_ids": "i32 [32]",
        "logits": "f32 [32, 256]",
        "hidden.0 .. hidden.2": "f32 [32, 256], the streams before each layer; the last one is after the final norm",
    },
}
json.dump(info, open(f"{OUT}/golden.json", "w"), indent=1)
print(json.dumps(info, indent=1))
