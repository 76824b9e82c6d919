#!/usr/bin/env python3
"""Float16 masters in the layout of 1bitLLM/bitnet_b1_58-large, with golden logits: writes fixtures/hf_1bitllm.

That layout: `BitnetForCausalLM` under model_type "llama", SiLU, as many key/value heads as query heads, a tied
head, sub-norms called `self_attn.inner_attn_ln` and `mlp.ffn_layernorm`, and unquantized master weights that the
forward pass makes ternary (`weight_bits` 1, `input_bits` 8, no `quantization_config`). Transformers has no class
of that name; its BitNetForCausalLM computes the same function, so the golden logits come from it, under its own
names, with `quantization_mode` "online".

Needs: the environment of README.md in this folder.  Call: python scripts/oracles/hf_1bitllm.py [FOLDER]
"""

import json
import os
import sys
import tempfile

os.environ.setdefault(
    "TORCHDYNAMO_DISABLE", "1"
)  # the quantization helpers run as they are written, uncompiled
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from reference import LINEARS, Shape, absmean, absmean_tie_distance, choose_prompt, forward
from safetensors.torch import save_file
from transformers import BitNetForCausalLM

OUT = sys.argv[1] if len(sys.argv) > 1 else "fixtures/hf_1bitllm"
CONFIG = {
    "architectures": ["BitnetForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "input_bits": 8,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 256,
    "weight_bits": 1,
}
SHAPE = Shape(2, 4, 4, 32, 1e-5, 10000.0, "silu", True)
TOKENS = 32
TIE_DISTANCE = 1e-3
# Name in transformers' BitNet -> name in the 1bitLLM checkpoints.
RENAMED = {"self_attn.attn_sub_norm": "self_attn.inner_attn_ln", "mlp.ffn_sub_norm": "mlp.ffn_layernorm"}

generator = torch.Generator().manual_seed(30)
hidden, inter = CONFIG["hidden_size"], CONFIG["intermediate_size"]
SHAPES = dict(zip(LINEARS, [(hidden, hidden)] * 4 + [(inter, hidden)] * 2 + [(hidden, inter)]))


def normal(*shape):
    return torch.randn(*shape, generator=generator)


bitnet, exact = {}, {}


def plain(name, tensor):
    bitnet[name] = tensor.to(torch.float16).contiguous()
    exact[name] = bitnet[name].float().numpy()


plain("model.embed_tokens.weight", 0.1 * normal(CONFIG["vocab_size"], hidden))
nearest = 1.0
for layer in range(CONFIG["num_hidden_layers"]):
    p = f"model.layers.{layer}."
    for name, width in (
        ("input_layernorm", hidden),
        ("post_attention_layernorm", hidden),
        ("self_attn.attn_sub_norm", hidden),
        ("mlp.ffn_sub_norm", inter),
    ):
        plain(f"{p}{name}.weight", 1 + 0.25 * normal(width))
    for name in LINEARS:
        plain(f"{p}{name}.weight", 0.05 * normal(*SHAPES[name]))
        master = exact.pop(f"{p}{name}.weight")
        nearest = min(nearest, absmean_tie_distance(master))
        exact[p + name] = absmean(master)
plain("model.norm.weight", 1 + 0.25 * normal(hidden))
assert nearest > 1e-6, f"a master weight lies {nearest} from a rounding tie: take another seed"


def renamed(name):
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


os.makedirs(OUT, exist_ok=True)
save_file({renamed(k): v for k, v in bitnet.items()}, f"{OUT}/model.safetensors", metadata={"format": "pt"})
json.dump(CONFIG, open(f"{OUT}/config.json", "w"), indent=2)

ids = choose_prompt(SHAPE, exact, CONFIG["vocab_size"], TOKENS, TIE_DISTANCE, seed=31)
with tempfile.TemporaryDirectory() as folder:
    online = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    config = {k: v for k, v in CONFIG.items() if k not in ("weight_bits", "input_bits")}
    config |= {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "quantization_config": online}
    json.dump(config, open(f"{folder}/config.json", "w"))
    save_file(bitnet, f"{folder}/model.safetensors", metadata={"format": "pt"})
    model = BitNetForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
for parameter in [*model.parameters(), *model.buffers()]:
    if parameter.is_floating_point():  # the loader may leave some in the type of the checkpoint
        parameter.data = parameter.data.float()
linear = model.model.layers[0].mlp.down_proj
assert type(linear).__name__ == "AutoBitLinear" and linear.online_quant, linear
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
    "weight_tie_distance": float(nearest),
    "max_abs_vs_float64_reference": difference,
    "logit_absmax": float(out.logits.abs().max()),
    "tensors": {
        "input_ids": "i32 [32]",
        "logits": "f32 [32, 256]",
        "hidden.0 .. hidden.2": "f32 [32, 128], the streams before each layer; the last one is after the final norm",
    },
}
json.dump(info, open(f"{OUT}/golden.json", "w"), indent=1)
print(json.dumps(info, indent=1))
