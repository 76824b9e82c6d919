//! What a measurement row says about its surroundings: the process's own counters, and what the host did meanwhile.
//!
//! A source that the host does not offer is `None`, never 0: "not throttled" and "nobody could tell" are different
//! findings. The parsers take text, so that they are tested on recorded files.

use crate::cgroup;
use crate::limits::kib_field;
use std::path::PathBuf;
use std::time::Duration;

/// Counters of this process, all threads together, since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessFacts {
    /// Time in user mode, ns.
    pub user_ns: Option<u64>,
    /// Time in the kernel, ns.
    pub sys_ns: Option<u64>,
    /// Voluntary context switches (a parked barrier is one).
    pub nvcsw: Option<u64>,
    /// Involuntary context switches: the scheduler took the CPU away.
    pub nivcsw: Option<u64>,
    /// Page faults served without input or output.
    pub minflt: Option<u64>,
    /// Page faults that read from a device.
    pub majflt: Option<u64>,
    /// Peak resident set (`VmHWM`), bytes.
    pub rss_peak_bytes: Option<u64>,
    /// Resident set now (`VmRSS`), bytes.
    pub rss_bytes: Option<u64>,
    /// Anonymous memory on huge pages (`AnonHugePages`), bytes.
    pub anon_huge_bytes: Option<u64>,
}

impl ProcessFacts {
    /// All facts. The huge-page figure makes the kernel walk the page tables, which takes milliseconds for a large
    /// process: between timed repetitions use [`ProcessFacts::counters`].
    pub fn now() -> Self {
        let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").ok();
        Self {
            anon_huge_bytes: rollup.and_then(|text| kib_field(&text, "AnonHugePages:")),
            ..Self::counters()
        }
    }

    /// All facts but `anon_huge_bytes`; some microseconds.
    pub fn counters() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").ok();
        let field = |name| status.as_deref().and_then(|text| kib_field(text, name));
        Self { rss_peak_bytes: field("VmHWM:"), rss_bytes: field("VmRSS:"), ..usage() }
    }
}

/// `getrusage`, which rustix does not wrap. The layout below is that of 64-bit Linux.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
fn usage() -> ProcessFacts {
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Timeval {
        sec: i64,
        usec: i64,
    }

    /// `struct rusage` with the reserved words that some C libraries append.
    #[repr(C)]
    #[derive(Default)]
    struct Rusage {
        utime: Timeval,
        stime: Timeval,
        maxrss: i64,
        ixrss: i64,
        idrss: i64,
        isrss: i64,
        minflt: i64,
        majflt: i64,
        nswap: i64,
        inblock: i64,
        oublock: i64,
        msgsnd: i64,
        msgrcv: i64,
        nsignals: i64,
        nvcsw: i64,
        nivcsw: i64,
        reserved: [i64; 16],
    }

    unsafe extern "C" {
        fn getrusage(who: std::ffi::c_int, usage: *mut Rusage) -> std::ffi::c_int;
    }

    const RUSAGE_SELF: std::ffi::c_int = 0;
    let mut usage = Rusage::default();
    // SAFETY: the pointer is to a live struct at least as large as the C library's, and the call only writes to it.
    if unsafe { getrusage(RUSAGE_SELF, &raw mut usage) } != 0 {
        return ProcessFacts::default();
    }
    let count = |value: i64| u64::try_from(value).ok();
    let ns = |time: Timeval| Some(count(time.sec)? * 1_000_000_000 + count(time.usec)? * 1_000);
    ProcessFacts {
        user_ns: ns(usage.utime),
        sys_ns: ns(usage.stime),
        nvcsw: count(usage.nvcsw),
        nivcsw: count(usage.nivcsw),
        minflt: count(usage.minflt),
        majflt: count(usage.majflt),
        ..ProcessFacts::default()
    }
}

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
fn usage() -> ProcessFacts {
    ProcessFacts::default()
}

/// What the host says about all CPUs and this control group, since boot or since the group began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Time that the hypervisor gave to others while a CPU was ready to run, in jiffies.
    pub steal_jiffies: Option<u64>,
    /// All time of all CPUs, in jiffies.
    pub total_jiffies: Option<u64>,
    /// Time that the control group was throttled by its quota, µs.
    pub throttled_us: Option<u64>,
    /// Time that some task waited for a CPU (PSI `some`), µs.
    pub psi_cpu_some_us: Option<u64>,
    /// The lowest current frequency of the CPUs, kHz.
    pub min_khz: Option<u64>,
    /// The highest current frequency of the CPUs, kHz.
    pub max_khz: Option<u64>,
}

impl HostFacts {
    /// Reads all of it; some tens of microseconds, so between timed repetitions, never inside one.
    pub fn now() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).ok();
        let jiffies = read("/proc/stat").and_then(|text| parse_stat(&text));
        let khz = frequencies();
        Self {
            steal_jiffies: jiffies.map(|(steal, _)| steal),
            total_jiffies: jiffies.map(|(_, total)| total),
            throttled_us: throttled_us(),
            psi_cpu_some_us: read("/proc/pressure/cpu").and_then(|text| parse_psi(&text)),
            min_khz: khz.iter().min().copied(),
            max_khz: khz.iter().max().copied(),
        }
    }

    /// Lowest and highest current frequency, kHz, where the host says.
    pub fn khz(&self) -> Option<(u64, u64)> {
        self.min_khz.zip(self.max_khz)
    }
}

/// From the nearest group that has a quota.
fn throttled_us() -> Option<u64> {
    let text = |group: &PathBuf| std::fs::read_to_string(group.join("cpu.stat")).ok();
    cgroup::groups("cpu").iter().filter_map(text).find_map(|text| parse_throttled(&text))
}

