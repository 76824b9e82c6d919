//! The keys of a GGUF file: which architecture it is, its shape, and its feed-forward non-linearity.

use std::path::Path;

use crate::checkpoint::OpenOptions;
use crate::error::{Error, Result};
use crate::gguf::{GgufError, Header, Metadata};
use crate::model::{Activation, ModelConfig, preset};

/// What distinguishes an architecture of the container.
pub(crate) struct Architecture {
    /// Value of `general.architecture` and prefix of the keys.
    pub(crate) name: &'static str,
    /// The one non-linearity that models of this architecture were trained with; none where there were several.
    pub(crate) activation: Option<Activation>,
    /// RMSNorms before the output and down projections.
    pub(crate) sub_norms: bool,
    /// Rows of the query and key projections have the two halves of a rotary pair side by side.
    pub(crate) interleaved: bool,
}

/// Every architecture that is read. Sources: the converters of bitnet.cpp (`bitnet-25`, `bitnet-b1.58`: 2B-4T and its
/// first upload) and of llama.cpp (`bitnet`: the 1bitLLM models, and 2B-4T too; `llama`: Falcon3 and Llama 3 at 1.58
/// bits).
pub(crate) const ARCHITECTURES: [Architecture; 4] = [
    Architecture { name: "bitnet", activation: None, sub_norms: true, interleaved: false },
    Architecture {
        name: "bitnet-25",
        activation: Some(Activation::Relu2),
        sub_norms: true,
        interleaved: false,
    },
    Architecture {
        name: "bitnet-b1.58",
        activation: Some(Activation::Relu2),
        sub_norms: true,
        interleaved: false,
    },
    Architecture { name: "llama", activation: Some(Activation::Silu), sub_norms: false, interleaved: true },
];

/// Keys under the architecture's prefix that have been used for the non-linearity.
pub(crate) const ACTIVATION_KEYS: [&str; 2] = ["hidden_activation", "hidden_act"];

/// Reads the keys of one file.
pub(super) struct Keys<'a> {
    path: &'a Path,
    metadata: &'a Metadata,
    pub(super) architecture: &'static Architecture,
}

/// Puts the file's name to an error of the container.
pub(super) fn at(path: &Path) -> impl Fn(GgufError) -> Error + '_ {
    move |source| Error::Gguf { path: path.to_path_buf(), source }
}

impl<'a> Keys<'a> {
    pub(super) fn of(path: &'a Path, header: &'a Header) -> Result<Self> {
        let metadata = &header.metadata;
        let fail = |reason: String| Error::Config { path: path.to_path_buf(), reason };
        // First of all: only one of the parts has the keys of the model.
        if let Some(parts) = metadata.u64("split.count").map_err(at(path))?.filter(|parts| *parts > 1) {
            let part = metadata.u64("split.no").map_err(at(path))?.map_or(0, |no| no.saturating_add(1));
            return Err(fail(format!(
                "is part {part} of a model split into {parts} files (split.count); join them with llama-gguf-split --merge"
            )));
        }
        let name = metadata.str("general.architecture").map_err(at(path))?;
        let name = name.ok_or_else(|| fail("the key general.architecture is missing".into()))?;
        let Some(architecture) = ARCHITECTURES.iter().find(|a| a.name == name) else {
            let known = ARCHITECTURES.map(|a| a.name).join(", ");
            return Err(fail(format!("architecture `{name}` is not supported; supported are {known}")));
        };
        Ok(Keys { path, metadata, architecture })
    }

