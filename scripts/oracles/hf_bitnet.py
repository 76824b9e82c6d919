#!/usr/bin/env python3
"""A tiny BitNet b1.58 in three layouts, with golden logits from Hugging Face transformers: writes fixtures/hf_bitnet.

offline/    U8 packed, bf16 `weight_scale` [1] = mean |W| that the output is multiplied by:
            microsoft/bitnet-b1.58-2B-4T
online/     bf16 master weights that the forward pass makes ternary: microsoft/bitnet-b1.58-2B-4T-bf16; and
            golden.safetensors, float32 logits of a prompt that keeps a distance from rounding ties (see
            reference.py)
bitlinear/  U8 packed, `weight_scale` = 1 / mean |W| that the output is divided by: HF1BitLLM, Falcon3
golden.*    logits of all three in float32 and bfloat16, the streams between layers (float32, offline), logits
            under a block-causal mask, and greedy continuations; for a prompt of random tokens, ties or no ties

The weights depend on how transformers draws its initial ones, so keep to the version in golden.json.

Needs: the environment of README.md in this folder.  Call: python scripts/oracles/hf_bitnet.py [FOLDER]
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
from reference import LINEARS, Shape, absmean, absmean_tie_distance, choose_prompt, forward
from safetensors.torch import save_file
from transformers import BitNetConfig, BitNetForCausalLM
from transformers.integrations.bitnet import pack_weights

OUT = sys.argv[1] if len(sys.argv) > 1 else "fixtures/hf_bitnet"
BASE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "relu2",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
}
SHAPE = Shape(4, 4, 2, 64, 1e-5, 500000.0, "relu2", True)
BLOCK = 8
TIE_DISTANCE = 5e-4

torch.set_num_threads(1)
torch.manual_seed(1234)


def master_weights():
    """bfloat16 tensors under their checkpoint names; the tied head is left out."""
    model = BitNetForCausalLM(BitNetConfig(**BASE)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if "norm" in name:
                parameter.copy_(1.0 + 0.25 * noise)
            else:
                parameter.copy_(noise * (0.1 if "embed" in name else 0.05))
    state = model.state_dict().items()
    return {k: v.detach().to(torch.bfloat16).contiguous() for k, v in state if k != "lm_head.weight"}


def packed(master):
    """The offline and the bitlinear checkpoint, and the mean share of zeros."""
    offline, bitlinear, zeros = {}, {}, []
    for name, tensor in master.items():
        if not any(f"{linear}.weight" in name for linear in LINEARS):
            offline[name], bitlinear[name] = tensor, tensor.clone()
            continue
        mean = tensor.float().abs().mean().clamp(min=1e-5)
        codes = (tensor.float() / mean).round().clamp(-1, 1)
        zeros.append(float((codes == 0).float().mean()))
        rows = pack_weights(codes)  # changes its argument
        scale = mean.to(torch.bfloat16)
        offline[name], bitlinear[name] = rows, rows.clone()
        offline[name + "_scale"] = scale.reshape(1)
        bitlinear[name + "_scale"] = (1.0 / scale.float()).to(torch.bfloat16).reshape(1)
    return offline, bitlinear, sum(zeros) / len(zeros)


def write(name, tensors, quantization):
    folder = os.path.join(OUT, name)
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    config = BASE | {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "quantization_config": {"quant_method": "bitnet"} | quantization,
    }
    json.dump(config, open(f"{folder}/config.json", "w"), indent=2)
    return folder


def load(folder, dtype):
    model = BitNetForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    rotary = BASE["hidden_size"] // BASE["num_attention_heads"] // 2  # its frequencies stay float32
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.numel() != rotary:
            tensor.data = tensor.data.to(dtype)  # the loader leaves some in the type of the checkpoint
    return model


def decode_difference(model, ids, logits):
    """Largest difference between a prefill and the same tokens fed one by one through the cache."""
    past, steps = None, []
    for t in range(ids.shape[1]):
        result = model(ids[:, t : t + 1], past_key_values=past, use_cache=True)
        past = result.past_key_values
        steps.append(result.logits[0, -1])
    return float((torch.stack(steps) - logits).abs().max())


def block_causal(model, ids):
    """Logits when token q sees every k with k // BLOCK <= q // BLOCK."""
    block = torch.arange(ids.shape[1]) // BLOCK
    mask = torch.where(block[:, None] >= block[None], 0.0, torch.finfo(torch.float32).min)[None, None]
    return model(ids, attention_mask=mask, use_cache=False).logits[0].contiguous()


