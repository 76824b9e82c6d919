//! Where the control group's files lie: the path from `/proc/self/cgroup`, its ancestors, and the mount root, for both
//! versions. In a container the path is often of the host and does not exist: then the root of the mount is the group.

use std::path::{Path, PathBuf};

const MOUNT: &str = "/sys/fs/cgroup";

/// Directories that may hold the files of `controller` (`cpu`, `memory`), from the process's own group to the root,
/// from the text of `/proc/self/cgroup`. Version 1 first where the controller is mounted that way.
pub(crate) fn directories(proc_self_cgroup: &str, controller: &str) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut add = |root: &Path, path: &str| {
        let own = Path::new(path.trim_start_matches('/'));
        // `ancestors` of a relative path ends with the empty one: the root itself.
        all.extend(own.ancestors().filter(|p| !p.starts_with("..")).map(|p| root.join(p)));
    };
    for line in proc_self_cgroup.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        if controllers.is_empty() {
            add(Path::new(MOUNT), path);
        } else if controllers.split(',').any(|name| name == controller) {
            // Mounted under the joint name (`cpu,cpuacct`), under each name, or under both.
            add(&Path::new(MOUNT).join(controllers), path);
            if controllers != controller {
                add(&Path::new(MOUNT).join(controller), path);
            }
        }
    }
    all
}

/// The groups of this process that `controller` may limit, own group first; empty where there are none.
pub(crate) fn groups(controller: &str) -> Vec<PathBuf> {
    std::fs::read_to_string("/proc/self/cgroup")
        .map_or_else(|_| Vec::new(), |own| directories(&own, controller))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_two_climbs_to_the_root() {
        let dirs = directories("0::/user.slice/run-7.scope\n", "cpu");
        let want = ["user.slice/run-7.scope", "user.slice", ""];
        assert_eq!(dirs, want.map(|path| Path::new(MOUNT).join(path)));
    }

    #[test]
    fn version_one_finds_the_controller_and_ignores_the_others() {
        let text = "9:name=systemd:/\n4:memory:/jobs/17\n2:cpu,cpuacct:/\n0::/\n";
        let root = Path::new(MOUNT);
        let memory =
            [root.join("memory/jobs/17"), root.join("memory/jobs"), root.join("memory"), root.to_owned()];
        assert_eq!(directories(text, "memory"), memory);
        let cpu = [root.join("cpu,cpuacct"), root.join("cpu"), root.to_owned()];
        assert_eq!(directories(text, "cpu"), cpu);
        assert!(directories("garbage\n\n1:2\n", "cpu").is_empty());
    }
}
