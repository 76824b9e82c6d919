//! Words for the two byte orders of I2_S, as flags, keys and messages write them.

use crate::formats::I2sLayout;

impl I2sLayout {
    /// `x86` or `arm`.
    pub fn as_str(self) -> &'static str {
        match self {
            I2sLayout::X86 => "x86",
            I2sLayout::Arm => "arm",
        }
    }

    /// The layout called `name`.
    pub fn parse(name: &str) -> Option<Self> {
        [I2sLayout::X86, I2sLayout::Arm].into_iter().find(|layout| layout.as_str() == name)
    }
}
