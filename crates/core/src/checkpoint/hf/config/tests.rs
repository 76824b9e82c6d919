//! What is read from a `config.json`, and what is refused.

use super::*;

const PACKED: &str = r#"{"architectures":["BitNetForCausalLM"],"model_type":"bitnet","vocab_size":512,
    "hidden_size":256,"intermediate_size":512,"num_hidden_layers":4,"num_attention_heads":4,
    "num_key_value_heads":2,"hidden_act":"relu2","rms_norm_eps":1e-05,"rope_theta":500000.0,
    "tie_word_embeddings":true,"quantization_config":{"quant_method":"bitnet",
    "linear_class":"autobitlinear","quantization_mode":"offline"}}"#;

/// As published by 1bitLLM.
const ONE_BIT: &str = r#"{"architectures":["BitnetForCausalLM"],"attention_bias":false,"hidden_act":"silu",
    "hidden_size":1536,"input_bits":8,"intermediate_size":4096,"max_position_embeddings":2048,"model_type":"llama",
    "num_attention_heads":16,"num_hidden_layers":24,"num_key_value_heads":16,"pad_token_id":32000,"pretraining_tp":1,
    "rms_norm_eps":1e-05,"rope_scaling":null,"rope_theta":10000.0,"tie_word_embeddings":true,"torch_dtype":"float16",
    "use_cache":true,"vocab_size":32002,"weight_bits":1}"#;

/// As published for Falcon3-7B.
const FALCON: &str = r#"{"architectures":["LlamaForCausalLM"],"attention_bias":false,"head_dim":256,
    "hidden_act":"silu","hidden_size":3072,"intermediate_size":23040,"is_bitnet_config":true,
    "max_position_embeddings":32768,"mlp_bias":false,"model_type":"llama","num_attention_heads":12,
    "num_hidden_layers":28,"num_key_value_heads":4,"quantization_config":{"modules_to_not_convert":["lm_head"],
    "quant_method":"bitnet"},"rms_norm_eps":1e-06,"rope_scaling":null,"rope_theta":1000042,
    "tie_word_embeddings":false,"vocab_size":131072}"#;

fn parse(text: &str) -> Result<CheckpointConfig> {
    CheckpointConfig::parse(Path::new("config.json"), text, &OpenOptions::default())
}

fn refused(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from}");
    parse(&text.replace(from, to)).expect_err(to).to_string()
}

#[test]
fn reads_the_packed_layout() {
    let config = parse(PACKED).unwrap();
    assert_eq!((config.family, config.storage), (Family::BitNet, Storage::Packed(ScaleUse::Multiply)));
    assert_eq!(config.model.head_dim, 64);
    assert_eq!(config.model.group(), 2);
    assert!(config.model.tied_head && config.model.sub_norms);
}

