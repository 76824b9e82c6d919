//! What a configuration will weigh and read, from shapes alone.

use crate::attention::tasks::most_tasks;
use crate::attention::{EVICTION_SLACK, MethodShape, MethodSpec, partial};
use crate::error::{Error, Result};
use crate::kv::{CacheShape, KvDtype, PAGE_TOKENS};
use crate::model::{Activation, Compaction, HeadFormat, ModelBytes, ModelConfig, Packing};
use crate::session::Session;

/// Longest context that [`largest_context`] looks for.
const LONGEST: usize = 1 << 40;

/// What a process takes beside its data: code, stacks, allocator.
pub const PROCESS_BYTES: u64 = 64 << 20;

/// Bytes of a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Weights, embedding, head.
    pub weights: u64,
    /// The KV cache with `context + headroom` tokens in it.
    pub cache: u64,
    /// State of the method.
    pub index: u64,
    /// Pages that a fork of a filled cache takes for itself where the method evicts: the rows that it keeps, and the page or
    /// two of each head that steps write to. 0 for other methods, and no part of [`Footprint::resident`]: a session that
    /// nobody forked shrinks instead.
    pub forked: u64,
    /// Rotary table and the buffers of a decode step.
    pub scratch: u64,
    /// Buffers of a prefill in chunks of [`Session::DEFAULT_CHUNK`], which stay once there was one; see [`pass_bytes`].
    pub prefill: u64,
    /// Weights read by a decode step.
    pub weights_per_token: u64,
    /// Cache and index read by a decode step at `context`.
    pub kv_per_token: u64,
    /// The part of it that is read to decide what else is.
    pub decide_per_token: u64,
}

impl Footprint {
    /// Everything that is in memory at once, without the buffers of a prefill.
    pub fn resident(&self) -> u64 {
        [self.cache, self.index, self.scratch].into_iter().fold(self.weights, u64::saturating_add)
    }

    /// Everything that a decode step reads.
    pub fn per_token(&self) -> u64 {
        self.weights_per_token.saturating_add(self.kv_per_token)
    }
}

/// The longest context for which `bytes`, which must not fall as it grows, is no more than `memory`; none when not even one
/// token fits.
pub fn largest_context(memory: u64, bytes: impl Fn(usize) -> u64) -> Option<usize> {
    let fits = |context: usize| bytes(context) <= memory;
    if !fits(1) {
        return None;
    }
    let (mut good, mut bad) = (1, 2);
    while bad < LONGEST && fits(bad) {
        (good, bad) = (bad, 2 * bad);
    }
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if fits(middle) { good = middle } else { bad = middle }
    }
    Some(good)
}

/// A model given by its numbers alone, of which the cache can be told, and the rest where it has been given.
#[derive(Clone, Debug, PartialEq)]
pub struct PlainShape {
    /// The shape; what is not known of it is 1.
    pub config: ModelConfig,
    /// Whether `intermediate` and `vocab` are known, so that weights can be counted.
    pub weights: bool,
}

impl PlainShape {
    /// Reads `layers=80,heads=64,kv_heads=8,head_dim=128`; also `hidden` (heads x head_dim where it is not given), `vocab`,
    /// `intermediate`, and `tied=0` for a head of its own. Without `kv_heads` every head has its own keys and values.
    ///
    /// # Errors
    /// [`Error::Parameter`] for anything else.
    pub fn parse(text: &str) -> Result<Self> {
        const KEYS: [&str; 8] =
            ["layers", "heads", "head_dim", "kv_heads", "hidden", "intermediate", "vocab", "tied"];
        let wrong = |reason: String| Error::Parameter { text: text.into(), reason };
        let mut given = [None::<usize>; KEYS.len()];
        for part in text.split(',').map(str::trim) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let place = KEYS.iter().position(|k| *k == key.trim());
            let slot = place.and_then(|i| given.get_mut(i)).ok_or_else(|| {
                wrong(format!("`{part}` is not a number of a shape; there are {}", KEYS.join(", ")))
            })?;
            let number = value.trim().parse().map_err(|_| wrong(format!("`{part}` needs a whole number")))?;
            if slot.replace(number).is_some() {
                return Err(wrong(format!("`{}` is given twice", key.trim())));
            }
        }
        let [layers, heads, head_dim, kv_heads, hidden, intermediate, vocab, tied] = given;
        let (Some(layers), Some(heads), Some(head_dim)) = (layers, heads, head_dim) else {
            return Err(wrong("a shape has at least `layers`, `heads` and `head_dim`".into()));
        };
        let config = ModelConfig {
            name: format!("shape:{text}"),
            vocab: vocab.unwrap_or(1),
            hidden: hidden.unwrap_or_else(|| heads.saturating_mul(head_dim)),
            intermediate: intermediate.unwrap_or(1),
            layers,
            heads,
            kv_heads: kv_heads.unwrap_or(heads),
            head_dim,
            rope_theta: 10_000.0,
            rms_eps: 1e-5,
            activation: Activation::Silu,
            sub_norms: false,
            tied_head: tied != Some(0),
            trained_positions: 0,
        };
        config.check().map_err(wrong)?;
        Ok(PlainShape { config, weights: intermediate.is_some() && vocab.is_some() })
    }
}

