//! What this machine is, as far as it says. Unknown is none, never a guess; what is likely to disturb a measurement
//! is said in [`Machine::warnings`].

mod parse;

use std::path::{Path, PathBuf};

use longbit_protocol::{Machine, Probe, Toolchain};
use sha2::{Digest, Sha256};

use crate::Result;
use crate::engine::Engine;
use crate::spec::hex;

/// Buffer of the bandwidth probe that feeds predictions: larger than most last-level caches, read in well under a
/// second.
pub const PROBE_BYTES: u64 = 512 << 20;

/// How this binary was built.
pub fn toolchain() -> Toolchain {
    Toolchain {
        git_sha: env!("LONGBIT_GIT_SHA").to_owned(),
        git_dirty: env!("LONGBIT_GIT_DIRTY").parse().ok(),
        rustc: env!("LONGBIT_RUSTC").to_owned(),
        target: env!("LONGBIT_TARGET").to_owned(),
        profile: env!("LONGBIT_PROFILE").to_owned(),
    }
}

/// This machine, without bandwidth probes.
pub fn gather() -> Machine {
    let mut machine = gather_from(Path::new("/"));
    // Where there is no /proc.
    if machine.memory_bytes == 0 {
        if let Ok(mut system) = sysinfo::System::new() {
            system.refresh_memory();
            machine.memory_bytes = system.total_memory();
            machine.memory_available_bytes = system.available_memory();
        }
        identify(&mut machine, &sysinfo::System::host_name().unwrap_or_default());
    }
    machine
}

/// Measures read bandwidth with each thread count through the engine and stores it.
///
/// # Errors
/// As [`Engine::probe`].
pub fn probe(machine: &mut Machine, engine: &dyn Engine, threads: &[usize]) -> Result<Vec<Probe>> {
    let probes = engine.probe(threads, PROBE_BYTES)?;
    machine.probes.clone_from(&probes);
    Ok(probes)
}

/// Thread counts worth probing on `cpus` CPUs: all up to 8, then powers of two, and all of them.
pub fn probe_threads(cpus: usize) -> Vec<usize> {
    (1..=cpus.max(1)).filter(|&n| n <= 8 || n.is_power_of_two() || n == cpus).collect()
}

/// Reads below `root`, so that tests can lay out a machine in a directory.
fn gather_from(root: &Path) -> Machine {
    let files = Files(root.to_path_buf());
    let cpuinfo = files.read("proc/cpuinfo").unwrap_or_default();
    let meminfo = files.read("proc/meminfo").unwrap_or_default();
    let field = |key| parse::cpuinfo(&cpuinfo, key);
    let allowed = files
        .read("proc/self/status")
        .and_then(|t| parse::list_len(parse::status_field(&t, "Cpus_allowed_list")?))
        .or_else(|| std::thread::available_parallelism().ok().map(usize::from))
        .unwrap_or(1);
    let signature = match (field("cpu family"), field("model"), field("stepping")) {
        (Some(f), Some(m), Some(s)) => Some(format!("{f}-{m}-{s}")),
        _ => None,
    };
    let cpu = "sys/devices/system/cpu";
    let available = parse::meminfo(&meminfo, "MemAvailable").unwrap_or(0);
    let groups = files.read("proc/self/cgroup").unwrap_or_default();
    let (limit, free) = files.memory_group(&groups);
    let mut machine = Machine {
        cpu_model: field("model name"),
        cpu_signature: signature,
        microcode: field("microcode"),
        flags: parse::flags(&cpuinfo),
        cpus_allowed: allowed,
        threads_per_core: files
            .read(&format!("{cpu}/cpu0/topology/thread_siblings_list"))
            .and_then(|t| parse::list_len(&t)),
        sockets: count(cpuinfo.lines().filter(|l| l.starts_with("physical id"))),
        numa_nodes: files.numa_nodes(),
        caches: files.caches(),
        memory_bytes: parse::meminfo(&meminfo, "MemTotal").unwrap_or(0),
        memory_available_bytes: free.map_or(available, |f| f.min(available)),
        cgroup_memory_max_bytes: limit,
        cgroup_cpu_max: files.cpu_group(&groups),
        os: files.os(),
        hypervisor: files.hypervisor(&cpuinfo),
        governor: files.line(&format!("{cpu}/cpu0/cpufreq/scaling_governor")),
        turbo: files
            .line(&format!("{cpu}/intel_pstate/no_turbo"))
            .map(|t| t == "0")
            .or_else(|| files.line(&format!("{cpu}/cpufreq/boost")).map(|t| t == "1")),
        thp: files.read("sys/kernel/mm/transparent_hugepage/enabled").and_then(|t| parse::bracketed(&t)),
        toolchain: toolchain(),
        ..Machine::default()
    };
    let host = files.line("proc/sys/kernel/hostname").unwrap_or_default();
    let host = format!("{host}|{}", files.line("etc/machine-id").unwrap_or_default());
    identify(&mut machine, &host);
    machine.warnings = warnings(&machine, &files);
    machine
}

