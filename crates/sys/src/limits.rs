//! Caps and head room: the address-space limit of a worker process, and the memory that is open to it.

use crate::cgroup;
use crate::error::SysError;
use std::path::Path;

/// Memory that this process could still use; a source that the platform lacks is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct OpenMemory {
    /// `MemAvailable` of `/proc/meminfo`: what the machine can give without swapping.
    pub available_bytes: Option<u64>,
    /// The tightest memory limit of the control group and its ancestors; `None` also when there is no limit.
    pub cgroup_limit_bytes: Option<u64>,
    /// What that control group uses now, file cache included.
    pub cgroup_used_bytes: Option<u64>,
}

impl OpenMemory {
    /// The smaller of what the machine and the control group leave; `None` when neither is known. File cache counts as
    /// used in the group although it could be dropped, so the figure is on the safe side.
    pub fn usable(&self) -> Option<u64> {
        let group =
            self.cgroup_limit_bytes.map(|limit| limit - self.cgroup_used_bytes.unwrap_or(0).min(limit));
        match (self.available_bytes, group) {
            (Some(machine), Some(group)) => Some(machine.min(group)),
            (machine, group) => machine.or(group),
        }
    }
}

/// The memory open to this process now.
pub fn open_memory() -> OpenMemory {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok();
    let groups = cgroup::groups("memory");
    let read = |group: &Path, file: &str| std::fs::read_to_string(group.join(file)).ok();
    // Version 2, then version 1: a host has one of them for memory.
    let pick = |limit: &str, used: &str| {
        tightest(groups.iter().filter_map(|group| Some((read(group, limit)?, read(group, used)))))
    };
    let group = pick("memory.max", "memory.current")
        .or_else(|| pick("memory.limit_in_bytes", "memory.usage_in_bytes"));
    OpenMemory {
        available_bytes: meminfo.and_then(|text| kib_field(&text, "MemAvailable:")),
        cgroup_limit_bytes: group.map(|(limit, _)| limit),
        cgroup_used_bytes: group.and_then(|(_, used)| used),
    }
}

/// The limit that leaves least of a chain of groups, with the use in its group, from the texts of both files.
fn tightest(groups: impl Iterator<Item = (String, Option<String>)>) -> Option<(u64, Option<u64>)> {
    groups
        .filter_map(|(limit, used)| {
            Some((limit_value(&limit)?, used.and_then(|text| text.trim().parse().ok())))
        })
        .min_by_key(|&(limit, used): &(u64, Option<u64>)| limit.saturating_sub(used.unwrap_or(0)))
}

/// A limit in bytes; `None` for `max` (version 2) and for the page-rounded maximum that version 1 writes for no limit.
fn limit_value(text: &str) -> Option<u64> {
    text.trim().parse::<u64>().ok().filter(|&bytes| bytes < 1 << 60)
}

/// The value of a `Name:  123 kB` line in bytes.
pub(crate) fn kib_field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Limits the address space of this process to `bytes` (`RLIMIT_AS`, the soft limit), so that a too large request fails
/// with an error instead of calling the out-of-memory killer. A hard limit below `bytes`, as batch systems set, stays.
///
/// # Errors
/// [`SysError::Limit`] when it is refused, [`SysError::Unsupported`] outside Linux.
#[cfg(target_os = "linux")]
pub fn set_address_space_limit(bytes: u64) -> Result<(), SysError> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::As).maximum;
    let current = Some(maximum.map_or(bytes, |hard| hard.min(bytes)));
    setrlimit(Resource::As, Rlimit { current, maximum })
        .map_err(|error| SysError::Limit { bytes, source: error.into() })
}

/// Limits the address space of this process: not available on this platform.
///
/// # Errors
/// [`SysError::Unsupported`], always.
#[cfg(not(target_os = "linux"))]
pub fn set_address_space_limit(_bytes: u64) -> Result<(), SysError> {
    Err(SysError::Unsupported { what: "an address-space limit" })
}

/// Asks the system to end this process when the thread that started it ends, so that a killed runner leaves no worker
/// behind that goes on using the machine. Where the system cannot be asked, nothing happens.
pub fn die_with_parent() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Signal, set_parent_process_death_signal};
        // Refusal leaves a worker that ends at its next write to the runner.
        let _ = set_parent_process_death_signal(Some(Signal::KILL));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str =
        "MemTotal:        4014048 kB\nMemFree:          123456 kB\nMemAvailable:    2000000 kB\n";

    #[test]
    fn meminfo_lines_are_read_in_bytes() {
        assert_eq!(kib_field(MEMINFO, "MemAvailable:"), Some(2_000_000 * 1024));
        assert_eq!(kib_field(MEMINFO, "SwapFree:"), None);
        assert_eq!(kib_field("MemAvailable: many kB\n", "MemAvailable:"), None);
        assert_eq!(kib_field("MemAvailable: 12\n", "MemAvailable:"), None);
        assert_eq!(kib_field("MemAvailable: 18446744073709551615 kB\n", "MemAvailable:"), None);
    }

    #[test]
    fn the_group_that_leaves_least_counts() {
        let chain = |list: &[(&str, Option<&str>)]| {
            let own = |text: &str| format!("{text}\n");
            tightest(
                list.iter().map(|&(limit, used)| (own(limit), used.map(own))).collect::<Vec<_>>().into_iter(),
            )
        };
        let found = chain(&[("max", Some("5")), ("1000", Some("10")), ("900", Some("20"))]);
        assert_eq!(found, Some((900, Some(20))));
        assert_eq!(chain(&[("1000", Some("950")), ("900", None)]), Some((1000, Some(950))));
        assert_eq!(chain(&[("max", None), ("9223372036854771712", Some("7"))]), None);
    }

    #[test]
    fn usable_is_the_smaller_of_both_and_never_negative() {
        let memory = |a, l, u| OpenMemory { available_bytes: a, cgroup_limit_bytes: l, cgroup_used_bytes: u };
        assert_eq!(memory(Some(100), Some(50), Some(20)).usable(), Some(30));
        assert_eq!(memory(Some(10), Some(50), Some(20)).usable(), Some(10));
        assert_eq!(memory(None, Some(50), Some(70)).usable(), Some(0));
        assert_eq!(memory(Some(7), None, None).usable(), Some(7));
        assert_eq!(memory(None, None, None).usable(), None);
    }
}