/// What the weights of a model are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightFormat {
    /// Number format of the head.
    pub head: HeadFormat,
    /// How the ternary matrices are repacked after loading.
    pub compaction: Compaction,
}

impl From<HeadFormat> for WeightFormat {
    fn from(head: HeadFormat) -> Self {
        WeightFormat { head, compaction: Compaction::default() }
    }
}

/// Predicts the bytes of a session of `context + headroom` tokens.
pub fn footprint(
    config: &ModelConfig,
    weights: impl Into<WeightFormat>,
    kv: KvDtype,
    method: &MethodSpec,
    context: usize,
    headroom: usize,
    threads: usize,
) -> Footprint {
    let WeightFormat { head, compaction } = weights.into();
    let model = ModelBytes::compacted(config, head, compaction);
    // Matrices of another packing are in memory twice while they are made.
    let loaded = if compaction.packing == Packing::TwoBits {
        0
    } else {
        ModelBytes::ternary(config, Packing::TwoBits)
    };
    let capacity = context.saturating_add(headroom).div_ceil(PAGE_TOKENS).saturating_mul(PAGE_TOKENS);
    let shape = CacheShape::new(config, capacity);
    let rope = (capacity as u64).saturating_mul(config.head_dim as u64 * 4);
    // Partials of decode tasks.
    let tasks = most_tasks(capacity) as u64;
    let partials = tasks.saturating_mul((config.heads * partial::stride(config.head_dim) * 4) as u64);
    // Logits and their copy, and rows private to each thread.
    let rows = (threads * (4 * config.intermediate + 8 * config.hidden) * 4) as u64 + 8 * config.vocab as u64;
    let predicted = method.predict(context, &MethodShape::new(config, kv));
    let of_heads = |bytes: usize| (bytes as u64).saturating_mul((config.layers * config.kv_heads) as u64);
    let forked = match method.evicts() {
        true => {
            // What keeps everything moves no row, and shares all pages but the last.
            let kept =
                if predicted.rows < context { predicted.rows.saturating_add(EVICTION_SLACK) } else { 0 };
            let pages = kept.saturating_add(headroom).div_ceil(PAGE_TOKENS).saturating_add(1);
            shape.stored_bytes(kv, pages.saturating_mul(PAGE_TOKENS))
        }
        false => 0,
    };
    Footprint {
        weights: model.resident.saturating_add(loaded),
        cache: shape.stored_bytes(kv, capacity),
        index: of_heads(predicted.state_bytes),
        forked,
        scratch: rope.saturating_add(partials).saturating_add(rows),
        prefill: pass_bytes(config, Session::DEFAULT_CHUNK),
        weights_per_token: model.per_token,
        kv_per_token: shape.read_bytes(kv, predicted.rows).saturating_add(of_heads(predicted.read_bytes)),
        decide_per_token: of_heads(predicted.read_bytes),
    }
}

