//! Every instruction set of this processor against the scalar oracle, bit for bit.

use longbit_kernels::{Isa, Kernels, oracle};

/// Lengths around every boundary of the kernels, and those of the models.
const LENGTHS: [usize; 20] =
    [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 80, 127, 128, 129, 255, 257, 2560, 5632, 6912];
/// Head dimensions, small enough to be combined with many row counts.
const DIMS: [usize; 11] = [1, 15, 16, 17, 32, 48, 64, 80, 100, 128, 131];
const ROWS: [usize; 9] = [1, 3, 4, 5, 8, 63, 64, 65, 130];
const SPECIALS: [f32; 12] = [
    0.0,
    -0.0,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    f32::MAX,
    f32::MIN,
    f32::MIN_POSITIVE,
    -1e-40,
    1e-40,
    1.0,
    -1.0,
];

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float() * 3.0).collect()
    }

    fn bf16(&mut self, n: usize) -> Vec<u16> {
        self.floats(n).into_iter().map(oracle::f32_to_bf16).collect()
    }

    fn bytes(&mut self, n: usize) -> Vec<i8> {
        (0..n).map(|_| self.next() as i8).collect()
    }

    /// Random numbers, with some of the special ones among them.
    fn wild(&mut self, n: usize) -> Vec<f32> {
        let mut x = self.floats(n);
        for x in &mut x {
            let pick = self.next() as usize % (4 * SPECIALS.len());
            *x = SPECIALS.get(pick).copied().unwrap_or(*x);
        }
        x
    }
}

fn tables() -> impl Iterator<Item = &'static Kernels> {
    Isa::available().into_iter().map(|isa| Kernels::for_isa(isa).expect("an available set has a table"))
}

/// Equality of bits; any NaN equals any NaN.
#[track_caller]
fn same(kernels: &Kernels, what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{} {what}", kernels.isa());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let equal = g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan());
        assert!(equal, "{} {what} [{i}]: {g:e} is not {w:e}", kernels.isa());
    }
}

/// Stamps one test per operation: the body gets a table, a length and a random generator, for every table and length.
macro_rules! conform {
    ($($name:ident over $lengths:ident = |$k:ident, $n:ident, $random:ident| $body:block)*) => {$(
        #[test]
        fn $name() {
            for $k in tables() {
                for $n in $lengths {
                    let $random = &mut Random($n as u64 + 7);
                    $body
                }
            }
        }
    )*};
}

