//! One ternary matrix and its products with the activations of some tokens, on a team: what a layer does between two
//! barriers, alone. For comparisons with engines that publish the time of one matrix.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use longbit_kernels::{Kernels, Quantized, TILE_ROWS, TernaryShape};
use longbit_sys::{Segment, Shared, Team, share};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::model::TernaryLinear;
use crate::rng::mix;

/// What a name of a matrix begins with: `matrix:4096x4096` has 4096 rows and as many columns.
pub const PREFIX: &str = "matrix:";
/// Most rows and columns.
const MAX_SIDE: usize = 1 << 20;
/// Version of the recipe; part of the identity.
const RECIPE: u32 = 1;

/// Whether `name` is meant for a matrix.
pub fn is_name(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Rows (outputs) and columns (inputs) of the matrix called `name`.
///
/// # Errors
/// [`Error::Invalid`] with the form of a name.
pub fn shape_of(name: &str) -> Result<TernaryShape> {
    let side = |text: &str| text.parse::<usize>().ok().filter(|n| (1..=MAX_SIDE).contains(n));
    let sides = name.strip_prefix(PREFIX).and_then(|text| text.split_once('x'));
    match sides.map(|(rows, cols)| (side(rows), side(cols))) {
        Some((Some(rows), Some(cols))) => Ok(TernaryShape { rows, cols }),
        _ => Err(Error::Invalid(format!(
            "{name:?} is not the name of a matrix: {PREFIX}ROWSxCOLUMNS, each from 1 to {MAX_SIDE}, e.g. {PREFIX}4096x4096"
        ))),
    }
}

/// A matrix of seeded ternary weights, a third each of -1, 0 and 1.
pub struct Matrix {
    linear: TernaryLinear,
    kernels: &'static Kernels,
}

impl Matrix {
    /// The matrix of `shape` with weights from `seed`; the same bytes on every machine.
    ///
    /// # Errors
    /// When memory cannot be had, or `LONGBIT_ISA` names what this machine lacks.
    pub fn random(shape: TernaryShape, seed: u64) -> Result<Self> {
        let mut data = Segment::new(shape.bytes())?;
        shape.fill_random(0..shape.tiles(), mix(seed, 1), &mut data);
        let scale = 1.0 / (2.0 / 3.0 * shape.cols as f32).sqrt();
        Ok(Matrix { linear: TernaryLinear::new(shape, data, scale), kernels: Kernels::from_env()? })
    }

    /// Rows and columns.
    pub fn shape(&self) -> TernaryShape {
        self.linear.shape
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> u64 {
        self.linear.data.len() as u64
    }

    /// Name of the instruction set of its products.
    pub fn isa(&self) -> &'static str {
        self.kernels.isa().as_str()
    }

    /// SHA-256 that identifies the matrix of `shape` and `seed`.
    pub fn sha256(shape: TernaryShape, seed: u64) -> String {
        let TernaryShape { rows, cols } = shape;
        crate::hex(&Sha256::digest(format!("longbit matrix {RECIPE}; seed {seed}; {rows}x{cols}")))
    }
}

/// The product of a matrix with the activations of a fixed number of tokens on a fixed number of threads: everything that
/// it writes, allocated once.
pub struct Product {
    tokens: usize,
    threads: usize,
    /// `[tokens][columns]`.
    input: Vec<f32>,
    /// `[tokens][padded columns]`, a stripe a token.
    codes: Shared<i8>,
    /// One a token.
    quantized: Shared<Quantized>,
    /// A stripe a thread: `[tokens][rows of the thread]`.
    out: Shared<f32>,
    /// Codes of the only token, one a thread.
    private: Vec<Mutex<Vec<i8>>>,
}

impl Product {
    /// Seeded activations of `tokens` tokens for `matrix`, uniform in [-1, 1).
    ///
    /// # Errors
    /// No token or no thread.
    pub fn new(matrix: &Matrix, tokens: usize, threads: usize, seed: u64) -> Result<Self> {
        if tokens == 0 || threads == 0 {
            return Err(Error::Invalid("a product needs a token and a thread".into()));
        }
        let TernaryShape { rows, cols } = matrix.shape();
        let number = |i: usize| f32::from((mix(seed, i as u64) >> 48) as u16 as i16) / 32768.0;
        let padded = matrix.shape().padded_cols();
        let mut bounds = vec![0];
        for w in 0..threads {
            bounds.push(bounds[w] + owned(matrix.shape(), w, threads).1.len() * tokens);
        }
        let none = Quantized { scale: 1.0, sum: 0 };
        Ok(Product {
            tokens,
            threads,
            input: (0..tokens * cols).map(number).collect(),
            codes: Shared::even(tokens, padded, tokens, 0).named("codes"),
            quantized: Shared::even(tokens, 1, tokens, none).named("activation scales"),
            out: Shared::striped(rows * tokens, &bounds, 0.0).named("product"),
            private: (0..threads).map(|_| Mutex::new(vec![0; TernaryLinear::room(cols)])).collect(),
        })
    }

    /// Quantises the activations and multiplies; the team enters once.
    ///
    /// # Errors
    /// A team of another size than the product was made for.
    pub fn run(&self, matrix: &Matrix, team: &Team) -> Result<()> {
        if team.threads() != self.threads {
            return Err(Error::Invalid(format!(
                "the product was made for {} threads, the team has {}",
                self.threads,
                team.threads()
            )));
        }
        let (linear, kernels) = (&matrix.linear, matrix.kernels);
        let cols = linear.shape.cols;
        team.run(|worker| {
            let w = worker.index();
            let (tiles, _) = owned(linear.shape, w, self.threads);
            if self.tokens == 1 {
                // Cheaper for each thread to do than to wait for.
                let mut codes = self.private[w].lock().unwrap_or_else(PoisonError::into_inner);
                let Quantized { scale, sum } = kernels.quantize_activations(&self.input, &mut codes);
                linear.gemv(kernels, tiles, &codes, sum, linear.scale / scale, &mut self.out.write(w));
                return;
            }
            for token in worker.range(self.tokens) {
                let row = &self.input[token * cols..(token + 1) * cols];
                self.quantized.write(token)[0] =
                    kernels.quantize_activations(row, &mut self.codes.write(token));
            }
            worker.barrier();
            let (codes, quantized) = (self.codes.read(), self.quantized.read());
            let sums: Vec<i32> = quantized.iter().map(|q| q.sum).collect();
            let scales: Vec<f32> = quantized.iter().map(|q| linear.scale / q.scale).collect();
            let out = &mut self.out.write(w);
            linear.gemm(kernels, tiles, self.tokens, &codes, &sums, &scales, out);
        });
        Ok(())
    }

    /// The result of the last run, `[tokens][rows]`.
    pub fn output(&self, matrix: &Matrix) -> Vec<f32> {
        let rows = matrix.shape().rows;
        let mut all = vec![0.0; self.tokens * rows];
        for w in 0..self.threads {
            let (_, range) = owned(matrix.shape(), w, self.threads);
            if range.is_empty() {
                continue;
            }
            let stripe = self.out.read_stripe(w);
            for (token, values) in stripe.chunks_exact(range.len()).enumerate() {
                all[token * rows..][range.clone()].copy_from_slice(values);
            }
        }
        all
    }
}

/// Tiles and rows of thread `w`.
fn owned(shape: TernaryShape, w: usize, threads: usize) -> (Range<usize>, Range<usize>) {
    let tiles = share(shape.tiles(), w, threads);
    let row = |tile: usize| (tile * TILE_ROWS).min(shape.rows);
    (tiles.clone(), row(tiles.start)..row(tiles.end))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `W x` from unpacked weights, token by token.
    fn expected(matrix: &Matrix, product: &Product) -> Vec<f32> {
        let TernaryShape { rows, cols } = matrix.shape();
        let mut all = Vec::new();
        for x in product.input.chunks_exact(cols) {
            let mut codes = vec![0; cols];
            let q = matrix.kernels.quantize_activations(x, &mut codes);
            let mut weights = vec![0u8; cols];
            for row in 0..rows {
                matrix.linear.unpack_row(row, &mut weights);
                let dot: i32 =
                    weights.iter().zip(&codes).map(|(w, c)| (i32::from(*w) - 1) * i32::from(*c)).sum();
                all.push(dot as f32 * (matrix.linear.scale / q.scale));
            }
        }
        all
    }

    #[test]
    fn products_are_exact_for_any_number_of_tokens_and_threads() {
        for (rows, cols) in [(1, 1), (33, 70), (130, 517)] {
            let matrix = Matrix::random(TernaryShape { rows, cols }, 3).unwrap();
            for threads in [1, 2, 3, 5] {
                let team = Team::oversubscribed(threads).unwrap();
                for tokens in [1, 2, 7, 33] {
                    let product = Product::new(&matrix, tokens, threads, 9).unwrap();
                    for _ in 0..2 {
                        product.run(&matrix, &team).unwrap();
                        let (found, wanted) = (product.output(&matrix), expected(&matrix, &product));
                        assert_eq!(found, wanted, "{rows}x{cols}, {threads} threads, {tokens} tokens");
                    }
                }
            }
        }
    }

    #[test]
    fn names_say_the_shape() {
        assert_eq!(shape_of("matrix:4096x11008").unwrap(), TernaryShape { rows: 4096, cols: 11_008 });
        for wrong in ["matrix:", "matrix:4096", "matrix:0x4", "matrix:4x-1", "matrix:9999999x4", "tiny"] {
            let error = shape_of(wrong).unwrap_err().to_string();
            assert!(error.contains("matrix:4096x4096"), "{error}");
        }
        let shape = TernaryShape { rows: 8, cols: 300 };
        assert_ne!(Matrix::sha256(shape, 1), Matrix::sha256(shape, 2));
        let (a, b) = (Matrix::random(shape, 1).unwrap(), Matrix::random(shape, 2).unwrap());
        assert!(a.linear.data[..] != b.linear.data[..] && a.bytes() == shape.bytes() as u64);
        assert!(Product::new(&a, 0, 1, 1).is_err());
        let product = Product::new(&a, 1, 1, 1).unwrap();
        assert!(product.run(&a, &Team::oversubscribed(2).unwrap()).is_err());
    }
}