/// Fills in `machine_id` and `machine_class`.
fn identify(machine: &mut Machine, host: &str) {
    let gib = (machine.memory_bytes as f64 / f64::from(1 << 30)).round();
    let model = machine.cpu_model.as_deref().unwrap_or("unknown");
    let class = format!("{model}|{}|{}|{gib}", machine.flags.join(" "), machine.cpus_allowed);
    let short = |text: &str| hex(&Sha256::digest(text.as_bytes())[..8]);
    machine.machine_class = short(&class);
    machine.machine_id = short(&format!("{class}|{host}"));
}

/// What is likely to disturb a measurement here.
fn warnings(machine: &Machine, files: &Files) -> Vec<String> {
    let mut found = Vec::new();
    match machine.governor.as_deref() {
        None => found.push("no frequency governor is visible; clock changes cannot be ruled out".to_owned()),
        Some("performance") => {}
        Some(other) => found.push(format!("the frequency governor is {other}, not performance")),
    }
    if machine.thp.as_deref() == Some("never") {
        found.push("transparent huge pages are off; large caches pay for page walks".to_owned());
    }
    if let Some(cpus) = machine.cgroup_cpu_max.filter(|&c| c < machine.cpus_allowed as f64) {
        let allowed = machine.cpus_allowed;
        found.push(format!("the control group allows {cpus:.1} of {allowed} CPUs; bursts are throttled"));
    }
    if let Some(name) = &machine.hypervisor {
        found.push(format!("this is a virtual machine ({name}); neighbours may take time and bandwidth"));
    }
    if let Some(steal) = files.read("proc/stat").and_then(|t| parse::steal_pct(&t)).filter(|&s| s > 1.0) {
        found.push(format!("the host stole {steal:.1} % of the CPU time since boot"));
    }
    let load = files.line("proc/loadavg").and_then(|t| t.split(' ').next()?.parse::<f64>().ok());
    if let Some(load) = load.filter(|&l| l > 0.5) {
        found.push(format!("other work is running: load average {load:.2}"));
    }
    if let Some(share) =
        files.read("proc/pressure/cpu").and_then(|t| parse::pressure(&t)).filter(|&p| p > 5.0)
    {
        found.push(format!("tasks waited for a CPU {share:.0} % of the last 10 s"));
    }
    found
}

/// How many different items; none without any.
fn count<T: Ord>(items: impl Iterator<Item = T>) -> Option<usize> {
    let n = items.collect::<std::collections::BTreeSet<_>>().len();
    (n > 0).then_some(n)
}

/// A file system below a root.
struct Files(PathBuf);

