//! How the integer products are cut into blocks, from the caches of this processor.
//!
//! A product of many tokens goes through three levels. A *register tile* is 4 rows by a few tokens. A *token group* (the
//! tokens of a register tile) keeps its activations in the first-level cache, over as many columns as fit three quarters of it,
//! while the rows of a *row block* stream by; the weights of a row block stay in a quarter of the second-level cache
//! while all token groups pass. So per register tile and 64 columns only four lines of weights come from the second
//! level, and every weight comes from memory once.

use super::{BLOCK_BYTES, BLOCK_COLS, TILE_ROWS};
use std::sync::OnceLock;

/// From how many tokens on the codes of a row block are unpacked to one a byte before the tokens pass. Unpacking costs
/// about as much as the dot products of one or two tokens, and spares an instruction a row and register tile.
const UNPACK_TOKENS: usize = 128;

/// What the block sizes are derived from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    /// Bytes of the first-level data cache.
    pub(crate) l1: usize,
    /// Bytes of the second-level cache.
    pub(crate) l2: usize,
    /// Whether a stream that is read once should be requested ahead of the arithmetic, line by line. It pays where the
    /// hardware prefetcher stops at every 4 KiB; on AMD's cores (Zen 4), which go on over that border, the requests take a
    /// quarter of the bandwidth of one token.
    pub(crate) request_ahead: bool,
}

impl Machine {
    /// What is assumed where the processor does not say.
    const USUAL: Machine = Machine { l1: 32 << 10, l2: 1 << 20, request_ahead: true };

    /// This processor.
    pub(crate) fn get() -> Machine {
        static MACHINE: OnceLock<Machine> = OnceLock::new();
        *MACHINE.get_or_init(Machine::ask)
    }

    fn ask() -> Machine {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        /// Deterministic cache parameters, Intel.
        const INTEL: u32 = 4;
        /// Cache properties, AMD: the same fields.
        const AMD: u32 = 0x8000_001d;
        let (first, extended) = (__cpuid(0), __cpuid(0x8000_0000));
        let amd = (first.ebx, first.edx, first.ecx) == (0x6874_7541, 0x6974_6e65, 0x444d_4163);
        let mut machine = Machine { request_ahead: !amd, ..Machine::USUAL };
        let leaf = match amd {
            true if extended.eax >= AMD => AMD,
            false if first.eax >= INTEL => INTEL,
            _ => return machine,
        };
        for index in 0..8 {
            let cache = __cpuid_count(leaf, index);
            let (kind, level) = (cache.eax & 31, cache.eax >> 5 & 7);
            // Ways, partitions, line size and sets, each stored less one.
            let ways = (cache.ebx >> 22) as usize + 1;
            let partitions = (cache.ebx >> 12 & 0x3ff) as usize + 1;
            let line = (cache.ebx & 0xfff) as usize + 1;
            let bytes = ways * partitions * line * (cache.ecx as usize + 1);
            match (kind, level) {
                (0, _) => break,
                // Data, or both. What a hypervisor may make up is kept within what has been built.
                (1 | 3, 1) => machine.l1 = bytes.clamp(16 << 10, 256 << 10),
                (1 | 3, 2) => machine.l2 = bytes.clamp(256 << 10, 4 << 20),
                _ => {}
            }
        }
        machine
    }
}

/// The blocks of one product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blocking {
    /// Whether row blocks are unpacked to one code a byte.
    pub(crate) unpack: bool,
    /// Tiles of a row block.
    pub(crate) tiles: usize,
    /// Token groups, of sizes that differ by one at most.
    pub(crate) groups: usize,
    /// Blocks of columns that a token group keeps in the first-level cache at a time.
    pub(crate) part_blocks: usize,
    /// Whether the first group requests the weights ahead of the arithmetic.
    pub(crate) request_ahead: bool,
}

impl Blocking {
    /// For `tokens` tokens of `blocks` blocks of columns, and register tiles of `most` tokens.
    pub(crate) fn new(machine: Machine, tokens: usize, blocks: usize, most: usize) -> Blocking {
        let groups = tokens.div_ceil(most);
        let unpack = tokens >= UNPACK_TOKENS;
        // Columns of a group, and how much of the first-level cache their codes may take.
        let (group_cols, room) = (tokens.div_ceil(groups.max(1)).max(1) * BLOCK_COLS, machine.l1 / 4 * 3);
        // Parts of about one size. Few tokens are bound by memory: parts would only interrupt the stream.
        let fit = if unpack { (room / group_cols).max(1) } else { usize::MAX };
        let part_blocks = blocks.div_ceil(blocks.div_ceil(fit).max(1)).max(1);
        // Loads of codes that miss the first-level cache keep any hardware prefetcher from following the weights.
        let request_ahead = machine.request_ahead || blocks * group_cols > machine.l1 / 8 * 3;
        let tile_bytes = blocks * BLOCK_BYTES * if unpack { TILE_ROWS } else { 1 };
        // One group reads every weight once: a block of rows would only interrupt the stream.
        let tiles = if groups == 1 { usize::MAX } else { (machine.l2 / 4 / tile_bytes.max(1)).max(1) };
        Blocking { unpack, tiles, groups, part_blocks, request_ahead }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_has_caches_of_a_plausible_size() {
        let machine = Machine::get();
        assert!(machine.l1 >= 16 << 10 && machine.l2 >= 256 << 10 && machine.l1 < machine.l2, "{machine:?}");
    }

    #[test]
    fn blocks_fit_the_caches() {
        let machine = Machine { l1: 32 << 10, l2: 1 << 20, request_ahead: false };
        for cols in [256, 2560, 4096, 6912, 65536] {
            for tokens in [2, 6, 7, 127, 128, 512] {
                for most in [6, 3] {
                    let blocks = cols / BLOCK_COLS;
                    let b = Blocking::new(machine, tokens, blocks, most);
                    assert!((1..=blocks).contains(&b.part_blocks), "{b:?}");
                    let most_in_group = tokens.div_ceil(b.groups);
                    assert!(
                        !b.unpack || b.part_blocks * BLOCK_COLS * most_in_group <= machine.l1 / 4 * 3,
                        "{b:?}"
                    );
                    assert!(b.groups * most >= tokens && (b.groups - 1) * most < tokens, "{b:?}");
                    let bytes = blocks * BLOCK_BYTES * if b.unpack { 4 } else { 1 };
                    let whole = b.groups == 1 && b.tiles == usize::MAX;
                    assert!(whole || b.tiles == 1 || b.tiles * bytes <= machine.l2 / 4, "{b:?}");
                }
            }
        }
        let b = Blocking::new(machine, 512, 27, 6);
        assert_eq!((b.part_blocks, b.tiles, b.groups), (14, 9, 86));
    }
}