    fn fail(&self, reason: String) -> Error {
        Error::Config { path: self.path.to_path_buf(), reason }
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name)
    }

    /// A whole number that a dimension can be.
    fn count(&self, name: &str) -> Result<Option<usize>> {
        let key = self.key(name);
        match self.metadata.u64(&key).map_err(at(self.path))? {
            Some(value) => match usize::try_from(value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(self.fail(format!("{key} is {value}, which no dimension can be"))),
            },
            None => Ok(None),
        }
    }

    fn required(&self, name: &str) -> Result<usize> {
        self.count(name)?.ok_or_else(|| self.fail(format!("the key {} is missing", self.key(name))))
    }

    fn float(&self, name: &str) -> Result<Option<f32>> {
        self.metadata.f32(&self.key(name)).map_err(at(self.path))
    }

    /// The shape; `vocab` is the number of rows of the embedding, `tied` whether the file has no head of its own.
    pub(super) fn config(&self, vocab: usize, tied: bool, options: &OpenOptions) -> Result<ModelConfig> {
        self.refuse_what_is_not_run()?;
        let (hidden, heads) = (self.required("embedding_length")?, self.required("attention.head_count")?);
        let head_dim = match self.count("attention.key_length")? {
            Some(d) => d,
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                return Err(self.fail(format!(
                    "{} ({hidden}) is not a multiple of {} ({heads}) and {} is not given",
                    self.key("embedding_length"),
                    self.key("attention.head_count"),
                    self.key("attention.key_length")
                )));
            }
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(found) = self.count(name)?.filter(|found| *found != head_dim) {
                let reason = format!(
                    "{} is {found}; only {head_dim}, the width of a head, is supported",
                    self.key(name)
                );
                return Err(self.fail(reason));
            }
        }
        if let Some(found) = self.count("vocab_size")?.filter(|found| *found != vocab) {
            return Err(self
                .fail(format!("{} is {found}, but the embedding has {vocab} rows", self.key("vocab_size"))));
        }
        let mut config = ModelConfig {
            name: self.path.display().to_string(),
            vocab,
            hidden,
            intermediate: self.required("feed_forward_length")?,
            layers: self.required("block_count")?,
            heads,
            kv_heads: self.count("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            // The defaults of the container's own specification.
            rope_theta: f64::from(self.float("rope.freq_base")?.unwrap_or(10_000.0)),
            rms_eps: self.float("attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
                self.fail(format!("the key {} is missing", self.key("attention.layer_norm_rms_epsilon")))
            })?,
            activation: Activation::Relu2,
            sub_norms: self.architecture.sub_norms,
            tied_head: tied,
            trained_positions: self.count("context_length")?.unwrap_or(0),
        };
        config.check().map_err(|reason| self.fail(reason))?;
        config.activation = self.activation(&config, options)?;
        Ok(config)
    }

    fn refuse_what_is_not_run(&self) -> Result<()> {
        let scaling = self.key("rope.scaling.type");
        if let Some(kind) = self.metadata.str(&scaling).map_err(at(self.path))?.filter(|kind| *kind != "none")
        {
            return Err(
                self.fail(format!("{scaling} is `{kind}`; only the plain rotary embedding is supported"))
            );
        }
        // A factor without a type means linear scaling in llama.cpp, where 0 stands for none.
        for name in ["rope.scaling.factor", "rope.scale_linear"] {
            if let Some(found) = self.float(name)?.filter(|found| *found != 0.0 && *found != 1.0) {
                return Err(self.fail(format!(
                    "{} is {found}; only the plain rotary embedding (1) is supported",
                    self.key(name)
                )));
            }
        }
        for name in ["expert_count", "attention.sliding_window"] {
            if let Some(found) = self.count(name)?.filter(|found| *found != 0) {
                return Err(
                    self.fail(format!("{} is {found}; such models are not supported", self.key(name)))
                );
            }
        }
        Ok(())
    }

    /// The file's own key decides; else what the architecture was trained with, which a flag cannot change either; else
    /// the flag; else the family, where the shape shows it. Never a guess: the same file runs without complaint with
    /// either, and one of them writes nonsense.
    fn activation(&self, config: &ModelConfig, options: &OpenOptions) -> Result<Activation> {
        let told = match self.activation_key()? {
            Some((key, activation)) => Some((key, activation)),
            None => self.architecture.activation.map(|a| (self.said_by_architecture(), a)),
        };
        match (told, options.activation) {
            (Some((why, known)), Some(asked)) if known != asked => Err(self.fail(format!(
                "the activation asked for is {}, but {why} means {}",
                asked.as_str(),
                known.as_str()
            ))),
            (Some((_, known)), _) => Ok(known),
            (None, Some(asked)) => Ok(asked),
            (None, None) => by_shape(config).ok_or_else(|| {
                self.fail(format!(
                    "does not say its feed-forward activation, and {} has been used with two: pass --activation relu2 \
                     (models of the 2B-4T kind) or --activation silu (models of the 1bitLLM kind)",
                    self.said_by_architecture()
                ))
            }),
        }
    }

    fn said_by_architecture(&self) -> String {
        format!("architecture `{}`", self.architecture.name)
    }

    /// The key that names the activation, with what it says; two that contradict each other are refused.
    fn activation_key(&self) -> Result<Option<(String, Activation)>> {
        let mut told: Option<(String, Activation)> = None;
        for name in ACTIVATION_KEYS {
            let key = self.key(name);
            let Some(value) = self.metadata.str(&key).map_err(at(self.path))? else { continue };
            let found = Activation::parse(value)
                .ok_or_else(|| self.fail(format!("{key} is `{value}`; supported are relu2 and silu")))?;
            match &told {
                Some((first, said)) if *said != found => {
                    return Err(self.fail(format!(
                        "{first} says {} and {key} says {}; they must agree",
                        said.as_str(),
                        found.as_str()
                    )));
                }
                Some(_) => {}
                None => told = Some((key, found)),
            }
        }
        Ok(told)
    }
}

/// Two families share the architecture `bitnet`. The models of 1bitLLM have no grouped heads and the vocabulary of LLaMA
/// (32000 tokens, 32002 with two of their own); 2B-4T has its shape.
fn by_shape(config: &ModelConfig) -> Option<Activation> {
    if config.kv_heads == config.heads && matches!(config.vocab, 32_000 | 32_002) {
        Some(Activation::Silu)
    } else {
        is_2b_4t(config).then_some(Activation::Relu2)
    }
}

/// Whether `config` is the published 2B-4T.
fn is_2b_4t(config: &ModelConfig) -> bool {
    let shape =
        |c: &ModelConfig| (c.vocab, c.hidden, c.intermediate, c.layers, c.heads, c.kv_heads, c.head_dim);
    preset("bitnet-2b-4t").is_ok_and(|published| shape(&published) == shape(config))
}
