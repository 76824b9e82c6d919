//! What holds for every KV dtype.

use super::*;
use crate::error::Error;

/// Every format, as it is and with each option.
fn dtypes() -> Vec<KvDtype> {
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
fn rows(n: usize, d: usize, seed: u32) -> Vec<f32> {
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
fn bytes(kv: &KvHead) -> Vec<u8> {
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
                        assert!(
                            error <= 2e-4 * f64::from(size * row_size),
                            "{dtype}: score {run:?} {t}: {error}"
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

/// Rotation and centring change exact attention by no more than rounding.
#[test]
fn rotation_and_centring_are_exact_for_attention() {
    let (n, d) = (600, 64);
    let (keys, values) = (rows(n, d, 13), rows(n, d, 14));
    let query = rows(2, d, 15)[d..].to_vec();
    let attend = |name: &str| -> Vec<f64> {
        let cache = cache(kv_dtype(name).unwrap(), d, n);
        cache.head_mut(0, 0).append(&keys, &values).unwrap();
        let kv = cache.head(0, 0);
        let mut query = query.clone();
        kv.rotate_queries(&mut query);
        let (mut scratch, mut acc, mut sum) = (KvScratch::default(), vec![0.0; d], 0.0);
        kv.prepare(&query, &mut scratch);
        for run in kv.runs(0..n) {
            let mut weights = vec![0.0; run.len()];
            kv.scores(&query, &run, &[], &mut scratch, &mut weights);
            weights.iter_mut().for_each(|x| *x = (0.2 * *x).exp());
            sum += weights.iter().sum::<f32>();
            kv.accumulate(&weights, &run, &[], &mut scratch, &mut acc);
        }
        kv.restore_outputs(&mut acc);
        acc.iter().map(|x| f64::from(x / sum)).collect()
    };
    let plain = attend("f32");
    let size = plain.iter().map(|x| x * x).sum::<f64>().sqrt();
    for name in ["f32+rotate", "k=f32+centre,v=f32", "k=f32,v=f32+centre", "f32+rotate+centre"] {
        let other = attend(name);
        let error = plain.iter().zip(&other).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
        // Means are kept in bfloat16, and the first rows of a centred side are exact in their own format.
        assert!(error <= 2e-3 * size, "{name}: {error} of {size}");
    }
}