conform! {
    dot over LENGTHS = |k, n, random| {
        for (a, b) in [(random.floats(n), random.floats(n)), (random.wild(n), random.wild(n))] {
            same(k, &format!("dot n={n}"), &[k.dot(&a, &b)], &[oracle::dot(&a, &b)]);
        }
        // Products that underflow to a negative zero meet the padding.
        let (a, b) = (vec![-1e-30; n], vec![1e-30; n]);
        same(k, "dot underflow", &[k.dot(&a, &b)], &[oracle::dot(&a, &b)]);
    }

    max over LENGTHS = |k, n, random| {
        for x in [random.floats(n), random.wild(n), vec![f32::NAN; n], vec![-0.0; n], vec![f32::NEG_INFINITY; n]] {
            same(k, &format!("max n={n}"), &[k.max(&x)], &[oracle::max(&x)]);
        }
    }

    exp_sum over LENGTHS = |k, n, random| {
        for (x, shift) in [(random.floats(n), 2.5), (random.wild(n), 1.0), (random.wild(n), f32::NEG_INFINITY)] {
            let x: Vec<f32> = x.iter().map(|x| x * 20.0).collect();
            let (mut got, mut want) = (x.clone(), x.clone());
            let sums = (k.exp_sum(&mut got, shift), oracle::exp_sum(&mut want, shift));
            same(k, &format!("exp_sum values n={n}"), &got, &want);
            same(k, &format!("exp_sum n={n}"), &[sums.0], &[sums.1]);
            let (mut got, mut want) = (x.clone(), x.iter().map(|x| x + 2.5).collect::<Vec<f32>>());
            let sums = (k.exp_sum_offset(&mut got, 2.5, shift), oracle::exp_sum(&mut want, shift));
            same(k, &format!("exp_sum_offset values n={n}"), &got, &want);
            same(k, &format!("exp_sum_offset n={n}"), &[sums.0], &[sums.1]);
        }
    }

    count_depths over LENGTHS = |k, n, random| {
        let mut got = [7; longbit_kernels::DEPTHS];
        for (x, top) in [(random.floats(n), 3.0), (random.wild(n), 0.5), (vec![1.0; n], 1.0), (random.wild(n), f32::NAN)] {
            for per_unit in [0.5, 32.0, 1000.0] {
                k.count_depths(&x, top, per_unit, &mut got);
                let want = oracle::count_depths(&x, top, per_unit);
                assert_eq!(got.to_vec(), want, "{} count_depths n={n} top={top} per_unit={per_unit}", k.isa());
            }
        }
    }

    maxima over LENGTHS = |k, n, random| {
        for x in [random.floats(n), random.wild(n), vec![f32::NAN; n], vec![-0.0; n]] {
            let mut got = vec![7.0; 5];
            k.maxima(&x, &mut got);
            same(k, &format!("maxima n={n}"), &got, &oracle::maxima(&x));
        }
    }

    sums_of_what_reaches_a_bound over LENGTHS = |k, n, random| {
        for x in [random.floats(n), random.wild(n)] {
            let bounds = [f32::NEG_INFINITY, -0.5, 0.0, 0.75];
            same(k, &format!("sums_from n={n}"), &k.sums_from(&x, &bounds), &oracle::sums_from(&x, &bounds));
            let (got, want) = (k.sum_f64(&x), oracle::sum_f64(&x));
            let equal = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
            assert!(equal, "{} sum_f64 n={n}: {got} {want}", k.isa());
        }
    }

    marks_of_equal_codes over LENGTHS = |k, n, random| {
        let n = n / 64 * 64;
        let codes: Vec<u16> = (0..n).map(|_| [3, 0x8003, 0, 4][random.next() as usize % 4]).collect();
        for code in [0x8003, 3, 0, 5] {
            let mut got = vec![u64::MAX; n / 64];
            k.marks_equal(&codes, code, &mut got);
            assert_eq!(got, oracle::marks_equal(&codes, code), "{} marks_equal n={n}", k.isa());
        }
    }

    silu_mul over LENGTHS = |k, n, random| {
        for (gate, up) in [(random.floats(n), random.floats(n)), (random.wild(n), random.wild(n))] {
            let (mut got, mut want) = (vec![9.0; n], vec![8.0; n]);
            k.silu_mul(&gate, &up, &mut got);
            oracle::silu_mul(&gate, &up, &mut want);
            same(k, &format!("silu_mul n={n}"), &got, &want);
        }
    }

    relu2_mul over LENGTHS = |k, n, random| {
        for (gate, up) in [(random.floats(n), random.floats(n)), (random.wild(n), random.wild(n))] {
            let (mut got, mut want) = (vec![9.0; n], vec![8.0; n]);
            k.relu2_mul(&gate, &up, &mut got);
            oracle::relu2_mul(&gate, &up, &mut want);
            same(k, &format!("relu2_mul n={n}"), &got, &want);
        }
    }

    rmsnorm over LENGTHS = |k, n, random| {
        for (x, weight) in [(random.floats(n), random.floats(n)), (random.wild(n), random.wild(n))] {
            let (mut got, mut want) = (vec![9.0; n], vec![8.0; n]);
            k.rmsnorm(&x, &weight, 1e-5, &mut got);
            oracle::rmsnorm(&x, &weight, 1e-5, &mut want);
            same(k, &format!("rmsnorm n={n}"), &got, &want);
        }
    }

    rope over LENGTHS = |k, n, random| {
        for head in [random.floats(2 * n), random.wild(2 * n)] {
            let (cos, sin) = (random.floats(n), random.floats(n));
            let (mut got, mut want) = (head.clone(), head);
            k.rope(&mut got, &cos, &sin);
            oracle::rope(&mut want, &cos, &sin);
            same(k, &format!("rope half={n}"), &got, &want);
        }
    }

    sums_and_scalings over LENGTHS = |k, n, random| {
        let (x, y) = (random.wild(n), random.wild(n));
        let (mut got, mut want) = (x.clone(), x.clone());
        k.scale_add(&mut got, 0.3, &y, -1.7);
        oracle::scale_add(&mut want, 0.3, &y, -1.7);
        same(k, &format!("scale_add n={n}"), &got, &want);
        let mut got = x.clone();
        k.add_assign(&mut got, &y);
        same(k, &format!("add_assign n={n}"), &got, &x.iter().zip(&y).map(|(x, y)| x + y).collect::<Vec<_>>());
        let mut got = x.clone();
        k.mul_assign(&mut got, &y);
        same(k, &format!("mul_assign n={n}"), &got, &x.iter().zip(&y).map(|(x, y)| x * y).collect::<Vec<_>>());
        let mut got = x.clone();
        k.scale(&mut got, 0.1);
        same(k, &format!("scale n={n}"), &got, &x.iter().map(|x| x * 0.1).collect::<Vec<_>>());
    }

    bf16 over LENGTHS = |k, n, random| {
        let mut x = random.wild(n);
        x.iter_mut().step_by(3).for_each(|x| *x = f32::from_bits(random.next() as u32));
        let mut got = vec![1; n];
        k.f32_to_bf16(&x, &mut got);
        assert_eq!(got, x.iter().map(|&x| oracle::f32_to_bf16(x)).collect::<Vec<_>>(), "{} n={n}", k.isa());
        let mut wide = vec![1.0; n];
        k.bf16_to_f32(&got, &mut wide);
        same(k, "bf16_to_f32", &wide, &got.iter().map(|&x| oracle::bf16_to_f32(x)).collect::<Vec<_>>());
    }

    quantize_activations over LENGTHS = |k, n, random| {
        let ties: Vec<f32> = (0..n).map(|i| if i == 0 { 127.0 } else { (i % 250) as f32 - 124.5 }).collect();
        let mut one_nan = random.floats(n);
        one_nan[n / 2] = f32::NAN;
        for x in [random.floats(n), random.wild(n), ties, one_nan, vec![0.0; n], vec![1e-7; n]] {
            let (mut got, mut want) = (vec![5; n + 9], vec![6; n + 9]);
            let q = k.quantize_activations(&x, &mut got);
            let (scale, sum) = oracle::quantize_activations(&x, &mut want);
            assert_eq!((q.scale.to_bits(), q.sum), (scale.to_bits(), sum), "{} n={n}", k.isa());
            assert_eq!(got, want, "{} n={n}", k.isa());
        }
    }

    quantize_rows_int8 over LENGTHS = |k, n, random| {
        let mut rows = random.bf16(4 * n);
        rows[2 * n..3 * n].fill(0);
        rows.extend(random.wild(n).into_iter().map(oracle::f32_to_bf16));
        let (mut got, mut want) = ((vec![5; 5 * n], vec![0.0; 5]), (vec![6; 5 * n], vec![1.0; 5]));
        k.quantize_rows_int8(&rows, n, &mut got.0, &mut got.1);
        oracle::quantize_rows_int8(&rows, n, &mut want.0, &mut want.1);
        same(k, &format!("quantize_rows_int8 scales n={n}"), &got.1, &want.1);
        assert_eq!(got.0, want.0, "{} n={n}", k.isa());
    }

    heads over LENGTHS = |k, n, random| {
        for rows in [1, 4, 7] {
            let x = random.floats(n);
            let (mut got, mut want) = (vec![1.0; rows], vec![2.0; rows]);
            for weights in [random.floats(rows * n), random.wild(rows * n)] {
                k.head_f32(&weights, &x, &mut got);
                oracle::head_f32(&weights, &x, &mut want);
                same(k, &format!("head_f32 k={n} rows={rows}"), &got, &want);
            }
            let weights = random.bf16(rows * n);
            k.head_bf16(&weights, &x, &mut got);
            oracle::head_bf16(&weights, &x, &mut want);
            same(k, &format!("head_bf16 k={n} rows={rows}"), &got, &want);
            let picked: Vec<u32> = (0..rows as u32).rev().collect();
            k.head_bf16_rows(&weights, &picked, &x, &mut got);
            want.reverse();
            same(k, &format!("head_bf16_rows k={n} rows={rows}"), &got, &want);
            let (weights, scales) = (random.bytes(rows * n), random.floats(rows));
            k.head_int8(&weights, &scales, &x, &mut got);
            oracle::head_int8(&weights, &scales, &x, &mut want);
            same(k, &format!("head_int8 k={n} rows={rows}"), &got, &want);
        }
    }

    woven_rows over DIMS = |k, d, random| {
        for n in ROWS {
            let rows = random.wild(n * d);
            let narrow: Vec<u16> = rows.iter().map(|&x| oracle::f32_to_bf16(x)).collect();
            let mut woven = vec![1; n * d];
            k.weave_bf16(&rows, d, &mut woven);
            assert_eq!(woven, oracle::weave(&narrow, d), "{} weave d={d} n={n}", k.isa());
            let (mut wide, mut want) = (vec![1.0; n * d], vec![2.0; n * d]);
            k.unweave_bf16(&woven, d, &mut wide);
            k.bf16_to_f32(&narrow, &mut want);
            same(k, &format!("unweave d={d} n={n}"), &wide, &want);
        }
    }

    scores over DIMS = |k, d, random| {
        for g in 1..=9 {
            for n in ROWS {
                let (queries, rows, narrow) = (random.floats(g * d), random.floats(n * d), random.bf16(n * d));
                let (mut got, mut want) = (vec![1.0; g * n], vec![2.0; g * n]);
                k.scores_f32(&queries, &rows, d, &mut got, &rows);
                oracle::scores_f32(&queries, &rows, d, &mut want);
                same(k, &format!("scores_f32 d={d} g={g} n={n}"), &got, &want);
                let woven = oracle::weave(&narrow, d);
                k.scores_bf16(&queries, &woven, d, &mut got, &woven[..n / 2 * d]);
                oracle::scores_bf16(&queries, &narrow, d, &mut want);
                same(k, &format!("scores_bf16 d={d} g={g} n={n}"), &got, &want);
            }
        }
    }

    accumulate over DIMS = |k, d, random| {
        for g in 1..=9 {
            for n in ROWS {
                let (weights, rows, narrow) = (random.floats(g * n), random.floats(n * d), random.bf16(n * d));
                let start = random.floats(g * d);
                let (mut got, mut want) = (start.clone(), start);
                k.accumulate_f32(&weights, &rows, d, &mut got, &[]);
                oracle::accumulate_f32(&weights, &rows, d, &mut want);
                same(k, &format!("accumulate_f32 d={d} g={g} n={n}"), &got, &want);
                let woven = oracle::weave(&narrow, d);
                k.accumulate_bf16(&weights, &woven, d, &mut got, &woven);
                oracle::accumulate_bf16(&weights, &narrow, d, &mut want);
                same(k, &format!("accumulate_bf16 d={d} g={g} n={n}"), &got, &want);
            }
        }
    }
}

