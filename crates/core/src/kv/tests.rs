//! What holds for every KV dtype.

use super::*;
use crate::error::Error;

/// Every format, as it is and with each option.
pub(super) fn dtypes() -> Vec<KvDtype> {
    let names = KV_FORMATS.iter().flat_map(|f| {
        ["", "+plain", "+rotate", "+centre", "+rotate+centre"].map(|options| format!("{}{options}", f.name))
    });
    let mut all: Vec<KvDtype> = names.map(|name| kv_dtype(&name).unwrap()).collect();
    all.dedup();
    all
}

fn cache(dtype: KvDtype, head_dim: usize, capacity: usize) -> KvCache {
    let shape = CacheShape { layers: 1, kv_heads: 1, head_dim, capacity };
    KvCache::new(shape, dtype, Kernels::best()).unwrap()
}

/// `n` rows with an offset, an outlier channel and a small first row.
pub(super) fn rows(n: usize, d: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).max(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 - 0.5
    };
    let at = |i: usize, x: f32| match (i / d, i % d) {
        (0, _) => 0.02 * x,
        (_, 3) => 5.0 + x,
        (_, c) => x + 0.3 * (c as f32).sin(),
    };
    (0..n * d).map(|i| at(i, 2.0 * next())).collect()
}

/// All stored bytes of the tokens of a head.
pub(super) fn bytes(kv: &KvHead) -> Vec<u8> {
    let parts = |run: Range<usize>| -> Vec<u8> {
        kv.key_parts(&run).chain(kv.value_parts(&run)).flatten().copied().collect()
    };
    kv.runs(0..kv.len()).flat_map(parts).collect()
}

#[test]
fn runs_end_at_pages_and_cover() {
    let cache = cache(kv_dtype("f32").unwrap(), 8, 1024);
    cache.head_mut(0, 0).append(&rows(770, 8, 1), &rows(770, 8, 2)).unwrap();
    let kv = cache.head(0, 0);
    let runs: Vec<_> = kv.runs(250..770).collect();
    assert_eq!(runs, [250..256, 256..512, 512..768, 768..770]);
    assert_eq!(kv.runs(5..5).count(), 0);
}

#[test]
fn the_first_tokens_are_a_run_where_weights_are_rounded() {
    for (name, cut) in
        [("bf16", false), ("q8_0", true), ("int8+plain", true), ("int8", true), ("kivi4", false)]
            .into_iter()
            .chain([("k=bf16,v=q4_0", true), ("int8-channel", false)])
    {
        let cache = cache(kv_dtype(name).unwrap(), 64, 1024);
        cache.head_mut(0, 0).append(&rows(700, 64, 1), &rows(700, 64, 2)).unwrap();
        let kv = cache.head(0, 0);
        let ends: Vec<_> = kv.runs(3..100).map(|run| run.end).collect();
        assert_eq!(ends.contains(&32), cut, "{name}: {ends:?}");
        assert_eq!(ends.last(), Some(&100), "{name}: {ends:?}");
    }
}

#[test]
fn appending_in_pieces_gives_the_same_bytes() {
    let (n, d) = (800, 64);
    let (keys, values) = (rows(n, d, 3), rows(n, d, 4));
    for dtype in dtypes() {
        let whole = cache(dtype, d, n);
        whole.head_mut(0, 0).append(&keys, &values).unwrap();
        let expected = bytes(&whole.head(0, 0));
        for step in [1, 7, 31, 255, 256, 257] {
            let pieces = cache(dtype, d, n);
            for (keys, values) in keys.chunks(step * d).zip(values.chunks(step * d)) {
                pieces.head_mut(0, 0).append(keys, values).unwrap();
            }
            assert!(bytes(&pieces.head(0, 0)) == expected, "{dtype}: {step} rows at a time");
        }
    }
}

