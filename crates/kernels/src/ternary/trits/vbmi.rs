//! Five trits a byte with AVX-512 VBMI: a lookup of 64 entries is one instruction.
//!
//! Fourteen vector operations for 320 weights: a comparison, three lookups and a mask decode a unit, and each group
//! takes its dot products, four of them after a mask. As in the 2-bit product groups keep the scale that their place in
//! the byte gives them; the fifth has the scale of the fourth and shares its accumulator.

use super::super::avx512::finish;
use super::code::{DIRECT_FOUR, ESCAPE, ESCAPED_FIFTH, ESCAPED_FOUR};
use super::{TRIT_COLS, TritTable, TritTiles, UNIT_BYTES, shape};
use crate::ternary::{TILE_ROWS, UNIT};
use std::arch::x86_64::*;

pub(crate) static TABLE: TritTable = TritTable { gemv: Some(gemv), expand };

/// How far ahead of the arithmetic the stream of weights is requested.
const AHEAD: usize = 8192;

/// The tables of the byte code, in registers.
#[derive(Clone, Copy)]
struct Decoder {
    direct: __m512i,
    escaped: __m512i,
    fifth: __m512i,
    escape: __m512i,
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn new() -> Decoder {
        // SAFETY: each table has 64 bytes.
        let load = |table: &[u8; 64]| unsafe { _mm512_loadu_si512(table.as_ptr().cast()) };
        Decoder {
            direct: load(&DIRECT_FOUR),
            escaped: load(&ESCAPED_FOUR),
            fifth: load(&ESCAPED_FIFTH),
            escape: _mm512_set1_epi8(ESCAPE as i8),
        }
    }

    /// The first four groups of a unit, two bits each, and the fifth in the top two bits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn decode(self, w: __m512i) -> (__m512i, __m512i) {
        // Every byte from 192 on, and none below, is at least `ESCAPE`; its two top bits are a mask of the fifth too.
        let escaped = _mm512_cmpge_epu8_mask(w, self.escape);
        let four = _mm512_permutexvar_epi8(w, self.direct);
        let four = _mm512_mask_permutexvar_epi8(four, escaped, w, self.escaped);
        let fifth = _mm512_and_si512(w, self.escape);
        (four, _mm512_mask_permutexvar_epi8(fifth, escaped, w, self.fifth))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn gemv(tiles: TritTiles<'_>, codes: &[i8], sum: i32, scale: f32, out: &mut [f32]) {
    let tile_bytes = tiles.units * UNIT_BYTES;
    let codes = &codes[..tiles.units * TRIT_COLS];
    assert!(tiles.data.len() >= tiles.rows.div_ceil(TILE_ROWS) * tile_bytes);
    for (tile, out) in out[..tiles.rows].chunks_mut(TILE_ROWS).enumerate() {
        // SAFETY: the assertion above leaves a whole tile here, and codes has the activations of each of its units.
        let acc =
            unsafe { tile_sums(tiles.data.as_ptr().add(tile * tile_bytes), tiles.units, codes.as_ptr()) };
        finish(acc, sum, scale, out);
    }
}

/// The four rows of one tile for one token.
///
/// # Safety
/// `tile` is readable for `units` units of four rows, `codes` for `units` times 320 activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
unsafe fn tile_sums(tile: *const u8, units: usize, codes: *const i8) -> [__m512i; TILE_ROWS] {
    let masks =
        [_mm512_set1_epi8(3), _mm512_set1_epi8(3 << 2), _mm512_set1_epi8(3 << 4), _mm512_set1_epi8(-64)];
    let decoder = Decoder::new();
    // At most 2 * 128 * 128 * 4 a unit in the last accumulator: exact to more columns than are allowed.
    let mut acc = [[_mm512_setzero_si512(); 4]; TILE_ROWS];
    for unit in 0..units {
        let mut a = [_mm512_setzero_si512(); 5];
        for g in 0..5 {
            // SAFETY: unit < units and g < 5: 64 codes of this unit.
            a[g] = unsafe { _mm512_loadu_si512(codes.add(unit * TRIT_COLS + g * UNIT).cast()) };
        }
        for row in 0..TILE_ROWS {
            let at = tile.wrapping_add(unit * UNIT_BYTES + row * UNIT);
            // A request beyond the end of the matrix is harmless: prefetches do not fault.
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
            // SAFETY: unit < units; a row of a unit has 64 bytes.
            let (four, fifth) = decoder.decode(unsafe { _mm512_loadu_si512(at.cast()) });
            for g in 0..4 {
                acc[row][g] = _mm512_dpbusd_epi32(acc[row][g], _mm512_and_si512(four, masks[g]), a[g]);
            }
            acc[row][3] = _mm512_dpbusd_epi32(acc[row][3], fifth, a[4]);
        }
    }
    let mut sums = [_mm512_setzero_si512(); TILE_ROWS];
    for row in 0..TILE_ROWS {
        let low = _mm512_add_epi32(acc[row][0], _mm512_srai_epi32::<2>(acc[row][1]));
        let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(acc[row][2]), _mm512_srai_epi32::<6>(acc[row][3]));
        sums[row] = _mm512_add_epi32(low, high);
    }
    sums
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn expand(tile: &[u8], out: &mut [u8]) {
    let decoder = Decoder::new();
    shape::expand_with(tile, out, |unit, four, fifth| {
        // SAFETY: all three have 64 bytes.
        unsafe {
            let (f, fifths) = decoder.decode(_mm512_loadu_si512(unit.as_ptr().cast()));
            _mm512_storeu_si512(four.as_mut_ptr().cast(), f);
            // Nothing crosses into the next byte: the low six bits are zero.
            _mm512_storeu_si512(fifth.as_mut_ptr().cast(), _mm512_srli_epi16::<6>(fifths));
        }
    });
}