#[test]
fn the_linear_class_and_the_mode_decide_the_storage() {
    let both = r#""linear_class":"autobitlinear","quantization_mode":"offline""#;
    for (to, storage) in [
        (r#""modules_to_not_convert":null"#, Storage::Packed(ScaleUse::Divide)),
        (r#""linear_class":"bitlinear","use_rms_norm":false"#, Storage::Packed(ScaleUse::Divide)),
        (r#""linear_class":"autobitlinear""#, Storage::Packed(ScaleUse::Multiply)),
        (r#""linear_class":"autobitlinear","quantization_mode":"online""#, Storage::Masters),
    ] {
        assert_eq!(parse(&PACKED.replace(both, to)).unwrap().storage, storage, "{to}");
    }
}

#[test]
fn reads_the_masters_of_1bitllm() {
    let config = parse(ONE_BIT).unwrap();
    assert_eq!((config.family, config.storage), (Family::OneBitLlm, Storage::Masters));
    assert_eq!(config.family.sub_norms(), Some(["self_attn.inner_attn_ln", "mlp.ffn_layernorm"]));
    assert_eq!((config.model.activation, config.model.group()), (Activation::Silu, 1));
    assert!(config.model.tied_head && config.model.sub_norms);
}

#[test]
fn reads_ternary_llamas() {
    let config = parse(FALCON).unwrap();
    assert_eq!((config.family, config.storage), (Family::Llama, Storage::Packed(ScaleUse::Divide)));
    assert_eq!((config.model.head_dim, config.model.q_rows()), (256, 3072));
    assert_eq!(config.model.rope_theta, 1_000_042.0);
    assert!(!config.model.tied_head && !config.model.sub_norms);
    let derived = parse(&FALCON.replace("\"head_dim\":256,", "")).unwrap();
    assert_eq!(derived.model.head_dim, 256);
}

#[test]
fn other_architectures_are_refused_with_the_supported_ones() {
    for name in ["FalconForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "BitLlamaForCausalLM"] {
        let message = refused(FALCON, "LlamaForCausalLM", name);
        for part in [name, "BitNetForCausalLM", "BitnetForCausalLM", "LlamaForCausalLM", "bitnet"] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    // An architecture is known before its keys are read.
    let message = parse(r#"{"architectures":["GPT2LMHeadModel"],"n_embd":768}"#).unwrap_err().to_string();
    assert!(message.contains("GPT2LMHeadModel") && message.contains("not supported"), "{message}");
    for nothing in ["{}", "[]", "null", r#"{"architectures":[]}"#, r#"{"architectures":null}"#] {
        assert!(parse(nothing).unwrap_err().to_string().contains("architecture missing"), "{nothing}");
    }
}

#[test]
fn refusals_name_the_key() {
    for (from, to, names) in [
        ("BitNetForCausalLM", "GemmaForCausalLM", "architecture"),
        ("\"offline\"", "\"onlin\"", "quantization_mode `onlin`"),
        ("\"autobitlinear\"", "\"linear\"", "linear_class `linear`"),
        (
            "\"autobitlinear\",\"quantization_mode\":\"offline\"",
            "\"bitlinear\",\"quantization_mode\":\"online\"",
            "online",
        ),
        ("\"quant_method\":\"bitnet\"", "\"quant_method\":\"gptq\"", "quant_method is `gptq`"),
        ("\"quant_method\":\"bitnet\"", "\"quant_method\":\"bitnet\",\"use_rms_norm\":true", "use_rms_norm"),
        (",\"quantization_config\":{", ",\"other\":{", "quantization_config is missing"),
        ("relu2", "gelu", "hidden_act"),
        ("\"hidden_act\":\"relu2\",", "", "hidden_act is missing"),
        ("\"num_key_value_heads\":2", "\"num_key_value_heads\":3", "num_key_value_heads"),
        ("500000.0", "-1.0", "rope_theta"),
        ("\"rope_theta\":500000.0,", "", "rope_theta is missing"),
        ("\"vocab_size\":512", "\"vocab_size\":0", "vocab_size"),
        ("\"hidden_size\":256", "\"hidden_size\":1e99", "not a model configuration"),
        ("\"num_attention_heads\":4", "\"num_attention_heads\":0", "num_attention_heads"),
        ("\"rms_norm_eps\":1e-05", "\"rms_norm_eps\":0", "rms_norm_eps"),
        ("\"vocab_size\"", "\"attention_bias\":true,\"vocab_size\"", "attention_bias"),
        ("\"vocab_size\"", "\"mlp_bias\":true,\"vocab_size\"", "mlp_bias"),
        ("\"vocab_size\"", "\"partial_rotary_factor\":0.5,\"vocab_size\"", "partial_rotary_factor"),
    ] {
        let message = refused(PACKED, from, to);
        assert!(message.contains(names), "{to}: {message}");
    }
}

#[test]
fn only_the_plain_rotary_embedding_is_read() {
    let theta = r#""rope_theta":500000.0"#;
    for plain in [
        r#""rope_parameters":{"rope_theta":500000.0,"rope_type":"default"}"#,
        r#""rope_parameters":{"rope_theta":500000.0}"#,
        r#""rope_parameters":{"rope_theta":500000.0,"rope_type":"default"},"rope_theta":500000.0"#,
        r#""rope_scaling":{"type":"default"},"rope_theta":500000.0"#,
        r#""rope_scaling":null,"rope_parameters":null,"rope_theta":500000.0"#,
    ] {
        assert_eq!(parse(&PACKED.replace(theta, plain)).unwrap().model.rope_theta, 500_000.0, "{plain}");
    }
    for (other, names) in [
        (r#""rope_theta":1e4,"rope_scaling":{"rope_type":"llama3","factor":8.0}"#, "rope_type `llama3`"),
        (r#""rope_theta":1e4,"rope_scaling":{"type":"yarn","factor":4.0}"#, "rope_type `yarn`"),
        (r#""rope_theta":1e4,"rope_scaling":{"factor":4.0}"#, "rope_scaling"),
        (r#""rope_theta":1e4,"rope_scaling":2.0"#, "rope_scaling"),
        (r#""rope_parameters":{"rope_theta":1e4,"rope_type":"linear"}"#, "rope_parameters"),
        (r#""rope_parameters":{"rope_theta":1e4,"partial_rotary_factor":0.5}"#, "partial_rotary_factor"),
        (r#""rope_parameters":{"rope_theta":"1e4"}"#, "rope_parameters.rope_theta"),
        (r#""rope_parameters":{"rope_theta":1e4},"rope_theta":2e4"#, "must agree"),
    ] {
        let message = refused(PACKED, theta, other);
        assert!(message.contains(names), "{other}: {message}");
    }
}

#[test]
fn masters_of_1bitllm_say_their_bits() {
    for (from, to, names) in [
        ("\"weight_bits\":1", "\"weight_bits\":2", "weight_bits is 2; it must be 1"),
        (",\"weight_bits\":1", "", "weight_bits is missing"),
        ("\"input_bits\":8", "\"input_bits\":4", "input_bits is 4; it must be 8"),
        ("\"input_bits\":8", "\"input_bits\":null", "input_bits is missing"),
        ("\"weight_bits\":1", "\"weight_bits\":1,\"packed\":true", "packed"),
        ("\"weight_bits\":1", "\"weight_bits\":1,\"quant_bits\":2", "quant_bits is 2"),
        (
            "\"weight_bits\":1",
            "\"weight_bits\":1,\"quantization_config\":{\"quant_method\":\"bitnet\"}",
            "quantization_config is present",
        ),
    ] {
        let message = refused(ONE_BIT, from, to);
        assert!(message.contains(names), "{to}: {message}");
    }
    assert!(
        parse(
            &ONE_BIT.replace("\"weight_bits\":1", "\"weight_bits\":1,\"packed\":false,\"quant_bits\":null")
        )
        .is_ok()
    );
}

#[test]
fn llamas_must_be_ternary_in_all_but_the_head() {
    let quantization = r#""quantization_config":{"modules_to_not_convert":["lm_head"],
    "quant_method":"bitnet"},"#;
    for plain in ["", "\"quantization_config\":null,"] {
        let message = refused(FALCON, quantization, plain);
        assert!(
            message.contains("quantization_config is missing") && message.contains("not ternary"),
            "{message}"
        );
    }
    assert!(parse(&FALCON.replace("[\"lm_head\"]", "null")).is_ok());
    for kept in ["[]", "[\"lm_head\",\"model.layers.0.mlp.down_proj\"]", "[\"self_attn\"]", "\"lm_head\""] {
        let message = refused(FALCON, "[\"lm_head\"]", kept);
        assert!(message.contains("modules_to_not_convert") && message.contains(kept), "{message}");
    }
}

#[test]
fn an_activation_asked_for_must_be_the_one_of_the_file() {
    let with = |text: &str, activation| {
        let options = OpenOptions { activation: Some(activation), ..OpenOptions::default() };
        CheckpointConfig::parse(Path::new("config.json"), text, &options)
    };
    assert!(with(PACKED, Activation::Relu2).is_ok());
    let message = with(PACKED, Activation::Silu).unwrap_err().to_string();
    assert!(message.contains("hidden_act is `relu2`") && message.contains("Silu"), "{message}");
    let silent = PACKED.replace("\"hidden_act\":\"relu2\",", "");
    assert_eq!(with(&silent, Activation::Silu).unwrap().model.activation, Activation::Silu);
}