def golden_of_all(folders, zeros):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, BASE["vocab_size"], (1, 48), generator=generator)
    ids[0, 0] = BASE["bos_token_id"]
    golden = {"input_ids": ids.to(torch.int32)}
    info = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "zero_fraction_mean": zeros,
        "base_config": BASE,
        "variants": {},
    }
    for name, folder in folders.items():
        for dtype in (torch.float32, torch.bfloat16):
            key = f"{name}.{'f32' if dtype == torch.float32 else 'bf16'}"
            model = load(folder, dtype)
            linear = model.model.layers[0].mlp.down_proj
            out = model(ids, output_hidden_states=True, use_cache=True)
            golden[f"logits.{key}"] = out.logits[0].float().contiguous()
            if key == "offline.f32":
                for i, state in enumerate(out.hidden_states):
                    golden[f"hidden.{i}"] = state[0].contiguous()
                info["decode_vs_prefill_max_abs"] = decode_difference(model, ids, out.logits[0])
                golden[f"logits.{key}.block{BLOCK}"] = block_causal(model, ids)
            text = model.generate(
                ids[:, :16], max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            difference = (golden[f"logits.{key}"] - golden["logits.offline.f32"]).abs()
            same = golden[f"logits.{key}"].argmax(-1) == golden["logits.offline.f32"].argmax(-1)
            info["variants"][key] = {
                "linear": type(linear).__name__,
                "weight_dtype": str(linear.weight.dtype),
                "greedy_from_first_16": text[0, 16:].tolist(),
                "logit_absmax": float(out.logits.abs().max()),
                "max_abs_vs_offline_f32": float(difference.max()),
                "top1_agreement_vs_offline_f32": float(same.float().mean()),
            }
    save_file(golden, f"{OUT}/golden.safetensors")
    json.dump(info, open(f"{OUT}/golden.json", "w"), indent=1)


def golden_of_online(folder, master):
    exact, nearest = {}, 1.0
    for name, tensor in master.items():
        array = tensor.float().numpy()
        if any(f"{linear}.weight" in name for linear in LINEARS):
            nearest = min(nearest, absmean_tie_distance(array))
            exact[name.removesuffix(".weight")] = absmean(array)
        else:
            exact[name] = array
    ids = choose_prompt(SHAPE, exact, BASE["vocab_size"], 32, TIE_DISTANCE, seed=11)
    out = load(folder, torch.float32)(torch.from_numpy(ids)[None], output_hidden_states=True)
    golden = {"input_ids": torch.from_numpy(ids).to(torch.int32), "logits": out.logits[0].contiguous()}
    for i, state in enumerate(out.hidden_states):
        golden[f"hidden.{i}"] = state[0].contiguous()
    save_file(golden, f"{folder}/golden.safetensors")
    logits, ties = forward(SHAPE, exact, ids)
    difference = float(np.abs(logits - golden["logits"].numpy()).max())
    assert difference < 1e-4, f"transformers and the numpy reference differ by {difference}"
    info = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "float32",
        "attention": "eager",
        "tie_distance": float(ties.min()),
        "weight_tie_distance": float(nearest),
        "max_abs_vs_float64_reference": difference,
        "logit_absmax": float(out.logits.abs().max()),
        "tensors": {
            "input_ids": "i32 [32]",
            "logits": "f32 [32, 512]",
            "hidden.0 .. hidden.4": "f32 [32, 256], the streams before each layer; "
            "the last one is after the final norm",
        },
    }
    json.dump(info, open(f"{folder}/golden.json", "w"), indent=1)
    print(json.dumps(info, indent=1))


with torch.no_grad():
    master = master_weights()
    offline, bitlinear, zeros = packed(master)
    auto = {"linear_class": "autobitlinear"}
    folders = {
        "offline": write("offline", offline, auto | {"quantization_mode": "offline"}),
        "online": write("online", master, auto | {"quantization_mode": "online"}),
        "bitlinear": write("bitlinear", bitlinear, {"modules_to_not_convert": None}),
    }
    golden_of_all(folders, zeros)
    golden_of_online(folders["online"], master)
