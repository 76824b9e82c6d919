//! One timed repetition of a cell.

use std::time::Instant;

use longbit_protocol::{Measure, Sample, Traffic};
use longbit_sys::{HostFacts, ProcessFacts, psi_pct, steal_pct};

use crate::WorkerError;

/// What a repetition times.
pub(crate) trait Passes {
    /// Makes ready for pass `step`, while the clock stands.
    fn ready(&mut self, _step: usize) {}

    /// Runs pass `step` of a repetition.
    fn pass(&mut self, step: usize) -> Result<(), WorkerError>;

    /// What the attention of the last pass read.
    fn traffic(&self) -> Traffic {
        Traffic::default()
    }

    /// Back to where the repetition began; bytes of state beside the cache there.
    fn rewind(&mut self) -> u64 {
        0
    }
}

/// Runs the warm-up and the timed passes of `batch` tokens, then rewinds. The clock is read around each pass; everything
/// that it needs from the workload was made before.
pub(crate) fn repetition(
    passes: &mut dyn Passes,
    batch: usize,
    measure: &Measure,
) -> Result<Sample, WorkerError> {
    let (warmup, timed) = measure.passes(batch);
    for step in 0..warmup {
        passes.ready(step);
        passes.pass(step)?;
    }
    let mut sample = Sample { t0: utc_now(), tok_ns: Vec::with_capacity(timed), ..Sample::default() };
    let (process, host, start) = (ProcessFacts::counters(), HostFacts::now(), Instant::now());
    for step in warmup..warmup + timed {
        passes.ready(step);
        let before = Instant::now();
        passes.pass(step)?;
        sample.tok_ns.push(before.elapsed().as_nanos() as u64);
        let traffic = passes.traffic();
        sample.traffic.kv_bytes += traffic.kv_bytes;
        sample.traffic.index_bytes += traffic.index_bytes;
        sample.traffic.rows += traffic.rows;
    }
    let wall = start.elapsed();
    let (process_after, host_after) = (ProcessFacts::counters(), HostFacts::now());
    let index_bytes = passes.rewind();
    let spent = |f: fn(&ProcessFacts) -> Option<u64>| {
        f(&process_after).zip(f(&process)).map(|(b, a)| b.saturating_sub(a))
    };
    Ok(Sample {
        user_ns: spent(|p| p.user_ns),
        sys_ns: spent(|p| p.sys_ns),
        nvcsw: spent(|p| p.nvcsw),
        nivcsw: spent(|p| p.nivcsw),
        minflt: spent(|p| p.minflt),
        majflt: spent(|p| p.majflt),
        rss_peak_bytes: process_after.rss_peak_bytes,
        steal_pct: steal_pct(&host, &host_after),
        throttled_us: host_after.throttled_us.zip(host.throttled_us).map(|(b, a)| b.saturating_sub(a)),
        psi_cpu_pct: psi_pct(&host, &host_after, wall),
        khz: host_after.khz(),
        index_bytes,
        traffic: Traffic { ..sample.traffic },
        ..sample
    })
}

/// Now, RFC 3339 in UTC, to the millisecond.
fn utc_now() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    rfc3339(since.as_secs(), since.subsec_millis())
}

/// Civil date from days since 1970 (Howard Hinnant, chrono-compatible low-level date algorithms).
fn rfc3339(seconds: u64, millis: u32) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{millis:03}Z",
        rest / 3600,
        rest % 3600 / 60,
        rest % 60
    )
}

#[cfg(test)]
mod tests {
    use super::rfc3339;

    #[test]
    fn dates_are_civil() {
        assert_eq!(rfc3339(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(951_782_400, 7), "2000-02-29T00:00:00.007Z");
        assert_eq!(rfc3339(1_767_225_599, 999), "2025-12-31T23:59:59.999Z");
    }
}
