//! Parsers of what Linux shows below `/proc` and `/sys`. Pure functions of text; what is not there is `None`.

/// The first value of `key : value` in `/proc/cpuinfo`.
pub(super) fn cpuinfo(text: &str, key: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (k, v) = line.split_once(':')?;
        (k.trim() == key && !v.trim().is_empty()).then(|| v.trim().to_owned())
    })
}

/// Flags that kernels can use, in the order of this list.
pub(super) fn flags(cpuinfo_text: &str) -> Vec<String> {
    const KNOWN: [&str; 30] = [
        "sse4_2",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "bmi2",
        "popcnt",
        "gfni",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512_vnni",
        "avx512vbmi",
        "avx512_vbmi2",
        "avx512_bitalg",
        "avx512_vpopcntdq",
        "avx512_bf16",
        "avx512_fp16",
        "amx_tile",
        "amx_int8",
        "amx_bf16",
        "asimd",
        "asimddp",
        "asimdhp",
        "i8mm",
        "bf16",
        "sve",
        "sve2",
    ];
    let listed = cpuinfo(cpuinfo_text, "flags").or_else(|| cpuinfo(cpuinfo_text, "Features"));
    let listed: Vec<&str> = listed.as_deref().unwrap_or_default().split_whitespace().collect();
    KNOWN.iter().filter(|k| listed.contains(k)).map(|k| (*k).to_owned()).collect()
}

/// How many numbers a list such as `0-3,8` names.
pub(super) fn list_len(text: &str) -> Option<usize> {
    let mut count = 0;
    for part in text.trim().split(',').filter(|p| !p.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (usize, usize) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        count += to.checked_sub(from)? + 1;
    }
    (count > 0).then_some(count)
}

/// The value of `key:` in `/proc/self/status`.
pub(super) fn status_field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':')).map(str::trim)
}

/// Bytes of a `/proc/meminfo` entry, which is in kiB.
pub(super) fn meminfo(text: &str, key: &str) -> Option<u64> {
    let kib: u64 = status_field(text, key)?.strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A cache size such as `2048K`.
pub(super) fn cache_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let (number, scale) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    number.parse::<u64>().ok()?.checked_mul(scale)
}

/// The chosen word of `always [madvise] never`.
pub(super) fn bracketed(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// A control-group limit in bytes; none when there is no limit. Version 1 writes a number near 2^63 for that.
pub(super) fn memory_max(text: &str) -> Option<u64> {
    text.trim().parse::<u64>().ok().filter(|&b| b < 1 << 60)
}

/// CPUs of a version 2 `cpu.max` (`quota period` or `max period`).
pub(super) fn cpu_max(text: &str) -> Option<f64> {
    let mut words = text.split_whitespace();
    quota(words.next()?, words.next()?)
}

/// CPUs of a quota and a period in microseconds; none without a quota.
pub(super) fn quota(quota: &str, period: &str) -> Option<f64> {
    let (quota, period): (f64, f64) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
    (quota > 0.0 && period > 0.0).then_some(quota / period)
}

/// Control-group paths from `/proc/self/cgroup`: of version 2, and of a version 1 controller.
pub(super) fn cgroup_path(text: &str, controller: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let here = match controller {
            "" => controllers.is_empty(),
            name => controllers.split(',').any(|c| c == name),
        };
        here.then(|| path.to_owned())
    })
}

/// Share of CPU time since boot that the host stole, percent, from the first line of `/proc/stat`.
pub(super) fn steal_pct(text: &str) -> Option<f64> {
    let line = text.lines().find(|l| l.starts_with("cpu "))?;
    let ticks: Vec<u64> = line.split_whitespace().skip(1).map_while(|t| t.parse().ok()).collect();
    let all: u64 = ticks.iter().take(8).sum();
    (all > 0).then(|| *ticks.get(7).unwrap_or(&0) as f64 * 100.0 / all as f64)
}

/// `some avg10` of a `/proc/pressure` file, percent.
pub(super) fn pressure(text: &str) -> Option<f64> {
    let line = text.lines().find(|l| l.starts_with("some "))?;
    line.split_whitespace().find_map(|w| w.strip_prefix("avg10="))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixtures() {
        let cpu = "processor\t: 0\nmodel name\t: A CPU @ 2GHz\nflags\t\t: fpu avx2 sse4_2 avx512_vnni\n";
        assert_eq!(cpuinfo(cpu, "model name").as_deref(), Some("A CPU @ 2GHz"));
        assert_eq!(flags(cpu), ["sse4_2", "avx2", "avx512_vnni"]);
        assert_eq!(
            (list_len("0-3,8\n"), list_len(""), list_len("3-1"), list_len("x")),
            (Some(5), None, None, None)
        );
        let status = "Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t0-1\n";
        assert_eq!(status_field(status, "Cpus_allowed_list"), Some("0-1"));
        assert_eq!(meminfo("MemTotal:       24 kB\nMemAvailable:  12 kB\n", "MemAvailable"), Some(12288));
        assert_eq!(
            (cache_size("48K\n"), cache_size("260M"), cache_size("")),
            (Some(49152), Some(260 << 20), None)
        );
        assert_eq!(bracketed("always [madvise] never\n").as_deref(), Some("madvise"));
        assert_eq!(
            (memory_max("max\n"), memory_max("9223372036854771712"), memory_max("4096")),
            (None, None, Some(4096))
        );
        assert_eq!((cpu_max("max 100000"), cpu_max("150000 100000\n")), (None, Some(1.5)));
        assert_eq!(quota("-1", "100000"), None);
        let groups = "4:memory:/a/b\n3:cpu,cpuacct:/c\n0::/d\n";
        assert_eq!(cgroup_path(groups, "memory").as_deref(), Some("/a/b"));
        assert_eq!(cgroup_path(groups, "cpuacct").as_deref(), Some("/c"));
        assert_eq!(cgroup_path(groups, "").as_deref(), Some("/d"));
        assert_eq!(steal_pct("cpu  10 0 10 70 0 0 0 10 0 0\ncpu0 1 2\n"), Some(10.0));
        assert_eq!(steal_pct("cpu0 1 2\n"), None);
        assert_eq!(pressure("some avg10=66.10 avg60=1.0 avg300=0 total=5\nfull avg10=0\n"), Some(66.10));
    }
}