/// Buffers of a pass that takes `tokens` together: logits, the rows of every stage, and their copies on the way from one to
/// the next.
pub fn pass_bytes(config: &ModelConfig, tokens: usize) -> u64 {
    let rows = 4 * config.q_rows() + 2 * config.kv_rows() + 6 * config.hidden + 4 * config.intermediate;
    (4 * (config.vocab + rows)) as u64 * tokens as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::method;
    use crate::kv::kv_dtype;
    use crate::model::preset;

    #[test]
    fn the_2b_model_at_96k_matches_the_arithmetic_of_its_shape() {
        let config = preset("bitnet-2b-4t").unwrap();
        let bf16 = kv_dtype("bf16").unwrap();
        let dense = method("dense").unwrap();
        let f = footprint(&config, HeadFormat::Bf16, bf16, &dense, 98_304, 0, 2);
        // 30 layers x 5 heads x 128 numbers x K and V x 2 bytes = 76,800 bytes a token.
        assert_eq!(f.cache, 76_800 * 98_304);
        assert_eq!(f.kv_per_token, 76_800 * 98_304);
        // 2.084 G ternary weights at 2 bits and a 657 MB head.
        let ternary = 30 * 69_468_160u64 / 4;
        let norms = 4 * (30 * (2 * 2560 + 2560 + 6912) + 2560);
        assert_eq!(f.weights_per_token, ternary + norms + 2 * 128_256 * 2560 + 2 * 2560);
        let window = method("window:sinks=4,window=1020").unwrap();
        let f = footprint(&config, HeadFormat::Bf16, bf16, &window, 98_304, 0, 2);
        assert_eq!(f.kv_per_token, 76_800 * 1024);
    }
    /// The sizes of a course text on long contexts, its formula 2 x heads x head_dim x layers x tokens x 2 bytes.
    #[test]
    fn caches_of_llama_70b_by_heads() {
        let bf16 = kv_dtype("bf16").unwrap();
        let bytes = |text: &str, tokens: usize| {
            let shape = PlainShape::parse(text).unwrap();
            assert!(!shape.weights);
            CacheShape::new(&shape.config, tokens).stored_bytes(bf16, tokens)
        };
        // Taken with 80 heads, as the text does: 3,276,800 bytes a token. It says 13.4 GB for 4K, which are 4,096 tokens.
        let eighty = "layers=80,heads=80,head_dim=128";
        assert_eq!(bytes(eighty, 4096), 13_421_772_800);
        // And 419 GB for 128K: those are 128,000 tokens. 131,072 of them, counted as the 4K are, take 429.5 GB.
        assert_eq!(bytes(eighty, 128_000), 419_430_400_000);
        assert_eq!(bytes(eighty, 131_072), 429_496_729_600);
        // The model has 64 heads, not 80, so without grouping it would take 335.5 GB.
        let heads = "layers=80,heads=64,head_dim=128";
        assert_eq!(bytes(heads, 128_000), 335_544_320_000);
        // With its 8 KV heads 41.9 GB are right (the text: 42 GB), but that is an eighth of the heads, not a tenth.
        let grouped = "layers=80, heads=64, kv_heads=8, head_dim=128";
        assert_eq!(bytes(grouped, 128_000), 41_943_040_000);
        assert_eq!(bytes(grouped, 131_072), 42_949_672_960);
        assert_eq!(bytes(heads, 131_072) / bytes(grouped, 131_072), 8);
        // Multi-query attention: one KV head, 1/64.
        let shared = "layers=80,heads=64,kv_heads=1,head_dim=128";
        assert_eq!(bytes(shared, 131_072) * 64, bytes(heads, 131_072));
        // The text's 32 layers of 32 heads are half a megabyte a token in 16 bits: 64 GiB at 128K, not terabytes.
        assert_eq!(bytes("layers=32,heads=32,head_dim=128", 131_072), 64 << 30);
    }

    #[test]
    fn a_shape_says_what_it_lacks() {
        let error = |text: &str| PlainShape::parse(text).unwrap_err().to_string();
        assert!(error("layers=2,heads=4").contains("at least `layers`, `heads` and `head_dim`"));
        assert!(error("layers=2,heads=4,head_dim=64,head=1").contains("`head=1` is not a number of a shape"));
        assert!(error("layers=2,heads=4,head_dim=x").contains("needs a whole number"));
        assert!(error("layers=2,layers=2").contains("twice"));
        assert!(error("layers=2,heads=4,kv_heads=3,head_dim=64").contains("not a multiple"));
        assert!(error("layers=0,heads=4,head_dim=64").contains("num_hidden_layers"));
        // With all its numbers a shape is the model: that of the 2B preset, less its sub-norms.
        let text = "layers=30,heads=20,kv_heads=5,head_dim=128,hidden=2560,intermediate=6912,vocab=128256";
        let plain = PlainShape::parse(text).unwrap();
        let known = preset("bitnet-2b-4t").unwrap();
        let dense = method("dense").unwrap();
        let of = |config: &ModelConfig| {
            footprint(config, HeadFormat::Bf16, kv_dtype("bf16").unwrap(), &dense, 2048, 0, 1)
        };
        assert!(plain.weights && plain.config.tied_head);
        assert_eq!(of(&known).weights - of(&plain.config).weights, 4 * 30 * (2560 + 6912));
        assert_eq!(of(&known).cache, of(&plain.config).cache);
    }

    #[test]
    fn the_largest_context_is_the_last_that_fits() {
        let bytes = |context: usize| 1000 + 3 * context as u64;
        assert_eq!(largest_context(1002, bytes), None);
        assert_eq!(largest_context(1003, bytes), Some(1));
        assert_eq!(largest_context(4005, bytes), Some(1001));
        assert_eq!(largest_context(u64::MAX, |_| 0), Some(LONGEST - 1));
        let config = preset("bitnet-2b-4t").unwrap();
        let (bf16, dense) = (kv_dtype("bf16").unwrap(), method("dense").unwrap());
        let of = |context| footprint(&config, HeadFormat::Bf16, bf16, &dense, context, 0, 2).resident();
        let most = largest_context(16 << 30, of).unwrap();
        assert!(of(most) <= 16 << 30 && of(most + 1) > 16 << 30, "{most}");
    }
}