/// Rewinding and appending the same rows again gives the bytes of a cache that was never rewound.
#[test]
fn a_rewind_leaves_no_trace() {
    let (n, d) = (700, 32);
    let (keys, values) = (rows(n, d, 5), rows(n, d, 6));
    let (other_keys, other_values) = (rows(n, d, 7), rows(n, d, 8));
    for dtype in dtypes() {
        for (peak, back) in
            [(700, 699), (700, 600), (520, 300), (300, 250), (257, 256), (256, 1), (60, 20), (33, 0)]
        {
            let straight = cache(dtype, d, n);
            straight.head_mut(0, 0).append(&keys[..back * d], &values[..back * d]).unwrap();
            let rewound = cache(dtype, d, n);
            let mut kv = rewound.head_mut(0, 0);
            kv.append(&keys[..back * d], &values[..back * d]).unwrap();
            kv.append(&other_keys[back * d..peak * d], &other_values[back * d..peak * d]).unwrap();
            kv.truncate(back);
            drop(kv);
            let label = format!("{dtype}: {peak} -> {back}");
            assert!(bytes(&straight.head(0, 0)) == bytes(&rewound.head(0, 0)), "{label}");
            for cache in [&straight, &rewound] {
                cache.head_mut(0, 0).append(&keys[back * d..], &values[back * d..]).unwrap();
            }
            assert!(bytes(&straight.head(0, 0)) == bytes(&rewound.head(0, 0)), "{label}, and on");
        }
    }
}

#[test]
fn a_full_cache_refuses_and_keeps_what_it_has() {
    for dtype in dtypes() {
        let cache = cache(dtype, 32, 256);
        let rows = vec![1.0; 200 * 32];
        cache.head_mut(0, 0).append(&rows, &rows).unwrap();
        let error = cache.head_mut(0, 0).append(&rows, &rows).unwrap_err();
        assert!(matches!(error, Error::CacheFull { capacity: 256, wanted: 400 }), "{error}");
        assert_eq!(cache.head(0, 0).len(), 200);
    }
}

#[test]
fn what_cannot_be_stored_is_refused_with_its_place() {
    for dtype in dtypes() {
        for (bad, at) in [(f32::NAN, 0), (f32::INFINITY, 37), (f32::NEG_INFINITY, 95)] {
            let cache = cache(dtype, 32, 256);
            let good = rows(3, 32, 9);
            cache.head_mut(0, 0).append(&good, &good).unwrap();
            let mut wrong = good.clone();
            wrong[at] = bad;
            for (keys, values, what) in [(&wrong, &good, "key"), (&good, &wrong, "value")] {
                let error = cache.head_mut(0, 0).append(keys, values).unwrap_err().to_string();
                let place = format!("layer 0, KV head 0, position {}: a {what} is", 3 + at / 32);
                assert!(error.contains(&place) && error.contains("damaged"), "{dtype}: {error}");
                assert_eq!(cache.head(0, 0).len(), 3);
            }
        }
    }
}

/// Rows of any length, however odd, are stored and read back, or refused with the length and what would do.
#[test]
fn every_row_length_is_stored_or_refused() {
    for dtype in dtypes() {
        for d in (1..=33).chain([36, 40, 48, 63, 64, 96, 100, 511, 512, 513, 520, 1024]) {
            if let Err(error) = dtype.check(d) {
                let error = error.to_string();
                let helps = error.contains("+plain") || error.contains("use bf16");
                assert!(helps && error.contains(&format!("{d}")), "{dtype}: {error}");
                continue;
            }
            let cache = cache(dtype, d, 256);
            let rows = rows(40, d, 5);
            let mut kv = cache.head_mut(0, 0);
            kv.append(&rows, &rows).unwrap();
            let mut out = vec![f32::NAN; rows.len()];
            kv.decode_keys(0..40, &mut out);
            assert!(out.iter().all(|x| x.is_finite()), "{dtype}, rows of {d}");
            kv.decode_values(0..40, &mut out);
            assert!(out.iter().all(|x| x.is_finite()), "{dtype}, rows of {d}");
        }
    }
}

