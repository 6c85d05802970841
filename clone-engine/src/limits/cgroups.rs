//! Where the control groups of this process keep their limits, in both versions of cgroups.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Which version a group is of: its files are named otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    One,
    Two,
}

/// A group that this process is in, or one above it.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) version: Version,
    folder: PathBuf,
}

impl Group {
    /// The number in a file of it; `None` where there is none: "max", or a group without the
    /// controller.
    pub(super) fn number(&self, file: &str) -> Option<u64> {
        self.text(file)?.trim().parse().ok()
    }

    /// A file of it.
    pub(super) fn text(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.folder.join(file)).ok()
    }
}

/// The groups of this process that `controller` may limit, and those above them.
pub(super) fn of(controller: &str) -> io::Result<Vec<Group>> {
    let lines = fs::read_to_string("/proc/self/cgroup")?;
    Ok(lines
        .lines()
        .flat_map(|line| groups(line, controller))
        .collect())
}

/// Of one line of /proc/self/cgroup: `hierarchy:controllers:path`.
fn groups(line: &str, controller: &str) -> Vec<Group> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
        return Vec::new();
    };
    let mounted = Path::new("/sys/fs/cgroup");
    let (version, root) = if controllers.is_empty() {
        (Version::Two, mounted.to_owned())
    } else if controllers.split(',').any(|name| name == controller) {
        (Version::One, mounted.join(controller))
    } else {
        return Vec::new();
    };
    let own = root.join(path.trim_start_matches('/'));
    own.ancestors()
        .take_while(|folder| folder.starts_with(&root))
        .map(|folder| Group {
            version,
            folder: folder.to_owned(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folders(line: &str) -> Vec<String> {
        let of = |group: Group| group.folder.display().to_string();
        groups(line, "pids").into_iter().map(of).collect()
    }

    #[test]
    fn a_group_of_version_2_is_asked_with_all_above_it() {
        let expected = ["/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a", "/sys/fs/cgroup"];
        assert_eq!(folders("0::/a/b"), expected);
    }

    #[test]
    fn a_hierarchy_of_version_1_is_asked_for_its_own_controllers_only() {
        assert_eq!(folders("8:pids:/"), ["/sys/fs/cgroup/pids/"]);
        assert_eq!(folders("4:cpu,cpuacct:/a"), [""; 0]);
    }
}
