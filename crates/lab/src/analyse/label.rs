//! Short names for series and tables: only what differs is said, and numbers carry the digits they deserve.

use std::collections::{BTreeMap, BTreeSet};

use longbit_protocol::is_not_finite;

use crate::record::Record;

/// The exact method that all others are compared with.
pub const DENSE: &str = "dense";

/// The KV dtype that others are compared with, where it was measured: what released checkpoints are run with.
pub const REFERENCE_KV: &str = "bf16";

/// Names of methods within one result: the parameters that differ between the cells of a method are shown, the others
/// are left to the full listing.
#[derive(Clone, Debug, Default)]
pub struct Labels {
    varying: BTreeMap<String, BTreeSet<String>>,
}

impl Labels {
    /// Learns from `records` which parameters vary.
    pub fn new(records: &[Record]) -> Self {
        let mut values: BTreeMap<(String, String), BTreeSet<Option<String>>> = BTreeMap::new();
        let mut keys: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for r in records {
            keys.entry(&r.method).or_default().extend(r.params().into_keys());
        }
        for r in records {
            let params = r.params();
            for key in keys.get(r.method.as_str()).into_iter().flatten() {
                values.entry((r.method.clone(), key.clone())).or_default().insert(params.get(key).cloned());
            }
        }
        let mut varying: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for ((method, key), seen) in values {
            if seen.len() > 1 {
                varying.entry(method).or_default().insert(key);
            }
        }
        Labels { varying }
    }

    /// E.g. `window:window=512` when only `window` varies, `window` when nothing does.
    pub fn method(&self, record: &Record) -> String {
        let mut params = record.params();
        params.retain(|key, _| self.varying.get(&record.method).is_some_and(|keys| keys.contains(key)));
        crate::plan::method_string(&record.method, &params)
    }
}

/// Distinct values in order of first appearance.
pub fn distinct<T: PartialEq>(values: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut seen = Vec::new();
    for value in values {
        if !seen.contains(&value) {
            seen.push(value);
        }
    }
    seen
}

/// `32k` for whole multiples of 1,024 tokens, digits otherwise.
pub fn context(tokens: u64) -> String {
    if tokens >= 1024 && tokens.is_multiple_of(1024) {
        format!("{}k", tokens / 1024)
    } else {
        tokens.to_string()
    }
}

/// What is shown for a figure that is not a number of its kind.
pub const NOT_FINITE: &str = "not finite";

/// About three significant digits without an exponent: `0.00214`, `12.1`, `1530`.
pub fn digits(value: f64) -> String {
    if is_not_finite(value) {
        return NOT_FINITE.to_owned();
    }
    if value == 0.0 {
        return "0".to_owned();
    }
    let magnitude = value.abs().log10().floor() as i32;
    let decimals = (2 - magnitude).clamp(0, 12) as usize;
    format!("{value:.decimals$}")
}

/// `decimals` digits after the point.
pub fn fixed(value: f64, decimals: usize) -> String {
    if is_not_finite(value) { NOT_FINITE.to_owned() } else { format!("{value:.decimals$}") }
}

/// A share in percent: `43 %`, `2.1 %`, `0.21 %`.
pub fn percent(share: f64) -> String {
    if is_not_finite(share) {
        return NOT_FINITE.to_owned();
    }
    let value = share * 100.0;
    let decimals = match value.abs() {
        v if v == 0.0 || v >= 9.95 => 0,
        v if v >= 0.995 => 1,
        v if v >= 0.0995 => 2,
        _ => 3,
    };
    format!("{value:.decimals$} %")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyse::testing::{Sweep, records};

    #[test]
    fn only_what_differs_is_said() {
        let records = records();
        let labels = Labels::new(&records);
        assert!(records.iter().any(|r| labels.method(r) == "window"));
        let sweep = Sweep {
            methods: vec![
                ("window", &[("sinks", "4"), ("window", "512")]),
                ("window", &[("sinks", "4"), ("window", "1024")]),
            ],
            ..Sweep::default()
        };
        let (plan, machine, lines) = sweep.build();
        let records = crate::analyse::summarise::summarise(&plan, &machine, &lines);
        let labels = Labels::new(&records);
        assert_eq!(
            distinct(records.iter().map(|r| labels.method(r))),
            ["window:window=512", "window:window=1024"]
        );
    }

    #[test]
    fn numbers_carry_three_digits() {
        let shown: Vec<String> =
            [0.00214, 12.14, 1530.4, 0.0, 99.96, 0.999].into_iter().map(digits).collect();
        assert_eq!(shown, ["0.00214", "12.1", "1530", "0", "100.0", "0.999"]);
        let shown: Vec<String> = [0.434, 0.0213, 0.00214, 0.0, 1.0].into_iter().map(percent).collect();
        assert_eq!(shown, ["43 %", "2.1 %", "0.21 %", "0 %", "100 %"]);
        let mean_of_64 = longbit_protocol::NOT_FINITE / 64.0;
        assert_eq!([digits(mean_of_64), digits(f64::NAN), percent(mean_of_64)], [NOT_FINITE; 3]);
        assert_eq!(
            (context(98304), context(1000), context(1024)),
            ("96k".into(), "1000".into(), "1k".into())
        );
    }
}