/// Scores and weighted sums of the stored rows are those of the decoded rows.
#[test]
fn attention_reads_what_decoding_gives() {
    let (n, d, group) = (700, 64, 3);
    let (keys, values) = (rows(n, d, 10), rows(n, d, 11));
    let queries = rows(group + 1, d, 12)[d..].to_vec();
    for dtype in dtypes() {
        let cache = cache(dtype, d, n);
        cache.head_mut(0, 0).append(&keys, &values).unwrap();
        let kv = cache.head(0, 0);
        let mut queries = queries.clone();
        kv.rotate_queries(&mut queries);
        let mut scratch = KvScratch::default();
        kv.prepare(&queries, &mut scratch);
        for span in [0..n, 3..41, 30..33, 250..600, 699..700] {
            let mut decoded = vec![0.0; span.len() * d];
            kv.decode_keys(span.clone(), &mut decoded);
            let mut values = vec![0.0; span.len() * d];
            kv.decode_values(span.clone(), &mut values);
            let mut at = 0;
            for run in kv.runs(span.clone()) {
                let mut out = vec![0.0; group * run.len()];
                kv.scores(&queries, &run, &[], &mut scratch, &mut out);
                let weights: Vec<f32> = (0..out.len()).map(|i| 1.0 / (1 + i % 7) as f32).collect();
                let mut acc = vec![0.25; group * d];
                kv.accumulate(&weights, &run, &[], &mut scratch, &mut acc);
                for h in 0..group {
                    let query = &queries[h * d..(h + 1) * d];
                    let size: f32 = query.iter().map(|x| x * x).sum::<f32>().sqrt();
                    for t in 0..run.len() {
                        let row = &decoded[(at + t) * d..(at + t + 1) * d];
                        let exact: f64 =
                            query.iter().zip(row).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                        let row_size: f32 = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                        let error = (f64::from(out[h * run.len() + t]) - exact).abs();
                        // Formats of few bits meet queries of 8 bits: half a step of max|q| / 127 for each number.
                        let most = query.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                        let eight = most / 254.0 * row.iter().map(|x| x.abs()).sum::<f32>();
                        let few = dtype.keys.codec().page_bytes(128) < PAGE_TOKENS * 120;
                        let bound = 2e-4 * size * row_size + if few { eight } else { 0.0 };
                        assert!(
                            error <= f64::from(bound),
                            "{dtype}: score {run:?} {t}: {error} over {bound}"
                        );
                    }
                    for i in 0..d {
                        let exact: f64 = (0..run.len())
                            .map(|t| {
                                f64::from(weights[h * run.len() + t]) * f64::from(values[(at + t) * d + i])
                            })
                            .sum();
                        let error = (f64::from(acc[h * d + i]) - 0.25 - exact).abs();
                        assert!(error <= 1e-3 * run.len() as f64, "{dtype}: value {run:?} {i}: {error}");
                    }
                }
                at += run.len();
            }
        }
    }
}

/// Exact attention of one query over 600 structured rows in a dtype.
fn attend(name: &str) -> Vec<f64> {
    let (n, d) = (600, 64);
    let (keys, values) = (rows(n, d, 13), rows(n, d, 14));
    let mut query = rows(2, d, 15)[d..].to_vec();
    let cache = cache(kv_dtype(name).unwrap(), d, n);
    cache.head_mut(0, 0).append(&keys, &values).unwrap();
    let kv = cache.head(0, 0);
    kv.rotate_queries(&mut query);
    let (mut scratch, mut acc, mut sum) = (KvScratch::default(), vec![0.0; d], 0.0);
    kv.prepare(&query, &mut scratch);
    for run in kv.runs(0..n) {
        let mut weights = vec![0.0; run.len()];
        kv.scores(&query, &run, &[], &mut scratch, &mut weights);
        weights.iter_mut().for_each(|x| *x = (0.2 * *x - 5.0).exp());
        sum += weights.iter().sum::<f32>();
        kv.accumulate(&weights, &run, &[], &mut scratch, &mut acc);
    }
    kv.restore_outputs(&mut acc);
    acc.iter().map(|x| f64::from(x / sum)).collect()
}

