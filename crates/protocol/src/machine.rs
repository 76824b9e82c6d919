//! What a machine is, as far as it says. Unknown is `null`, never a guess.

use serde::{Deserialize, Serialize};

use crate::Probe;

/// A machine, as recorded beside every result.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Hash of what identifies this very machine (hostname, CPU, memory size, boot-independent identifiers).
    pub machine_id: String,
    /// Hash of what makes two machines comparable: CPU model, flags that kernels use, cores, memory size class.
    pub machine_class: String,
    /// CPU model name.
    pub cpu_model: Option<String>,
    /// Family, model, stepping.
    pub cpu_signature: Option<String>,
    /// Microcode revision.
    pub microcode: Option<String>,
    /// Instruction-set flags that kernels can use.
    pub flags: Vec<String>,
    /// CPUs that this process may use.
    pub cpus_allowed: usize,
    /// Hardware threads a core.
    pub threads_per_core: Option<usize>,
    /// Sockets.
    pub sockets: Option<usize>,
    /// NUMA nodes.
    pub numa_nodes: Option<usize>,
    /// Cache sizes by name, e.g. `("L2", 2097152)`.
    pub caches: Vec<(String, u64)>,
    /// Memory.
    pub memory_bytes: u64,
    /// Memory available now, within the control group's limit.
    pub memory_available_bytes: u64,
    /// Control-group memory limit.
    pub cgroup_memory_max_bytes: Option<u64>,
    /// Control-group CPU limit, in CPUs.
    pub cgroup_cpu_max: Option<f64>,
    /// Operating system and kernel.
    pub os: String,
    /// Hypervisor, where one shows itself.
    pub hypervisor: Option<String>,
    /// Frequency governor.
    pub governor: Option<String>,
    /// Turbo or boost enabled.
    pub turbo: Option<bool>,
    /// Transparent huge pages: `always`, `madvise` or `never`.
    pub thp: Option<String>,
    /// Measured read bandwidth by thread count.
    pub probes: Vec<Probe>,
    /// What is likely to disturb a measurement here, one sentence each.
    pub warnings: Vec<String>,
    /// How the binary was built.
    pub toolchain: Toolchain,
}

/// How the binary was built.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Toolchain {
    /// Commit of the sources, or `unknown`.
    pub git_sha: String,
    /// The work tree differed from that commit; none where git was not there.
    pub git_dirty: Option<bool>,
    /// Compiler version.
    pub rustc: String,
    /// Target triple.
    pub target: String,
    /// `release` or `debug`.
    pub profile: String,
}