#[test]
fn infinite_scores_and_values_pass_through() {
    for k in tables() {
        let mut rows = vec![1.0; 5 * 33];
        rows[33] = f32::NEG_INFINITY;
        rows[2 * 33 + 32] = f32::INFINITY;
        let queries = vec![1.0; 4 * 33];
        let mut out = vec![0.0; 20];
        k.scores_f32(&queries, &rows, 33, &mut out, &[]);
        assert_eq!(&out[..5], &[33.0, f32::NEG_INFINITY, f32::INFINITY, 33.0, 33.0], "{}", k.isa());
    }
}

#[test]
fn empty_inputs_are_allowed() {
    for k in tables() {
        assert_eq!(k.dot(&[], &[]).to_bits(), 0);
        assert_eq!(k.max(&[]), f32::NEG_INFINITY);
        assert_eq!(k.exp_sum(&mut [], 0.0).to_bits(), 0);
        assert_eq!(k.quantize_activations(&[], &mut [3, 4]).sum, 0);
        k.scores_f32(&[1.0; 8], &[], 4, &mut [], &[]);
        let mut acc = [1.5; 8];
        k.accumulate_bf16(&[], &[], 4, &mut acc, &[]);
        assert_eq!(acc, [1.5; 8]);
    }
}

#[test]
fn the_exponential_keeps_its_promises() {
    for k in tables() {
        assert_eq!(k.exp(0.0).to_bits(), 1.0f32.to_bits());
        assert_eq!(k.exp(-0.0).to_bits(), 1.0f32.to_bits());
        assert_eq!(k.exp(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!(k.exp(-87.4).to_bits(), 0);
        assert_eq!(k.exp(89.0), f32::INFINITY);
        assert_eq!(k.exp(f32::INFINITY), f32::INFINITY);
        assert!(k.exp(f32::NAN).is_nan());
    }
    let k = Kernels::best();
    let (mut worst, mut at) = (0.0f64, 0.0);
    // A step that is no round number, and every float near the ends of a few octaves.
    let points = (0..870_000u32).map(|i| -(f64::from(i) * 1.000_13e-4) as f32);
    let edges = [0u32, 0x3eb1_7218, 0x3f31_7218, 0x42ae_0000 - 2000].map(|b| (0..2000).map(move |i| b + i));
    let edges = edges.into_iter().flatten().map(|b| -f32::from_bits(b));
    for x in points.chain(edges).filter(|x| (-87.0..=0.0).contains(x)) {
        let got = f64::from(k.exp(x));
        assert_eq!((got as f32).to_bits(), oracle::exp(x).to_bits(), "exp({x})");
        let error = (got / f64::from(x).exp() - 1.0).abs();
        if error > worst {
            (worst, at) = (error, x);
        }
    }
    assert!(worst < 2.5e-7, "relative error {worst:e} at {at}");
    assert!(worst > 1e-8, "an f32 cannot be that good: {worst:e}");
}