impl Files {
    fn read(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.0.join(path)).ok()
    }

    fn line(&self, path: &str) -> Option<String> {
        let text = self.read(path)?;
        text.lines().next().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty())
    }

    fn names(&self, path: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.join(path)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    fn numa_nodes(&self) -> Option<usize> {
        let node = |n: &String| n.strip_prefix("node").is_some_and(|d| d.parse::<u32>().is_ok());
        count(self.names("sys/devices/system/node").into_iter().filter(node))
    }

    fn caches(&self) -> Vec<(String, u64)> {
        let base = "sys/devices/system/cpu/cpu0/cache";
        let mut found = Vec::new();
        for index in self.names(base).into_iter().filter(|n| n.starts_with("index")) {
            let of = |file: &str| self.line(&format!("{base}/{index}/{file}"));
            if let (Some(level), Some(kind), Some(size)) = (of("level"), of("type"), of("size")) {
                let suffix = match kind.as_str() {
                    "Data" => "d",
                    "Instruction" => "i",
                    _ => "",
                };
                if let Some(bytes) = parse::cache_size(&size) {
                    found.push((format!("L{level}{suffix}"), bytes));
                }
            }
        }
        found
    }

    fn os(&self) -> String {
        let release = self.read("etc/os-release").unwrap_or_default();
        let name = release.lines().find_map(|l| l.strip_prefix("PRETTY_NAME=")).map(|n| n.trim_matches('"'));
        let kernel = [self.line("proc/sys/kernel/ostype"), self.line("proc/sys/kernel/osrelease")];
        let kernel: Vec<String> = kernel.into_iter().flatten().collect();
        match (name, kernel.is_empty()) {
            (Some(name), false) => format!("{name}, {}", kernel.join(" ")),
            (None, false) => kernel.join(" "),
            (Some(name), true) => name.to_owned(),
            (None, true) => std::env::consts::OS.to_owned(),
        }
    }

    fn hypervisor(&self, cpuinfo: &str) -> Option<String> {
        let shows = parse::cpuinfo(cpuinfo, "flags").is_some_and(|f| f.split(' ').any(|w| w == "hypervisor"));
        let vendor = || {
            let parts =
                [self.line("sys/class/dmi/id/sys_vendor"), self.line("sys/class/dmi/id/product_name")];
            let text = parts.into_iter().flatten().collect::<Vec<_>>().join(" ");
            (!text.is_empty()).then_some(text)
        };
        self.line("sys/hypervisor/type")
            .or_else(|| shows.then(|| vendor().unwrap_or_else(|| "unnamed".to_owned())))
    }

    /// The smallest memory limit of the process's control groups, and what is left below it.
    fn memory_group(&self, groups: &str) -> (Option<u64>, Option<u64>) {
        let mut found: (Option<u64>, Option<u64>) = (None, None);
        let mut take = |base: &str, path: Option<String>, max: &str, used: &str| {
            for folder in ancestors(path.as_deref().unwrap_or("/")) {
                let of = |file: &str| self.read(&format!("{base}{folder}/{file}"));
                let Some(limit) = of(max).and_then(|t| parse::memory_max(&t)) else { continue };
                let used = of(used).and_then(|t| t.trim().parse::<u64>().ok()).unwrap_or(0);
                let free = limit.saturating_sub(used);
                found.0 = Some(found.0.map_or(limit, |l| l.min(limit)));
                found.1 = Some(found.1.map_or(free, |f| f.min(free)));
            }
        };
        take("sys/fs/cgroup", parse::cgroup_path(groups, ""), "memory.max", "memory.current");
        let v1 = parse::cgroup_path(groups, "memory");
        take("sys/fs/cgroup/memory", v1, "memory.limit_in_bytes", "memory.usage_in_bytes");
        found
    }

    fn cpu_group(&self, groups: &str) -> Option<f64> {
        let mut found: Option<f64> = None;
        let mut take = |cpus: Option<f64>| {
            if let Some(cpus) = cpus {
                found = Some(found.map_or(cpus, |f| f.min(cpus)));
            }
        };
        for folder in ancestors(parse::cgroup_path(groups, "").as_deref().unwrap_or("/")) {
            take(self.read(&format!("sys/fs/cgroup{folder}/cpu.max")).and_then(|t| parse::cpu_max(&t)));
        }
        for folder in ancestors(parse::cgroup_path(groups, "cpu").as_deref().unwrap_or("/")) {
            let of = |file: &str| self.read(&format!("sys/fs/cgroup/cpu{folder}/{file}"));
            if let (Some(quota), Some(period)) = (of("cpu.cfs_quota_us"), of("cpu.cfs_period_us")) {
                take(parse::quota(&quota, &period));
            }
        }
        found
    }
}

