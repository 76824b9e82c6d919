//! Flags that every verb with a model file shares: what the file does not say about itself.

use clap::Args;
use longbit::formats::I2sLayout;
use longbit::{Activation, OpenOptions};

#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct FileArgs {
    /// Byte order of I2_S tensors, for GGUF files that do not say it.
    #[arg(long, value_name = "LAYOUT", value_parser = layout)]
    i2s: Option<I2sLayout>,
    /// Feed-forward activation, for GGUF files that do not say it: relu2 or silu.
    #[arg(long, value_name = "NAME", value_parser = activation)]
    activation: Option<Activation>,
}

impl FileArgs {
    pub(crate) fn options(self) -> OpenOptions {
        OpenOptions { i2s: self.i2s, activation: self.activation }
    }
}

fn layout(name: &str) -> Result<I2sLayout, String> {
    I2sLayout::parse(name).ok_or_else(|| "it is x86 or arm".into())
}

fn activation(name: &str) -> Result<Activation, String> {
    Activation::parse(name).ok_or_else(|| "it is relu2 or silu".into())
}
