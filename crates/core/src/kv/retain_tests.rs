//! Rows that are dropped from among others.

use super::tests::{bytes, dtypes, rows};
use super::*;

const D: usize = 64;

fn cache(dtype: KvDtype, heads: usize) -> KvCache {
    let shape = CacheShape { layers: 1, kv_heads: heads, head_dim: D, capacity: 2048 };
    KvCache::new(shape, dtype, Kernels::best()).unwrap()
}

/// Rows to keep that begin, end and go on in every way at the borders of pages.
fn kept() -> Vec<Range<usize>> {
    vec![0..4, 100..101, 255..260, 300..513, 600..1024, 1030..1031, 1290..1300]
}

/// What remains has the bytes, the order and the positions that it had; what is appended then comes behind it.
#[test]
fn kept_rows_keep_their_bytes_and_positions() {
    for dtype in dtypes().into_iter().filter(|d| d.check(D).is_ok()) {
        let mut cache = cache(dtype, 1);
        let (keys, values) = (rows(1400, D, 1), rows(1400, D, 2));
        cache.head_mut(0, 0).append(&keys[..1300 * D], &values[..1300 * D]).unwrap();
        cache.set_len(1300).unwrap();
        let before = bytes(&cache.head(0, 0));
        let result = cache.head_mut(0, 0).retain(&kept());
        if [dtype.keys, dtype.values].iter().any(|side| side.rows_move().is_err()) {
            let message = result.unwrap_err().to_string();
            assert!(message.contains("cannot be evicted") && message.contains("bf16"), "{dtype}: {message}");
            assert_eq!(bytes(&cache.head(0, 0)), before, "{dtype}");
            continue;
        }
        result.unwrap();
        let listed: Vec<usize> = kept().into_iter().flatten().collect();
        let decoded = |kv: &KvHead, tokens: Range<usize>| {
            let mut out = vec![0.0; 2 * tokens.len() * D];
            let (keys, values) = out.split_at_mut(tokens.len() * D);
            kv.decode_keys(tokens.clone(), keys);
            kv.decode_values(tokens, values);
            out
        };
        let whole = self::cache(dtype, 1);
        whole.head_mut(0, 0).append(&keys, &values).unwrap();
        cache.head_mut(0, 0).append(&keys[1300 * D..], &values[1300 * D..]).unwrap();
        cache.set_len(1400).unwrap();
        let (kv, whole) = (cache.head(0, 0), whole.head(0, 0));
        assert_eq!((kv.len(), kv.tokens(), kv.dropped()), (listed.len() + 100, 1400, 1300 - listed.len()));
        for (row, token) in listed.iter().copied().chain(1300..1400).enumerate() {
            assert_eq!((kv.position_of(row), kv.row_of(token)), (token, row), "{dtype}");
            assert_eq!(decoded(&kv, row..row + 1), decoded(&whole, token..token + 1), "{dtype}, {token}");
        }
        // A token whose row is gone would stand where the next one that remains is.
        assert_eq!((kv.row_of(50), kv.row_of(1299)), (4, listed.len() - 1));
    }
}

/// A rewind behind the compaction is one to rows; one before it leaves what is gone gone.
#[test]
fn rewinds_count_tokens() {
    let mut cache = cache(kv_dtype("bf16").unwrap(), 1);
    let (keys, values) = (rows(1300, D, 1), rows(1300, D, 2));
    cache.head_mut(0, 0).append(&keys, &values).unwrap();
    cache.set_len(1300).unwrap();
    cache.head_mut(0, 0).retain(&kept()).unwrap();
    let rows = cache.head(0, 0).len();
    cache.head_mut(0, 0).append(&keys[..20 * D], &values[..20 * D]).unwrap();
    cache.set_len(1320).unwrap();
    cache.truncate(1310);
    assert_eq!((cache.head(0, 0).len(), cache.head(0, 0).tokens()), (rows + 10, 1310));
    cache.truncate(1300);
    assert_eq!((cache.head(0, 0).len(), cache.head(0, 0).tokens()), (rows, 1300));
    cache.truncate(258);
    let kv = cache.head(0, 0);
    assert_eq!((kv.len(), kv.tokens(), kv.dropped()), (4 + 1 + 3, 258, 250));
    assert_eq!(kv.position_of(7), 257);
}

/// Whatever is dropped, the memory goes; whoever shares the pages keeps them as they are.
#[test]
fn memory_falls_and_a_fork_is_untouched() {
    let dtype = kv_dtype("int8+plain").unwrap();
    let mut parent = cache(dtype, 2);
    for head in 0..2 {
        parent.head_mut(0, head).append(&rows(1300, D, 1), &rows(1300, D, 2)).unwrap();
    }
    parent.set_len(1300).unwrap();
    let before = bytes(&parent.head(0, 0));
    let full = parent.memory();
    let mut child = parent.fork().unwrap();
    child.head_mut(0, 0).retain(&kept()).unwrap();
    // The heads of a layer need not keep as many.
    child.head_mut(0, 1).retain(&[0..256, 1000..1010]).unwrap();
    child.set_len(1300).unwrap();
    let pages = (kept().iter().map(Range::len).sum::<usize>().div_ceil(PAGE_TOKENS) + 2) as u64;
    assert_eq!(child.memory().pages, 2 * pages);
    // The first page of the second head, keys and values, is as it was.
    assert_eq!(child.memory().shared_pages, 2);
    assert!(child.stored_bytes() < parent.stored_bytes() / 2);
    assert_eq!((bytes(&parent.head(0, 0)), parent.memory().page_bytes), (before.clone(), full.page_bytes));
    child.head_mut(0, 1).replace(3, &[1.0; D], &[2.0; D]).unwrap();
    assert_eq!(bytes(&parent.head(0, 1)), before);
    let mut row = [0.0; D];
    child.head(0, 1).decode_values(3..4, &mut row);
    assert!(row.iter().all(|x| (x - 2.0).abs() < 0.02), "{row:?}");
    // A fork of what is left shares it, and its own rows move in place.
    let grandchild = child.fork().unwrap();
    drop(child);
    let used = grandchild.pool().usage();
    grandchild.head_mut(0, 0).retain(&[5..6, 7..300]).unwrap();
    assert_eq!(grandchild.head(0, 0).position_of(0), 255);
    assert!(grandchild.pool().usage().page_bytes < used.page_bytes);
    assert_eq!(bytes(&parent.head(0, 0)), before);
}