/// A control-group path and everything above it, without trailing slash: `/a/b`, `/a`, ``.
fn ancestors(path: &str) -> Vec<String> {
    Path::new(path).ancestors().map(|p| p.to_string_lossy().trim_end_matches('/').to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lay_out(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }

    const CPU: &str = "processor: 0\nmodel name: X\nphysical id : 0\nflags: fma hypervisor avx2\nprocessor: 1\nphysical id : 1\n";

    #[test]
    fn a_machine_from_fixtures() {
        let dir = lay_out(&[
            ("proc/cpuinfo", CPU),
            ("proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n"),
            ("proc/self/status", "Cpus_allowed_list:\t0-1\n"),
            ("proc/self/cgroup", "0::/job/7\n"),
            ("proc/stat", "cpu  80 0 0 0 0 0 0 20 0 0\n"),
            ("proc/loadavg", "1.50 1 1 1/9 9\n"),
            ("proc/pressure/cpu", "some avg10=66.00 avg60=0 avg300=0 total=0\n"),
            ("sys/fs/cgroup/job/memory.max", "3221225472\n"),
            ("sys/fs/cgroup/job/memory.current", "1073741824\n"),
            ("sys/fs/cgroup/job/7/memory.max", "max\n"),
            ("sys/fs/cgroup/job/7/cpu.max", "150000 100000\n"),
            ("sys/devices/system/cpu/cpu0/cache/index2/level", "2\n"),
            ("sys/devices/system/cpu/cpu0/cache/index2/type", "Unified\n"),
            ("sys/devices/system/cpu/cpu0/cache/index2/size", "2048K\n"),
            ("sys/devices/system/node/node0/x", ""),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n"),
            ("sys/devices/system/cpu/intel_pstate/no_turbo", "1\n"),
        ]);
        let m = gather_from(dir.path());
        assert_eq!((m.cpus_allowed, m.sockets, m.numa_nodes, m.turbo), (2, Some(2), Some(1), Some(false)));
        assert_eq!(m.cgroup_memory_max_bytes, Some(3 << 30));
        assert_eq!(m.memory_available_bytes, 2 << 30);
        assert_eq!(m.cgroup_cpu_max, Some(1.5));
        assert_eq!(m.caches, [("L2".to_owned(), 2 << 20)]);
        assert_eq!(m.hypervisor.as_deref(), Some("unnamed"));
        assert_eq!(m.governor, None);
        assert_eq!(m.warnings.len(), 7, "{:#?}", m.warnings);
        assert!(m.warnings[4].contains("20.0 %"), "{:#?}", m.warnings);
    }

    #[test]
    fn an_empty_root_says_unknown() {
        let dir = lay_out(&[]);
        let m = gather_from(dir.path());
        assert_eq!((m.cpu_model, m.thp, m.turbo, m.sockets), (None, None, None, None));
        assert!(m.cpus_allowed >= 1);
    }

    #[test]
    fn class_is_shared_and_id_is_not() {
        let mem = ("proc/meminfo", "MemTotal: 8388608 kB\n");
        let same = ("proc/self/status", "Cpus_allowed_list: 0\n");
        let a = gather_from(lay_out(&[("proc/cpuinfo", CPU), mem, same, ("etc/machine-id", "a")]).path());
        let b = gather_from(lay_out(&[("proc/cpuinfo", CPU), mem, same, ("etc/machine-id", "b")]).path());
        let c = gather_from(lay_out(&[("proc/cpuinfo", "model name: Y\n"), mem, same]).path());
        assert_eq!(a.machine_class, b.machine_class);
        assert_ne!(a.machine_id, b.machine_id);
        assert_ne!(a.machine_class, c.machine_class);
    }

    #[test]
    fn this_machine_has_a_name() {
        let m = gather();
        assert_eq!((m.machine_id.len(), m.machine_class.len()), (16, 16));
        assert!(m.memory_bytes > 0 && !m.toolchain.rustc.is_empty() && !m.toolchain.target.is_empty());
        assert_eq!(probe_threads(2), [1, 2]);
        assert_eq!(probe_threads(24), [1, 2, 3, 4, 5, 6, 7, 8, 16, 24]);
    }
}
