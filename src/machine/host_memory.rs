//! How much memory the host can still give this process: what is free, and what its control groups
//! leave of it. Beyond the first the host swaps, beyond the second its OOM killer comes.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory that can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Available {
    /// How much, in bytes.
    pub(super) bytes: u64,
    /// The control group that sets the limit; `None`: the host's own memory does.
    pub(super) group: Option<PathBuf>,
}

/// What this process can have; `None` if the host does not say.
pub(super) fn available() -> Option<Available> {
    available_under(Path::new("/"))
}

/// The same, with the files of the system under `root`.
fn available_under(root: &Path) -> Option<Available> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let host = Available { bytes: available_in(&meminfo)?, group: None };
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let limits = groups.lines().filter_map(Hierarchy::of).flat_map(|(hierarchy, path)| hierarchy.limits(root, path));
    limits.chain([host]).min_by_key(|limit| limit.bytes)
}

fn available_in(meminfo: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Where a kind of control groups is, and what its files are called.
struct Hierarchy {
    mount: &'static str,
    /// Files that hold a limit. Above `memory.high` nothing is killed, but everything crawls.
    limits: &'static [&'static str],
    usage: &'static str,
    /// The lines of `memory.stat` about what is given back when it is needed.
    reclaimable: &'static [&'static str],
}

const UNIFIED: Hierarchy = Hierarchy {
    mount: "sys/fs/cgroup",
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    reclaimable: &["active_file", "inactive_file", "slab_reclaimable"],
};

const LEGACY: Hierarchy = Hierarchy {
    mount: "sys/fs/cgroup/memory",
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    reclaimable: &["total_active_file", "total_inactive_file"],
};

impl Hierarchy {
    /// The hierarchy that a line of `/proc/self/cgroup` is about, if that limits memory, and the
    /// group in it.
    fn of(line: &str) -> Option<(&'static Hierarchy, &str)> {
        let mut parts = line.splitn(3, ':');
        let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        match (number, controllers) {
            ("0", "") => Some((&UNIFIED, path)),
            (_, controllers) if controllers.split(',').any(|name| name == "memory") => Some((&LEGACY, path)),
            _ => None,
        }
    }

    /// What a group and those around it leave. In a container the path may be one of the host's,
    /// which is not there: the groups around it are then those that are seen.
    fn limits(&'static self, root: &Path, path: &str) -> impl Iterator<Item = Available> {
        let (mount, group) = (root.join(self.mount), PathBuf::from(path.trim_start_matches('/')));
        let groups: Vec<_> = group.ancestors().map(|group| mount.join(group)).collect();
        groups.into_iter().filter_map(|group| Some(Available { bytes: self.left_in(&group)?, group: Some(group) }))
    }

    /// What one group leaves; `None` if it has no limit.
    fn left_in(&self, group: &Path) -> Option<u64> {
        let number = |name: &&str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
        let limit = self.limits.iter().filter_map(number).min()?;
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let lines = stat.lines().filter_map(|line| line.split_once(' '));
        let reclaimable = lines.filter(|(name, _)| self.reclaimable.contains(name));
        let reclaimable: u64 = reclaimable.filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok()).sum();
        let used = number(&self.usage).unwrap_or(0).saturating_sub(reclaimable);
        Some(limit.saturating_sub(used))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A system of 1 GiB with these files besides.
    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for (path, text) in [("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:   1048576 kB\n")].iter().chain(files) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, text).expect("a file");
        }
        root
    }

    fn available_with(files: &[(&str, &str)]) -> (u64, Option<String>) {
        let root = system(files);
        let available = available_under(root.path()).expect("known");
        let group = available.group.map(|group| group.strip_prefix(root.path()).expect("below").display().to_string());
        (available.bytes, group)
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn without_groups_it_is_what_the_host_has() {
        assert_eq!(available_with(&[]), (GIB, None));
        assert_eq!(available_with(&[("proc/self/cgroup", "0::/\n3:cpuset:/\n")]), (GIB, None));
        let unlimited = [("proc/self/cgroup", "0::/a\n"), ("sys/fs/cgroup/a/memory.max", "max\n")];
        assert_eq!(available_with(&unlimited), (GIB, None));
        assert_eq!(available_in("MemTotal: 9 kB\n"), None);
        assert_eq!(available_under(Path::new("/nonexistent")), None);
    }

    #[test]
    fn a_group_or_one_around_it_limits_it_and_its_page_cache_does_not_count() {
        let own = [
            ("proc/self/cgroup", "0::/system.slice/mcd.service\n"),
            ("sys/fs/cgroup/system.slice/mcd.service/memory.max", "104857600\n"),
            ("sys/fs/cgroup/system.slice/mcd.service/memory.current", "62914560\n"),
            (
                "sys/fs/cgroup/system.slice/mcd.service/memory.stat",
                "anon 5\nactive_file 20971520\ninactive_file 10485760\n",
            ),
        ];
        assert_eq!(available_with(&own), (70 << 20, Some("sys/fs/cgroup/system.slice/mcd.service".into())));
        let around = [&own[..], &[("sys/fs/cgroup/system.slice/memory.high", "8192\n")]].concat();
        assert_eq!(available_with(&around), (8192, Some("sys/fs/cgroup/system.slice".into())));
        // More used than allowed is nothing left, and no more than that.
        let over =
            [&own[..1], &[("sys/fs/cgroup/memory.max", "4096"), ("sys/fs/cgroup/memory.current", "8192")]].concat();
        assert_eq!(available_with(&over).0, 0);
    }

    #[test]
    fn the_older_hierarchy_is_known_too() {
        let files = [
            ("proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/docker/1\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "8192\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "5000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "inactive_file 4000\ntotal_inactive_file 1000\n"),
        ];
        assert_eq!(available_with(&files), (4192, Some("sys/fs/cgroup/memory".into())));
    }
}