/// Relative L2 distance of the output from that of f32.
fn distance(name: &str) -> f64 {
    let (exact, other) = (attend("f32"), attend(name));
    let off: f64 = exact.iter().zip(&other).map(|(a, b)| (a - b) * (a - b)).sum();
    (off / exact.iter().map(|x| x * x).sum::<f64>()).sqrt()
}

/// Rotation and centring change exact attention by no more than rounding.
#[test]
fn rotation_and_centring_are_exact_for_attention() {
    for name in ["f32+rotate", "k=f32+centre,v=f32", "k=f32,v=f32+centre", "f32+rotate+centre"] {
        // The first rows of a centred side are exact in a format of their own.
        let found = distance(name);
        assert!(found <= 1e-4, "{name}: {found}");
    }
}

/// Outputs are as near as the bits allow, in the order that the field reports, and rotation and centring help where rows have
/// an outlier channel and an offset.
#[test]
fn errors_are_in_order() {
    for (name, most) in [
        ("f16", 2e-4),
        ("bf16", 1.5e-3),
        ("int8", 0.0015),
        ("int8+plain", 0.004),
        ("int8-channel", 0.003),
        ("q8_0", 0.002),
        ("planes8", 0.0015),
        ("fp8-e4m3", 0.02),
        ("fp8-e4m3-row", 0.01),
        ("fp8-e5m2", 0.04),
        ("fp8-e5m2-row", 0.02),
        ("int4", 0.015),
        ("kivi4", 0.02),
        ("lm4", 0.03),
        ("lm4+centre", 0.02),
        ("q4_0", 0.04),
    ] {
        let found = distance(name);
        assert!(found <= most, "{name}: {found} over {most}");
    }
    for (better, worse) in [
        ("f16", "bf16"),
        ("bf16", "int8+plain"),
        ("int8", "int8+plain"),
        ("int8+plain", "fp8-e4m3"),
        ("fp8-e4m3-row", "fp8-e5m2-row"),
        ("int8-channel", "int8+plain"),
        ("int4", "q4_0"),
        ("q4_0+rotate+centre", "q4_0"),
        ("lm4+centre", "lm4"),
        ("lm4", "lm3"),
        ("lm3", "lm2"),
        ("kivi4", "kivi2"),
    ] {
        let (near, far) = (distance(better), distance(worse));
        assert!(near < far, "{better}: {near}, {worse}: {far}");
    }
}

