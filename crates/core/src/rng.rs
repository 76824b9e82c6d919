//! The counter-based random numbers behind every seed: the same on every machine, in any order, for ever.

/// Hash of (`seed`, `index`): two rounds of the SplitMix64 finaliser (Steele, Lea, Flood 2014) over their combination.
pub(crate) fn mix(seed: u64, index: u64) -> u64 {
    finalise(finalise(seed.wrapping_add(0x9E37_79B9_7F4A_7C15)) ^ index.wrapping_mul(0xD134_2543_DE82_EF95))
}

fn finalise(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::mix;

    #[test]
    fn the_stream_is_fixed() {
        assert_eq!([mix(0, 0), mix(1, 0), mix(1, 1)], GOLDEN);
        assert_ne!(mix(1, 2), mix(2, 1));
    }

    const GOLDEN: [u64; 3] =
        [5_197_578_548_964_807_871, 15_916_886_550_466_581_944, 16_321_219_242_549_553_506];
}
