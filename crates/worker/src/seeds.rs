//! How far the figures of a method that draws at random depend on what it drew: the same comparison with other seeds.

use longbit::attention::MethodSpec;
use longbit_protocol::{NOT_FINITE, SeedSpread, is_not_finite};

/// The parameter that such a method has.
const SEED: &str = "seed";

/// `method` with the seeds 1 to `count`, in full; empty where it draws nothing at random, or where one seed is asked for.
pub(crate) fn reseeded(method: &MethodSpec, count: u32) -> Vec<String> {
    let draws = method.method().params.iter().any(|p| p.name == SEED);
    if !draws || count < 2 {
        return Vec::new();
    }
    with_seeds(&method.canonical(), count)
}

/// `text`, a method with all parameters, with other values of its seed.
fn with_seeds(text: &str, count: u32) -> Vec<String> {
    let (name, params) = text.split_once(':').unwrap_or((text, ""));
    let of = |seed: u32| {
        let pairs = params.split(',').map(|pair| match pair.split_once('=') {
            Some((SEED, _)) => format!("{SEED}={seed}"),
            _ => pair.to_owned(),
        });
        format!("{name}:{}", pairs.collect::<Vec<_>>().join(","))
    };
    (1..=count).map(of).collect()
}

/// The spread of the median errors, one a seed; none of fewer than two.
pub(crate) fn spread(errors: &[f64]) -> Option<SeedSpread> {
    let n = errors.len() as f64;
    if errors.len() < 2 {
        return None;
    }
    let count = errors.len() as u32;
    if errors.iter().any(|e| is_not_finite(*e)) {
        return Some(SeedSpread { count, rel_l2_mean: NOT_FINITE, rel_l2_sd: NOT_FINITE });
    }
    let mean = errors.iter().sum::<f64>() / n;
    let squares: f64 = errors.iter().map(|e| (e - mean) * (e - mean)).sum();
    Some(SeedSpread { count, rel_l2_mean: mean, rel_l2_sd: (squares / (n - 1.0)).sqrt() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_seed_changes() {
        assert_eq!(
            with_seeds("lsh:bits=8,seed=3,reuse=2", 2),
            ["lsh:bits=8,seed=1,reuse=2", "lsh:bits=8,seed=2,reuse=2"]
        );
        let window = longbit::attention::method("window").unwrap();
        assert!(reseeded(&window, 5).is_empty(), "it draws nothing");
        for method in longbit::attention::METHODS {
            let spec = longbit::attention::method(method.name).unwrap();
            assert!(reseeded(&spec, 1).is_empty());
            for text in reseeded(&spec, 3) {
                let other = longbit::attention::method(&text).unwrap();
                assert_eq!(other.canonical(), text);
                assert_eq!(other.method().name, method.name);
            }
        }
    }

    #[test]
    fn spread_of_known_errors() {
        let found = spread(&[0.1, 0.2, 0.3]).unwrap();
        assert!((found.rel_l2_mean - 0.2).abs() < 1e-12 && (found.rel_l2_sd - 0.1).abs() < 1e-12);
        assert_eq!((found.count, spread(&[0.1]), spread(&[])), (3, None, None));
        assert_eq!(spread(&[0.1, NOT_FINITE]).unwrap().rel_l2_sd, NOT_FINITE);
    }
}