/// The largest error that a format states for number `i` of `row`, one of `rows` that are encoded together.
fn bound(name: &str, keys: bool, rows: &[f32], row: &[f32], i: usize) -> f32 {
    let d = row.len();
    let largest = |x: &[f32]| x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let block = &row[i / 32 * 32..d.min(i / 32 * 32 + 32)];
    let channel: Vec<f32> = rows[i..].iter().step_by(d).copied().collect();
    let spread = |x: &[f32]| {
        let (least, most) = x.iter().fold((f32::MAX, f32::MIN), |(a, b), &x| (a.min(x), b.max(x)));
        (most - least, least.abs().max(most.abs()))
    };
    let float =
        |mantissa: i32, least: i32| (row[i].abs() * 2f32.powi(-mantissa - 1)).max(2f32.powi(least - 1));
    let kivi = |steps: f32, x: &[f32]| {
        let (spread, most) = spread(x);
        // Half a step; the two f16 numbers, once for the smallest and up to `steps` times for the step.
        spread / steps / 2.0 * 1.001 + (spread + most) * 2f32.powi(-11) + (steps + 1.0) * 2f32.powi(-25)
    };
    let mean_square = (row.iter().map(|x| x * x).sum::<f32>() / d as f32).sqrt();
    let lm = |levels: &[f32], gap: f32| {
        let last = levels[levels.len() - 1];
        (gap / 2.0 * 1.02 * mean_square).max(row[i].abs() - last * mean_square * 0.99) + 1e-3 * row[i].abs()
    };
    match (name, keys) {
        ("f32", _) => 0.0,
        ("f16", _) => float(10, -24),
        ("bf16", _) => float(7, -133),
        ("fp8-e4m3", _) => {
            if row[i].abs() > 448.0 {
                row[i].abs() - 448.0
            } else {
                float(3, -9)
            }
        }
        ("fp8-e5m2", _) => {
            if row[i].abs() > 57344.0 {
                row[i].abs() - 57344.0
            } else {
                float(2, -16)
            }
        }
        ("fp8-e4m3-row", _) => {
            (row[i].abs() / 16.0).max(largest(row) * 1.01 / 448.0 * 2f32.powi(-10)) * 1.0001
        }
        ("fp8-e5m2-row", _) => {
            (row[i].abs() / 8.0).max(largest(row) * 1.01 / 57344.0 * 2f32.powi(-17)) * 1.0001
        }
        ("int8-channel", true) => largest(&channel) * 1.008 / 254.0 * 1.0001,
        ("int8" | "int8-channel" | "planes8", _) => largest(row) * 1.008 / 254.0 * 1.0001,
        ("q8_0", _) => largest(block) * 0.0045 + 127.0 * 2f32.powi(-25),
        ("q4_0", _) => largest(block) * 0.126 + 8.0 * 2f32.powi(-25),
        ("int4", _) => largest(block) * 0.185,
        ("kivi4", true) => kivi(15.0, &channel),
        ("kivi4", false) => kivi(15.0, block),
        ("kivi2", true) => kivi(3.0, &channel),
        ("kivi2", false) => kivi(3.0, block),
        ("lm4", _) => lm(&[2.7326], 0.6636),
        ("lm3", _) => lm(&[2.1520], 0.8081),
        ("lm2", _) => lm(&[1.5104], 1.0576),
        _ => panic!("{name} states no bound"),
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]

    /// Every number of every format comes back within the bound that its file states.
    #[test]
    fn every_format_keeps_its_bound(
        seed in 1u32..1 << 30,
        exponent in -20i32..12,
        spike in 0usize..4,
        offset in -4.0f32..4.0,
    ) {
        let (n, d) = (PAGE_TOKENS, 64);
        let scale = 2f32.powi(exponent);
        let mut data = rows(n, d, seed);
        for (i, x) in data.iter_mut().enumerate() {
            *x = match spike {
                // A lone giant, a constant, zeros, or as it is with an offset.
                0 if i % d == (i / d) % d => 40.0,
                1 if i / d % 7 == 3 => offset,
                2 if i / d % 5 == 2 => 0.0,
                _ => *x + offset,
            } * scale;
        }
        let kernels = Kernels::best();
        for format in KV_FORMATS {
            for (codec, keys) in [(format.keys as &dyn Codec, true), (format.values as &dyn Codec, false)] {
                // Larger numbers are refused before they are encoded.
                if data.iter().any(|x| x.abs() > codec.largest()) {
                    continue;
                }
                let mut page = vec![0u64; codec.page_bytes(d).div_ceil(8)];
                let page: &mut [u8] = bytemuck::cast_slice_mut(&mut page);
                codec.encode(kernels, &data, d, page, 0);
                let mut back = vec![0.0; data.len()];
                codec.decode(kernels, &Rows { page, range: 0..n, head_dim: d, upcoming: &[] }, &mut back);
                for (r, (row, back)) in data.chunks_exact(d).zip(back.chunks_exact(d)).enumerate() {
                    let group = r / codec.group() * codec.group();
                    let together = &data[group * d..(group + codec.group()) * d];
                    for i in 0..d {
                        let (error, bound) = ((row[i] - back[i]).abs(), bound(format.name, keys, together, row, i));
                        proptest::prop_assert!(
                            error <= bound,
                            "{} {}: {} became {}: {error} over {bound}",
                            format.name,
                            if keys { "key" } else { "value" },
                            row[i],
                            back[i]
                        );
                    }
                }
            }
        }
    }
}
