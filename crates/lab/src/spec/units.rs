//! Quantities with units, as people write them: `1GiB`, `90%`, `30m`.

use serde::{Deserialize, Serialize};

/// A memory limit: absolute, or a share of what is available.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum MemoryLimit {
    /// Bytes.
    Bytes(u64),
    /// Percent of the memory available to the process.
    Percent(f64),
}

impl MemoryLimit {
    /// The limit in bytes where `available` bytes can be had.
    pub fn resolve(self, available: u64) -> u64 {
        match self {
            MemoryLimit::Bytes(bytes) => bytes,
            MemoryLimit::Percent(percent) => (available as f64 * percent / 100.0) as u64,
        }
    }
}

/// The number at the front and the unit behind it.
fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let value: f64 = text[..end].parse().ok()?;
    value.is_finite().then(|| (value, text[end..].trim()))
}

/// Bytes of e.g. `512MiB`, `8GiB`, `2GB`, `4096B`.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn size(text: &str) -> Result<u64, String> {
    let bad = || format!("{text:?} is not a size; write e.g. \"512MiB\", \"8GiB\" or \"2GB\"");
    let (value, unit) = split(text).ok_or_else(bad)?;
    let scale: f64 = match unit.to_ascii_lowercase().as_str() {
        "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(bad()),
    };
    let bytes = value * scale;
    // 2^53: up to here the product is exact enough to be a count, and nothing real is larger.
    if bytes < 9.007_199_254_740_992e15 { Ok(bytes.round() as u64) } else { Err(bad()) }
}

/// A size, or a percentage of the available memory in (0, 100].
///
/// # Errors
/// A sentence that says what is accepted.
pub fn memory_limit(text: &str) -> Result<MemoryLimit, String> {
    if text.trim().ends_with('%') {
        let percent = percent(text)?;
        if percent <= 0.0 || percent > 100.0 {
            return Err(format!("{text:?} is not a share of the memory; write e.g. \"90%\""));
        }
        return Ok(MemoryLimit::Percent(percent));
    }
    match size(text) {
        Ok(0) => Err("a limit of 0 bytes lets nothing run".to_owned()),
        Ok(bytes) => Ok(MemoryLimit::Bytes(bytes)),
        Err(_) => Err(format!("{text:?} is not a memory limit; write e.g. \"90%\" or \"8GiB\"")),
    }
}

/// Seconds of e.g. `90s`, `30m`, `2h`, `500ms`; more than zero, at most a year.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn duration(text: &str) -> Result<f64, String> {
    let bad = || format!("{text:?} is not a duration; write e.g. \"90s\", \"30m\" or \"2h\"");
    let (value, unit) = split(text).ok_or_else(bad)?;
    let seconds = match unit {
        "ms" => value / 1e3,
        "s" => value,
        "m" | "min" => value * 60.0,
        "h" => value * 3600.0,
        _ => return Err(bad()),
    };
    if seconds > 0.0 && seconds <= 366.0 * 86400.0 { Ok(seconds) } else { Err(bad()) }
}

/// Percent of e.g. `5%` or `0.5%`; not negative.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn percent(text: &str) -> Result<f64, String> {
    match split(text) {
        Some((value, "%")) => Ok(value),
        _ => Err(format!("{text:?} is not a percentage; write e.g. \"5%\"")),
    }
}

/// A plain number that is not negative, written as text or number.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn number(text: &str) -> Result<f64, String> {
    match split(text) {
        Some((value, "")) => Ok(value),
        _ => Err(format!("{text:?} is not a number; write e.g. \"0.001\"")),
    }
}

/// Bytes for people, e.g. `13.8 GB`.
pub fn show_bytes(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", value / 1e6),
        _ => format!("{:.1} GB", value / 1e9),
    }
}

/// Seconds for people, e.g. `1h 05m`, `3m 20s`, `4.2s`.
pub fn show_seconds(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{:.1}s", seconds.max(0.0));
    }
    let whole = seconds.round().min(1e15) as u64;
    match whole {
        0..3600 => format!("{}m {:02}s", whole / 60, whole % 60),
        _ => format!("{}h {:02}m", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(size("1GiB"), Ok(1 << 30));
        assert_eq!(size("1.5 MB"), Ok(1_500_000));
        assert_eq!(duration("30m"), Ok(1800.0));
        assert_eq!(duration("500ms"), Ok(0.5));
        assert_eq!(percent("0.5%"), Ok(0.5));
        assert_eq!(memory_limit("90%"), Ok(MemoryLimit::Percent(90.0)));
        assert_eq!(MemoryLimit::Percent(50.0).resolve(1000), 500);
        for bad in ["", "GiB", "1", "1 parsec", "-1GiB", "1e3GiB", "99999999TiB", "1..2GB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        for bad in ["0s", "1", "-3m", "m", "99999h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        for bad in ["0%", "101%", "0GiB", "ninety"] {
            assert!(memory_limit(bad).is_err(), "{bad}");
        }
        assert_eq!(show_bytes(13_800_000_000), "13.8 GB");
        assert_eq!(show_seconds(3905.0), "1h 05m");
        assert_eq!(show_seconds(200.0), "3m 20s");
    }
}