fn frequencies() -> Vec<u64> {
    let Ok(cpus) = std::fs::read_dir("/sys/devices/system/cpu") else { return Vec::new() };
    cpus.flatten()
        .filter(|entry| {
            let name = entry.file_name();
            let digits = name.to_str().and_then(|name| name.strip_prefix("cpu"));
            digits.is_some_and(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()))
        })
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("cpufreq/scaling_cur_freq")).ok())
        .filter_map(|text| text.trim().parse().ok())
        .collect()
}

/// Steal and total jiffies from the `cpu ` line of `/proc/stat`. Guest time is part of user time and not counted again.
/// `None` for kernels before the steal column.
fn parse_stat(text: &str) -> Option<(u64, u64)> {
    const STEAL: usize = 7;
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> =
        line.split_ascii_whitespace().take(STEAL + 1).map(|f| f.parse().ok()).collect::<Option<_>>()?;
    let steal = *fields.get(STEAL)?;
    Some((steal, fields.iter().try_fold(0u64, |sum, &f| sum.checked_add(f))?))
}

/// Throttled time in µs from `cpu.stat`: `throttled_usec` (version 2) or `throttled_time` in ns (version 1).
fn parse_throttled(text: &str) -> Option<u64> {
    let value = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse::<u64>().ok())
    };
    value("throttled_usec").or_else(|| value("throttled_time").map(|ns| ns / 1000))
}

/// The total of the `some` line of a PSI file, µs.
fn parse_psi(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    line.split_ascii_whitespace().find_map(|field| field.strip_prefix("total="))?.parse().ok()
}

/// Share of all CPU time between two readings that the hypervisor took, in percent; `None` where either lacks it, or no
/// jiffy passed.
pub fn steal_pct(before: &HostFacts, after: &HostFacts) -> Option<f64> {
    let steal = after.steal_jiffies?.checked_sub(before.steal_jiffies?)?;
    let total = after.total_jiffies?.checked_sub(before.total_jiffies?)?;
    (total > 0).then(|| 100.0 * steal as f64 / total as f64)
}

/// Share of the wall time between two readings in which some task of the machine waited for a CPU, in percent; `None`
/// where either lacks it, or no time passed.
pub fn psi_pct(before: &HostFacts, after: &HostFacts, wall: Duration) -> Option<f64> {
    let waited = after.psi_cpu_some_us?.checked_sub(before.psi_cpu_some_us?)?;
    let wall_us = wall.as_secs_f64() * 1e6;
    (wall_us > 0.0).then(|| 100.0 * waited as f64 / wall_us)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str =
        "cpu  1000 20 300 40000 50 6 7 89 11 12\ncpu0 500 10 150 20000 25 3 3 45 5 6\nintr 1 2\n";

    #[test]
    fn stat_gives_steal_and_total_without_guest_time() {
        assert_eq!(parse_stat(STAT), Some((89, 1000 + 20 + 300 + 40000 + 50 + 6 + 7 + 89)));
        assert_eq!(parse_stat("cpu  1 2 3 4 5 6 7\n"), None, "no steal column");
        assert_eq!(parse_stat("cpu  1 2 x 4 5 6 7 8\n"), None);
        assert_eq!(parse_stat("cpu0 1 2 3 4 5 6 7 8\n"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn throttling_is_read_from_both_versions() {
        let v2 = "usage_usec 9\nnr_periods 10\nnr_throttled 3\nthrottled_usec 4567\n";
        let v1 = "nr_periods 10\nnr_throttled 3\nthrottled_time 4567890\n";
        assert_eq!(parse_throttled(v2), Some(4567));
        assert_eq!(parse_throttled(v1), Some(4567));
        assert_eq!(parse_throttled("usage_usec 9\nuser_usec 5\n"), None, "a root group has no quota");
    }

    #[test]
    fn psi_takes_the_total_of_some() {
        let text = "some avg10=1.00 avg60=0.04 avg300=0.19 total=5201763\nfull avg10=0.00 total=77\n";
        assert_eq!(parse_psi(text), Some(5_201_763));
        assert_eq!(parse_psi("full avg10=0.00 total=77\n"), None);
        assert_eq!(parse_psi("some avg10=0.00\n"), None);
    }

    #[test]
    fn shares_are_none_where_a_reading_is_missing_or_runs_backwards() {
        let host = |steal, total, psi| HostFacts {
            steal_jiffies: steal,
            total_jiffies: total,
            psi_cpu_some_us: psi,
            ..HostFacts::default()
        };
        let (a, b) = (host(Some(10), Some(1000), Some(500)), host(Some(20), Some(1200), Some(250_500)));
        assert_eq!(steal_pct(&a, &b), Some(5.0));
        assert_eq!(psi_pct(&a, &b, Duration::from_secs(1)), Some(25.0));
        assert_eq!(steal_pct(&b, &a), None);
        assert_eq!(steal_pct(&a, &a), None);
        assert_eq!(steal_pct(&host(None, Some(1), None), &b), None);
        assert_eq!(psi_pct(&host(None, None, None), &b, Duration::from_secs(1)), None);
        assert_eq!(psi_pct(&a, &b, Duration::ZERO), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_counters_that_grow() {
        let before = ProcessFacts::now();
        let mut pages = vec![0u8; 8 << 20];
        pages.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        std::hint::black_box(&pages);
        let after = ProcessFacts::counters();
        assert!(after.user_ns.zip(after.sys_ns).is_some_and(|(user, sys)| user + sys > 0), "{after:?}");
        assert!(after.minflt > before.minflt, "{before:?} {after:?}");
        assert!(after.rss_peak_bytes >= before.rss_peak_bytes && after.rss_peak_bytes > Some(8 << 20));
        assert_eq!(after.anon_huge_bytes, None);
    }
}
